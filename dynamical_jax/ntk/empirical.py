"""The empirical NTK of thousands of examples: Jacobians once, then matrix products.

𝒦[x, x', i, j] = ∇f^i(x) · ∇f^j(x'), and Θ its mean over the diagonal i = j: in the limit of
infinite width 𝒦 = Θ ⊗ I_K. neural-tangents computes it for one pair of blocks of examples after
another, and the Jacobians of both blocks again for each pair. Here the Jacobian J of all examples
is computed once, for as many parameters at a time as memory allows, and Θ is the sum of J Jᵀ over
these parts.

J has the type of the parameters; the products and their sum are in float64, because λ_max / λ_min
of an NTK is too large for float32, in which Θ⁻¹ would be noise. Rounding J changes its singular
values by no more than the rounding error, and so λ_min by far less than λ_max · 1e-7.
"""

import functools
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dynamical_jax import contract, resources
from dynamical_jax.errors import UserError
from dynamical_jax.gradients import map_blocks
from dynamical_jax.types import (
    AnyArray,
    ApplyFn,
    Array,
    OnProgress,
    Params,
    Variables,
    ignore_progress,
)

CHUNK_SIZE = 32
BLOCK_BYTES = 2**26
"""Rows of the kernel that are made at a time."""


def empirical_ntk(
    apply: ApplyFn,
    variables: Variables,
    x1: Any,
    x2: Any = None,
    *,
    trace: bool = True,
    file: str | os.PathLike[str] | None = None,
    memory_bytes: int | None = None,
    chunk_size: int = CHUNK_SIZE,
    on_progress: OnProgress = ignore_progress,
) -> Float[np.ndarray, "..."]:
    """Returns the empirical NTK between two sets of examples, in float64.

    With a file the kernel is a memory map of it, and may be larger than memory. It has its name
    only once it is whole; what an interrupted call leaves ends in .partial, and is not continued.

    Args:
      apply: the model, `apply(variables, x)`, in evaluation mode.
      variables: its variables; statistics of BatchNorm are constants.
      x1: `[n, ...]` inputs.
      x2: `[m, ...]` inputs; by default x1.
      trace: whether to return Θ `[n, m]`, else 𝒦 `[n, m, K, K]`.
      file: an .npy file for the kernel, which is replaced; None keeps the kernel in memory.
      memory_bytes: for the part of the Jacobian that is held at a time; by default half of the free
        memory.
      chunk_size: examples whose Jacobians are computed together; changes no result.
      on_progress: called with (done, total), counted in examples × parts.

    Raises:
      UserError: if the result needs more memory, or space on disk, than there is.
    """
    k = contract.output_shapes(apply, variables, x1).logits.shape[1]
    sides = [x1] if x2 is None else [x1, x2]
    rows = sum(map(len, sides)) * k
    leaves = jax.tree.leaves(variables["params"])
    size = np.dtype(jnp.result_type(*leaves)).itemsize
    shape = (len(x1), len(sides[-1])) + (() if trace else (k, k))
    kernel = _make_kernel(shape, file)
    limit = resources.free_memory() // 2 if memory_bytes is None else memory_bytes
    # Each part is held together with its copy in float64.
    parts = _parts(leaves, max(1, limit // (rows * (size + 8))))
    done, total = 0, len(parts) * sum(map(len, sides))
    for indices, start, stop in parts:
        jacobians = []
        for x in sides:
            report = lambda ready, _, done=done: on_progress(done + ready, total)
            jacobians.append(
                _jacobian(apply, variables, x, indices, (start, stop), chunk_size, report)
            )
            done += len(x)
        with jax.enable_x64(True):
            right = jacobians[-1].astype(jnp.float64)
            for start in range(0, len(kernel), size := max(1, BLOCK_BYTES // kernel[:1].nbytes)):
                left = jacobians[0][start : start + size]
                kernel[start : start + size] += np.asarray(_product(left, right, trace))
        del jacobians, left, right
    return kernel if file is None else _finish(kernel, file)


def _make_kernel(shape: tuple[int, ...], file: str | os.PathLike[str] | None) -> np.ndarray:
    """Returns a kernel of zeros, in memory or in a file, if there is room for it."""
    what, needed = f"a kernel of {' × '.join(map(str, shape))} numbers", math.prod(shape) * 8
    if file is None:
        # A block of it is made beside it.
        needed += min(needed, BLOCK_BYTES)
        resources.check_memory(needed, what, "take fewer examples, or give a file")
        return np.zeros(shape)
    path = _partial(file)
    resources.check_disk(path, needed, what, "take fewer examples")
    try:
        return np.lib.format.open_memmap(path, "w+", np.float64, shape)
    except OSError as error:
        raise UserError(f"cannot write {os.path.abspath(file)}: {error.strerror}") from error


def _finish(kernel: np.ndarray, file: str | os.PathLike[str]) -> np.ndarray:
    kernel.flush()
    os.replace(_partial(file), file)
    return np.load(file, mmap_mode="r")


def _partial(file: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(f"{os.fspath(file)}.partial").absolute()


def combined_gradients(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    weights: Float[AnyArray, "n c"],
    *,
    chunk_size: int = CHUNK_SIZE,
) -> Float[np.ndarray, "k c p"]:
    """Returns Σ_i w_i ∇f^k(x_i) for each column w of the weights, in float64.

    Tr(Wᵀ Θ W) is the squared norm of the result, divided by K. This gives alignment (Eq. 16) and
    G_MSE without Θ; the result for S ∪ Q is the sum of those for S and for Q.

    Args:
      apply: the model, `apply(variables, x)`, in evaluation mode.
      variables: its variables; statistics of BatchNorm are constants.
      x: examples.
      weights: W.
      chunk_size: examples whose Jacobians are computed together; changes no result.
    """
    leaves = jax.tree.leaves(variables["params"])
    indices, size = tuple(range(len(leaves))), sum(leaf.size for leaf in leaves)
    weights, total = np.asarray(weights, float), 0.0

    def add(positions: np.ndarray, count: int) -> None:
        nonlocal total
        with jax.default_matmul_precision("highest"):
            rows = _block_jacobian(apply, variables, x[positions], indices, 0, size)
        counted = np.arange(len(positions)) < count
        with jax.enable_x64(True):
            more = _add_combination(total, rows, np.where(counted[:, None], weights[positions], 0))
        # If memory runs out, it must be before the sum changes: the block is tried again in halves.
        total = jax.block_until_ready(more)

    map_blocks(add, len(x), min(chunk_size, len(x)))
    return np.asarray(total)


def _parts(leaves: list[AnyArray], limit: int) -> list[tuple[tuple[int, ...], int, int]]:
    """Cuts the parameters into parts of at most `limit` numbers: (leaves, start, stop).

    A part holds whole leaves, so that only their Jacobian is computed for it. A leaf larger than a
    part is cut, and its Jacobian is computed for each piece.
    """
    parts, together, count = [], [], 0
    for index, leaf in enumerate(leaves):
        if count and count + leaf.size > limit:
            parts.append((tuple(together), 0, count))
            together, count = [], 0
        if leaf.size > limit:
            starts = range(0, leaf.size, limit)
            parts += [((index,), start, min(start + limit, leaf.size)) for start in starts]
        else:
            together.append(index)
            count += leaf.size
    return [*parts, (tuple(together), 0, count)] if together else parts


def _jacobian(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    indices: tuple[int, ...],
    piece: tuple[int, int],
    chunk_size: int,
    on_progress: OnProgress,
) -> Float[Array, "n k p"]:
    """Returns a piece of ∂f/∂θ of all examples, θ being these leaves, flattened and joined."""
    buffer = None

    def fill(positions: np.ndarray, count: int) -> Array:
        nonlocal buffer
        start, stop = piece
        # By default GPUs multiply in TensorFloat-32, whose rounding would change λ_min.
        with jax.default_matmul_precision("highest"):
            rows = _block_jacobian(apply, variables, x[positions], indices, start, stop - start)
        if buffer is None:
            buffer = jnp.zeros((len(x), *rows.shape[1:]), rows.dtype)
        # Repeated positions of the last block carry the same row again.
        buffer = _write(buffer, rows, positions)
        return rows[0, 0, 0]

    map_blocks(fill, len(x), min(chunk_size, len(x)), on_progress)
    return buffer


@functools.partial(jax.jit, static_argnames=("apply", "indices", "size"))
def _block_jacobian(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    indices: tuple[int, ...],
    start: Array,
    size: int,
) -> Array:
    rest = {name: value for name, value in variables.items() if name != "params"}
    leaves, structure = jax.tree.flatten(variables["params"])

    def logits(chosen: Params, one: Any) -> Array:
        own = list(leaves)
        for index, leaf in zip(indices, chosen, strict=True):
            own[index] = leaf
        params = jax.tree.unflatten(structure, own)
        return contract.as_outputs(apply({"params": params, **rest}, one[None]), 1).logits[0]

    chosen = [leaves[index] for index in indices]
    jacobians = jax.vmap(jax.jacrev(logits), (None, 0))(chosen, x)
    flat = [jacobian.reshape(*jacobian.shape[:2], -1) for jacobian in jacobians]
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate(flat, axis=-1), start, size, axis=-1)


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer: Array, rows: Array, positions: Array) -> Array:
    return buffer.at[positions].set(rows)


@functools.partial(jax.jit, static_argnames="trace")
def _product(left: Array, right: Array, trace: bool) -> Array:
    left = left.astype(jnp.float64)
    if trace:
        return jnp.einsum("nkp,mkp->nm", left, right) / left.shape[1]
    return jnp.einsum("nkp,mlp->nmkl", left, right)


@jax.jit
def _add_combination(total: Array, rows: Array, weights: Array) -> Array:
    return total + jnp.einsum("nkp,nc->kcp", rows.astype(jnp.float64), weights)
