"""The binaries that were made for a GPU, run as a user runs them."""

import json

import jax
import numpy as np
import pytest

from benchmarks import constants, seeds
from benchmarks.task import Task


@pytest.mark.slow
def test_constants(run_benchmark, tmp_path):
    path = tmp_path / "constants.json"
    status, output, errors = run_benchmark(
        constants, models=["cnn"], batch_sizes=["2"], costs=["1"], chunks=["10"], json=str(path)
    )
    assert (status, errors) == (None, "")
    assert "cnn, cost of forming" in output
    cases = json.loads(path.read_text())["cases"]
    assert [case["constant"] for case in cases] == ["block", "cost of forming", "chunk"]
    assert all(np.min(turns) > 0 for case in cases for turns in case["turns"].values())


@pytest.mark.slow
def test_each_setting_is_a_program_of_its_own():
    lowered = []
    with pytest.MonkeyPatch.context() as patch:
        compile_of = jax.stages.Lowered.compile
        patch.setattr(
            jax.stages.Lowered,
            "compile",
            lambda self: lowered.append(self.as_text()) or compile_of(self),
        )
        for cost in (1, 10**9):  # Forms all gradients, and none.
            constants._compile(Task("cnn", 2), {"cost_of_forming": cost})
    assert lowered[0] != lowered[1]


@pytest.mark.slow
def test_seeds(run_benchmark, tmp_path):
    path = tmp_path / "seeds.json"
    status, _, errors = run_benchmark(
        seeds, models=["cnn"], batch_sizes=["2"], seeds=["1", "2"], set_size=4, json=str(path)
    )
    assert (status, errors) == (None, "")
    (case,) = json.loads(path.read_text())["cases"]
    assert list(case["milliseconds"]) == ["1", "2"]


@pytest.mark.slow
def test_networks_at_once_train_as_one():
    task = Task("cnn", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "SET_SIZE", type("Flag", (), {"value": 4}))
        (one, _), (both, _) = (seeds._epoch(task, count)() for count in (1, 2))
    jax.tree.map(
        lambda alone, beside: np.testing.assert_allclose(beside[0], alone, rtol=1e-4, atol=1e-6),
        one["params"],
        both["params"],
    )
