"""The pool: which examples are labeled, and the oracle that knows labels. NumPy only."""

from typing import NamedTuple

import numpy as np


class Pool(NamedTuple):
    """The rows of a data set's pool, split into labeled S and unlabeled U.

    `labeled` is in the order in which labels were asked for; `unlabeled` is sorted. Both hold rows
    of the pool. A strategy returns *positions in `unlabeled`*; only `reveal` turns positions into
    rows.
    """

    labeled: np.ndarray
    unlabeled: np.ndarray

    def reveal(self, positions: np.ndarray) -> tuple["Pool", np.ndarray]:
        """Moves positions of `unlabeled` to the end of `labeled`.

        Returns:
          The new pool, and the rows that were moved, in the order of `positions`.

        Raises:
          ValueError: if a position is out of range or given twice.
        """
        positions = np.asarray(positions)
        if len(np.unique(positions)) != len(positions):
            raise ValueError("a query holds a position twice")
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self.unlabeled):
            raise ValueError("a query holds a position outside the unlabeled set")
        rows = self.unlabeled[positions]
        moved = Pool(np.append(self.labeled, rows), np.delete(self.unlabeled, positions))
        return moved, rows


def initial_pool(size: int, initial_size: int, generator: np.random.Generator) -> Pool:
    """Draws the initial labeled set S, i.i.d. without replacement, from a pool of `size` rows."""
    everything = Pool(np.array([], dtype=np.int64), np.arange(size))
    pool, _ = everything.reveal(generator.choice(size, initial_size, replace=False))
    return pool


class Oracle:
    """Knows the labels of the pool, and returns those that are asked for.

    Args:
      labels: `[n]` the label of every row of the pool.
    """

    def __init__(self, labels: np.ndarray):
        self._labels = np.asarray(labels)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Returns the labels of rows of the pool."""
        return self._labels[rows]
