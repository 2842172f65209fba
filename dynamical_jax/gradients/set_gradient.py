"""The gradient of the loss summed over a set."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamical_jax import contract, losses, parallel
from dynamical_jax.gradients.blocks import bucketed, map_blocks
from dynamical_jax.types import ApplyFn, Array, Examples, Params, Variables


def set_gradient(
    apply: ApplyFn,
    variables: Variables,
    examples: Examples,
    chunk_size: int = 128,
    mesh: Mesh | None = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Params:
    """Returns g_S = Σ_{x∈S} ∇_θ ℓ(x, y), a pytree of parameters, accumulated block by block.

    A block is summed in the type of the parameters, as in training; blocks in float32 at least.

    Args:
      apply: the model, `apply(variables, x)`.
      variables: its variables.
      examples: the set S.
      chunk_size: how many examples at a time; halved if memory runs out. Changes memory and speed,
        not the result.
      mesh: devices that take a part of the examples each, `chunk_size` at a time.
      loss: ℓ.

    Raises:
      UserError: if a label is no class of the model.
    """
    contract.check_labels(apply, variables, examples.x, examples.y, loss.of_classes)
    labels = np.asarray(examples.y)
    devices = parallel.num_devices(mesh)
    block_size = bucketed(-(-len(labels) // devices), chunk_size) * devices
    variables = parallel.replicate(variables, mesh)
    total = None

    def add(positions: np.ndarray, count: int) -> None:
        nonlocal total
        weights = np.arange(len(positions)) < count
        parts = (examples.x, labels)
        block = Examples(*(parallel.rows(part, positions, mesh) for part in parts))
        weights = parallel.rows(weights, np.arange(len(positions)), mesh)
        gradient = _block_gradient(apply, mesh, loss, variables, block, weights)
        # Memory that runs out must do so before the sum is touched.
        gradient = jax.block_until_ready(gradient)
        total = gradient if total is None else _add(total, gradient)

    map_blocks(add, len(labels), block_size, smallest=devices)
    if total is None:
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, jnp.result_type(jnp.float32, leaf)),
            variables["params"],
        )
    return parallel.total(total, mesh)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Params, gradient: Params) -> Params:
    return jax.tree.map(jnp.add, total, gradient)


@functools.partial(jax.jit, static_argnames=("apply", "mesh", "loss"))
def _block_gradient(
    apply: ApplyFn,
    mesh: Mesh | None,
    loss: losses.Loss,
    variables: Variables,
    block: Examples,
    weights: Any,
) -> Params:
    """Returns the gradient of the block; with a mesh, a row for each device."""

    def gradient(variables: Variables, block: Examples, weights: Any) -> Params:
        rest = {name: value for name, value in variables.items() if name != "params"}

        def total(params: Params) -> Array:
            outputs = contract.as_outputs(apply({"params": params, **rest}, block.x), len(block.x))
            return jnp.vdot(weights, loss(outputs.logits, block.y))

        # Blocks are summed in float32 at least, since there may be many.
        summed = jax.tree.map(
            lambda leaf: leaf.astype(jnp.result_type(jnp.float32, leaf)),
            jax.grad(total)(variables["params"]),
        )
        return summed if mesh is None else jax.tree.map(lambda leaf: leaf[None], summed)

    return parallel.on_each(gradient, mesh, False, True, True)(variables, block, weights)
