"""The binary, run as a user runs it."""

import json

import pytest

from benchmarks import round as round_
from dynamical_jax.runs import processes


@pytest.mark.slow
def test_table_and_file(run_benchmark, tmp_path):
    path = tmp_path / "round.json"
    status, output, errors = run_benchmark(
        round_,
        data="digits",
        num_labels=20,
        num_queried=5,
        num_runs=1,
        processes=["1"],
        json=str(path),
    )
    assert (status, errors) == (None, "")
    assert "runs per hour" in output
    (case,) = json.loads(path.read_text())["cases"]
    assert [index for index, _ in case["rounds"]] == [0, 1]
    assert case["rounds"][0][1]["score"] > 0


def test_bad_workers_are_one_line(run_benchmark):
    many = processes.num_cores() + 1
    for counts, message in ((["none"], "processes must be"), ([str(many)], "cannot divide")):
        status, output, errors = run_benchmark(round_, processes=counts)
        assert (status, output) == (1, "")
        assert errors.startswith("error: ")
        assert message in errors
        assert errors.count("\n") == 1
