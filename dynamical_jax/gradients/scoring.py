"""‖g_u‖² and g_u·v of every example of a pool, block by block, by the engine of choice."""

import functools
import warnings
from typing import Any

import jax
import numpy as np
import psutil

from dynamical_jax.errors import UserError
from dynamical_jax.gradients import factored, per_example
from dynamical_jax.gradients.blocks import block_at, bucketed
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

# On CPU and GPU larger blocks gain nothing more; smaller ones are taken where memory is short.
LARGEST_CHUNK_SIZE = 256


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
    """Returns ‖g_u‖², g_u·v and the label used for every example u, in NumPy.

    Memory does not grow with the number of examples, beyond the results.

    Args:
      apply: the model, `apply(variables, x) -> Outputs`.
      variables: its variables.
      x: `[n, ...]` the inputs; anything that gathers rows as `x[positions]`.
      direction: v, a pytree of parameters; g_S in dynamicAL.
      labels: `[n]` the labels; pseudo-labels (the arg-max predictions, Eq. 10) if None.
      engine: a key of `ENGINES`; changes memory and speed, not the result. Where a model has no
        factored form, "vmap" takes its place, with a warning that says why.
      chunk_size: how many examples at a time, likewise. By default as many, up to
        `LARGEST_CHUNK_SIZE`, as need no more than half of the free memory by the compiler's
        account. Either is halved where memory runs out all the same.
      on_progress: called with (done, total) after each block.

    Raises:
      UserError: if the engine is unknown.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}; choose from {', '.join(ENGINES)}")

    def arguments(positions: np.ndarray) -> tuple[Any, ...]:
        block = Examples(x[positions], None if labels is None else np.asarray(labels)[positions])
        return apply, ENGINES[engine], variables, block, direction

    start, parts = 0, []
    block_size = bucketed(len(x), chunk_size or LARGEST_CHUNK_SIZE)
    while start < len(x):
        positions, count = block_at(start, block_size, len(x))
        try:
            if start == 0 and chunk_size is None:
                fitting = _fitting(block_size, *arguments(positions))
                if fitting < block_size:
                    block_size = fitting
                    continue
            terms = _score_block(*arguments(positions))
            parts.append([np.asarray(term)[:count] for term in terms])
        except factored.UnsupportedError as error:
            warnings.warn(f"no factored gradients ({error}); using vmap", stacklevel=2)
            engine = "vmap"
            continue
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or block_size == 1:
                raise
            block_size //= 2
            continue
        start += count
        on_progress(start, len(x))
    if not parts:
        return GradientTerms(np.empty(0), np.empty(0), np.empty(0, int))
    return GradientTerms(*map(np.concatenate, zip(*parts, strict=True)))


def _fitting(block_size: int, *arguments: Any) -> int:
    """The block size if its program fits in half of the free memory, else a smaller guess.

    The program that is compiled to be asked is the one that `_score_block` runs then.
    """
    needed = _score_block.lower(*arguments).compile().memory_analysis()
    allowed = free_memory() // 2
    if needed is None or needed.temp_size_in_bytes <= allowed:
        return block_size
    guess = max(1, block_size * allowed // needed.temp_size_in_bytes)
    return min(block_size // 2 or 1, 1 << (guess.bit_length() - 1))


def free_memory() -> int:
    """Returns the bytes that are free on the default device."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return psutil.virtual_memory().available


@functools.partial(jax.jit, static_argnames=("apply", "engine"))
def _score_block(
    apply: ApplyFn, engine: Any, variables: Variables, block: Examples, direction: Params
) -> GradientTerms:
    return engine(apply, variables, block.x, block.y, direction)
