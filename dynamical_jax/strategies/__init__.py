"""Strategies: which unlabeled examples to label next.

To add a strategy, write a file with a class like those here and add a line to `STRATEGIES`; the
contract test finds it there.
"""

import inspect
from collections.abc import Callable

from dynamical_jax import words
from dynamical_jax.strategies import selection as selection
from dynamical_jax.strategies.albl import ALBL as ALBL
from dynamical_jax.strategies.badge import Badge as Badge
from dynamical_jax.strategies.bait import Bait as Bait
from dynamical_jax.strategies.bald import Bald as Bald
from dynamical_jax.strategies.base import LearnerView as LearnerView
from dynamical_jax.strategies.base import Query as Query
from dynamical_jax.strategies.base import Strategy as Strategy
from dynamical_jax.strategies.base import check_model as check_model
from dynamical_jax.strategies.batch_bald import BatchBald as BatchBald
from dynamical_jax.strategies.confidence import Confidence as Confidence
from dynamical_jax.strategies.coreset import Coreset as Coreset
from dynamical_jax.strategies.diverse import DynamicalDiverse as DynamicalDiverse
from dynamical_jax.strategies.dynamical import Dynamical as Dynamical
from dynamical_jax.strategies.dynamical_herding import DynamicalHerding as DynamicalHerding
from dynamical_jax.strategies.entropy import Entropy as Entropy
from dynamical_jax.strategies.joint import DynamicalJoint as DynamicalJoint
from dynamical_jax.strategies.margin import Margin as Margin
from dynamical_jax.strategies.max_herding import MaxHerding as MaxHerding
from dynamical_jax.strategies.probcover import ProbCover as ProbCover
from dynamical_jax.strategies.random import Random as Random
from dynamical_jax.strategies.repelled import DynamicalRepelled as DynamicalRepelled
from dynamical_jax.strategies.sampled import Sampled as Sampled
from dynamical_jax.strategies.sampled import dynamical_sampled as dynamical_sampled
from dynamical_jax.strategies.sampled import power_margin as power_margin
from dynamical_jax.strategies.typiclust import TypiClust as TypiClust
from dynamical_jax.strategies.uncertainty_herding import UncertaintyHerding as UncertaintyHerding

STRATEGIES: dict[str, Callable[..., Strategy]] = words.Registry(
    "strategy",
    {
        "dynamical": Dynamical,
        "random": Random,
        "confidence": Confidence,
        "margin": Margin,
        "entropy": Entropy,
        "coreset": Coreset,
        "badge": Badge,
        "albl": ALBL,
        "typiclust": TypiClust,
        "probcover": ProbCover,
        "max_herding": MaxHerding,
        "uncertainty_herding": UncertaintyHerding,
        "bait": Bait,
        "bald": Bald,
        "batch_bald": BatchBald,
        "power_margin": power_margin,
        "dynamical_sampled": dynamical_sampled,
        "dynamical_joint": DynamicalJoint,
        "dynamical_diverse": DynamicalDiverse,
        "dynamical_repelled": DynamicalRepelled,
        "dynamical_herding": DynamicalHerding,
    },
)


def create(name: str, **options: object) -> Strategy:
    """Returns the strategy called `name`.

    Raises:
      UserError: if the name is unknown, or an option is out of range.
    """
    return STRATEGIES[name](**options)


def options(name: str) -> set[str]:
    """Returns the names of the options of a strategy; none if there is no such strategy."""
    return set(inspect.signature(STRATEGIES[name]).parameters) if name in STRATEGIES else set()
