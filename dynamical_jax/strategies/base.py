"""The contract of a strategy."""

import abc
import dataclasses
import time
import types
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynamical_jax import contract, losses, nnx_modules, words
from dynamical_jax.errors import UserError
from dynamical_jax.strategies import dropout, selection
from dynamical_jax.types import (
    ApplyFn,
    Array,
    Examples,
    OnProgress,
    Variables,
    ignore_progress,
)


@dataclasses.dataclass(frozen=True)
class LearnerView:
    """All that a strategy may see; it has no field for the labels of the pool.

    Attributes:
      apply: the model, `apply(variables, x)` in evaluation mode, which returns logits `[n, K]`, a
        pair of logits and embedding `[n, d]`, or `Outputs`: `model.apply` of a Flax Linen module.
      variables: its variables, trained on the labeled set.
      labeled: the labeled set S, in the order in which labels were asked for.
      unlabeled: `[n, ...]` inputs of the unlabeled set U; anything that gathers rows as
        `unlabeled[positions]` with an integer array: an array, a memory map, `types.Rows`.
      on_progress: called with (done, total) during long work.
      mesh: the devices among which work is divided; None for one.
    """

    apply: ApplyFn
    variables: Variables
    labeled: Examples | tuple[Any, Any]
    unlabeled: Any
    on_progress: OnProgress = ignore_progress
    mesh: Mesh | None = None

    @classmethod
    def from_nnx(
        cls, module: Any, labeled: Examples | tuple[Any, Any], unlabeled: Any, **fields: Any
    ) -> "LearnerView":
        """Returns the view of a trained `nnx.Module`, which is used in evaluation mode.

        Args:
          module: called with `(x)` or `(x, train=False)`. The state that it has now is used.
          labeled: as of `LearnerView`.
          unlabeled: likewise.
          **fields: further fields.
        """
        model, variables = nnx_modules.from_nnx(module)
        return cls(model.apply, variables, labeled, unlabeled, **fields)

    def __post_init__(self):
        object.__setattr__(self, "labeled", Examples(*self.labeled))
        shapes = [np.shape(self.labeled.x)[1:], np.shape(self.unlabeled)[1:]]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"labeled inputs are of shape {shapes[0]}, unlabeled ones {shapes[1]}: they must "
                "be alike"
            )
        if len(self.labeled.x) != len(self.labeled.y):
            inputs = words.count(len(self.labeled.x), "input")
            labels = words.count(len(self.labeled.y), "label")
            raise UserError(f"the labeled set has {inputs} and {labels}")


class Query(NamedTuple):
    """The examples that a strategy chose.

    Attributes:
      positions: `[b]` distinct positions in `view.unlabeled`.
      scores: `[b]` the strategy's score of each; higher scores are chosen first.
      state: the strategy's state, for its next query.
      seconds: time spent on "score", "select" and "describe".
      facts: name → number, facts about this query for the records.
    """

    positions: np.ndarray
    scores: np.ndarray
    state: Any = None
    seconds: Mapping[str, float] = types.MappingProxyType({})
    facts: Mapping[str, float | None] = types.MappingProxyType({})


class Strategy(abc.ABC):
    """Chooses which unlabeled examples to label next.

    Most strategies define `score` alone, and the highest scores are chosen. To choose in another
    way, override `select`; to keep a state from round to round, override `init`; to record facts
    about a query, override `describe`.

    Attributes:
      needs_embedding: whether the model has to return an embedding beside its logits.
      needs_dropout: whether the model has to have `Dropout` layers of Flax Linen.
      needs_losses: those that the model has to be trained by; an `Experiment` refuses another.
    """

    needs_embedding: ClassVar[bool] = False
    needs_dropout: ClassVar[bool] = False
    needs_losses: ClassVar[tuple[losses.Loss, ...]] = ()

    def init(self) -> Any:
        """Returns the state before the first query; None for strategies that keep none."""
        return None

    @abc.abstractmethod
    def score(self, key: Array, view: LearnerView, state: Any) -> Any:
        """Returns what `select` needs for each unlabeled example; by default scores `[n]`."""

    def select(self, key: Array, scored: Any, batch_size: int, state: Any) -> Query:
        """Returns the query from what `score` returned; by default the highest scores."""
        scores = np.asarray(scored)
        check_finite(scores)
        positions = np.asarray(selection.top_b(scores, batch_size))
        return Query(positions, scores[positions], state)

    def describe(self, view: LearnerView, scored: Any, query: Query) -> Mapping[str, float | None]:
        """Returns facts about a query, for the records; by default none."""
        return {}

    def query(
        self, key: Array, view: LearnerView, batch_size: int, state: Any | None = None
    ) -> Query:
        """Returns `batch_size` examples to label next.

        Args:
          key: the only source of randomness; the same key gives the same query.
          view: what the strategy may see.
          batch_size: b.
          state: what `init` or the last query returned; `init()` if None.

        Raises:
          UserError: if `batch_size` is not between 1 and the number of unlabeled examples, or a
            score is not finite, or the model lacks an embedding or dropout that is needed.
        """
        check_batch_size(batch_size, view)
        check_model(self, view.apply, view.variables, view.unlabeled)
        state = self.init() if state is None else state
        key_score, key_select = jax.random.split(key)
        start = time.perf_counter()
        scored = jax.block_until_ready(self.score(key_score, view, state))
        middle = time.perf_counter()
        try:
            query = self.select(key_select, scored, batch_size, state)
            check_finite(query.scores)
        except NotFiniteError as error:
            why = contract.explain_not_finite(view.variables, view.unlabeled)
            raise NotFiniteError(f"{error}{why}") from None
        chosen = time.perf_counter()
        seconds = {"score": middle - start, "select": chosen - middle}
        if facts := self.describe(view, scored, query):
            seconds["describe"] = time.perf_counter() - chosen
        return query._replace(seconds=seconds, facts=facts)


def check_model(strategy: Strategy, apply: ApplyFn, variables: Variables, x: Any) -> None:
    """Raises `UserError` if a strategy needs an embedding or dropout that a model does not have.

    Nothing is computed.

    Args:
      strategy: the strategy.
      apply: the model, as in `LearnerView`.
      variables: its variables.
      x: `[n, ...]` inputs.
    """
    name = type(strategy).__name__
    if strategy.needs_embedding and contract.output_shapes(apply, variables, x).embedding is None:
        raise UserError(
            f"{name} needs embeddings: let the model return (logits, embedding), the embedding "
            "[n, d] being what its last layer is given"
        )
    if strategy.needs_dropout and not dropout.num_dropout_layers(apply, variables, x):
        raise UserError(
            f"{name} needs a model with dropout, and this one calls no flax.linen.Dropout of a "
            "rate above 0"
        )


class NotFiniteError(UserError):
    """Scores are not finite."""


def check_finite(scores: np.ndarray) -> None:
    """Raises `NotFiniteError` unless all scores, or distances, are finite."""
    if not np.all(np.isfinite(scores)):
        raise NotFiniteError(
            f"{np.sum(~np.isfinite(scores))} of {len(scores)} scores are not finite; the model has "
            "diverged or an input is not finite"
        )


def check_batch_size(batch_size: int, view: LearnerView) -> None:
    """Raises `UserError` unless `batch_size` examples can be queried."""
    if not 1 <= batch_size <= len(view.unlabeled):
        number = words.count(len(view.unlabeled), "unlabeled example")
        raise UserError(
            f"cannot query {batch_size} of {number}; choose between 1 and {len(view.unlabeled)}"
        )
