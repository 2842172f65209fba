"""Plays runs on a Ray cluster; records and checkpoints stay with the process that asks for them."""

import dataclasses
import math
import os
import pickle
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import jax

from dynamical_jax.errors import UserError
from dynamical_jax.runs import playing, processes
from dynamical_jax.runs.comparison import Beginning

# Times that a run is started from the same state before it counts as failed.
ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Ray:
    """An executor: each run is a task of a Ray cluster.

    What a task tells comes back as Ray's streaming generator, checkpoints included, so machines
    need no files in common. A run whose machine dies is started again elsewhere, from its last
    checkpoint. All machines need this package in one version. Records are those of one process
    with as many threads, bit for bit, where machines are alike.

    Attributes:
      address: of the cluster, "auto" for the one that this machine belongs to.
      cpus_per_run: cores of a task, which computes with as many threads.
      gpus_per_run: GPUs of a task; a fraction is a share of one, and of its memory.

    Raises:
      UserError: if Ray is not installed.
    """

    address: str
    cpus_per_run: float = 1.0
    gpus_per_run: float = 0.0

    def __post_init__(self):
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise UserError("Ray is not installed: pip install 'dynamical-jax[cluster]'") from error

    def __call__(
        self, runs: Mapping[int, playing.Run], begin: Beginning
    ) -> Generator[tuple[int, playing.Told], None, None]:
        """Yields what each run tells, as `comparison.Executor` says."""
        import ray

        ours = not ray.is_initialized()
        if ours:
            self._connect()
        # Ray must not try again by itself: it does not know of our checkpoints.
        task = ray.remote(
            num_cpus=self.cpus_per_run,
            num_gpus=self.gpus_per_run,
            max_retries=0,
            num_returns="streaming",
        )(_play)
        payload = ray.put(processes.pickled(runs))
        threads = max(1, math.floor(self.cpus_per_run))
        memory = processes.MEMORY_OF_GPU * min(self.gpus_per_run, 1.0)
        attempts = dict.fromkeys(runs, 0)
        streams: dict[Any, int] = {}

        def start(number: int) -> None:
            attempts[number] += 1
            beginning = pickle.dumps(begin(number))
            stream = task.remote(payload, number, beginning, threads, memory, processes.settings())
            streams[stream] = number

        try:
            for number in runs:
                start(number)
            while streams:
                (stream,), _ = ray.wait(list(streams), num_returns=1, fetch_local=False)
                number = streams[stream]
                try:
                    told = pickle.loads(ray.get(next(stream)))
                except StopIteration:
                    del streams[stream]
                    continue
                except ray.exceptions.RayTaskError as error:
                    del streams[stream]
                    cause = f"{type(error.cause).__name__}: {error.cause}".partition("\n")[0]
                    yield number, playing.Told("failed", (cause, str(error)))
                    continue
                except ray.exceptions.RayError as error:
                    del streams[stream]
                    if attempts[number] < ATTEMPTS:
                        start(number)
                    else:
                        why = f"it was lost {ATTEMPTS} times ({type(error).__name__})"
                        yield number, playing.Told("failed", (why, str(error)))
                    continue
                if told.method in ("record", "save"):
                    attempts[number] = 0  # It gets on.
                yield number, told
        finally:
            for stream in streams:
                ray.cancel(stream, force=True)
            if ours:
                ray.shutdown()

    def _connect(self) -> None:
        import ray

        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(f"no Ray cluster at {self.address}: {why}") from error
        for resource, needed in (("CPU", self.cpus_per_run), ("GPU", self.gpus_per_run)):
            most = max((node["Resources"].get(resource, 0) for node in ray.nodes()), default=0)
            if needed > most:
                ray.shutdown()
                raise UserError(
                    f"a run needs {needed:g} {resource}s, but no machine of the cluster has more "
                    f"than {most:g}"
                )


def _play(
    payload: bytes,
    number: int,
    beginning: bytes,
    threads: int,
    memory_of_gpu: float,
    settings: Mapping[str, Any],
) -> Iterator[bytes]:
    """What a task does: plays a run, and yields what it tells."""
    # Read by XLA when it starts, which is below.
    os.environ["NPROC"] = str(threads)
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{memory_of_gpu:.3f}"
    for name, value in settings.items():
        jax.config.update(name, value)
    run, start = pickle.loads(payload)[number], pickle.loads(beginning)
    told: queue.Queue[bytes | None] = queue.Queue(maxsize=8)

    def work() -> None:
        try:
            # Pickled in that thread: the arrays of a state are used up when it goes on.
            processes.play_elsewhere(run, start, lambda message: told.put(pickle.dumps(message)))
        finally:
            told.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (message := told.get()) is not None:  # Ray sends to the generator: `yield from` won't do.
        yield message
