"""The binary of contact sheets, run as a user runs it."""

import json

import numpy as np
import pytest

from experiments import one_query


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_pictures")
def test_a_sheet_for_each_strategy(run_binary, tmp_path):
    names = ["random", "dynamical_joint"]
    small = {"strategies": names, "batch_size": 4, "max_epochs": 2, "output_dir": str(tmp_path)}
    status, output, errors = run_binary(one_query, **small)
    assert (status, errors) == (None, "")
    queries = json.loads((tmp_path / "queries.json").read_text())["queries"]
    assert list(queries) == names
    for name, query in queries.items():
        assert f"{name}: {query['classes']} classes" in output
        assert len(set(query["query"])) == 4
        assert (tmp_path / f"{name}.png").stat().st_size > 2_000


def test_vectors_have_no_pictures(run_binary, tmp_path):
    path = tmp_path / "features.npz"
    np.savez(path, embedding=np.random.default_rng(0).normal(size=(60, 4)), label=np.arange(60) % 3)
    options = {"dataset": str(path), "strategies": ["random"], "output_dir": str(tmp_path)}
    status, _, errors = run_binary(one_query, **options)
    assert status == 1
    assert "contact sheets are of images; features has vectors" in errors
