"""The gradient of the loss summed over a set."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import contract, losses
from dynamical_jax.gradients.blocks import bucketed, map_blocks
from dynamical_jax.types import ApplyFn, Array, Examples, Params, Variables


def set_gradient(
    apply: ApplyFn, variables: Variables, examples: Examples, chunk_size: int = 128
) -> Params:
    """Returns g_S = Σ_{x∈S} ∇_θ ℓ(x, y), a pytree of parameters, accumulated block by block.

    Args:
      apply: the model, `apply(variables, x)`.
      variables: its variables.
      examples: the set S.
      chunk_size: how many examples at a time; halved if memory runs out. Changes memory and speed,
        not the result.

    Raises:
      UserError: if a label is no class of the model.
    """
    contract.check_labels(apply, variables, examples.x, examples.y)
    labels = np.asarray(examples.y)
    block_size = bucketed(len(labels), chunk_size)
    # Summed in float32 at least, since there are many terms.
    total = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.result_type(jnp.float32, leaf)), variables["params"]
    )

    def add(positions: np.ndarray, count: int) -> None:
        nonlocal total
        weights = np.arange(len(positions)) < count
        block = Examples(examples.x[positions], labels[positions])
        gradient = _block_gradient(apply, variables, block, weights)
        # Memory that runs out must do so before the sum is touched.
        total = _add(total, jax.block_until_ready(gradient))

    map_blocks(add, len(labels), block_size)
    return total


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Params, gradient: Params) -> Params:
    return jax.tree.map(jnp.add, total, gradient)


@functools.partial(jax.jit, static_argnames="apply")
def _block_gradient(apply: ApplyFn, variables: Variables, block: Examples, weights: Any) -> Params:
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Params) -> Array:
        outputs = contract.as_outputs(apply({"params": params, **rest}, block.x), len(block.x))
        return jnp.vdot(weights, losses.cross_entropy(outputs.logits, block.y))

    return jax.grad(loss)(variables["params"])
