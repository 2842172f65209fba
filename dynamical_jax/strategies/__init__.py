"""Strategies: which unlabeled examples to label next.

To add a strategy, write a file with a class like those here and add a line to `STRATEGIES`; the
contract test finds it there.
"""

from dynamical_jax.errors import UserError
from dynamical_jax.strategies import selection as selection
from dynamical_jax.strategies.albl import ALBL as ALBL
from dynamical_jax.strategies.badge import Badge as Badge
from dynamical_jax.strategies.base import LearnerView as LearnerView
from dynamical_jax.strategies.base import Query as Query
from dynamical_jax.strategies.base import Strategy as Strategy
from dynamical_jax.strategies.base import check_embedding as check_embedding
from dynamical_jax.strategies.confidence import Confidence as Confidence
from dynamical_jax.strategies.coreset import Coreset as Coreset
from dynamical_jax.strategies.dynamical import Dynamical as Dynamical
from dynamical_jax.strategies.entropy import Entropy as Entropy
from dynamical_jax.strategies.margin import Margin as Margin
from dynamical_jax.strategies.random import Random as Random

STRATEGIES: dict[str, type[Strategy]] = {
    "dynamical": Dynamical,
    "random": Random,
    "confidence": Confidence,
    "margin": Margin,
    "entropy": Entropy,
    "coreset": Coreset,
    "badge": Badge,
    "albl": ALBL,
}


def create(name: str, **options: object) -> Strategy:
    """Returns the strategy called `name`.

    Raises:
      UserError: if the name is unknown, or an option is out of range.
    """
    if name not in STRATEGIES:
        raise UserError(f"unknown strategy {name!r}; choose from {', '.join(STRATEGIES)}")
    return STRATEGIES[name](**options)
