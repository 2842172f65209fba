"""BADGE's idea with the gradient of the whole network, and Δ for its length."""

import numpy as np

from dynamical_jax.strategies import selection
from dynamical_jax.strategies.candidates import OnCandidates
from dynamical_jax.types import Array


class DynamicalDiverse(OnCandidates):
    """Draws examples of large Δ({u}|S) whose gradients are unlike each other.

    k-means++ with weights: the first is the one of largest Δ, each next one is drawn with
    probability proportional to Δ({u}|S) D², D being the exact distance of g_u to the nearest
    gradient of those chosen before. Where Δ is not above 0 the weight is 0: those come last, drawn
    uniformly.
    """

    def choose(
        self, key: Array, change: np.ndarray, products: np.ndarray, batch_size: int
    ) -> tuple[Array, np.ndarray]:
        """Returns the seeding, and Δ({u}|S) of each."""
        weights = np.maximum(change, 0)
        positions = selection.weighted_k_means_plus_plus(key, products, weights, batch_size)
        return positions, change[np.asarray(positions)]
