"""ProbCover: covers as much of the pool as it can with balls (Yehuda et al., 2022)."""

import dataclasses
import math
from typing import ClassVar

import jax
import numpy as np

from dynamical_jax import streams
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.clusters import cluster
from dynamical_jax.strategies.coreset import Embeddings
from dynamical_jax.strategies.coverage import Covering
from dynamical_jax.types import Array

IMPURE_OF = 20  # One ball in so many may be impure.
BALLS = 2_000


@dataclasses.dataclass(frozen=True)
class ProbCover(Covering):
    """Chooses, one by one, the example whose ball holds most of what no ball holds so far.

    Balls of one radius δ lie around unit embeddings, around labeled ones, too; Yehuda et al.,
    "Active Learning Through a Covering Lens" (2022, arXiv:2205.11320). What the model predicts does
    not matter. Once all is covered, further examples are random.

    `radius` is δ. By default it is the paper's: the largest at which 95 % of balls are pure, that
    is hold a single class, with clusters of k-means, as many as classes, in place of the unknown
    classes. A ball is pure up to the distance to the nearest example of another class, so that δ
    is a quantile of these distances; here of 2,000 balls, drawn at random.
    """

    kernel: ClassVar[selection.Kernel] = staticmethod(selection.ball)

    def default_radius(self, key: Array, embeddings: Embeddings, num_classes: int) -> float:
        """Returns the largest radius at which 95 % of balls are pure; 1 where all always are."""
        points = np.concatenate(embeddings[:2])
        key_clusters, key_balls = jax.random.split(key)
        classes = cluster(key_clusters, points, num_classes)
        drawn = streams.generator_of(key_balls).permutation(len(points))[:BALLS]
        reach = selection.distances_to_others(points[drawn], classes[drawn], points, classes)
        # Balls are open: one of the radius of its reach is pure still.
        radius = float(np.sort(reach)[len(reach) // IMPURE_OF])
        return radius if 0 < radius < math.inf else 1.0
