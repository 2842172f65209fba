"""BAIT in its binary form: examples that leave least Fisher information uncovered."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import LearnerView, Query, Strategy
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import Array, Outputs

RIDGE = 1.0


class Fisher(NamedTuple):
    """Factors v of the Fisher information v vᵀ of examples: of U `[n, d]` and S `[m, d]`."""

    unlabeled: Array
    labeled: Array


class Bait(Strategy):
    """Chooses examples after which the Fisher information of the pool is covered best.

    Ash et al., "Gone Fishing: Neural Active Learning with Fisher Embeddings" (2021,
    arXiv:2106.09675), in the binary form of Huseljic et al., "Fast Fishing" (2024,
    arXiv:2404.08981): is the predicted class, of probability p, the right one? Of this question the
    last layer's Fisher information at an embedding h is v vᵀ, v = √(p (1 − p)) h, `[d, d]` whatever
    the number of classes.

    Chosen greedily is what lowers tr(M⁻¹ F) most, F being the mean of v vᵀ over S and U and
    M = I + m/(m + b) · (mean of v vᵀ over S) + b/(m + b) · (sum of v vᵀ over the query). Twice the
    query is chosen first; then, one by one, what raises the trace least is dropped. Weights and
    the ridge of 1 are those of the authors' program of 2021.
    """

    needs_embedding = True

    def score(self, key: Array, view: LearnerView, state: Any) -> Fisher:
        """Returns the factors of the Fisher information of U and S."""
        unlabeled = _factors(predict(view, view.unlabeled, view.on_progress))
        if len(view.labeled.y) == 0:
            return Fisher(unlabeled, unlabeled[:0])
        return Fisher(unlabeled, _factors(predict(view, view.labeled.x)))

    def select(self, key: Array, scored: Fisher, batch_size: int, state: Any) -> Query:
        """Returns the examples in the order of choice; a score is how much the trace fell."""
        positions, gains = selection.least_trace(*information(*scored, batch_size), batch_size)
        return Query(np.asarray(positions), np.asarray(gains), state)


@jax.jit
def _factors(outputs: Outputs) -> Array:
    log_p = jnp.max(jax.nn.log_softmax(outputs.logits), axis=-1)
    return jnp.sqrt(jnp.exp(log_p) * -jnp.expm1(log_p))[:, None] * outputs.embedding


@functools.partial(jax.jit, static_argnames="batch_size")
def information(unlabeled: Array, labeled: Array, batch_size: int) -> tuple[Array, Array, Array]:
    """Returns the weighted factors of U, M of S alone `[d, d]` and F `[d, d]`."""
    num_labeled, size = len(labeled), len(unlabeled) + len(labeled)
    of_labeled, of_unlabeled = (_second_moment(part) for part in (labeled, unlabeled))
    share = batch_size / (num_labeled + batch_size)
    start = RIDGE * jnp.eye(unlabeled.shape[1]) + (1 - share) * of_labeled / max(num_labeled, 1)
    return np.sqrt(share) * unlabeled, start, (of_labeled + of_unlabeled) / size


def _second_moment(points: Array) -> Array:
    return jnp.matmul(points.T, points, precision=jax.lax.Precision.HIGHEST)
