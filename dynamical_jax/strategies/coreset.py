"""Coreset: k-center greedy on embeddings (Sener & Savarese, 2018)."""

from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import LearnerView, Query, Strategy
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import Array


class Embeddings(NamedTuple):
    """Penultimate features of U `[n, d]` and S `[m, d]`, in evaluation mode.

    And the devices that divide the former.
    """

    unlabeled: Array
    labeled: Array
    mesh: Mesh | None = None


class Coreset(Strategy):
    """Chooses one by one the example farthest from all that are labeled or chosen already."""

    needs_embedding = True

    def score(self, key: Array, view: LearnerView, state: Any) -> Embeddings:
        """Returns the embeddings of U and S."""
        unlabeled = predict(view, view.unlabeled, view.on_progress).embedding
        labeled = unlabeled[:0]
        if len(view.labeled.y):
            labeled = predict(view, view.labeled.x).embedding
        return Embeddings(unlabeled, labeled, view.mesh)

    def select(self, key: Array, scored: Embeddings, batch_size: int, state: Any) -> Query:
        """Returns the farthest-first traversal; a score is the distance at the time of choice."""
        unlabeled, labeled, mesh = scored
        positions, distances = selection.farthest_first(unlabeled, labeled, batch_size, mesh)
        return Query(np.asarray(positions), np.asarray(distances), state)
