"""dynamicAL block by block; each block lowers the scores of examples with similar gradients."""

import dataclasses
from typing import Any

import numpy as np

from dynamical_jax import gradients
from dynamical_jax.errors import UserError
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import Query, check_finite
from dynamical_jax.strategies.dynamical import Changes, Dynamical
from dynamical_jax.types import Array, Examples


@dataclasses.dataclass(frozen=True)
class DynamicalRepelled(Dynamical):
    """Chooses a block of the largest Δ({u}|S), lowers the rest by g_u·g_Q of it, and so on.

    The authors' program does so, in blocks of 100; the paper does not say it. A block as large as
    the query gives that of `Dynamical`. Each further block takes one more pass over the pool.

    Attributes:
      block_size: examples of a block.
    """

    block_size: int = 100

    def __post_init__(self):
        super().__post_init__()
        if self.block_size < 1:
            raise UserError(f"block_size must be at least 1, got {self.block_size}")

    def select(self, key: Array, scored: Changes, batch_size: int, state: Any) -> Query:
        """Returns the blocks in turn; scores are as they were when chosen."""
        check_finite(scored.change)
        change, labels = np.array(scored.change), np.asarray(scored.terms.label)
        chosen: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        left = batch_size
        while True:
            block = np.asarray(selection.top_b(change, min(left, self.block_size)))
            chosen.append(block)
            scores.append(change[block])
            left -= len(block)
            if not left:
                return Query(np.concatenate(chosen), np.concatenate(scores), state)
            change -= self._products(scored, Examples(scored.view.unlabeled[block], labels[block]))
            change[np.concatenate(chosen)] = -np.inf

    def _products(self, scored: Changes, block: Examples) -> np.ndarray:
        """Returns g_u·g_Q `[n]` of the whole pool, Q being a block."""
        view = scored.view
        terms = gradients.norms_and_products(
            view.apply,
            view.variables,
            view.unlabeled,
            self._set_gradient(view, block),
            labels=scored.terms.label,
            engine=self.engine,
            chunk_size=self.chunk_size,
            on_progress=view.on_progress,
            mesh=view.mesh,
            loss=self.loss,
        )
        return np.asarray(terms.inner_product)
