"""The rule of thumb."""

import jax
import numpy as np
import pytest

import dynamical_jax as dj
from dynamical_jax.labeling import automatic
from dynamical_jax.types import Examples


@pytest.mark.parametrize(
    ("y", "name"),
    [([0, 1, 2, 0, 1], "random"), ([0, 1, 2, 0, 1, 2], "margin"), ([0, 0, 0, 1], "margin")],
)
def test_random_while_labels_are_few_and_then_the_other(y, name):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    view = dj.LearnerView(
        lambda variables, x: x[:, :3], {}, Examples(x[: len(y)], np.array(y, np.int32)), x
    )
    said = []
    strategy = automatic.Automatic(dj.STRATEGIES["margin"](), "margin", said.append)
    key = jax.random.key(3)
    query = strategy.query(key, view, 5)
    expected = dj.STRATEGIES[name]().query(key, view, 5)
    np.testing.assert_array_equal(query.positions, expected.positions)
    (line,) = said
    assert line.startswith(f"strategy: {name}, because there are {len(y)} labels of")
