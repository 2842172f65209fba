"""Computes logits and embeddings of a set, for strategies that need no gradients."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamical_jax import contract, parallel
from dynamical_jax.errors import UserError
from dynamical_jax.gradients import bucketed, each_block, scoring
from dynamical_jax.strategies.base import LearnerView
from dynamical_jax.types import AnyArray, ApplyFn, OnProgress, Outputs, Variables, ignore_progress


def predict(view: LearnerView, x: Any, on_progress: OnProgress = ignore_progress) -> Outputs:
    """Returns the model's outputs for x `[n, ...]`, n > 0, computed block by block.

    The embedding is None where the model returns none. With a mesh the outputs are in NumPy.

    Raises:
      UserError: if an output is not finite.
    """

    def run(slots: np.ndarray, count: int) -> tuple[Any, Any, Outputs]:
        positions, counted = order.block(slots, count)
        block = parallel.rows(x, positions, view.mesh)
        return positions[counted], counted, _outputs(view.apply, view.mesh, variables, block)

    contract.output_shapes(view.apply, view.variables, x)
    order, devices = parallel.Order(x, view.mesh), parallel.num_devices(view.mesh)
    variables = parallel.replicate(view.variables, view.mesh)
    block_size = bucketed(-(-order.size // devices), scoring.largest_chunk_size()) * devices
    found = each_block(run, order.size, block_size, on_progress, devices)
    rows, counted, blocks = zip(*found, strict=True)
    counts = tuple(map(len, rows))
    if view.mesh is None:
        outputs, finite = _join(jnp, counts, blocks)
    else:  # The host joins them: no device need hold the outputs for all.
        parts = [
            jax.tree.map(lambda leaf, index=index: leaf[index], block)
            for index, block in zip(counted, parallel.fetch(blocks), strict=True)
        ]
        outputs, finite = _join.__wrapped__(np, counts, parts)
        outputs = order.restore(rows, outputs)
    # A NaN would silently win or lose every comparison.
    if not np.all(finite):
        raise UserError(
            f"the outputs for {np.sum(~finite)} of {len(x)} examples are not finite; the model has "
            "diverged or an input is not finite" + contract.explain_not_finite(view.variables, x)
        )
    return outputs


def probabilities(logits: AnyArray) -> np.ndarray:
    """Returns the softmax of logits `[n, K]`, in NumPy."""
    return np.asarray(_softmax(logits))


_softmax = jax.jit(jax.nn.softmax)


@functools.partial(jax.jit, static_argnames=("apply", "mesh"))
def _outputs(apply: ApplyFn, mesh: Mesh | None, variables: Variables, x: Any) -> Outputs:
    outputs = lambda variables, x: contract.as_outputs(apply(variables, x), len(x))
    return parallel.on_each(outputs, mesh, False, True)(variables, x)


# One program; operation by operation there would be a dozen to compile for each size of a pool.
@functools.partial(jax.jit, static_argnames=("xp", "counts"))
def _join(xp: Any, counts: tuple[int, ...], blocks: Sequence[Outputs]) -> tuple[Outputs, Any]:
    """Returns the first rows of each block, one after the other, and which of them are finite."""

    def join(*parts: Any) -> Any:
        # Half precision cannot hold the squares that distances are made of.
        wide = jnp.promote_types(parts[0].dtype, jnp.float32)
        return xp.concatenate(
            [part[:count].astype(wide) for part, count in zip(parts, counts, strict=True)]
        )

    outputs = jax.tree.map(join, *blocks)
    finite = [xp.all(xp.isfinite(part), axis=-1) for part in jax.tree.leaves(outputs)]
    return outputs, functools.reduce(xp.logical_and, finite)
