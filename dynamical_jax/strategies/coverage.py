"""Queries that cover the pool: an example covers those whose embeddings are near to its own."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import streams
from dynamical_jax.errors import UserError
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.base import LearnerView, Query, Strategy, check_finite
from dynamical_jax.strategies.coreset import Embeddings
from dynamical_jax.strategies.predictions import predict
from dynamical_jax.types import AnyArray, Array, Outputs


class Coverage(NamedTuple):
    """The pool as it is covered by S.

    Attributes:
      points: `[n, d]` unit embeddings of U.
      targets: `[m, d]` those of the examples that are to be covered.
      weights: `[m]` how much each counts.
      covered: `[m]` how far each is covered by S, from 0 to 1.
      radius: of the kernel.
    """

    points: np.ndarray
    targets: AnyArray
    weights: AnyArray
    covered: Array
    radius: float


@dataclasses.dataclass(frozen=True)
class Covering(Strategy):
    """Chooses, one by one, the example that adds most to the coverage of the pool.

    The coverage by a set C is the mean over examples v of w_v max_{c∈C} k(c, v), w_v being their
    weights. Embeddings are divided by their norms, as in the programs of the papers. Where gains
    are equal chance decides.

    Attributes:
      radius: of the kernel k; None for the strategy's own rule.
      num_targets: coverage is measured on so many examples of the pool, drawn at random, or on all
        if there are no more. The papers take all, or draw 35,000 of which to choose, too; here all
        can be chosen.
    """

    needs_embedding: ClassVar[bool] = True
    kernel: ClassVar[selection.Kernel] = staticmethod(selection.gaussian)

    radius: float | None = None
    num_targets: int = 10_000

    def __post_init__(self):
        # The comparison is False for NaN.
        if self.radius is not None and not 0 < self.radius < np.inf:
            raise UserError(f"radius must be above 0 and finite, got {self.radius}")
        if self.num_targets < 1:
            raise UserError(f"num_targets must be at least 1, got {self.num_targets}")

    def score(self, key: Array, view: LearnerView, state: Any) -> Coverage:
        """Returns how the pool is covered by S."""
        key_targets, key_radius = jax.random.split(key)
        outputs, embeddings = unit_embeddings(view)
        points, labeled, _ = embeddings
        weights = self.weights(view, outputs.logits)
        radius = self.radius
        if radius is None:
            radius = self.default_radius(key_radius, embeddings, outputs.logits.shape[-1])
        targets = points
        if len(points) > self.num_targets:
            drawn = streams.generator_of(key_targets).permutation(len(points))[: self.num_targets]
            targets, weights = points[drawn], weights[drawn]
        covered = selection.coverage(targets, labeled, self.kernel, radius)
        return Coverage(points, targets, weights, covered, radius)

    def select(self, key: Array, scored: Coverage, batch_size: int, state: Any) -> Query:
        """Returns the examples in the order of choice; a score is the gain in coverage."""
        check_finite(np.asarray(scored.weights))
        *covering, radius = scored
        # Of equal gains the lower position is chosen: an order by chance lets chance decide.
        order = streams.generator_of(key).permutation(len(scored.points))
        covering[0] = covering[0][order]
        positions, gains = selection.cover(*covering, self.kernel, radius, batch_size)
        return Query(order[positions], gains, state)

    def weights(self, view: LearnerView, logits: Array) -> AnyArray:
        """Returns how much each example of U counts, of logits `[n, K]`; by default all alike."""
        return jnp.ones(len(logits))

    @abc.abstractmethod
    def default_radius(self, key: Array, embeddings: Embeddings, num_classes: int) -> float:
        """Returns the radius where none is given."""


@dataclasses.dataclass(frozen=True)
class NarrowingCovering(Covering):
    """A coverage with a radius that falls as labels come in.

    By default it is the smallest distance between labeled examples, copies aside; 1 where there are
    none.
    """

    def default_radius(self, key: Array, embeddings: Embeddings, num_classes: int) -> float:
        """Returns the smallest distance between labeled examples."""
        return selection.smallest_distance(embeddings.labeled) or 1.0


def unit_embeddings(view: LearnerView) -> tuple[Outputs, Embeddings]:
    """Returns the outputs for U, and embeddings of U and S on the host, each over its norm."""
    outputs = predict(view, view.unlabeled, view.on_progress)
    unlabeled = _unit(np.asarray(outputs.embedding))
    if len(view.labeled.y) == 0:
        return outputs, Embeddings(unlabeled, unlabeled[:0])
    labeled = predict(view, view.labeled.x).embedding
    return outputs, Embeddings(unlabeled, _unit(np.asarray(labeled)))


def _unit(x: np.ndarray) -> np.ndarray:
    # First by the largest entry, whose square may overflow. What is 0 stays 0.
    x = x / np.maximum(np.max(np.abs(x), axis=1, keepdims=True), np.finfo(x.dtype).tiny)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)
