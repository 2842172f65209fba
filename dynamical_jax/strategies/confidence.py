"""Least confidence (Wang & Shang, 2014)."""

from typing import Any

import jax
import jax.numpy as jnp

from dynamical_jax.strategies.base import LearnerView, Strategy
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import Array


class Confidence(Strategy):
    """Chooses the examples whose largest class probability is smallest."""

    def score(self, key: Array, view: LearnerView, state: Any) -> Array:
        """Returns −log max_k p_k of each unlabeled example."""
        logits = predict(view, view.unlabeled, view.on_progress).logits
        # log Σ_k exp(f_k − max f) without the term that is 1: added to it, small ones would vanish.
        behind = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        first = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
        return jnp.log1p(jnp.sum(behind, axis=-1, where=~first))
