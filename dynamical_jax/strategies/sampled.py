"""Draws queries at random with probabilities given by scores (Kirsch et al., 2023)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import losses
from dynamical_jax.errors import UserError
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import LearnerView, Query, Strategy, check_finite
from dynamical_jax.strategies.dynamical import Dynamical
from dynamical_jax.strategies.margin import Margin
from dynamical_jax.types import Array


class Noisy(NamedTuple):
    """The result of the scoring strategy, and its scores with noise: β log s + Gumbel noise."""

    scored: Any
    scores: Array


@dataclasses.dataclass(frozen=True)
class Sampled(Strategy):
    """Draws without replacement, with probabilities proportional to s^β of another's scores s.

    That is the b largest of β log s + Gumbel noise: "power acquisition" of Kirsch et al.,
    "Stochastic Batch Acquisition" (2023, arXiv:2106.12059). Near-copies have scores alike and yet
    are not all drawn. Scores that are not above 0 come last, the larger first; scores that are not
    finite are refused.

    Attributes:
      of: the strategy that scores; one that chooses by scores alone.
      beta: β, 0 for a uniform draw, whatever the scores, `math.inf` for the query of `of`.
      scores: turns the result of `of.score` into the scores s `[n]`.
    """

    of: Strategy
    beta: float = 2.0
    scores: Callable[[Any], Any] = jnp.asarray

    def __post_init__(self):
        if math.isnan(self.beta) or self.beta < 0:
            raise UserError(f"beta must be at least 0 (inf is allowed), got {self.beta}")

    @property
    def needs_embedding(self) -> bool:
        """Whether the scoring strategy needs an embedding."""
        return self.of.needs_embedding

    @property
    def needs_dropout(self) -> bool:
        """Whether the strategy that scores does."""
        return self.of.needs_dropout

    @property
    def needs_losses(self) -> tuple[losses.Loss, ...]:
        """Those of the strategy that scores."""
        return self.of.needs_losses

    def init(self) -> Any:
        """Returns the state of the strategy that scores."""
        return self.of.init()

    def score(self, key: Array, view: LearnerView, state: Any) -> Noisy:
        """Returns what the strategy scored, and its scores after noise."""
        key_score, key_noise = jax.random.split(key)
        scored = self.of.score(key_score, view, state)
        scores = jnp.asarray(self.scores(scored))
        check_finite(np.asarray(scores))
        return Noisy(scored, selection.with_noise(key_noise, scores, self.beta))

    def select(self, key: Array, scored: Noisy, batch_size: int, state: Any) -> Query:
        """Returns the highest scores after noise."""
        if self.beta == math.inf:
            return self.of.select(key, scored.scored, batch_size, state)
        return super().select(key, scored.scores, batch_size, state)

    def describe(self, view: LearnerView, scored: Noisy, query: Query) -> Mapping[str, float]:
        """Returns the facts that the scoring strategy records about the query."""
        return self.of.describe(view, scored.scored, query)


def dynamical_sampled(
    gamma: float = 2.0,
    engine: str = "factored",
    chunk_size: int | None = None,
    beta: float = 2.0,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Sampled:
    """Returns a strategy that draws with probabilities proportional to Δ({u}|S)^β.

    Δ can be negative where the inner product with g_S rules; those examples come last.

    Args:
      gamma: as of `Dynamical`, like the next two.
      engine: likewise.
      chunk_size: likewise.
      beta: as of `Sampled`.
      loss: as of `Dynamical`.
    """
    return Sampled(Dynamical(gamma, engine, chunk_size, loss), beta, _change)


def power_margin(beta: float = 2.0) -> Sampled:
    """Returns a strategy that draws with probabilities proportional to (1 − m)^β, m the margin.

    Kirsch et al. leave open what a margin's score is; 1 − m is in [0, 1], and 1 on a boundary.

    Args:
      beta: as of `Sampled`.
    """
    return Sampled(Margin(), beta, _one_minus_margin)


# Functions with a name, so that strategies can be sent to other processes.


def _change(scored: Any) -> Any:
    return scored.change


def _one_minus_margin(scores: Any) -> Any:
    # `Margin` gives log((1 − m) / m), the logit of 1 − m.
    return jax.nn.sigmoid(scores)
