"""Plays several runs at a time, each in a process of this machine with a share of its cores."""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from multiprocessing import connection as connections
from typing import Any, NamedTuple

import jax

from dynamical_jax import words
from dynamical_jax.active_learning import State
from dynamical_jax.errors import UserError
from dynamical_jax.runs import playing
from dynamical_jax.runs.comparison import Beginning
from dynamical_jax.runs.records import Record
from dynamical_jax.training import Evaluation

# Settings of JAX that the processes take over.
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_default_matmul_precision",
    "jax_enable_x64",
)

# Seconds between two looks at the progress of a run.
PAUSE = 0.2

# Of the memory of a GPU, what JAX takes by default.
MEMORY_OF_GPU = 0.75


def num_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0))


@dataclasses.dataclass(frozen=True)
class Processes:
    """An executor: `count` processes, among which the cores are divided, or the GPUs.

    The runs are sent to each process once, so they must be what `pickle` can take: models and
    strategies that are defined in modules. As with all such processes of Python, a script that
    uses this does its work below `if __name__ == "__main__":`.

    With fewer cores sums are rounded in another order. The records are those of one process that
    has as many cores, bit for bit.

    Attributes:
      count: how many.

    Raises:
      UserError: if there are fewer cores, or a run cannot be sent.
    """

    count: int

    def __post_init__(self):
        if not 1 <= self.count <= num_cores():
            raise UserError(
                f"cannot divide {words.count(num_cores(), 'core')} among {self.count} processes: "
                f"choose from 1 to {num_cores()}"
            )

    def __call__(
        self, runs: Mapping[int, playing.Run], begin: Beginning
    ) -> Generator[tuple[int, playing.Told], None, None]:
        """Yields what each run tells, as `comparison.Executor` says.

        If a process dies, its run fails, and a new one plays the next.
        """
        payload = pickled(runs)
        waiting = list(runs)
        slots = list(range(self.count))  # Shares that no process has.
        workers: dict[connections.Connection, _Worker] = {}
        ended: list[_Worker] = []
        try:
            while waiting or workers:
                while waiting and slots:
                    worker = _start(slots.pop(0), self.count, waiting.pop(0))
                    workers[worker.ours] = worker
                    with contextlib.suppress(OSError):  # It died at once, which is seen below.
                        worker.ours.send_bytes(payload)
                        worker.ours.send((worker.number, begin(worker.number)))
                for ours in connections.wait(list(workers)):
                    worker = workers[ours]
                    try:
                        told = ours.recv()
                    except (EOFError, OSError):
                        yield worker.number, playing.Told("failed", (_death(worker.process), None))
                        slots.append(workers.pop(ours).slot)
                        continue
                    yield worker.number, told
                    if told.method in ("finished", "failed"):
                        if waiting:
                            worker = workers[ours] = worker._replace(number=waiting.pop(0))
                            with contextlib.suppress(OSError):
                                ours.send((worker.number, begin(worker.number)))
                        else:
                            ended.append(workers.pop(ours))
                            ended[-1].process.terminate()
        finally:
            for worker in workers.values():
                worker.process.kill()  # Its checkpoints are written by this process.
            for worker in (*ended, *workers.values()):
                worker.process.join()


def pickled(runs: Mapping[int, playing.Run]) -> bytes:
    """Returns the runs, which have one data set and one model among them, as bytes."""
    try:
        return pickle.dumps(dict(runs))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UserError(
            f"the runs cannot be sent to other processes ({error}): define models and strategies "
            "at the top of a module"
        ) from error


def settings() -> dict[str, Any]:
    """Returns the settings of JAX that other processes should have, too."""
    return {name: getattr(jax.config, name) for name in SETTINGS}


def play_elsewhere(run: playing.Run, start: playing.Start, tell: Any) -> None:
    """Plays a run in a process that belongs to it, and tells the one that records it.

    Args:
      run: the run.
      start: where it begins.
      tell: called with each `playing.Told`; may raise where nobody listens any more.
    """
    teller = _Teller(tell)
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # The other process knows which ones are shown.
        warnings.showwarning = lambda message, category, *where: teller.warned(
            str(message), category
        )
        playing.play(run, start, teller)


class _Teller(playing.Listener):
    """Tells another process what this run tells, progress only now and then.

    Args:
      tell: called with each `playing.Told`.
    """

    def __init__(self, tell: Any):
        self._tell, self._last = tell, -PAUSE

    def started(self) -> None:
        self._tell(playing.Told("started"))

    def begin(self, round_index: int) -> None:
        self._tell(playing.Told("begin", (round_index,)))

    def epoch(self, epoch: int, labeled: Evaluation | None, target: float | None) -> None:
        if labeled is not None or self._is_due():
            self._tell(playing.Told("epoch", (epoch, labeled, target)))

    def scored(self, done: int, total: int) -> None:
        if self._is_due():
            self._tell(playing.Told("scored", (done, total)))

    def record(self, record: Record) -> None:
        self._tell(playing.Told("record", (record,)))

    def save(self, state: State) -> None:
        self._tell(playing.Told("save", (state,)))

    def finished(self) -> None:
        self._tell(playing.Told("finished"))

    def failed(self, why: str, trace: str | None) -> None:
        self._tell(playing.Told("failed", (why, trace)))

    def warned(self, message: str, category: type[Warning]) -> None:
        self._tell(playing.Told("warned", (message, category)))

    def _is_due(self) -> bool:
        now = time.perf_counter()
        if due := now > self._last + PAUSE:
            self._last = now
        return due


class _Worker(NamedTuple):
    """A process, our end of the pipe to it, and the number of the run that it plays."""

    process: Any
    ours: connections.Connection
    slot: int
    number: int


def _start(slot: int, count: int, number: int) -> _Worker:
    """Starts a process with the share `slot` of `count`, to play a run."""
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork.
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, settings()), daemon=True)
    with _share(slot, count):
        process.start()
    theirs.close()
    return _Worker(process, ours, slot, number)


def _work(theirs: connections.Connection, settings: Mapping[str, Any]) -> None:
    """What a process does: plays the runs whose numbers it is sent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name, value in settings.items():
        jax.config.update(name, value)
    runs = pickle.loads(theirs.recv_bytes())
    while True:
        number, start = theirs.recv()
        play_elsewhere(runs[number], start, theirs.send)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however it ended."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _death(process: Any) -> str:
    """Returns how a process ended."""
    process.join()
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        hint = ", as when memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with status {process.exitcode}"


@contextlib.contextmanager
def _share(slot: int, count: int) -> Iterator[None]:
    """Within the block new processes get a share of the cores, and of the GPUs where there are any.

    They inherit it from this thread, before they load anything. They ignore Ctrl-C, which is
    this process's to answer.
    """
    cores = os.sched_getaffinity(0)
    environment = dict(os.environ)
    answer = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()  # Others may not ask.
    try:
        if in_main_thread:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.sched_setaffinity(0, sorted(cores)[slot::count])
        os.environ.update(_gpu_environment(slot, count))
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, answer)
        os.environ.clear()
        os.environ.update(environment)
        os.sched_setaffinity(0, cores)


def _gpu_environment(slot: int, count: int) -> dict[str, str]:
    """Returns the variables that give a process one GPU, or a share of one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = [path.name for path in pathlib.Path("/dev").glob("nvidia*")]
        gpus = sorted((name[6:] for name in names if re.fullmatch(r"nvidia\d+", name)), key=int)
    else:
        gpus = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not gpus:
        return {}
    share = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if (together := -(-count // len(gpus))) > 1:
        share["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY_OF_GPU / together:.3f}"
    return share
