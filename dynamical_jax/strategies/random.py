"""Random sampling, the baseline for all strategies."""

from typing import Any

import jax

from dynamical_jax.strategies.base import LearnerView, Strategy
from dynamical_jax.types import Array


class Random(Strategy):
    """Chooses uniformly without replacement: the highest of independent uniform scores."""

    def score(self, key: Array, view: LearnerView, state: Any) -> Array:
        """Returns one uniform number for each unlabeled example."""
        return jax.random.uniform(key, (len(view.unlabeled),))
