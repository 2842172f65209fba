"""A parameter that is a layer by itself."""

import jax.numpy as jnp
from flax import linen as nn

from dynamical_jax.gradients import kinds
from dynamical_jax.types import AnyArray, Array


class Parameter(nn.Module):
    """A parameter by itself, as a layer: a class token, a table of positions, a scale of a branch.

    In a layer of its own its gradient is exact and costs nothing:

        token = Parameter((1, d), nn.initializers.zeros, name="class_token")(x)  # [n, 1, d]
        x = x * Parameter((1, d), nn.initializers.constant(1e-5), name="scale")(x)

    Attributes:
      shape: of the parameter `value`.
      init: its initializer.
    """

    shape: tuple[int, ...]
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: AnyArray) -> Array:
        """Returns the parameter once for each of the n examples in x `[n, ...]`: `[n, *shape]`."""
        value = self.param("value", self.init, self.shape)
        return jnp.broadcast_to(value[None], (len(x), *self.shape))


kinds.KINDS[Parameter] = kinds.bare
