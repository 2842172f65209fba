"""BatchBALD: a query that tells most about the network as a whole (Kirsch et al., 2019)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import streams
from dynamical_jax.errors import UserError
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.bald import Bald, entropy
from dynamical_jax.strategies.base import LearnerView, Query
from dynamical_jax.types import AnyArray, Array


@dataclasses.dataclass(frozen=True)
class BatchBald(Bald):
    """Chooses, one by one, the example whose label tells most beside those of the chosen ones.

    The gain is that of the mutual information of all labels of the query together and the network;
    Kirsch et al., "BatchBALD" (2019, arXiv:1906.08158). It is exact as long as labels can be put
    together in no more than `num_configurations` ways; then so many are drawn from their joint
    distribution, as in the paper. t networks can be told apart by log t nats, so that a query gains
    next to nothing beyond a dozen examples: this is for small queries.

    Attributes:
      num_configurations: how many ways of putting labels together are looked at; at least
        `num_networks`, so that each network draws some.
    """

    num_configurations: int = 1_000

    def __post_init__(self):
        super().__post_init__()
        if self.num_configurations < self.num_networks:
            raise UserError(
                f"num_networks must be at most num_configurations, got {self.num_networks} and "
                f"{self.num_configurations}"
            )

    def score(self, key: Array, view: LearnerView, state: Any) -> AnyArray:
        """Returns the log-probabilities `[n, num_networks, K]` of U."""
        return self.log_probabilities(key, view)

    def select(self, key: Array, scored: AnyArray, batch_size: int, state: Any) -> Query:
        """Returns the examples in the order of choice; a score is the gain in information."""
        log_p = np.asarray(scored)
        joint = Joint(log_p.shape[1], self.num_configurations, streams.generator_of(key))

        def gains(positions: np.ndarray) -> Array:
            return _gains(log_p[positions], *joint.configurations)

        positions, scores = selection.lazy_greedy(
            gains, lambda position: joint.add(log_p[position]), len(log_p), batch_size
        )
        return Query(positions, scores, state)


class Joint:
    """The labels of the chosen examples: ways of putting them together, and their probabilities.

    Args:
      num_networks: t.
      limit: how many ways are kept, at least t; where there are more they are drawn.
      generator: of the draws.
    """

    def __init__(self, num_networks: int, limit: int, generator: np.random.Generator):
        self._limit, self._generator = limit, generator
        self._log_p = np.zeros((1, num_networks), np.float32)
        # The network by which each way was drawn, once ways are drawn.
        self._networks: np.ndarray | None = None

    @property
    def configurations(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns log p `[limit, t]` of each way by each network, and log-weights `[limit]`.

        The sum over ways of weight × p × f, p being the mean over networks, is the mean of f over
        the joint distribution, or its unbiased estimate. What is beyond the number of ways has no
        weight.
        """
        weight = np.zeros(len(self._log_p), np.float32)
        if self._networks is not None:
            # 1 / how often the way is expected; networks draw one more or less than others.
            draws = np.bincount(self._networks).astype(np.float32)
            weight = -np.logaddexp.reduce(self._log_p + np.log(draws), axis=1)
        missing = self._limit - len(weight)
        log_p = np.pad(self._log_p, ((0, missing), (0, 0)))
        return log_p, np.pad(weight, (0, missing), constant_values=-np.inf)

    def add(self, log_p: np.ndarray) -> None:
        """Adds an example of log-probabilities `[t, K]`."""
        if self._networks is None:
            if len(self._log_p) * log_p.shape[1] <= self._limit:
                self._log_p = (self._log_p[:, None] + log_p.T).reshape(-1, len(log_p))
                return
            # The networks draw in turn, each by its own probabilities.
            self._networks = np.arange(self._limit) % len(log_p)
            self._log_p = self._log_p[self._draw(self._log_p.T)]
        self._log_p = self._log_p + log_p.T[self._draw(log_p)]

    def _draw(self, log_p: np.ndarray) -> np.ndarray:
        """Draws one of the columns of log p `[t, ways]` for each of the networks."""
        odds = log_p[self._networks]
        return np.argmax(odds + self._generator.gumbel(size=odds.shape), axis=1)


@jax.jit
def _gains(log_p: Array, log_joint: Array, log_weights: Array) -> Array:
    """H(y, chosen) − H(chosen) − mean H(y) over networks, of candidates `[m, t, K]`."""
    # Probabilities of many labels together are too small for float32: their largest is set apart.
    largest = jnp.max(log_joint, axis=1)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)  # Of ways that no network allows.
    joint = jnp.exp(log_joint - largest[:, None]) / log_joint.shape[1]
    weights = jnp.exp(log_weights + largest)

    def together(p: Array) -> Array:
        return jnp.sum(weights * (entropy(jnp.log(p)) - largest * jnp.sum(p, axis=1)))

    def with_chosen(candidate: Array) -> Array:
        return together(jnp.matmul(joint, jnp.exp(candidate), precision=jax.lax.Precision.HIGHEST))

    of_chosen = together(jnp.sum(joint, axis=1, keepdims=True))
    return jax.lax.map(with_chosen, log_p) - of_chosen - jnp.mean(entropy(log_p), axis=1)
