"""The binary, run as a user runs it."""

import json

import pytest

from benchmarks import selection


@pytest.mark.slow  # Its workers are those of scoring_test.py.
def test_rows_and_file(run_benchmark, tmp_path):
    path = tmp_path / "selection.json"
    status, output, errors = run_benchmark(
        selection, models=["badge"], pool_size=30, batch_sizes=["4"], json=str(path)
    )
    assert (status, errors) == (None, "")
    assert "badge, 101 classes" in output
    results = json.loads(path.read_text())
    assert [case["classes"] for case in results["cases"]] == ["10 classes", "101 classes"]
    assert all(case["seconds"] > 0 for case in results["cases"])


def test_too_few_images_is_one_line(run_benchmark):
    status, output, errors = run_benchmark(selection, pool_size=100)
    assert (status, output) == (1, "")
    assert errors == "error: cannot choose 500 of 100 images\n"
