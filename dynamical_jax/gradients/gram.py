"""Computes g_u·g_v of all pairs of examples, block by block, by a chosen engine."""

import functools
import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dynamical_jax import contract, losses, parallel, resources, words
from dynamical_jax.errors import UserError, reason
from dynamical_jax.gradients import factored, pairs, per_example, scoring
from dynamical_jax.gradients.blocks import block_at, bucketed, each_block, map_blocks
from dynamical_jax.types import ApplyFn, Array, Examples, OnProgress, Variables, ignore_progress

ENGINES = {
    "factored": factored.forms,
    "vmap": per_example.forms,
}
"""name → function of (apply, variables, x, labels) to forms; products of all are the same."""


def gram(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    labels: Any = None,
    *,
    engine: str = "factored",
    chunk_size: int | None = None,
    on_progress: OnProgress = ignore_progress,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Float[np.ndarray, "n n"]:
    """Returns g_u·g_v of all pairs of examples, exactly symmetric, in NumPy.

    Its diagonal is ‖g_u‖²; the sum of a row is g_u·g_Q, Q being all examples; the sum of all is
    G(Q). No array of n × parameters is formed: memory is that of two blocks, and the result.

    Args:
      apply: the model, `apply(variables, x)`.
      variables: its variables.
      x: `[n, ...]` the inputs; anything that gathers rows as `x[positions]`.
      labels: `[n]` the labels; pseudo-labels (the arg-max predictions, Eq. 10) if None.
      engine: "factored", or "vmap", which forms every gradient of a block; changes memory and
        speed, not the result. Where a model has no factored form, "vmap" takes its place, with a
        warning that says why.
      chunk_size: examples of a block, likewise; by default as many, up to 256, as fit.
      on_progress: called with (done, n) after each block of rows.
      loss: whose gradients these are.

    Raises:
      UserError: if the engine is unknown or a label is no class of the model.
    """
    options = {
        "engine": engine,
        "chunk_size": chunk_size,
        "on_progress": on_progress,
        "loss": loss,
    }
    return _products(apply, variables, Examples(x, labels), None, **options)


def cross_gram(
    apply: ApplyFn,
    variables: Variables,
    left: Examples | tuple[Any, Any],
    right: Examples | tuple[Any, Any],
    *,
    engine: str = "factored",
    chunk_size: int | None = None,
    on_progress: OnProgress = ignore_progress,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Float[np.ndarray, "m n"]:
    """Returns g_u·g_v of each u in one set with each v in another, in NumPy.

    Args:
      apply: the model, `apply(variables, x)`.
      variables: its variables.
      left: inputs and labels of the m examples u; pseudo-labels if the labels are None.
      right: likewise of the n examples v.
      engine: as of `gram`.
      chunk_size: likewise.
      on_progress: called with (done, m) after each block of rows.
      loss: whose gradients these are.

    Raises:
      UserError: if the engine is unknown or a label is no class of the model.
    """
    options = {
        "engine": engine,
        "chunk_size": chunk_size,
        "on_progress": on_progress,
        "loss": loss,
    }
    return _products(apply, variables, Examples(*left), Examples(*right), **options)


def _products(
    apply: ApplyFn,
    variables: Variables,
    left: Examples,
    right: Examples | None,
    *,
    engine: str,
    chunk_size: int | None,
    on_progress: OnProgress,
    loss: losses.Loss,
) -> np.ndarray:
    """Returns the products of two sets, or of one with itself if there is no `right`."""
    words.check_known("engine", engine, ENGINES)
    engines = scoring.with_loss(ENGINES, loss)
    symmetric = right is None
    right = left if symmetric else right
    if left.x.shape[1:] != right.x.shape[1:]:
        raise UserError(
            f"both sets need inputs of one shape, got {left.x.shape[1:]} and {right.x.shape[1:]}"
        )
    for x, labels in (left, right):
        if labels is not None:
            contract.check_labels(apply, variables, x, labels, loss.of_classes)
        if len(x):
            contract.check_rows(apply, variables, x)
    dtype = jax.dtypes.result_type(np.float32, *jax.tree.leaves(variables["params"]))
    shape = (len(left.x), len(right.x))
    resources.check_memory(
        (3 if symmetric else 1)
        * shape[0]
        * shape[1]
        * dtype.itemsize,  # In the end, two triangles.
        f"a matrix of {shape[0]} × {shape[1]} products",
        "take fewer examples",
    )
    result = np.zeros(shape, dtype)
    if not result.size:
        return result

    def arguments(of: Examples, positions: np.ndarray) -> tuple[Any, ...]:
        labels = None if of.y is None else np.asarray(of.y)[positions]
        return apply, engines[engine], variables, Examples(of.x[positions], labels)

    largest = scoring.largest_chunk_size() if chunk_size is None else chunk_size
    block_size = bucketed(max(result.shape), largest)

    def fill_rows(rows: np.ndarray, count: int) -> None:
        forms = _forms(*arguments(left, rows))
        start = int(rows[0]) if symmetric else 0  # What is left of it is known from above.

        def block_of(columns: np.ndarray, width: int) -> tuple[np.ndarray, Array]:
            columns = start + columns
            return columns[:width], _block(forms, _forms(*arguments(right, columns)))

        for columns, block in each_block(block_of, len(right.x) - start, block_size):
            part = np.asarray(block)[:count, : len(columns)]
            result[rows[0] : rows[0] + count, columns] = part

    try:
        if chunk_size is None:
            rows = lambda size: block_at(0, size, len(left.x))[0]
            program = lambda size: _forms.lower(*arguments(left, rows(size)))
            block_size = parallel.smallest(scoring.fitting_block_size(program, block_size))
        map_blocks(fill_rows, len(left.x), block_size, on_progress)
    except UserError:
        raise
    except (factored.UnsupportedError, TypeError, ValueError, LookupError, AttributeError) as error:
        # As in `scoring`: what is the model's own fault comes up again in the obvious engine.
        if engine != "factored":
            raise
        warnings.warn(f"no factored gradients ({reason(error)}); using vmap", stacklevel=3)
        right = None if symmetric else right
        options = {"chunk_size": chunk_size, "on_progress": on_progress, "loss": loss}
        return _products(apply, variables, left, right, engine="vmap", **options)
    if symmetric:
        upper = np.triu(result)
        result = upper + np.triu(result, 1).T
    return result


@functools.partial(jax.jit, static_argnames=("apply", "engine"))
def _forms(apply: ApplyFn, engine: Any, variables: Variables, block: Examples) -> list[pairs.Form]:
    return engine(apply, variables, block.x, block.y)


@jax.jit
def _block(left: list[pairs.Form], right: list[pairs.Form]) -> Array:
    return pairs.products(left, right)
