"""Algorithm 1: train, query, ask the oracle, and repeat, keeping the weights."""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dynamical_jax import (
    contract,
    gradients,
    models,
    nnx_modules,
    parallel,
    streams,
    training,
    words,
)
from dynamical_jax.data.datasets import Dataset
from dynamical_jax.data.pool import Oracle, Pool, imbalanced_rows, initial_pool
from dynamical_jax.errors import UserError
from dynamical_jax.strategies import LearnerView, Strategy, check_model
from dynamical_jax.types import Examples, Rows, Variables, check_fields


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many labels are asked for, and in how many rounds (§2.2).

    Attributes:
      initial_size: M, labels of the initial set.
      batch_size: b, labels per query.
      num_rounds: R, queries. The model is trained R + 1 times, in rounds 0 to R.
    """

    initial_size: int
    batch_size: int
    num_rounds: int

    def __post_init__(self):
        check_fields(self)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")

    @property
    def total(self) -> int:
        """M + R·b, the number of labels at the end."""
        return self.initial_size + self.num_rounds * self.batch_size


class Underway(NamedTuple):
    """The part of `State` that exists only during the training of a round.

    Attributes:
      epoch: number of epochs done.
      optimizer_state: the optimiser's.
      best_test_accuracy: the best so far; 0 before the first evaluation on the test set.
      seconds: time spent so far, as in `Round`.
    """

    epoch: int
    optimizer_state: Any
    best_test_accuracy: float
    seconds: dict[str, float]


class State(NamedTuple):
    """The state of a run: all that a round depends on, besides the experiment itself.

    Attributes:
      round_index: the next round, or the one in progress.
      pool: S and U.
      variables: the model's.
      strategy_state: the state of the strategy.
      underway: None before the round; during its training, the state of that.
    """

    round_index: int
    pool: Pool
    variables: Variables
    strategy_state: Any
    underway: Underway | None = None


@dataclasses.dataclass(frozen=True)
class Round:
    """The result of one round: the model was trained on S and evaluated, then Q was queried.

    Attributes:
      round_index: 0 for the initial set.
      num_labeled: |S|.
      epochs: number of epochs of training.
      converged: whether training met its targets.
      labeled: evaluation on S after training.
      test: evaluation on the test set after the last epoch.
      best_test_accuracy: the best over those epochs of this round after which the model was
        evaluated on the test set. Nothing depends on it; some published tables report it.
      initial: `[M]` in round 0 the initial set, as `Dataset.index`; empty in the others.
      query: `[b]` the queried examples, as `Dataset.index`; empty in the last round.
      query_scores: `[b]` the strategy's scores of these.
      query_facts: name → number, facts from `Strategy.describe`.
      seconds: time of "train", "evaluate", "score" and "select", of "describe" if the strategy
        returns facts, and of "checkpoint" if a state was saved during training.
    """

    round_index: int
    num_labeled: int
    epochs: int
    converged: bool
    labeled: training.Evaluation
    test: training.Evaluation
    best_test_accuracy: float
    initial: np.ndarray
    query: np.ndarray
    query_scores: np.ndarray
    query_facts: Mapping[str, float | None]
    seconds: dict[str, float]


class Reporter:
    """Receives the progress of a round; this one ignores it. Derive from it to show progress."""

    def begin(self, round_index: int) -> None:
        """Called before a round."""

    def epoch(self, epoch: int, labeled: training.Evaluation | None, target: float | None) -> None:
        """Called after one or several epochs, as `training.fit` says.

        Args:
          epoch: number of epochs so far in this round.
          labeled: evaluation on S, or None if there was none after this epoch.
          target: the mean loss on S at which training stops; None if the loss does not decide.
        """

    def scored(self, done: int, total: int) -> None:
        """Called while the pool is scored."""


SILENT = Reporter()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One strategy with one seed.

    The initial set and the initial weights depend on the seed and not on the strategy, so that runs
    of different strategies with the same seed are paired.

    Attributes:
      dataset: the pool and the test set.
      model: a Flax module called with raw inputs, `(x, train=False)` or `(x)`: of Linen, or of NNX,
        which then starts from the weights that it has, whatever the seed; or a function of `rngs`
        that makes an NNX module, which starts from weights of the seed. It returns logits `[n, K]`,
        a pair of logits and embedding `[n, d]`, or `Outputs`.
      strategy: chooses the queries.
      budget: how many labels are asked for, and in how many rounds.
      training_config: how the model is fitted in each round.
      seed: seed of all random numbers.
      evaluate_every: number of epochs between evaluations on the test set; 0 for one after the
        last epoch only.
      eval_batch_size: number of examples evaluated at a time; changes no result.
      mesh: devices among which the work is divided, as `parallel.make_mesh` makes it; changes
        results by rounding only.
      redundancy: whether `Round.query_facts` tell how alike the gradients of each query are,
        whatever the strategy: `gradients.redundancy`, at pseudo-labels.
      pool_shares: the share of each class that is left in the pool, drawn by the seed, as
        `pool.imbalanced_rows` takes them; by default all. The test set, and the statistics by which
        the model scales its inputs, stay as they are.

    Raises:
      UserError: on construction, if a field is of another type, the budget exceeds the pool, or the
        strategy takes gradients of another loss than `training_config.loss`.
    """

    dataset: Dataset
    model: Any
    strategy: Strategy
    budget: Budget
    training_config: training.TrainingConfig = training.TrainingConfig()  # noqa: RUF009
    seed: int = 0
    evaluate_every: int = 0
    eval_batch_size: int = 256
    mesh: Mesh | None = None
    redundancy: bool = False
    pool_shares: tuple[float | int, ...] = (1.0,)

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "model", nnx_modules.as_model(self.model))
        if not 0 <= self.seed <= streams.LARGEST_SEED:
            raise UserError(f"the seed must be between 0 and 2³² − 1, got {self.seed}")
        if self.evaluate_every < 0 or self.eval_batch_size < 1:
            raise UserError("evaluate_every must be at least 0, eval_batch_size at least 1")
        if any(loss != self.training_config.loss for loss in self.strategy.needs_losses):
            raise UserError(
                f"{type(self.strategy).__name__} takes gradients of another loss than the model is "
                "trained by: give the strategy and TrainingConfig the same Loss"
            )
        size = len(self._pool_rows())
        if self.budget.total > size:
            first = words.count(self.budget.initial_size, "initial label")
            queries = words.count(self.budget.num_rounds, "query", "queries")
            raise UserError(
                f"{first} and {queries} of {self.budget.batch_size} need {self.budget.total} "
                f"{self.dataset.kind}, but the pool of {self.dataset.name} has {size}"
            )

    def init(self) -> State:
        """Returns the state before round 0, with a random initial set and initial weights.

        Raises:
          UserError: if the model's outputs do not fit the data set and the strategy.
        """
        pool = initial_pool(
            self._pool_rows(),
            self.budget.initial_size,
            streams.generator(self.seed, "initial_set"),
        )
        key = streams.key(self.seed, "weights")
        variables = models.init(self.model, key, self.dataset.pool.x)
        outputs = contract.output_shapes(self.model.apply, variables, self.dataset.pool.x)
        num_outputs, num_classes = outputs.logits.shape[1], len(self.dataset.class_names)
        if num_outputs != num_classes:
            raise UserError(
                f"the model has {words.count(num_outputs, 'output')}, but {self.dataset.name} has "
                f"{words.count(num_classes, 'class', 'classes')}"
            )
        check_model(self.strategy, self.model.apply, variables, self.dataset.pool.x)
        return State(0, pool, variables, self.strategy.init())

    def _pool_rows(self) -> np.ndarray:
        """Rows of the data's pool that are in the pool of this run."""
        generator = streams.generator(self.seed, "imbalance")
        return imbalanced_rows(self.dataset.pool.y, self.pool_shares, generator)

    def step(
        self,
        state: State,
        reporter: Reporter = SILENT,
        save: Callable[[State], None] | None = None,
    ) -> tuple[State, Round]:
        """Runs one round: trains on S, evaluates, and, except in the last round, queries labels.

        Args:
          state: the state to start from, between rounds or within one; its arrays are used up.
          reporter: receives the progress of the round.
          save: called after one or several epochs, with a state from which `step` returns the same
            round, bit for bit, except for times. It must not keep the arrays, whose memory is
            reused.

        Raises:
          DivergedError: if training does.
          UserError: if scores are not finite.
        """
        reporter.begin(state.round_index)
        underway = state.underway or Underway(0, None, 0.0, {})
        stopwatch = _Stopwatch(underway.seconds)
        rows = state.pool.labeled
        labeled = Examples(Rows(self.dataset.pool.x, rows), Oracle(self.dataset.pool.y)(rows))
        # Rows that several devices divide are gathered on the host, not on the first device.
        test_set = self.dataset.test_examples if self.mesh is None else self.dataset.test
        best, test, last_test_epoch = underway.best_test_accuracy, None, 0

        def look_at_test(epoch: int, variables: Variables) -> None:
            nonlocal best, test, last_test_epoch
            with stopwatch("evaluate"):
                test = training.evaluate(
                    self.model.apply,
                    variables,
                    test_set,
                    self.eval_batch_size,
                    self.mesh,
                    self.training_config.loss,
                )
            best, last_test_epoch = max(best, test.accuracy), epoch

        target = self.training_config.largest_loss(len(rows))

        def on_epoch(progress: training.Progress, seen: training.Evaluation | None) -> None:
            epoch, variables, optimizer_state = progress
            reporter.epoch(epoch, seen, target)
            if self.evaluate_every and epoch % self.evaluate_every == 0:
                look_at_test(epoch, variables)
            if save is not None:
                with stopwatch("checkpoint"):
                    partial = Underway(epoch, optimizer_state, best, dict(stopwatch.seconds))
                    save(state._replace(variables=variables, underway=partial))

        start = state.variables
        if underway.epoch:
            start = training.Progress(underway.epoch, state.variables, underway.optimizer_state)
        with stopwatch("train"):
            fit = training.fit(
                self.model,
                start,
                labeled,
                self.training_config,
                self.seed,
                state.round_index,
                capacity=self.budget.total,
                eval_batch_size=self.eval_batch_size,
                on_epoch=on_epoch,
                call_every=self.evaluate_every or None,
                mesh=self.mesh,
            )
        if last_test_epoch != fit.epochs:
            look_at_test(fit.epochs, fit.variables)

        pool, strategy_state = state.pool, state.strategy_state
        query, scores, facts = np.array([], np.int64), np.array([]), {}
        if state.round_index < self.budget.num_rounds:
            images = self.dataset.pool_images if self.mesh is None else self.dataset.pool.x
            view = LearnerView(
                self.model.apply,
                fit.variables,
                Examples(Rows(images, rows), labeled.y),
                Rows(images, pool.unlabeled),
                reporter.scored,
                self.mesh,
            )
            key = streams.key(self.seed, "strategy", state.round_index)
            chosen = self.strategy.query(key, view, self.budget.batch_size, strategy_state)
            stopwatch.seconds.update(chosen.seconds)
            parallel.check_agreement(f"the query of round {state.round_index}", chosen.positions)
            scores, strategy_state, facts = chosen.scores, chosen.state, chosen.facts
            if self.redundancy and self.budget.batch_size > 1:
                with stopwatch("describe"):
                    asked = Rows(view.unlabeled, chosen.positions)
                    redundancy = gradients.redundancy(
                        view.apply, view.variables, asked, loss=self.training_config.loss
                    )
                    facts = {**facts, **redundancy._asdict()}
            pool, rows_of_query = pool.reveal(chosen.positions)
            query = self.dataset.index[rows_of_query]
        round_result = Round(
            state.round_index,
            len(rows),
            fit.epochs,
            fit.converged,
            fit.labeled,
            test,
            best,
            self.dataset.index[rows if state.round_index == 0 else rows[:0]],
            query,
            scores,
            facts,
            dict(stopwatch.seconds),
        )
        return State(state.round_index + 1, pool, fit.variables, strategy_state), round_result

    def run(self, reporter: Reporter = SILENT) -> Iterator[Round]:
        """Yields rounds 0 to R, each as it ends."""
        state = self.init()
        while state.round_index <= self.budget.num_rounds:
            state, round_result = self.step(state, reporter)
            yield round_result


class _Stopwatch:
    """Measures seconds by part; while an inner part runs, the outer one is paused."""

    def __init__(self, seconds: Mapping[str, float]):
        self.seconds: dict[str, float] = defaultdict(float, seconds)
        self._part, self._since = None, 0.0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, part: str | None) -> str | None:
        last, now = self._part, time.perf_counter()
        if last is not None:
            self.seconds[last] += now - self._since
        self._part, self._since = part, now
        return last
