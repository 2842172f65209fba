"""Runs many experiments; continues stopped ones; a failure does not stop the others."""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence

import jax
from tqdm import tqdm

from dynamical_jax import parallel, words
from dynamical_jax.active_learning import State
from dynamical_jax.runs import playing, records
from dynamical_jax.runs.checkpoints import Checkpoints
from dynamical_jax.runs.playing import Run as Run
from dynamical_jax.runs.progress import Bar, Bars
from dynamical_jax.runs.run_directory import RunDirectory
from dynamical_jax.training import Evaluation

ERRORS_NAME = "errors.log"


Beginning = Callable[[int], playing.Start]
"""Returns from where the run of a number is played now: all that is recorded and saved."""


Executor = Callable[[Mapping[int, Run], Beginning], Generator[tuple[int, playing.Told], None, None]]
"""Plays runs wherever it likes, and yields (number of the run, what it tells).

It is given number → run, in the order in which they should be started, and a function that it calls
with the number of a run when it starts it. What one run tells must be yielded in its order, with
`finished` or `failed` at the end. A run that was lost, with its machine, may be started again, from
a new beginning. `processes.Processes` is one; `processes.play_elsewhere` does the work there.
"""


def play(
    runs: Sequence[Run],
    directory: RunDirectory,
    checkpoint_every: int,
    executor: Executor | None = None,
) -> list[str]:
    """Runs the rounds of each run that are not recorded yet; records and prints each round.

    If this process is the first of several hosts', the others `follow` it.

    If a run fails, the next one follows. The traceback of an error that is no `UserError` is
    written to `errors.log`.

    Args:
      runs: in the order in which they are run.
      directory: holds the rounds so far.
      checkpoint_every: number of epochs of training between checkpoints.
      executor: plays them elsewhere; if None they are played here, one by one.

    Returns:
      A line for each run that failed.
    """
    failures: list[str] = []
    left = _TimeLeft(sum(run.num_rounds for run in runs))
    todo: dict[int, Run] = {}
    with Bars() as bars:
        books: dict[int, _Book] = {}
        for number, run in enumerate(runs):
            title = f"[{number + 1}/{len(runs)}] {run}"
            book = books[number] = _Book(run, title, directory, bars, left, failures)
            left.without(len(book.done))
            if len(book.done) < run.num_rounds:
                todo[number] = run
            else:
                book.checkpoints.remove()  # The process may have been killed before it did this.

        def begin(number: int) -> playing.Start:
            return playing.Start(books[number].done, books[number].restore(), checkpoint_every)

        if executor is None:
            for number, run in todo.items():
                start = begin(number)
                parallel.broadcast((number, start))
                playing.play(run, start, books[number])
            parallel.broadcast(None)
        else:
            with contextlib.closing(executor(todo, begin)) as told_by:
                for number, told in told_by:
                    told.to(books[number])
    return failures


def follow(runs: Sequence[Run]) -> None:
    """Plays, on another host, what the first one plays, and keeps nothing.

    Args:
      runs: the same as in `play`, on the first host.
    """
    while (told := parallel.broadcast()) is not None:
        number, start = told
        playing.play(runs[number], start, _Follower())


class _Follower(playing.Listener):
    """Hears a run of which another process keeps the books."""

    def failed(self, why: str, trace: str | None) -> None:
        _check_together(why, trace)


def _check_together(why: str, trace: str | None) -> None:
    """Ends this process where it alone may have failed: the others would wait for it for ever."""
    if jax.process_count() > 1 and trace is not None:
        raise parallel.lost(why)


class _Book(playing.Listener):
    """Keeps what comes of a run: records and checkpoints on disk, lines and a bar to look at."""

    def __init__(
        self,
        run: Run,
        title: str,
        directory: RunDirectory,
        bars: Bars,
        left: "_TimeLeft",
        failures: list[str],
    ):
        self._run, self._title, self._directory = run, title, directory
        self._bars, self._left, self._failures = bars, left, failures
        self._bar: Bar | None = None
        path = directory.checkpoints(run.strategy, run.experiment.seed)
        self.checkpoints = Checkpoints(path, bars.write)

    @property
    def done(self) -> list[records.Record]:
        """The records so far."""
        return self._directory.done[self._run.strategy, self._run.experiment.seed]

    def restore(self) -> State | None:
        """Returns the state to continue from; None where the run is played from its beginning."""
        state = self.checkpoints.restore(self._run.experiment)
        # A record is written before the checkpoint that follows it.
        if state is None or state.round_index > len(self.done):
            self.checkpoints.remove()  # What does not fit the records must not be used later.
            return None
        epoch = f", epoch {state.underway.epoch}" if state.underway else ""
        self._bars.write(f"{self._run}: continued at round {state.round_index}{epoch}")
        return state

    def started(self) -> None:
        if self._bar is None:  # Not where a run is started again.
            self._bar = self._bars.take()
        run = self._run
        self._bar.start(self._title, run.num_rounds - 1, run.experiment.training_config.max_epochs)

    def begin(self, round_index: int) -> None:
        self._bar.begin(round_index)

    def epoch(self, epoch: int, labeled: Evaluation | None, target: float | None) -> None:
        self._bar.epoch(epoch, labeled, target)

    def scored(self, done: int, total: int) -> None:
        self._bar.scored(done, total)

    def record(self, record: records.Record) -> None:
        self._directory.append(record)
        self._left.rounds -= 1
        self._bar.status = f"test accuracy {record['test_accuracy']:.2%}, {self._left}"
        self._bars.write(
            f"{self._title}, round {record['round']}/{self._run.num_rounds - 1}: "
            f"{words.count(record['num_labeled'], 'label')}, "
            f"{words.count(record['epochs'], 'epoch')}"
            f"{'' if record['converged'] else ' (not converged)'}, "
            f"{sum(record['seconds'].values()):.1f} s, {self._bar.status}"
        )

    def save(self, state: State) -> None:
        self.checkpoints.save(state)

    def finished(self) -> None:
        self.checkpoints.remove()
        self._release()

    def failed(self, why: str, trace: str | None) -> None:
        if trace is not None:
            # A full disk must not hide the error.
            with (
                contextlib.suppress(OSError),
                (self._directory.path / ERRORS_NAME).open("a", encoding="utf-8") as file,
            ):
                file.write(f"{self._run}\n{trace}\n")
        _check_together(why, trace)
        self._bars.write(f"{self._title} failed: {why}")
        self._failures.append(f"{self._run}: {why}")
        self._left.rounds -= self._run.num_rounds - len(self.done)
        self._release()

    def _release(self) -> None:
        if self._bar is not None:
            self._bars.give_back(self._bar)
            self._bar = None


class _TimeLeft:
    """Estimates the time left: the rounds left take as long as those before."""

    def __init__(self, rounds: int):
        self.rounds = self._at_first = rounds
        self._start = time.perf_counter()

    def without(self, rounds: int) -> None:
        """Leaves out rounds that were played before."""
        self.rounds -= rounds
        self._at_first -= rounds

    def __str__(self) -> str:
        played = self._at_first - self.rounds
        seconds = (time.perf_counter() - self._start) / max(played, 1) * self.rounds
        return f"{tqdm.format_interval(seconds)} left"
