"""What the benchmark programs share: contenders take turns, and their times are compared.

Each contender has its own process. In one process JAX and PyTorch disturb each other: the threads
of one wait actively for work, and the other becomes 4 to 25 times slower. In processes that wait
passively, and work in turn, each has the whole machine.

Times change with the load of the machine, ratios hardly: a ratio is taken between turns of the same
repetition, and its median over repetitions is reported with the smallest and the largest.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import dynamical_jax as dj
from benchmarks.task import Task
from dynamical_jax.programs import binary

DEFAULT_BATCH_SIZES = {
    "cnn": (128, 512),
    "resnet18": (128,),
    "resnet18-cifar": (32,),
    "vgg11": (128,),
}
PEERS = ("torch", "backpack-for-pytorch", "opacus", "dattri-llm", "scikit-activeml")
PRECISIONS = ("default", "float32", "tensorfloat32")
ROOT = pathlib.Path(__file__).parent.parent

MODELS = flags.DEFINE_list(
    "models",
    None,
    f"Some of {', '.join(DEFAULT_BATCH_SIZES)}; by default all that the program has.",
)
BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", None, "Images in a batch; by default a size for each model."
)
REPETITIONS = flags.DEFINE_integer(
    "repetitions", 7, "How many turns each contender has, where they take turns."
)
CONTENDERS = flags.DEFINE_list(
    "contenders", None, "Some of those that the program prints; by default all."
)
MATMUL_PRECISION = flags.DEFINE_enum(
    "matmul_precision",
    "default",
    PRECISIONS,
    "Precision of matrix products on a GPU; default: each framework's own (JAX: TensorFloat-32; "
    "PyTorch: TensorFloat-32 in convolutions only). CPUs compute in float32 in any case.",
)
JSON = flags.DEFINE_string("json", None, "JSON file for the results; it is overwritten.")


KEY_FLAGS_OF_ONE_TURN = ("models", "batch_sizes", "contenders", "matmul_precision", "json")
"""Of programs whose contenders do not take turns."""


class LeftOutError(Exception):
    """Raised where a contender cannot do its work; the message says why."""


class Ratio(NamedTuple):
    """Times of one contender over those of another: median, smallest and largest."""

    median: float
    smallest: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.smallest:.2f}–{self.largest:.2f})"


class Settings(NamedTuple):
    """The values of the flags that all programs have."""

    tasks: Sequence[Task]
    contenders: Mapping[str, str]
    repetitions: int


def main(argv: list[str], run: Callable[[], None]) -> int | None:
    """Calls `run`; returns the exit status. A `UserError` is printed in one line."""
    try:
        binary.check_command_line(argv, sys.modules[run.__module__])
        # Otherwise JAX reserves most of a GPU for this process, which computes nothing.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        run()
    except (dj.UserError, LeftOutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return None


def settings(
    contenders: Mapping[str, str], batch_sizes: Mapping[str, Sequence[int | None]]
) -> Settings:
    """Checks the flags; returns their values.

    Args:
      contenders: the program's, name → function as `benchmarks.worker` takes it.
      batch_sizes: model → batch sizes by default.

    Raises:
      UserError: if the value of a flag cannot be used.
    """
    models = list(batch_sizes) if MODELS.value is None else MODELS.value
    names = list(contenders) if CONTENDERS.value is None else CONTENDERS.value
    _check_names("model", models, batch_sizes)
    _check_names("contender", names, contenders)
    sizes = None
    if BATCH_SIZES.value is not None:
        sizes = binary.parse_positive("batch_sizes", BATCH_SIZES.value)
    if REPETITIONS.value < 1:
        raise dj.UserError(f"repetitions must be at least 1, got {REPETITIONS.value}")
    device = jax.default_backend()
    tasks = [
        Task(model, size, None, MATMUL_PRECISION.value, "cpu" if device == "cpu" else "gpu")
        for model in models
        for size in sizes or batch_sizes[model]
    ]
    return Settings(tasks, {name: contenders[name] for name in names}, REPETITIONS.value)


def _check_names(what: str, names: Sequence[str], choices: Mapping[str, Any]) -> None:
    for name in names:
        dj.words.check_known(what, name, choices)
    if not names:
        raise dj.UserError(f"no {what} given; choose from {', '.join(choices)}")


class Worker:
    """A contender in its own process."""

    def __init__(self, contender: str, task: Task, environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", contender, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )

    def ask(self, request: str) -> Any:
        """Sends "warm_up", "turn", "cpu" or "peak" to the worker; returns its reply.

        Raises:
          LeftOutError: if the worker fails.
        """
        with contextlib.suppress(BrokenPipeError):
            print(request, file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        if not reply:
            raise LeftOutError(f"its process ended with status {self._process.wait()}")
        reply = json.loads(reply)
        if "error" in reply:
            raise LeftOutError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextlib.contextmanager
def worker_environment() -> Iterator[dict[str, str]]:
    """Yields environment variables for workers: idle threads sleep, compiled programs are kept.

    Memory is measured in fresh processes that find their programs compiled, because compilation
    takes more memory than most of the programs.
    """
    with tempfile.TemporaryDirectory() as compiled:
        yield {
            "OMP_WAIT_POLICY": "PASSIVE",
            "JAX_COMPILATION_CACHE_DIR": compiled,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            # Several workers share an accelerator.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # XLA warns of each program that it reads from the cache.
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }


def compare(
    task: Task, contenders: Mapping[str, str], repetitions: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Returns milliseconds and peak memory of each contender, and those left out, as JSON."""
    left_out: dict[str, str] = {}
    with measure_other_load() as others:
        seconds = take_turns(task, contenders, repetitions, environment, left_out)
    rows = {}
    for name, turns in seconds.items():
        with start_worker(contenders[name], task, environment) as worker:
            rows[name] = {
                "milliseconds": [round(1e3 * turn, 3) for turn in turns],
                "peak_mib": round(run_alone(worker)[1] / 2**20, 1),
            }
    return {
        "model": task.model,
        "batch_size": task.batch_size,
        "contenders": rows,
        "others_share": others(),
        "left_out": left_out,
    }


