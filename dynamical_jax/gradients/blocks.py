"""Cuts sets into blocks of one shape, so that one compiled program serves any set size."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dynamical_jax.errors import UserError
from dynamical_jax.types import OnProgress, ignore_progress


def block_at(start: int, block_size: int, size: int) -> tuple[np.ndarray, int]:
    """Returns the positions of the block at `start` and how many of them, from the front, count.

    Every block has exactly `block_size` positions. The last block is filled up with copies of the
    last position, which callers mask or cut off.

    >>> positions, count = block_at(3, 3, 5)
    >>> positions.tolist(), count
    ([3, 4, 4], 2)
    """
    positions = np.arange(start, start + block_size)
    return np.minimum(positions, size - 1), min(block_size, size - start)


def map_blocks(
    run: Callable[[np.ndarray, int], Any],
    size: int,
    block_size: int,
    on_progress: OnProgress = ignore_progress,
    smallest: int = 1,
) -> list[Any]:
    """Returns `run(positions, count)` of each block of `size` rows.

    A block for which memory runs out is tried again at half the size, as are all after it, rounded
    down to whole rows for each device.

    Args:
      run: called with a block as from `block_at`.
      size: number of rows.
      block_size: rows of a block, a multiple of `smallest`.
      on_progress: called with (done, total) after each block.
      smallest: size of the smallest blocks, a row for each device.
    """
    results, start = [], 0
    while start < size:
        positions, count = block_at(start, block_size, size)
        try:
            results.append(jax.block_until_ready(run(positions, count)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or block_size <= smallest:
                raise
            block_size = max(smallest, block_size // 2 // smallest * smallest)
            continue
        start += count
        on_progress(start, size)
    return results


def bucketed(size: int, limit: int) -> int:
    """Returns a block size for `size` rows: the next power of two, `limit` at most.

    So small sets are not filled up to `limit`, and sets that grow from round to round need few
    compiled programs.

    >>> bucketed(5, 256), bucketed(200, 256), bucketed(5000, 256)
    (8, 256, 256)
    """
    if limit < 1:
        raise UserError(f"a block needs at least 1 example, got {limit}")
    return min(limit, 1 << max(size - 1, 0).bit_length())
