"""Examples whose gradient is zero or small, and layers that compute in half precision."""

import gradient_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn

from dynamical_jax.gradients import factored, per_example


def test_saturated_examples():
    model = checks.single_layer(nn.Dense(4))
    x = checks.rows() * np.float32([[0.1], [1], [10], [1e6], [1]])
    variables, direction = checks.variables_and_direction(model, x)
    engines = (factored.gradient_terms, per_example.gradient_terms)
    terms, expected = checks.compute_terms(model, engines, variables, x, None, direction)
    assert terms.squared_norm[3] == terms.inner_product[3] == 0  # σ(f) is the label exactly.
    toy.assert_close(terms, expected, direction, 1e-5)


HALF = {
    "dense": lambda **types: nn.Dense(6, **types),
    "dense on positions, Gram": lambda **types: Positions(nn.Dense(40, **types)),
    "layer norm": lambda **types: nn.LayerNorm(**types),
    "group norm": lambda **types: nn.GroupNorm(num_groups=2, **types),
}


class Positions(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(jnp.stack([x, -x], axis=1))


@pytest.mark.parametrize("layer", HALF.values(), ids=HALF)
@pytest.mark.parametrize("formed", [True, False])
def test_half_precision_is_summed_in_single(layer, formed):
    # Gradients that are small or a direction that is large for float16, in which layers compute.
    model = checks.single_layer(layer(dtype=jnp.float16))
    x = jnp.asarray(checks.rows(), jnp.float32)
    variables, direction = checks.variables_and_direction(model, x)
    direction = jax.tree.map(lambda leaf: 1e6 * leaf, direction)
    engines = (checks.with_form(formed), per_example.gradient_terms)
    terms, expected = checks.compute_terms(model, engines, variables, x, None, direction)
    toy.assert_close(terms, expected, direction, 1e-2)
