"""BADGE: k-means++ seeding on gradients of the last layer (Ash et al., 2020)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamical_jax import losses
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import LearnerView, Query, Strategy
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import Array


class Factors(NamedTuple):
    """The last layer's gradients (p − e_ŷ) ⊗ h: residuals `[n, K]` and embeddings `[n, d]`.

    And the devices that divide them.
    """

    residual: Array
    embedding: Array
    mesh: Mesh | None = None


class Badge(Strategy):
    """Chooses examples of large and diverse gradients of the last layer at their pseudo-labels.

    The K·d numbers of a gradient are never formed, so memory is n (K + d), small also for a hundred
    classes.
    """

    needs_embedding = True

    def score(self, key: Array, view: LearnerView, state: Any) -> Factors:
        """Returns the factors of the gradients."""
        logits, embedding = predict(view, view.unlabeled, view.on_progress)
        residual = losses.residual(logits, jnp.argmax(logits, axis=-1))
        return Factors(residual, embedding, view.mesh)

    def select(self, key: Array, scored: Factors, batch_size: int, state: Any) -> Query:
        """Returns the seeding; a score is the distance to the nearest point chosen before."""
        residual, embedding, mesh = scored
        positions, distances = selection.k_means_plus_plus(
            key, residual, embedding, batch_size, mesh=mesh
        )
        return Query(np.asarray(positions), np.asarray(distances), state)
