"""Coreset: k-center greedy on embeddings (Sener & Savarese, 2018)."""

from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import LearnerView, Query, Strategy
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import Array


class Embeddings(NamedTuple):
    """Penultimate features of U `[n, d]` and S `[m, d]`, in evaluation mode."""

    unlabeled: Array
    labeled: Array


class Coreset(Strategy):
    """Chooses one by one the example farthest from all that are labeled or chosen already."""

    needs_embedding = True

    def score(self, key: Array, view: LearnerView, state: Any) -> tuple[Embeddings, Mesh | None]:
        """Returns the embeddings of U and S, and the devices that divide the former."""
        unlabeled = predict(view, view.unlabeled, view.on_progress).embedding
        if len(view.labeled.y) == 0:
            return Embeddings(unlabeled, unlabeled[:0]), view.mesh
        return Embeddings(unlabeled, predict(view, view.labeled.x).embedding), view.mesh

    def select(
        self, key: Array, scored: tuple[Embeddings, Mesh | None], batch_size: int, state: Any
    ) -> Query:
        """Returns the farthest-first traversal; a score is the distance at the time of choice."""
        (unlabeled, labeled), mesh = scored
        positions, distances = selection.farthest_first(unlabeled, labeled, batch_size, mesh)
        return Query(np.asarray(positions), np.asarray(distances), state)
