"""ALBL: a bandit that learns which strategy to use (Hsu & Lin, 2015)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import losses
from dynamical_jax.errors import UserError
from dynamical_jax.strategies.base import LearnerView, Query, Strategy
from dynamical_jax.strategies.confidence import Confidence
from dynamical_jax.strategies.coreset import Coreset
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import Array, Examples


class BanditState(NamedTuple):
    """The state that ALBL keeps from query to query.

    Attributes:
      weights: `[arms]` log-weights of the arms, 0 at first.
      arm: which arm made the last query; −1 before the first.
      batch_size: of the last query.
    """

    weights: np.ndarray
    arm: np.ndarray
    batch_size: np.ndarray


@dataclasses.dataclass(frozen=True)
class ALBL(Strategy):
    """Draws one of several strategies for each query, more often those that were rewarded.

    Exp4.P (Beygelzimer et al., 2011) over the arms, in batch mode: all of a query comes from one
    arm. At the next query the arm is rewarded by the importance-weighted accuracy on what it had
    asked for, r̂ = accuracy / p, of the model that has since been trained on it; r̂ = 0 for the
    others. Each arm's weight is then multiplied by exp(½ p_min (r̂ + √(ln(K/δ)/K) / p)) with K arms,
    where the second term rewards arms that are seldom drawn. Exp4.P divides K by the number of
    queries as well, which is not known here; it is taken for 1, so the second term weighs more. A
    model trained until it fits its training set is nearly always right on it, whichever arm chose
    it: expect the reward to tell arms apart only weakly.

    Attributes:
      arms: the strategies by name; none may keep a state of its own.
      minimum_probability: p_min, with which each arm is drawn at least; by default 1 / (10 K).
      delta: δ, the probability with which Exp4.P's bound may fail.
    """

    arms: Mapping[str, Strategy] = dataclasses.field(
        default_factory=lambda: {"coreset": Coreset(), "confidence": Confidence()}
    )
    minimum_probability: float | None = None
    delta: float = 0.1

    def __post_init__(self):
        if not self.arms:
            raise UserError("ALBL needs at least one arm")
        if not 0 < self.delta < 1:
            raise UserError(f"delta must be between 0 and 1, got {self.delta}")
        if any(arm.init() is not None for arm in self.arms.values()):
            raise UserError("an arm of ALBL cannot keep a state of its own")
        if not 0 < self._minimum_probability * len(self.arms) <= 1:
            raise UserError(
                f"the minimum probability must be above 0 and at most 1/{len(self.arms)}, got "
                f"{self.minimum_probability}"
            )

    @property
    def needs_embedding(self) -> bool:
        """Whether any arm needs an embedding; it is checked before the first arm is drawn."""
        return any(arm.needs_embedding for arm in self.arms.values())

    @property
    def needs_dropout(self) -> bool:
        """Whether any arm needs a model with dropout."""
        return any(arm.needs_dropout for arm in self.arms.values())

    @property
    def needs_losses(self) -> tuple[losses.Loss, ...]:
        """The losses of all arms."""
        return tuple(loss for arm in self.arms.values() for loss in arm.needs_losses)

    @property
    def _minimum_probability(self) -> float:
        if self.minimum_probability is None:
            return 1 / (10 * len(self.arms))
        return self.minimum_probability

    def init(self) -> BanditState:
        """Returns equal weights."""
        return BanditState(np.zeros(len(self.arms)), np.array(-1), np.array(0))

    def probabilities(self, state: BanditState) -> np.ndarray:
        """Returns `[arms]` the probability with which each arm is drawn."""
        weights = np.exp(state.weights - state.weights.max())
        least = self._minimum_probability
        return (1 - len(weights) * least) * weights / weights.sum() + least

    def reward_last_arm(self, state: BanditState, accuracy: float) -> BanditState:
        """Returns the state after the last query's arm earned an accuracy in [0, 1]."""
        probabilities = self.probabilities(state)
        reward = np.zeros(len(probabilities))
        reward[state.arm] = accuracy / probabilities[state.arm]
        bonus = math.sqrt(math.log(len(reward) / self.delta) / len(reward)) / probabilities
        gain = self._minimum_probability / 2 * (reward + bonus)
        return state._replace(weights=state.weights + gain)

    def score(self, key: Array, view: LearnerView, state: BanditState) -> tuple[BanditState, Any]:
        """Rewards the last arm and draws the next; returns the new state and the arm's scores."""
        if state.arm >= 0:
            state = self.reward_last_arm(state, _accuracy(view, int(state.batch_size)))
        probabilities = self.probabilities(state)
        key_arm, key_score = jax.random.split(key)
        arm = int(jax.random.choice(key_arm, len(probabilities), p=jnp.asarray(probabilities)))
        state = state._replace(arm=np.array(arm))
        return state, self._arm(state).score(key_score, view, None)

    def select(
        self, key: Array, scored: tuple[BanditState, Any], batch_size: int, state: BanditState
    ) -> Query:
        """Returns the query of the arm that was drawn."""
        state, arm_scores = scored
        query = self._arm(state).select(key, arm_scores, batch_size, None)
        return query._replace(state=state._replace(batch_size=np.array(batch_size)))

    def _arm(self, state: BanditState) -> Strategy:
        return list(self.arms.values())[int(state.arm)]


def _accuracy(view: LearnerView, count: int) -> float:
    """Returns the accuracy on the `count` examples labeled last."""
    size = len(view.labeled.y)
    last = np.arange(size - count, size)
    queried = Examples(view.labeled.x[last], view.labeled.y[last])
    predicted = jnp.argmax(predict(view, queried.x).logits, axis=-1)
    return float(np.mean(np.asarray(predicted) == np.asarray(queried.y)))
