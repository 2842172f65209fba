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
        """Returns log((1 − m) / m) of the margin m = p_(1) − p_(2) of each unlabeled example."""
        return margin_score(predict(view, view.unlabeled, view.on_progress).logits)


def margin_score(logits: Array) -> Array:
    """Returns log((1 − m) / m) `[n]` of the margin m = p_(1) − p_(2), of logits `[n, K]`.

    It falls as m grows, and tells apart margins near 0 as well as near 1.
    """
    top = jax.lax.top_k(logits, logits.shape[-1])[0]
    behind = top[:, 1:] - top[:, :1]
    # With q_k = p_(k) / p_(1): m = (1 − q_2) / Σ q and 1 − m = (2 q_2 + q_3 + …) / Σ q.
    margin = -jnp.expm1(behind[:, 0])
    rest = jnp.sum(jnp.exp(behind), axis=-1) + jnp.exp(behind[:, 0])
    tiny = jnp.finfo(rest).tiny
    return jnp.log(jnp.maximum(rest, tiny)) - jnp.log(jnp.maximum(margin, tiny))
