"""The binary, run as a user runs it; what it models, and how precision is rounded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import precision, scaling


def test_modelled_efficiency_by_hand():
    link = scaling.Link("two", num_devices=2, bandwidth=1e9, latency=1e-3)
    # 10 ms of work; 2 · ½ · 5 MB / (1 GB/s) = 5 ms, and 2 · 1 ms for each of two exchanges.
    work = {"gradient_flops": 0.01 * scaling.OPERATIONS}
    case = {**work, "train": [["all-reduce", 4_999_996], ["all-reduce", 4]]}
    assert scaling.efficiency(case, link) == pytest.approx(10 / (10 + 5 + 4))


def test_factors_of_products_are_rounded():
    x = jnp.asarray(1 + np.arange(1, 5) * 2.0**-9, jnp.float32)[None]
    product = lambda: np.asarray(jax.jit(lambda x: x * 1 @ jnp.eye(4))(x))[0]
    np.testing.assert_array_equal(product(), x[0])
    with precision.rounded_products(23):
        np.testing.assert_array_equal(product(), x[0])
    with precision.rounded_products(7):  # Halves to the even one.
        np.testing.assert_array_equal(product(), [1, 1, 1 + 2**-7, 1 + 2**-7])
    np.testing.assert_array_equal(product(), x[0])


@pytest.mark.slow
def test_table_and_file(run_benchmark, tmp_path):
    path = tmp_path / "scaling.json"
    status, output, errors = run_benchmark(
        scaling,
        models=["cnn"],
        batch_sizes=["8"],
        contenders=["score on 1", "score on 8"],
        json=str(path),
    )
    assert (status, errors) == (None, "")
    assert "score, 8 devices: 0 exchanges" in output
    assert "modelled efficiency" in output
    (case,) = json.loads(path.read_text())["cases"]
    assert case["score"] == []
    assert sum(size for _, size in case["train"]) >= case["parameter_bytes"]
