"""A strategy for those who do not want to choose one: a rule of thumb, which says what it does."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from dynamical_jax.strategies import LearnerView, Query, Random, Strategy, UncertaintyHerding
from dynamical_jax.types import Array

FEWEST = 2
"""Labels for each class, on average, below which images are drawn at random."""


@dataclasses.dataclass(frozen=True)
class Automatic(Strategy):
    """Draws at random while labels are few, then asks another strategy.

    A model of fewer than `FEWEST` labels for each class hardly knows what it does not know, and
    random images show which classes there are. After that `uncertainty_herding`, whose area under
    the curve is above BADGE's and margin's on embeddings of two data sets and on digits with a
    small network (`results/strategies/`).

    Attributes:
      later: the strategy after that.
      name: what it is called.
      say: called with a line that says what is done, and why.
    """

    later: Strategy = dataclasses.field(default_factory=UncertaintyHerding)
    name: str = "uncertainty_herding"
    say: Callable[[str], None] = print

    def score(self, key: Array, view: LearnerView, state: Any) -> Any:
        """Returns the scores of the strategy that is in turn."""
        return self._now(view).score(key, view, state)

    def query(
        self, key: Array, view: LearnerView, batch_size: int, state: Any | None = None
    ) -> Query:
        """Returns the query of the strategy that is in turn, and says which one."""
        now = self._now(view)
        labels, classes = _counts(view)
        name = self.name if now is self.later else "random"
        relation = "at least" if now is self.later else "fewer than"
        self.say(
            f"strategy: {name}, because there are {labels} labels of {classes} classes, {relation} "
            f"{FEWEST} for each"
        )
        return now.query(key, view, batch_size, state)

    def _now(self, view: LearnerView) -> Strategy:
        labels, classes = _counts(view)
        return self.later if labels >= FEWEST * classes else Random()


def _counts(view: LearnerView) -> tuple[int, int]:
    """Returns the number of labels, and of classes that have some."""
    return len(view.labeled.y), len(np.unique(view.labeled.y))
