"""The binary, run as a user runs it."""

import json

import pytest

from benchmarks import pool


@pytest.mark.slow  # Its workers are those of scoring_test.py.
def test_rows_and_file(run_benchmark, tmp_path):
    path = tmp_path / "results" / "pool.json"
    status, output, errors = run_benchmark(
        pool, models=["cnn"], pool_sizes=["5", "20"], batch_sizes=["4"], json=str(path)
    )
    assert (status, errors) == (None, "")
    assert "cnn, 20 images" in output
    results = json.loads(path.read_text())
    assert [case["pool_size"] for case in results["cases"]] == [5, 20]
    assert all(case["seconds"] > 0 and case["peak_mib"] > 0 for case in results["cases"])


def test_bad_pool_size_is_one_line(run_benchmark):
    status, output, errors = run_benchmark(pool, pool_sizes=["5000", "all"])
    assert (status, output) == (1, "")
    assert errors == "error: pool_sizes must be positive whole numbers, got '5000,all'\n"
