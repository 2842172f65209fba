"""Strategies that compare the examples of largest Δ by the products of their gradients."""

import abc
import dataclasses
import math
from typing import Any

import numpy as np

from dynamical_jax import gradients
from dynamical_jax.errors import UserError
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import Query, check_finite
from dynamical_jax.strategies.dynamical import Changes, Dynamical
from dynamical_jax.types import AnyArray, Array, Rows

CANDIDATES_PER_LABEL = 10


@dataclasses.dataclass(frozen=True)
class OnCandidates(Dynamical):
    """Chooses among the examples of largest Δ({u}|S), by Δ and their products g_u·g_v.

    Attributes:
      num_candidates: number of these examples; by default ten for each label of the query.
    """

    num_candidates: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.gamma == math.inf:
            raise UserError("gamma must be finite where gradients of the query meet, got inf")
        if self.num_candidates is not None and self.num_candidates < 1:
            raise UserError(f"num_candidates must be at least 1, got {self.num_candidates}")

    def select(self, key: Array, scored: Changes, batch_size: int, state: Any) -> Query:
        """Returns the examples that `choose` takes of the candidates."""
        check_finite(scored.change)
        count = self.num_candidates or CANDIDATES_PER_LABEL * batch_size
        if count < batch_size:
            raise UserError(f"cannot query {batch_size} of {count} candidates: take more of them")
        count = min(count, len(scored.change))
        candidates = np.asarray(selection.top_b(scored.change, count))
        view = scored.view
        products = gradients.gram(
            view.apply,
            view.variables,
            Rows(view.unlabeled, candidates),
            np.asarray(scored.terms.label)[candidates],
            engine=self.engine,
            chunk_size=self.chunk_size,
            loss=self.loss,
        )
        positions, scores = self.choose(key, scored.change[candidates], products, batch_size)
        return Query(candidates[np.asarray(positions)], np.asarray(scores), state)

    @abc.abstractmethod
    def choose(
        self, key: Array, change: np.ndarray, products: np.ndarray, batch_size: int
    ) -> tuple[AnyArray, AnyArray]:
        """Returns positions among the candidates `[b]`, and the score of each.

        Args:
          key: the only source of randomness.
          change: `[n]` Δ({u}|S) of the candidates, largest first.
          products: `[n, n]` g_u·g_v of all pairs of them.
          batch_size: b.
        """
