"""Independent random streams of one seed: more draws from one leave the others unchanged.

The initial set and the initial weights, which are equal for all strategies with one seed, have
their own streams. Strategies draw from another.
"""

import jax
import numpy as np

LARGEST_SEED = 2**32 - 1
"""That JAX tells from others: of larger ones it takes the rest."""

NAMES = ("initial_set", "weights", "order", "dropout", "strategy", "noise", "draws", "imbalance")


def generator(seed: int, stream: str, *path: int) -> np.random.Generator:
    """Returns NumPy's generator for `stream` of `seed`, at e.g. (round, epoch)."""
    spawn_key = (NAMES.index(stream), *path)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=spawn_key))


def key(seed: int, stream: str, *path: int) -> jax.Array:
    """Returns JAX's key for `stream` of `seed`, at e.g. (round,)."""
    key = jax.random.key(seed)
    for part in (NAMES.index(stream), *path):
        key = jax.random.fold_in(key, part)
    return key


def generator_of(key: jax.Array) -> np.random.Generator:
    """Returns NumPy's generator for a key of JAX."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
