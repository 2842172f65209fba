import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamical_jax import selection


def test_top_b_is_the_stable_sort_of_numpy():
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 5, 40), jnp.float32)
    expected = np.argsort(-np.asarray(scores), kind="stable")
    for batch_size in (1, 7, 40):
        chosen = jax.jit(selection.top_b, static_argnums=1)(scores, batch_size)
        np.testing.assert_array_equal(chosen, expected[:batch_size])


def test_signed_zeros_are_equal():
    np.testing.assert_array_equal(selection.top_b(jnp.array([-0.0, 0.0, -0.0]), 3), [0, 1, 2])


def test_top_b_of_too_few():
    with pytest.raises(ValueError, match="cannot choose 4 of 3"):
        selection.top_b(jnp.zeros(3), 4)
