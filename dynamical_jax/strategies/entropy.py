"""Largest entropy of the predicted classes (Wang & Shang, 2014)."""

from typing import Any

import jax
import jax.numpy as jnp

from dynamical_jax.strategies.base import LearnerView, Strategy
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import Array


class Entropy(Strategy):
    """Chooses the examples whose predicted class distribution has the largest entropy."""

    def score(self, key: Array, view: LearnerView, state: Any) -> Array:
        """Returns −Σ_k p_k log p_k of each unlabeled example, in nats."""
        logits = predict(view, view.unlabeled, view.on_progress).logits
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
