"""‖g_u‖² and g_u·v of every example of a pool, block by block, by the engine of choice."""

import functools
import warnings
from typing import Any

import jax
import numpy as np

from dynamical_jax.errors import UserError
from dynamical_jax.gradients import factored, per_example
from dynamical_jax.gradients.blocks import blocks, bucketed
from dynamical_jax.types import (
    ApplyFn,
    Examples,
    GradientTerms,
    OnProgress,
    Params,
    Variables,
    ignore_progress,
)

ENGINES = {
    "factored": factored.norms_and_products,
    "vmap": per_example.norms_and_products,
}
"""name → function of (apply, variables, x, labels, direction); all give the same numbers."""


def norms_and_products(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    direction: Params,
    *,
    labels: Any = None,
    engine: str = "factored",
    chunk_size: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> GradientTerms:
    """Returns ‖g_u‖², g_u·v and the label used for every example u.

    Args:
      apply: the model, `apply(variables, x) -> Outputs`.
      variables: its variables.
      x: `[n, ...]` the inputs; anything that gathers rows as `x[positions]`.
      direction: v, a pytree of parameters; g_S in dynamicAL.
      labels: `[n]` the labels; pseudo-labels (the arg-max predictions, Eq. 10) if None.
      engine: a key of `ENGINES`; changes memory and speed, not the result. Where a model has no
        factored form, "vmap" takes its place, with a warning that says why.
      chunk_size: how many examples at a time, likewise; by default what memory allows.
      on_progress: called with (done, total) after each block.

    Raises:
      UserError: if the engine is unknown.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}; choose from {', '.join(ENGINES)}")
    if chunk_size is None:
        chunk_size = default_chunk_size(variables)
    chunk_size = bucketed(len(x), chunk_size)
    parts = []
    for positions, count in blocks(len(x), chunk_size):
        block = Examples(x[positions], None if labels is None else np.asarray(labels)[positions])
        try:
            terms = _score_block(apply, ENGINES[engine], variables, block, direction)
        except factored.UnsupportedError as error:
            warnings.warn(f"no factored gradients ({error}); using vmap", stacklevel=2)
            return norms_and_products(
                apply,
                variables,
                x,
                direction,
                labels=labels,
                engine="vmap",
                chunk_size=chunk_size,
                on_progress=on_progress,
            )
        parts.append([np.asarray(term)[:count] for term in terms])
        on_progress(int(positions[0]) + count, len(x))
    if not parts:
        return GradientTerms(np.empty(0), np.empty(0), np.empty(0, int))
    return GradientTerms(*map(np.concatenate, zip(*parts, strict=True)))


def default_chunk_size(variables: Variables, budget_bytes: int = 2**30) -> int:
    """Returns how many per-example gradients fit in `budget_bytes`, between 1 and 256."""
    leaves = jax.tree.leaves(variables["params"])
    gradient_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return max(1, min(256, budget_bytes // gradient_bytes))


@functools.partial(jax.jit, static_argnames=("apply", "engine"))
def _score_block(
    apply: ApplyFn, engine: Any, variables: Variables, block: Examples, direction: Params
) -> GradientTerms:
    return engine(apply, variables, block.x, block.y, direction)
