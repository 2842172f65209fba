"""Θ of large sets, up to an error, from sketches of the gradients of every output."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dynamical_jax import contract
from dynamical_jax.errors import UserError
from dynamical_jax.gradients import pairs, scoring, sketching
from dynamical_jax.gradients.sketch import of_objective
from dynamical_jax.types import ApplyFn, Array, Examples, OnProgress, Variables, ignore_progress


def from_sketch(
    apply: ApplyFn,
    variables: Variables,
    x1: Any,
    x2: Any = None,
    *,
    size: int = 1024,
    seed: int = 0,
    engine: str = "factored",
    chunk_size: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Float[np.ndarray, "n m"]:
    """Returns Θ between two sets of examples in expectation over seeds, of rank `size` at most.

    The standard error of Θ(x, x') is about √(Θ(x, x) Θ(x', x') / size) at most where gradients are
    not alike, and up to √8 times that where they are (`gradients.sketching`). Good for means, norms
    and neighbours; not for Θ⁻¹, which depends on what the sketch leaves out. One forward and
    K backward passes, and n × `size` numbers, whatever the number of parameters.

    Args:
      apply: the model, `apply(variables, x)`, in evaluation mode.
      variables: its variables; statistics of BatchNorm are constants.
      x1: `[n, ...]` inputs.
      x2: `[m, ...]` inputs; by default x1.
      size: how many numbers stand for the gradients of an example.
      seed: of the random signs.
      engine: as of `gradients.sketch`.
      chunk_size: likewise.
      on_progress: called with (done, n) after each block, then likewise for x2.

    Raises:
      UserError: if the size is below 1.
    """
    if size < 1:
        raise UserError(f"the size of a sketch must be at least 1, got {size}")

    def sketches(x: Any) -> np.ndarray:
        options = {"chunk_size": chunk_size, "on_progress": on_progress}
        of, key = Examples(x, None), jax.random.key(seed)
        return scoring.score_blocks(apply, _engines(size), engine, variables, of, key, **options)[0]

    left = sketches(x1)
    return left @ (left if x2 is None else sketches(x2)).T


@functools.cache  # Programs are compiled for each function: those of one size are shared.
def _engines(size: int) -> dict[str, Callable[..., tuple[Array]]]:
    """Returns name → function of (apply, variables, x, labels, key): sketches of K⁻½ ∂f/∂θ."""

    def over_outputs(of_output: Callable[..., Array]) -> Callable[..., tuple[Array]]:
        def sketches(
            apply: ApplyFn, variables: Variables, x: Any, labels: Any, key: Array
        ) -> tuple[Array]:
            k = contract.output_shapes(apply, variables, x).logits.shape[1]
            # Outputs are as further layers: with signs of their own.
            one = lambda i: of_output(apply, variables, x, i, jax.random.fold_in(key, i))
            zero = jax.eval_shape(one, 0)
            add = lambda total, i: (total + one(i), None)
            total, _ = jax.lax.scan(add, jnp.zeros(zero.shape, zero.dtype), jnp.arange(k))
            return (total / math.sqrt(k),)

        return sketches

    def factored_sketch(apply: ApplyFn, variables: Variables, x: Any, i: Any, key: Array) -> Array:
        objective = lambda logits: logits[:, i].sum()
        return of_objective(apply, variables, x, objective, key, size)

    def formed_sketch(apply: ApplyFn, variables: Variables, x: Any, i: Any, key: Array) -> Array:
        rest = {name: value for name, value in variables.items() if name != "params"}

        def output(params: Any, one: Any) -> Array:
            return contract.as_outputs(apply({"params": params, **rest}, one[None]), 1).logits[0, i]

        formed = jax.vmap(jax.grad(output), (None, 0))(variables["params"], x)
        return sketching.fold_formed(key, size, jax.vmap(pairs.flat)(formed))

    return {"factored": over_outputs(factored_sketch), "vmap": over_outputs(formed_sketch)}
