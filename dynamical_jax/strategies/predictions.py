"""Computes logits and embeddings of a set, for strategies that need no gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamical_jax import contract, parallel
from dynamical_jax.errors import UserError
from dynamical_jax.gradients import bucketed, each_block, scoring
from dynamical_jax.strategies.base import LearnerView
from dynamical_jax.types import ApplyFn, OnProgress, Outputs, Variables, ignore_progress


def predict(view: LearnerView, x: Any, on_progress: OnProgress = ignore_progress) -> Outputs:
    """Returns the model's outputs for x `[n, ...]`, n > 0, computed block by block.

    The embedding is None where the model returns none. With a mesh the outputs are in NumPy.

    Raises:
      UserError: if an output is not finite.
    """

    def run(positions: np.ndarray, count: int) -> tuple[int, Outputs]:
        block = parallel.rows(x, positions, view.mesh)
        return count, _outputs(view.apply, view.mesh, variables, block)

    contract.output_shapes(view.apply, view.variables, x)
    size, devices = len(x), parallel.num_devices(view.mesh)
    variables = parallel.replicate(view.variables, view.mesh)
    block_size = bucketed(-(-size // devices), scoring.largest_chunk_size()) * devices
    blocks = list(each_block(run, size, block_size, on_progress, devices))
    # Of several devices the host joins them: no device need hold the outputs for all.
    xp, blocks = (jnp, blocks) if view.mesh is None else (np, parallel.fetch(blocks))
    # Half precision cannot hold the squares that distances are made of.
    widened = lambda part: part.astype(jnp.promote_types(part.dtype, jnp.float32))
    parts = [
        jax.tree.map(lambda part, count=count: widened(part[:count]), outputs)
        for count, outputs in blocks
    ]
    outputs = jax.tree.map(lambda *parts: xp.concatenate(parts), *parts)
    # A NaN would silently win or lose every comparison.
    finite_by_part = [xp.all(xp.isfinite(part), axis=-1) for part in jax.tree.leaves(outputs)]
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
