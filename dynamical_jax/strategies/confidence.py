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
        """Returns −log max_k p_k of each unlabeled example, in log-space throughout."""
        logits = predict(view, view.unlabeled, view.on_progress).logits
        return -jnp.max(jax.nn.log_softmax(logits), axis=-1)
