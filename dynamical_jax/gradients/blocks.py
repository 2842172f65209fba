"""Sets cut into blocks of one shape, so that one compiled program serves any set size."""

from collections.abc import Iterator

import numpy as np


def blocks(size: int, block_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the positions of each block and how many of them, from the front, count.

    Every block has exactly `block_size` positions; the last is filled up with repetitions of the
    last position, which callers mask or cut off.

    >>> [(positions.tolist(), count) for positions, count in blocks(5, 3)]
    [([0, 1, 2], 3), ([3, 4, 4], 2)]
    """
    for start in range(0, size, block_size):
        positions = np.arange(start, start + block_size)
        yield np.minimum(positions, size - 1), min(block_size, size - start)


def bucketed(size: int, limit: int) -> int:
    """Returns a block size for `size` rows: the next power of two, `limit` at most.

    Small sets need not be filled up to `limit`, and sets that grow from round to round meet few
    shapes to compile for.

    >>> bucketed(5, 256), bucketed(200, 256), bucketed(5000, 256)
    (8, 256, 256)
    """
    return min(limit, 1 << max(size - 1, 0).bit_length())
