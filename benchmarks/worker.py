"""The process of one contender: does what it is told, and times itself.

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

# A turn repeats what is shorter: the first call after another's turn finds cold caches and
# sleeping threads.
SECONDS_OF_A_TURN = 0.2


class Contender:
    """A contender and the memory its process held before its first call."""

    def __init__(self, work: Work):
        self.work = work
        gc.collect()  # JAX, too, gives back then what it copied parameters and images from.
        # Imports and parameters may have taken more for a moment: forget it, where Linux can.
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        self.before = work.device_memory()[0] if work.device_memory else peak_of_process()

    def warm_up(self) -> None:
        """Compiles what is to be compiled."""
        (self.work.warm_up or self.work.call)()

    def turn(self) -> float:
        """Returns the seconds that the work takes, the median over the calls of one turn."""
        seconds = []
        while sum(seconds) < SECONDS_OF_A_TURN:
            start = time.perf_counter()
            self.work.call()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds)) * self.work.calls

    def peak(self) -> int:
        """Returns the most bytes held at a time so far, beyond those held before."""
        peak = self.work.device_memory()[1] if self.work.device_memory else peak_of_process()
        return peak - self.before


def peak_of_process() -> int:
    """Returns the most bytes of memory that this process has held at a time."""
    with contextlib.suppress(OSError):
        # Not `ru_maxrss`, where it can be helped: that begins with what the parent held.
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def main(name: str, task: str) -> None:
    """Answers requests until there are no more."""
    # The library prints where it likes; replies go where nothing else does.
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
