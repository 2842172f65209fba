"""Cuts sets into blocks of one shape, so that one compiled program serves any set size."""

from collections import deque
from collections.abc import Callable, Iterator
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


def each_block(
    run: Callable[[np.ndarray, int], Any],
    size: int,
    block_size: int,
    on_progress: OnProgress = ignore_progress,
    smallest: int = 1,
    ahead: int = 1,
) -> Iterator[Any]:
    """Yields `run(positions, count)` of each block of `size` rows, in their order, when computed.

    Before a block is waited for the next is begun, so that the device need not wait for this
    process, which reads and copies meanwhile. A block for which memory runs out is tried again,
    first with none beside it, then at half the size, as are all after it, rounded down to whole
    rows for each device.

    Args:
      run: called with a block as from `block_at`; returns arrays, without waiting for them. It may
        be called again with the same rows, and must change nothing.
      size: number of rows.
      block_size: rows of a block, a multiple of `smallest`.
      on_progress: called with (done, total) after each block.
      smallest: size of the smallest blocks, a row for each device.
      ahead: how many blocks are begun beside the one that is waited for.
    """
    done = start = 0
    begun: deque[tuple[int, Any]] = deque()  # Where a block ends, and what it becomes.
    while done < size:
        try:
            if start < size:
                positions, count = block_at(start, block_size, size)
                begun.append((start + count, run(positions, count)))
                start += count
                if start < size and len(begun) <= ahead:
                    continue
            jax.block_until_ready(begun[0][1])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if not (begun and ahead):
                if block_size <= smallest:
                    raise
                block_size = max(smallest, block_size // 2 // smallest * smallest)
            begun.clear()
            start, ahead = done, 0
            continue
        done = begun[0][0]
        on_progress(done, size)
        yield begun.popleft()[1]


def map_blocks(
    run: Callable[[np.ndarray, int], Any],
    size: int,
    block_size: int,
    on_progress: OnProgress = ignore_progress,
    smallest: int = 1,
) -> list[Any]:
    """Returns `run(positions, count)` of each block, one after the other.

    As `each_block` with none ahead, so `run` may change what it has at hand, once it is sure that
    memory has not run out.
    """
    return list(each_block(run, size, block_size, on_progress, smallest, ahead=0))


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
