"""Sets cut into blocks of one shape, so that one compiled program serves any set size."""

from collections.abc import Iterator

import numpy as np


def block_at(start: int, block_size: int, size: int) -> tuple[np.ndarray, int]:
    """Returns the positions of the block at `start` and how many of them, from the front, count.

    Every block has exactly `block_size` positions; the last of `size` rows is filled up with
    repetitions of the last position, which callers mask or cut off.

    >>> positions, count = block_at(3, 3, 5)
    >>> positions.tolist(), count
    ([3, 4, 4], 2)
    """
    positions = np.arange(start, start + block_size)
    return np.minimum(positions, size - 1), min(block_size, size - start)


def blocks(size: int, block_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the blocks of `size` rows."""
    for start in range(0, size, block_size):
        yield block_at(start, block_size, size)


def bucketed(size: int, limit: int) -> int:
    """Returns a block size for `size` rows: the next power of two, `limit` at most.

    Small sets need not be filled up to `limit`, and sets that grow from round to round meet few
    shapes to compile for.

    >>> bucketed(5, 256), bucketed(200, 256), bucketed(5000, 256)
    (8, 256, 256)
    """
    return min(limit, 1 << max(size - 1, 0).bit_length())
