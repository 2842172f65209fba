"""Computes logits and embeddings of a set, for strategies that need no gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamical_jax import contract, parallel
from dynamical_jax.errors import UserError
from dynamical_jax.gradients import bucketed, map_blocks
from dynamical_jax.strategies.base import LearnerView
from dynamical_jax.types import ApplyFn, OnProgress, Outputs, Variables, ignore_progress

CHUNK_SIZE = 256


def predict(view: LearnerView, x: Any, on_progress: OnProgress = ignore_progress) -> Outputs:
    """Returns the model's outputs for x `[n, ...]`, n > 0, computed block by block.

    The embedding is None where the model returns none.

    Raises:
      UserError: if an output is not finite.
    """

    def run(positions: np.ndarray, count: int) -> Outputs:
        block = parallel.rows(x, positions, view.mesh)
        outputs = _outputs(view.apply, view.mesh, variables, block)
        if view.mesh is not None:
            outputs = parallel.fetch(outputs)
        # Half precision cannot hold the squares that distances are made of.
        return jax.tree.map(
            lambda part: part[:count].astype(jnp.promote_types(part.dtype, jnp.float32)), outputs
        )

    contract.output_shapes(view.apply, view.variables, x)
    size, devices = len(x), parallel.num_devices(view.mesh)
    variables = parallel.replicate(view.variables, view.mesh)
    block_size = bucketed(-(-size // devices), CHUNK_SIZE) * devices
    parts = map_blocks(run, size, block_size, on_progress, devices)
    outputs = jax.tree.map(lambda *blocks: jnp.concatenate(blocks), *parts)
    # A NaN would silently win or lose every comparison.
    finite_by_part = [jnp.all(jnp.isfinite(part), axis=-1) for part in jax.tree.leaves(outputs)]
    finite = np.logical_and.reduce(finite_by_part)
    if not finite.all():
        raise UserError(
            f"the outputs for {np.sum(~finite)} of {size} examples are not finite; the model has "
            "diverged or an input is not finite" + contract.explain_not_finite(view.variables, x)
        )
    return outputs


@functools.partial(jax.jit, static_argnames=("apply", "mesh"))
def _outputs(apply: ApplyFn, mesh: Mesh | None, variables: Variables, x: Any) -> Outputs:
    outputs = lambda variables, x: contract.as_outputs(apply(variables, x), len(x))
    return parallel.on_each(outputs, mesh, False, True)(variables, x)
