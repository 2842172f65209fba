"""Smallest margin (Roth & Small, 2006)."""

from typing import Any

import jax
import jax.numpy as jnp

from dynamical_jax.strategies.base import LearnerView, Strategy
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import Array


class Margin(Strategy):
    """Chooses the examples whose two most probable classes are closest in probability."""

    def score(self, key: Array, view: LearnerView, state: Any) -> Array:
        """Returns −(p_(1) − p_(2)) of each unlabeled example."""
        logits = predict(view, view.unlabeled, view.on_progress).logits
        largest, second = jnp.moveaxis(jax.lax.top_k(jax.nn.log_softmax(logits), 2)[0], -1, 0)
        # p₁ − p₂ = −p₁ (p₂/p₁ − 1), without the cancellation of nearly equal probabilities.
        return jnp.exp(largest) * jnp.expm1(second - largest)
