"""The binary, run as a user runs it."""

import json

import pytest

from benchmarks import vectors


@pytest.mark.slow  # Its workers are processes of their own.
def test_rows_and_file(run_benchmark, tmp_path):
    path = tmp_path / "vectors.json"
    status, output, errors = run_benchmark(
        *(vectors,),
        **{"models": ["dynamical"], "sizes": ["300x4"], "batch_sizes": ["5"], "json": str(path)},
    )
    assert (status, errors) == (None, "")
    assert "dynamical, 300×4, dynamical_jax" in output
    assert "left out (ValueError: scikit-activeml has no dynamical)" in output or (
        "left out (ModuleNotFoundError" in output
    )
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["contender"], case["num_features"]) == ("dynamical_jax", 4)
    assert case["seconds"] > 0


@pytest.mark.parametrize("size", ["300", "300x0", "axb"])
def test_sizes_that_are_none_are_one_line(run_benchmark, size):
    status, output, errors = run_benchmark(vectors, sizes=[size])
    assert (status, output) == (1, "")
    assert errors == f"error: sizes look like 20000x128, got {size!r}\n"
