import itertools

import jax
import numpy as np

from dynamical_jax import streams


def draws(seed, path=()):
    numbers = [streams.generator(seed, name, *path).random() for name in streams.NAMES]
    return numbers + [
        float(jax.random.uniform(streams.key(seed, name, *path))) for name in streams.NAMES
    ]


def test_streams_seeds_and_paths_are_separate():
    everything = draws(0) + draws(1) + draws(0, (1,)) + draws(0, (1, 2))
    assert all(a != b for a, b in itertools.combinations(everything, 2))


def test_streams_repeat():
    assert draws(3, (1,)) == draws(3, (1,))


def test_a_draw_from_one_stream_moves_no_other():
    order = streams.generator(0, "order")
    weights = streams.generator(0, "weights").random()
    order.random(1000)
    assert streams.generator(0, "weights").random() == weights
    np.testing.assert_array_equal(  # A published run rests on these: new streams go at the end.
        streams.NAMES,
        ["initial_set", "weights", "order", "dropout", "strategy", "noise", "draws", "imbalance"],
    )
