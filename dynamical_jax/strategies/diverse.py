"""BADGE's idea with the gradient of the whole network, and Δ for its length."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dynamical_jax import gradients
from dynamical_jax.errors import UserError
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import Query, check_finite
from dynamical_jax.strategies.candidates import OnCandidates
from dynamical_jax.strategies.dynamical import Changes
from dynamical_jax.types import Array


@dataclasses.dataclass(frozen=True)
class DynamicalDiverse(OnCandidates):
    """Draws examples of large Δ({u}|S) whose gradients are unlike each other.

    k-means++ with weights: the first is the one of largest Δ, each next one is drawn with
    probability proportional to Δ({u}|S) D², D being the exact distance of g_u to the nearest
    gradient of those chosen before. Where Δ is not above 0 the weight is 0: those come last, drawn
    uniformly.

    Attributes:
      sketch_size: if given, the draw is from the whole pool and not among candidates, with D from
        `gradients.sketch` of so many numbers. This takes one more pass over the pool.
    """

    sketch_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.sketch_size is None:
            return
        if self.sketch_size < 1:
            raise UserError(f"sketch_size must be at least 1, got {self.sketch_size}")
        if self.num_candidates is not None:
            raise UserError("with a sketch the draw is from the whole pool: give no num_candidates")

    def select(self, key: Array, scored: Changes, batch_size: int, state: Any) -> Query:
        """Returns the seeding, of candidates or of the whole pool."""
        if self.sketch_size is None:
            return super().select(key, scored, batch_size, state)
        check_finite(scored.change)
        key, key_sketch = jax.random.split(key)
        sketches = gradients.sketch(
            scored.view.apply,
            scored.view.variables,
            scored.view.unlabeled,
            scored.terms.label,
            size=self.sketch_size,
            seed=int(jax.random.bits(key_sketch, dtype="uint32")),
            engine=self.engine,
            chunk_size=self.chunk_size,
            on_progress=scored.view.on_progress,
            mesh=scored.view.mesh,
            loss=self.loss,
        )
        weights = np.maximum(scored.change, 0)
        one = np.ones((len(sketches), 1), sketches.dtype)
        positions, _ = selection.k_means_plus_plus(
            key, one, sketches, batch_size, weights, scored.view.mesh
        )
        return Query(np.asarray(positions), scored.change[np.asarray(positions)], state)

    def choose(
        self, key: Array, change: np.ndarray, products: np.ndarray, batch_size: int
    ) -> tuple[Array, np.ndarray]:
        """Returns the seeding, and Δ({u}|S) of each."""
        weights = np.maximum(change, 0)
        positions = selection.weighted_k_means_plus_plus(key, products, weights, batch_size)
        return positions, change[np.asarray(positions)]
