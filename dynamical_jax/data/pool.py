"""The pool: which examples are labeled, and the oracle that knows labels. NumPy only."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynamical_jax import words
from dynamical_jax.errors import UserError


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


def initial_pool(rows: int | np.ndarray, initial_size: int, generator: np.random.Generator) -> Pool:
    """Draws the initial labeled set S, i.i.d. without replacement, from a pool.

    Args:
      rows: of the pool, sorted; or their number, if these are all that the data have.
      initial_size: M.
      generator: of the draw.
    """
    rows = np.arange(rows) if isinstance(rows, int) else rows
    everything = Pool(np.array([], dtype=np.int64), rows)
    pool, _ = everything.reveal(generator.choice(len(rows), initial_size, replace=False))
    return pool


def imbalanced_rows(
    labels: np.ndarray, shares: Sequence[float | int], generator: np.random.Generator
) -> np.ndarray:
    """Draws rows of which a given share of each class is left; returns them sorted.

    Args:
      labels: `[n]` class of each row.
      shares: of class 0, 1, …, each from 0 to 1; where there are fewer than classes, they are
        repeated. So many rows are left of a class as its share of them, rounded.
      generator: of the draws.

    Raises:
      UserError: if there is no share, or more than classes, or one is not between 0 and 1.
    """
    num_classes = int(np.max(labels)) + 1
    if len(shares) > num_classes:
        number = words.count(len(shares), "share is", "shares are")
        raise UserError(f"{number} given for {words.count(num_classes, 'class', 'classes')}")
    # The comparison is False for NaN.
    if not shares or not all(0 <= share <= 1 for share in shares):
        given = ",".join(map(str, shares))
        raise UserError(f"shares of classes must be numbers from 0 to 1, got {given!r}")
    kept = [
        generator.choice(rows := np.flatnonzero(labels == label), round(share * len(rows)), False)
        for label, share in zip(range(num_classes), itertools.cycle(shares), strict=False)
    ]
    return np.sort(np.concatenate(kept))


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
