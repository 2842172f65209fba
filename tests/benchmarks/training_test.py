"""The binary, run as a user runs it."""

import json

import pytest

from benchmarks import training


@pytest.mark.slow  # Its workers are those of scoring_test.py.
def test_rows_and_file(run_benchmark, tmp_path):
    path = tmp_path / "training.json"
    status, output, errors = run_benchmark(
        training, models=["cnn"], batch_sizes=["3"], contenders=["jax"], json=str(path)
    )
    assert (status, errors) == (None, "")
    assert "cnn, 3 images" in output
    (case,) = json.loads(path.read_text())["cases"]
    row = case["contenders"]["jax"]
    assert len(row["milliseconds"]) == 1
    assert row["milliseconds"][0] > 0
    assert row["peak_mib"] > 0


def test_unknown_contender_is_one_line(run_benchmark):
    status, output, errors = run_benchmark(training, contenders=["tensorflow"])
    assert (status, output) == (1, "")
    assert errors == "error: unknown contender 'tensorflow'; choose from jax, torch, torch_fused\n"
