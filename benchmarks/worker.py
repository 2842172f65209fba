"""The process of one contender: answers requests, and times its own work.

  python -m benchmarks.worker jax_contenders.factored '["cnn", 128]'

Requests are lines on standard input, replies are lines of JSON on standard output.
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import re
import resource
import sys
import time
from typing import Any

import numpy as np

from benchmarks.task import Task, Work

# Calls are repeated for so long in a turn: the first one after another contender's turn finds cold
# caches and sleeping threads.
SECONDS_OF_A_TURN = 0.2


class Contender:
    """A contender and the memory its process held before its first call."""

    def __init__(self, work: Work):
        self.work = work
        gc.collect()  # JAX then frees the arrays that parameters and images were copied from.
        # Imports and parameters may have taken more for a moment: reset the peak, where Linux can.
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        self.before = work.device_memory()[0] if work.device_memory else peak_of_process()

    def warm_up(self) -> None:
        """Compiles all programs of the work."""
        (self.work.warm_up or self.work.call)()

    def turn(self) -> float:
        """Returns the seconds of the work, from the median over the calls of one turn."""
        seconds, of_cores = [], []
        while sum(seconds) < SECONDS_OF_A_TURN:
            start, start_of_cores = time.perf_counter(), time.process_time()
            self.work.call()
            seconds.append(time.perf_counter() - start)
            of_cores.append(time.process_time() - start_of_cores)
        self._of_cores = float(np.median(of_cores)) * self.work.calls
        return float(np.median(seconds)) * self.work.calls

    def cpu(self) -> float:
        """Returns the seconds of all cores in the last turn, which other programs hardly change."""
        return self._of_cores

    def peak(self) -> int:
        """Returns the peak memory in bytes so far, without what was held before the first call."""
        peak = self.work.device_memory()[1] if self.work.device_memory else peak_of_process()
        return peak - self.before


def peak_of_process() -> int:
    """Returns the peak memory of this process in bytes."""
    with contextlib.suppress(OSError):
        # Better than `ru_maxrss`, which includes the memory of the parent process.
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def main(name: str, task: str) -> None:
    """Answers requests until standard input ends."""
    # Libraries may print to standard output: replies go to a copy of it, all else to stderr.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = None

    def reply_to(request: str) -> Any:
        nonlocal contender
        if contender is None:
            module, _, function = name.partition(".")
            module = importlib.import_module(f"benchmarks.{module}")
            contender = Contender(getattr(module, function)(Task(*json.loads(task))))
        return getattr(contender, request)()

    for line in sys.stdin:
        try:
            reply = {"value": reply_to(line.strip())}
        except Exception as error:
            why = str(error).strip().partition("\n")[0]
            reply = {"error": f"{type(error).__name__}: {why}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