def take_turns(
    task: Task,
    contenders: Mapping[str, str],
    repetitions: int,
    environment: Mapping[str, str],
    left_out: dict[str, str],
) -> dict[str, list[float]]:
    """Returns the seconds of each contender's turns; adds those that fail to `left_out`."""
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        for name, contender in contenders.items():
            worker = stack.enter_context(start_worker(contender, task, environment))
            try:
                worker.ask("warm_up")
                workers[name] = worker
            except LeftOutError as error:
                left_out[name] = str(error)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(repetitions):
            for name, worker in workers.items():
                seconds[name].append(worker.ask("turn"))
    return seconds


@contextlib.contextmanager
def measure_other_load() -> Iterator[Callable[[], float | None]]:
    """Yields a function that returns, after the block, the share of the cores other programs took.

    Where that is large, ratios cannot be trusted either. None where it cannot be measured.
    """
    before = _cpu_seconds()
    yield lambda: share
    after = _cpu_seconds()
    share = None
    if before and after:
        wall, busy, own = np.subtract(after, before)
        share = round(max(0.0, float(busy - own)) / (wall * os.cpu_count()), 3)


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Returns seconds of the clock, of all cores' work, and of this process and ended workers."""
    try:
        cpu = pathlib.Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, *interrupts_and_stolen = map(int, cpu)
    busy = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, sum(os.times()[:4])


@contextlib.contextmanager
def start_worker(contender: str, task: Task, environment: Mapping[str, str]) -> Iterator[Worker]:
    """Yields a new worker, and closes it after the block."""
    worker = Worker(contender, task, environment)
    try:
        yield worker
    finally:
        worker.close()


def run_once(contender: str, task: Task, environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns seconds and peak memory of one turn, in a process whose program is compiled."""
    with start_worker(contender, task, environment) as worker:
        worker.ask("warm_up")  # Compiles for the worker that is measured.
    with start_worker(contender, task, environment) as worker:
        seconds, peak = run_alone(worker)
        of_cores = worker.ask("cpu")
    return {
        **task._asdict(),
        "seconds": round(seconds, 6),
        "cpu_seconds": round(of_cores, 6),
        "peak_mib": round(peak / 2**20, 1),
    }


def run_alone(worker: Worker) -> tuple[float, int]:
    """Returns the seconds of one turn of a new worker, and its peak memory in bytes."""
    worker.ask("warm_up")
    return worker.ask("turn"), worker.ask("peak")


def ratio(row: Mapping[str, Any], other: Mapping[str, Any]) -> Ratio:
    """Returns the ratios of the times of `row` to those of `other`, turn by turn."""
    ratios = np.divide(row["milliseconds"], other["milliseconds"])
    return Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))


def table(case: Mapping[str, Any], reference: str) -> str:
    """Returns the table of a case: milliseconds, ratio to the reference, memory."""
    rows = case["contenders"]
    title = f"{case['model']}, {case['batch_size']} images"
    lines = [f"{title:28}{'ms':>10}{f'/ {reference} (range)':>30}{'peak MiB':>12}"]
    for name, row in rows.items():
        times = str(ratio(row, rows[reference])) if reference in rows else ""
        median = np.median(row["milliseconds"])
        lines.append(f"  {name:26}{median:10.1f}{times:>30}{row['peak_mib']:12.0f}")
    lines += [f"  {name}: left out ({why})" for name, why in case["left_out"].items()]
    if (case["others_share"] or 0) > 0.05:
        lines.append(f"  other programs took {case['others_share']:.0%} of the cores meanwhile")
    return "\n".join(lines)


class Report:
    """The results so far, written to the file --json if it is given."""

    def __init__(self, program: str):
        self._results = {
            "command": shlex.join(["python", "-m", f"benchmarks.{program}", *sys.argv[1:]]),
            "machine": {"cpu": _cpu_name(), "cores": num_cores(), "system": platform.platform()},
            **dj.records.environment(),
            "matmul_precision": MATMUL_PRECISION.value,
            "cases": [],
        }
        self._results["versions"] = {**self._results["versions"], **_peer_versions()}
        self._write()

    def head(self) -> str:
        """Returns a line about the machine and the versions of packages."""
        versions = self._results["versions"]
        named = [f"{name} {versions[name]}" for name in ("jax", *PEERS) if name in versions]
        machine = f"{self._results['device']}; {_cpu_name()}, {num_cores()} cores"
        return f"{machine}; {', '.join(named)}; precision of products: {MATMUL_PRECISION.value}"

    def add(self, case: Mapping[str, Any]) -> None:
        """Adds results, and writes all so far, since a long run may be interrupted."""
        self._results["cases"].append(case)
        self._write()

    def _write(self) -> None:
        if JSON.value is None:
            return
        path = pathlib.Path(JSON.value)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dj.files.write(path, json.dumps(self._results, indent=1) + "\n")
        except OSError as error:
            raise dj.UserError(f"cannot write to {path}: {error.strerror}") from error


def _peer_versions() -> dict[str, str]:
    versions = {}
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def num_cores() -> int:
    """Returns how many cores this process and its workers may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
