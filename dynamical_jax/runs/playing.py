"""Plays one run, in whatever process, and tells a listener all that comes of it."""

import dataclasses
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dynamical_jax.active_learning import Experiment, Reporter, State
from dynamical_jax.errors import UserError, describe
from dynamical_jax.runs import records

# A round gets no checkpoint if it can be repeated in fewer seconds than this.
WORTH_SAVING = 2.0

# Fields of a record that may differ when a round is repeated.
NEUTRAL_FIELDS = {"seconds", "flags", "versions", "device", "git_commit"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One strategy with one seed.

    Attributes:
      strategy: the name under which it is recorded.
      experiment: the experiment to run.
      identity: fields of each of its records, beside the strategy and the seed.
    """

    strategy: str
    experiment: Experiment
    identity: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.strategy}, seed {self.experiment.seed}"

    @property
    def num_rounds(self) -> int:
        """Number of rounds, in each of which the model is trained."""
        return self.experiment.budget.num_rounds + 1


class Start(NamedTuple):
    """From where a run is played.

    Attributes:
      done: the records of its rounds so far.
      state: a state to continue from; None for the beginning. Its round may be recorded already:
        then it is played again and compared.
      checkpoint_every: number of epochs of training between checkpoints.
    """

    done: Sequence[records.Record]
    state: State | None
    checkpoint_every: int


class Listener(Reporter):
    """Hears what comes of a run, in this order; beside it the progress of its rounds."""

    def started(self) -> None:
        """Called first."""

    def record(self, record: records.Record) -> None:
        """Called with each new record, before a checkpoint of any later state."""

    def save(self, state: State) -> None:
        """Called with a state to continue from; must not keep the arrays."""

    def finished(self) -> None:
        """Called last, if all rounds are played."""

    def failed(self, why: str, trace: str | None) -> None:
        """Called last, if the run failed.

        Args:
          why: one line.
          trace: the traceback of an error that is no `UserError`.
        """

    def warned(self, message: str, category: type[Warning]) -> None:
        """Called with a warning from another process."""
        warnings.warn(message, category, stacklevel=2)


class Told(NamedTuple):
    """A call of a method of a `Listener`, which can be sent to another process."""

    method: str
    arguments: tuple[Any, ...] = ()

    def to(self, listener: Listener) -> None:
        """Calls the method of a listener."""
        getattr(listener, self.method)(*self.arguments)


def play(run: Run, start: Start, listener: Listener) -> None:
    """Plays the rounds of a run that are not recorded yet.

    An error of the run is told to the listener, and not raised.
    """
    listener.started()
    try:
        _play(run, start, listener)
    except Exception as error:
        why = str(error).partition("\n")[0]
        if isinstance(error, UserError):
            listener.failed(why, None)
        elif isinstance(error, OSError) and error.filename:
            listener.failed(describe(error), None)
        else:
            listener.failed(f"{type(error).__name__}: {why}", traceback.format_exc())
    else:
        listener.finished()


def _play(run: Run, start: Start, listener: Listener) -> None:
    state = run.experiment.init() if start.state is None else start.state
    saved = time.perf_counter()
    every = start.checkpoint_every
    last = (state.round_index, state.underway.epoch // every if state.underway else 0)

    def save(state: State) -> None:
        nonlocal saved, last
        now = (state.round_index, state.underway.epoch // every)
        if now > last and now[1] > 0:  # Called after each epoch, or less often.
            listener.save(state)
            saved, last = time.perf_counter(), now

    while state.round_index < run.num_rounds:
        state, round_result = run.experiment.step(state, listener, save)
        identity = {**run.identity, "strategy": run.strategy, "seed": run.experiment.seed}
        record = records.make(round_result, identity)
        if round_result.round_index < len(start.done):
            _check_same(record, start.done[round_result.round_index])
        else:
            listener.record(record)
        if state.round_index < run.num_rounds and time.perf_counter() > saved + WORTH_SAVING:
            listener.save(state)
            saved = time.perf_counter()


def _check_same(repeated: records.Record, recorded: records.Record) -> None:
    repeated = records.json_round_trip(repeated)
    names = [name for name in repeated if repeated[name] != recorded.get(name)]
    if differing := [name for name in names if name not in NEUTRAL_FIELDS]:
        raise UserError(
            f"round {repeated['round']} came out differently when it was played again "
            f"({', '.join(differing)}): the rounds of one run need one machine, the same number of "
            "cores and one version of the packages; use another --output_dir"
        )
