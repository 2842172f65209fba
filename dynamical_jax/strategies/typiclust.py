"""TypiClust: the most typical example of each cluster (Hacohen et al., 2022)."""

from typing import Any

import numpy as np

from dynamical_jax.strategies.base import LearnerView, Query, Strategy
from dynamical_jax.strategies.clusters import cluster
from dynamical_jax.strategies.coreset import Embeddings
from dynamical_jax.strategies.coverage import unit_embeddings
from dynamical_jax.types import Array

MOST_CLUSTERS = 500
SMALL = 5
NEIGHBORS = 20


class TypiClust(Strategy):
    """Chooses the most typical examples of clusters that have no labels, the largest first.

    Unit embeddings of S and U are put into |S| + b clusters, at most 500, by k-means. Clusters take
    turns: those of fewest labeled examples first, of these the largest. Each gives its most typical
    example, whose mean distance to its 20 nearest in the cluster, or to half of a cluster that is
    smaller, is least; Hacohen et al., "Active Learning on a Budget: Opposite Strategies Suit High
    and Low Budgets" (2022, arXiv:2202.02794). Neighbours are not labeled or chosen ones, and
    clusters of at most 5 examples give none, as in the authors' program; here they do once there
    are no others. Distances are as in the paper, in the program they are squared.
    """

    needs_embedding = True

    def score(self, key: Array, view: LearnerView, state: Any) -> Embeddings:
        """Returns the unit embeddings of U and S."""
        return unit_embeddings(view)[1]

    def select(self, key: Array, scored: Embeddings, batch_size: int, state: Any) -> Query:
        """Returns one example of each cluster in turn; a score is its typicality."""
        points, num_labeled = scored.unlabeled, len(scored.labeled)
        count = min(num_labeled + batch_size, MOST_CLUSTERS)
        clusters = cluster(key, np.concatenate([scored.labeled, points]), count)
        sizes = np.bincount(clusters, minlength=count)
        labeled = np.bincount(clusters[:num_labeled], minlength=count)
        order = np.lexsort((-sizes, labeled))
        members = {each: np.flatnonzero(clusters[num_labeled:] == each) for each in order}
        positions: list[int] = []
        scores: list[float] = []
        for small in (False, True):
            turns = [each for each in order if (sizes[each] <= SMALL) == small]
            while len(positions) < batch_size and any(len(members[each]) for each in turns):
                for each in turns:
                    if len(members[each]) == 0 or len(positions) == batch_size:
                        continue
                    typical = typicality(points[members[each]])
                    best = np.argmax(typical)
                    positions.append(members[each][best])
                    scores.append(typical[best])
                    members[each] = np.delete(members[each], best)
        return Query(np.array(positions), np.array(scores), state)


def typicality(points: np.ndarray) -> np.ndarray:
    """Returns, for each of the points `[n, d]` of a cluster, one over its mean distance to others.

    Of a point without others it is 0.
    """
    from sklearn.neighbors import NearestNeighbors  # here, because it takes a while

    if len(points) == 1:
        return np.zeros(1)
    count = min(max(len(points) // 2, 1), NEIGHBORS)
    # Asked without points, it leaves each out among its own neighbours.
    distances, _ = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(points).kneighbors()
    return 1 / (np.mean(distances, axis=1) + 1e-5)
