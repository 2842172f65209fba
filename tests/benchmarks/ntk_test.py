"""The binary, run as a user runs it."""

import json

import pytest

import dynamical_jax as dj
from benchmarks import ntk


@pytest.mark.slow  # Its workers are those of scoring_test.py.
@pytest.mark.skipif(not dj.ntk.compatibility.is_installed(), reason="needs neural-tangents")
def test_rows_and_file(run_benchmark, tmp_path):
    path = tmp_path / "ntk.json"
    contenders = ["empirical_ntk", "nt at once"]
    status, output, errors = run_benchmark(
        ntk, contenders=contenders, batch_sizes=["2"], json=str(path)
    )
    assert (status, errors) == (None, "")
    first, second = json.loads(path.read_text())["cases"]
    assert [first["contender"], second["contender"]] == contenders
    assert f"{second['seconds'] / first['seconds']:10.2f}" in output


def test_an_unknown_contender_is_one_line(run_benchmark):
    status, output, errors = run_benchmark(ntk, contenders=["fast"])
    assert (status, output) == (1, "")
    assert errors.startswith("error: unknown contender 'fast'; choose from empirical_ntk, nt.batch")
