"""Runs many experiments one by one; continues stopped ones; a failure does not stop the others."""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dynamical_jax.active_learning import Experiment, Round, State
from dynamical_jax.errors import UserError
from dynamical_jax.runs import records
from dynamical_jax.runs.checkpoints import Checkpoints
from dynamical_jax.runs.progress import Bar
from dynamical_jax.runs.run_directory import RunDirectory

ERRORS_NAME = "errors.log"

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


def play(runs: Sequence[Run], directory: RunDirectory, checkpoint_every: int) -> list[str]:
    """Runs the rounds of each run that are not recorded yet; records and prints each round.

    If a run fails, the next one follows. The traceback of an error that is no `UserError` is
    written to `errors.log`.

    Args:
      runs: in the order in which they are run.
      directory: holds the rounds so far.
      checkpoint_every: number of epochs of training between checkpoints.

    Returns:
      A line for each run that failed.
    """
    failures = []
    left = _TimeLeft(sum(run.num_rounds - len(_done(run, directory)) for run in runs))
    with Bar() as bar:
        for number, run in enumerate(runs, start=1):
            title = f"[{number}/{len(runs)}] {run}"
            bar.start(title, run.num_rounds - 1, run.experiment.training_config.max_epochs)
            try:
                for round_result in _play(run, directory, checkpoint_every, bar):
                    left.rounds -= 1
                    bar.status = f"test accuracy {round_result.test.accuracy:.2%}, {left}"
                    bar.write(
                        f"{title}, round {round_result.round_index}/{run.num_rounds - 1}: "
                        f"{round_result.num_labeled} labels, {round_result.epochs} epochs"
                        f"{'' if round_result.converged else ' (not converged)'}, "
                        f"{sum(round_result.seconds.values()):.1f} s, {bar.status}"
                    )
            except Exception as error:
                why = str(error).partition("\n")[0]
                if isinstance(error, OSError) and error.filename:
                    why = f"cannot use {error.filename}: {error.strerror}"
                elif not isinstance(error, UserError):
                    why = f"{type(error).__name__}: {why}"
                    # A full disk must not hide the error.
                    with (
                        contextlib.suppress(OSError),
                        (directory.path / ERRORS_NAME).open("a", encoding="utf-8") as file,
                    ):
                        file.write(f"{run}\n{traceback.format_exc()}\n")
                bar.write(f"{title} failed: {why}")
                failures.append(f"{run}: {why}")
                left.rounds -= run.num_rounds - len(_done(run, directory))
    return failures


def _done(run: Run, directory: RunDirectory) -> list[records.Record]:
    return directory.done[run.strategy, run.experiment.seed]


def _play(run: Run, directory: RunDirectory, checkpoint_every: int, bar: Bar) -> Iterator[Round]:
    """Yields each round that was not recorded before, after it is recorded."""
    checkpoints = Checkpoints(directory.checkpoints(run.strategy, run.experiment.seed), bar.write)
    done = _done(run, directory)
    if len(done) == run.num_rounds:
        checkpoints.remove()  # The process may have been killed before it did this.
        return
    state = checkpoints.restore(run.experiment)
    # A record is written before the checkpoint that follows it.
    if state is None or state.round_index > len(done):
        checkpoints.remove()  # Checkpoints that do not fit the records must not be used later.
        state = run.experiment.init()
    else:
        epoch = f", epoch {state.underway.epoch}" if state.underway else ""
        bar.write(f"{run}: continued at round {state.round_index}{epoch}")
    saved = time.perf_counter()
    last = (state.round_index, state.underway.epoch // checkpoint_every if state.underway else 0)

    def save(state: State) -> None:
        nonlocal saved, last
        now = (state.round_index, state.underway.epoch // checkpoint_every)
        if now > last and now[1] > 0:  # Called after each epoch, or less often.
            checkpoints.save(state)
            saved, last = time.perf_counter(), now

    while state.round_index < run.num_rounds:
        state, round_result = run.experiment.step(state, bar, save)
        identity = {**run.identity, "strategy": run.strategy, "seed": run.experiment.seed}
        record = records.make(round_result, identity)
        if round_result.round_index < len(done):
            _check_same(record, done[round_result.round_index])
        else:
            directory.append(record)
            yield round_result
        if state.round_index < run.num_rounds and time.perf_counter() > saved + WORTH_SAVING:
            checkpoints.save(state)
            saved = time.perf_counter()
    checkpoints.remove()


def _check_same(repeated: records.Record, recorded: records.Record) -> None:
    repeated = records.json_round_trip(repeated)
    names = [name for name in repeated if repeated[name] != recorded.get(name)]
    if differing := [name for name in names if name not in NEUTRAL_FIELDS]:
        raise UserError(
            f"round {repeated['round']} came out differently when it was played again "
            f"({', '.join(differing)}): the rounds of one run need one machine and one version of "
            "the packages; use another --output_dir"
        )


class _TimeLeft:
    """Estimates the time left: the rounds left take as long as those before."""

    def __init__(self, rounds: int):
        self.rounds = self._at_first = rounds
        self._start = time.perf_counter()

    def __str__(self) -> str:
        played = self._at_first - self.rounds
        seconds = (time.perf_counter() - self._start) / max(played, 1) * self.rounds
        return f"{tqdm.format_interval(seconds)} left"
