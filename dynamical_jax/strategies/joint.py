"""dynamicAL for a query as a whole: greedy on the exact Δ(Q|S), Eq. 13."""

import numpy as np

from dynamical_jax.strategies import selection
from dynamical_jax.strategies.candidates import OnCandidates
from dynamical_jax.types import Array


class DynamicalJoint(OnCandidates):
    """Adds one example after the other, the one by which the exact Δ(Q|S) grows most.

    Δ(Q|S) = Σ_u Δ({u}|S) + 2 Σ_{u<v} g_u·g_v: after each choice v the scores of the rest move by
    2 g_u·g_v. Eq. 14 of the paper leaves that term out because all pairs were too dear. It rewards
    gradients that agree, so expect examples that are alike. A query of one is that of `Dynamical`;
    the scores, each as it was when chosen, sum to Δ(Q|S).
    """

    def choose(
        self, key: Array, change: np.ndarray, products: np.ndarray, batch_size: int
    ) -> tuple[Array, Array]:
        """Returns the greedy choice, and by how much each let Δ(Q|S) grow."""
        return selection.greedy(change, 2 * products, batch_size)
