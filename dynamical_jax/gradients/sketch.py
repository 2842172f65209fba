"""Sketches: short vectors whose inner products are g_u·g_v of any two examples, up to an error."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from dynamical_jax import losses, words
from dynamical_jax.errors import UserError
from dynamical_jax.gradients import factored, per_example, scoring, sketching
from dynamical_jax.types import (
    ApplyFn,
    Array,
    Examples,
    OnProgress,
    Variables,
    ignore_progress,
)


def sketch(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    labels: Any = None,
    *,
    size: int = 512,
    seed: int = 0,
    engine: str = "factored",
    chunk_size: int | None = None,
    on_progress: OnProgress = ignore_progress,
    mesh: Mesh | None = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Float[np.ndarray, "n {size}"]:
    """Returns a vector s_u of each example, such that s_u·s_v is g_u·g_v in expectation, in NumPy.

    The expectation is over seeds. The standard error of s_u·s_v is near ‖g_u‖ ‖g_v‖ / √size where
    u and v are not alike: measured at 512 numbers, of the cosine of two gradients, 0.040 for the
    CNN on CIFAR-10 and 0.044 for a linear layer on embeddings (`benchmarks.sketch`), where
    projections of a and e by matrices of √size columns each err by 0.173 and 0.059. At g_u = g_v
    it is up to √2 times that for layers that are folded. For dense layers of vectors that are
    projected it is up to √8 times that at g_u = g_v, and up to √3 times if only the inputs of the
    layer are alike (`sketching` has the formula). Of many pairs, some err by several standard
    errors. Sketches come from one forward and one backward pass, as scores do.

    Sketches are linear: the sum of those of a set is the sketch of the set's gradient. Those of one
    seed, size, engine and shape of inputs go together, also from several calls.

    Args:
      apply: the model, `apply(variables, x)`.
      variables: its variables.
      x: `[n, ...]` the inputs; anything that gathers rows as `x[positions]`.
      labels: `[n]` the labels; pseudo-labels (the arg-max predictions, Eq. 10) if None.
      size: how many numbers.
      seed: of the random signs.
      engine: "factored", or "vmap", which forms every gradient of a block and takes other signs.
        Where a model has no factored form, "vmap" takes its place, with a warning that says why.
      chunk_size: examples of a block; changes memory and speed, not the result. By default as many,
        up to 256, as fit.
      on_progress: called with (done, n) after each block.
      mesh: devices that take a part of the examples each, as of `norms_and_products`.
      loss: whose gradients these are.

    Raises:
      UserError: if the engine is unknown, a label is no class of the model, or the size is below 1.
    """
    words.check_known("engine", engine, ("factored", "vmap"))
    if size < 1:
        raise UserError(f"the size of a sketch must be at least 1, got {size}")
    if len(x) == 0:
        return np.zeros((0, size), np.float32)
    options = {"chunk_size": chunk_size, "on_progress": on_progress, "mesh": mesh}
    key, examples = jax.random.key(seed), Examples(x, labels)
    (sketches,) = scoring.score_blocks(
        apply, engines(size, loss), engine, variables, examples, key, loss=loss, **options
    )
    return sketches


@functools.cache  # Programs are compiled for each function: those of one size are shared.
def engines(
    size: int, loss: losses.Loss = losses.CROSS_ENTROPY
) -> dict[str, Callable[..., tuple[Array]]]:
    """Returns name → function of (apply, variables, x, labels, key) to sketches of this size."""

    def factored_sketches(
        apply: ApplyFn, variables: Variables, x: Any, labels: Any, key: Array
    ) -> tuple[Array]:
        objective = factored.total_loss(labels, loss)
        return (of_objective(apply, variables, x, objective, key, size),)

    def formed_sketches(
        apply: ApplyFn, variables: Variables, x: Any, labels: Any, key: Array
    ) -> tuple[Array]:
        forms = per_example.forms(apply, variables, x, labels, loss)
        return (sketching.of_forms(key, size, forms),)

    return {"factored": factored_sketches, "vmap": formed_sketches}


def of_objective(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    objective: Callable[[Array], Array],
    key: Array,
    size: int,
) -> Array:
    """Returns sketches `[n, size]` of the gradients of a function of the logits.

    Args:
      apply: as of `factored.map_layers`, like the next three.
      variables: likewise.
      x: likewise.
      objective: likewise.
      key: of the random signs.
      size: how many numbers.
    """
    layers = itertools.count()
    of_layer = lambda *call: sketching.of_layer(jax.random.fold_in(key, next(layers)), size, *call)
    return sum(factored.map_layers(of_layer, apply, variables, x, objective))
