"""Computes ‖g_u‖² and g_u·v of every example of a pool, block by block, by a chosen engine."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from dynamical_jax import contract, losses, parallel, resources, words
from dynamical_jax.errors import UserError, reason
from dynamical_jax.gradients import factored, per_example
from dynamical_jax.gradients.blocks import block_at, bucketed, each_block
from dynamical_jax.types import (
    ApplyFn,
    Array,
    Examples,
    GradientTerms,
    OnProgress,
    Params,
    Variables,
    ignore_progress,
)

ENGINES = {
    "factored": factored.gradient_terms,
    "vmap": per_example.gradient_terms,
}
"""name → function of (apply, variables, x, labels, direction); all give the same numbers."""

# On a CPU larger blocks gain nothing; an accelerator has work for all of its cores with thousands
# of small images: on an H100 4,096 are 3.7 times as fast as 256 (ResNet-18). Smaller ones are taken
# where memory is short.
LARGEST_CHUNK_SIZE = 256
LARGEST_CHUNK_SIZE_ON_ACCELERATORS = 4096


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
    mesh: Mesh | None = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> GradientTerms:
    """Returns ‖g_u‖², g_u·v and the label used for every example u, in NumPy.

    Memory does not grow with the number of examples, beyond the results.

    Args:
      apply: the model, `apply(variables, x)`.
      variables: its variables.
      x: `[n, ...]` inputs; anything that gathers rows as `x[positions]`.
      direction: v, a pytree of parameters; g_S in dynamicAL.
      labels: `[n]` the labels; pseudo-labels (the arg-max predictions, Eq. 10) if None.
      engine: a key of `ENGINES`; changes memory and speed, not the result. Where a model has no
        factored form, "vmap" takes its place, with a warning that says why.
      chunk_size: how many examples at a time; changes memory and speed, not the result. By default
        as many, up to `largest_chunk_size`, as need at most half of the free memory, as the
        compiler estimates it. If memory runs out all the same, it is halved.
      on_progress: called with (done, total) after each block.
      mesh: devices that score a part of the examples each, `chunk_size` at a time, as
        `parallel.make_mesh` makes it.
      loss: whose gradients these are.

    Raises:
      UserError: if the engine is unknown, a label is no class of the model, or `direction` is not
        like the parameters.
    """
    words.check_known("engine", engine, ENGINES)
    check_direction(variables["params"], direction)
    if len(x) == 0:
        return GradientTerms(np.empty(0), np.empty(0), np.empty(0, int))
    options = {"chunk_size": chunk_size, "on_progress": on_progress, "mesh": mesh, "loss": loss}
    examples, engines = Examples(x, labels), with_loss(ENGINES, loss)
    return GradientTerms(
        *score_blocks(apply, engines, engine, variables, examples, direction, **options)
    )


def check_direction(params: Params, direction: Params) -> None:
    """Raises `UserError` unless `direction` has the leaves of `params`, in their shapes."""
    ours, theirs = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(tree))
        }
        for tree in (params, direction)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"direction must be like the parameters: {name} is {theirs.get(name, 'missing')} "
                f"there, and {ours.get(name, 'missing')} in the parameters"
            )


def with_loss(engines: Mapping[str, Any], loss: losses.Loss) -> Mapping[str, Any]:
    """Returns engines for a loss; the same functions each time, as programs are kept for each."""
    if loss == losses.CROSS_ENTROPY:
        return engines
    return {name: _with_loss(engine, loss) for name, engine in engines.items()}


@functools.lru_cache(64)
def _with_loss(engine: Callable[..., Any], loss: losses.Loss) -> Callable[..., Any]:
    return functools.partial(engine, loss=loss)


def score_blocks(
    apply: ApplyFn,
    engines: Mapping[str, Any],
    engine: str,
    variables: Variables,
    examples: Examples,
    given: Any,
    *,
    chunk_size: int | None,
    on_progress: OnProgress,
    mesh: Mesh | None = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> list[np.ndarray]:
    """Returns what an engine computes of each example, in NumPy, block by block.

    Args:
      apply: the model.
      engines: name → function of (apply, variables, x, labels, given) to a sequence of arrays with
        the examples on their first axis.
      engine: the name; "vmap" takes the place of "factored" where that does not cover the model.
      variables: the model's.
      examples: at least one; labels may be None.
      given: handed to the engine.
      chunk_size: as of `norms_and_products`.
      on_progress: likewise.
      mesh: likewise.
      loss: that of the engines, whose labels these are.
    """
    x, labels = examples
    if labels is not None:
        contract.check_labels(apply, variables, x, labels, loss.of_classes)
    contract.check_rows(apply, variables, x)

    variables, given = parallel.replicate((variables, given), mesh)

    def arguments(positions: np.ndarray) -> tuple[Any, ...]:
        y = None if labels is None else parallel.rows(np.asarray(labels), positions, mesh)
        block = Examples(parallel.rows(x, positions, mesh), y)
        return apply, engines[engine], variables, block, given, mesh

    def score(slots: np.ndarray, count: int) -> tuple[Any, Any, Sequence[Array]]:
        positions, counted = order.block(slots, count)
        return positions[counted], counted, _score_block(*arguments(positions))

    order, devices = parallel.Order(x, mesh), parallel.num_devices(mesh)
    limit = largest_chunk_size() if chunk_size is None else chunk_size
    block_size = bucketed(-(-order.size // devices), limit)  # For each device.
    try:
        if chunk_size is None:
            # The program that is compiled to find out is the one that `_score_block` then runs.
            program = lambda size: _score_block.lower(
                *arguments(order.block(*block_at(0, size * devices, order.size))[0])
            )
            block_size = parallel.smallest(fitting_block_size(program, block_size))
        # They stay on the devices until all are there, and come over together.
        blocks = list(each_block(score, order.size, block_size * devices, on_progress, devices))
    except UserError:
        raise
    except (factored.UnsupportedError, TypeError, ValueError, LookupError, AttributeError) as error:
        # The factored engine takes models apart in ways that their authors cannot have foreseen.
        # An error of the model itself is raised again by the obvious engine.
        if engine != "factored":
            raise
        warnings.warn(f"no factored gradients ({reason(error)}); using vmap", stacklevel=3)
        options = {
            "chunk_size": chunk_size,
            "on_progress": on_progress,
            "mesh": mesh,
            "loss": loss,
        }
        return score_blocks(apply, engines, "vmap", variables, examples, given, **options)
    rows, counted, found = zip(*parallel.fetch(blocks), strict=True)
    parts = [[term[index] for term in terms] for index, terms in zip(counted, found, strict=True)]
    return order.restore(rows, [np.concatenate(column) for column in zip(*parts, strict=True)])


def largest_chunk_size() -> int:
    """Returns how many examples are taken at a time, at most, on this platform."""
    if jax.default_backend() == "cpu":
        return LARGEST_CHUNK_SIZE
    return LARGEST_CHUNK_SIZE_ON_ACCELERATORS


def fitting_block_size(program: Callable[[int], Any], block_size: int) -> int:
    """Returns the largest block, up to `block_size`, that needs at most half of the free memory.

    Args:
      program: returns the program, lowered, that a block of this size runs.
      block_size: a power of two.
    """
    while block_size > 1:
        needed = program(block_size).compile().memory_analysis()
        allowed = resources.free_device_memory() // 2
        if needed is None or needed.temp_size_in_bytes + needed.output_size_in_bytes <= allowed:
            break
        needed_bytes = needed.temp_size_in_bytes + needed.output_size_in_bytes
        guess = max(1, block_size * allowed // needed_bytes)
        block_size = min(block_size // 2, 1 << (guess.bit_length() - 1))
    return block_size


@functools.partial(jax.jit, static_argnames=("apply", "engine", "mesh"))
def _score_block(
    apply: ApplyFn,
    engine: Any,
    variables: Variables,
    block: Examples,
    given: Any,
    mesh: Mesh | None = None,
) -> Sequence[Array]:
    def score(variables: Variables, block: Examples, given: Any) -> Sequence[Array]:
        return engine(apply, variables, block.x, block.y, given)

    return parallel.on_each(score, mesh, False, True, False)(variables, block, given)
