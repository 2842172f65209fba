"""BALD: examples about which the networks that dropout draws disagree (Houlsby et al., 2011)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax.errors import UserError
from dynamical_jax.strategies import dropout
from dynamical_jax.strategies.base import LearnerView, Strategy, check_finite
from dynamical_jax.types import AnyArray, Array


@dataclasses.dataclass(frozen=True)
class Bald(Strategy):
    """Chooses the examples whose label would tell most about the network.

    The score is the mutual information of label and network, H(mean p) − mean H(p) over networks
    that dropout draws; Houlsby et al., "Bayesian Active Learning for Classification and Preference
    Learning" (2011, arXiv:1112.5745), with dropout as Gal et al., "Deep Bayesian Active Learning
    with Image Data" (2017, arXiv:1703.02910). All examples are seen by the same networks.

    The model needs `Dropout` layers of Flax Linen; all else of it is in evaluation mode.

    Attributes:
      num_networks: how many networks. The papers take 100 and more; time and memory,
        n × num_networks × K, grow with it.
    """

    needs_dropout: ClassVar[bool] = True

    num_networks: int = 20

    def __post_init__(self):
        if self.num_networks < 2:
            raise UserError(f"num_networks must be at least 2, got {self.num_networks}")

    def score(self, key: Array, view: LearnerView, state: Any) -> Array:
        """Returns the mutual information of each unlabeled example."""
        return mutual_information(self.log_probabilities(key, view))

    def log_probabilities(self, key: Array, view: LearnerView) -> AnyArray:
        """Returns `[n, num_networks, K]` log-probabilities of U.

        Raises:
          UserError: if one is not finite.
        """
        keys = jax.random.split(key, self.num_networks)
        log_p = dropout.log_probabilities(
            view.apply, view.variables, view.unlabeled, keys, view.on_progress, view.mesh
        )
        # −inf, of probabilities that are 0, is fine.
        check_finite(np.where(np.isnan(log_p).any(axis=(1, 2)), np.nan, 0))
        return log_p


@jax.jit
def mutual_information(log_p: Array) -> Array:
    """Returns H(mean p) − mean H(p) `[n]`, the means over t networks, of log p `[n, t, K]`."""
    mean = jax.nn.logsumexp(log_p, axis=1) - jnp.log(log_p.shape[1])
    return entropy(mean) - jnp.mean(entropy(log_p), axis=1)


def entropy(log_p: Array) -> Array:
    """Returns −Σ p log p over the last axis; p log p is 0 where p is."""
    p = jnp.exp(log_p)
    return -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1)
