"""The gradient of the loss summed over a set."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import losses
from dynamical_jax.gradients.blocks import blocks, bucketed
from dynamical_jax.types import ApplyFn, Array, Examples, Params, Variables


def set_gradient(
    apply: ApplyFn, variables: Variables, examples: Examples, chunk_size: int = 128
) -> Params:
    """Returns g_S = Σ_{x∈S} ∇_θ ℓ(x, y), a pytree of parameters, accumulated block by block.

    Args:
      apply: the model, `apply(variables, x) -> Outputs`.
      variables: its variables.
      examples: the set S.
      chunk_size: how many examples at a time; changes memory and speed, not the result.
    """
    gradient = jax.tree.map(jnp.zeros_like, variables["params"])
    labels = np.asarray(examples.y)
    chunk_size = bucketed(len(labels), chunk_size)
    for positions, count in blocks(len(labels), chunk_size):
        weights = np.arange(chunk_size) < count
        block = Examples(examples.x[positions], labels[positions])
        gradient = _add_gradient(apply, gradient, variables, block, weights)
    return gradient


@functools.partial(jax.jit, static_argnames="apply", donate_argnames="gradient")
def _add_gradient(
    apply: ApplyFn, gradient: Params, variables: Variables, block: Examples, weights: Any
) -> Params:
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Params) -> Array:
        logits = apply({"params": params, **rest}, block.x).logits
        return jnp.vdot(weights, losses.cross_entropy(logits, block.y))

    return jax.tree.map(jnp.add, gradient, jax.grad(loss)(variables["params"]))
