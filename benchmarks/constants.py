"""Which constants of the engine are best on this device? Scores a batch under several of them.

  python -m benchmarks.constants --json=results/gpu/constants.json

Some minutes on a GPU. Prints, for each network, how long a batch takes, for each image, and the
ratio to what the library takes by default (median and range over turns):

- block: so many images are scored at a time; the ratio is to the largest;
- cost of forming: an element of a formed gradient counts as much as so many multiplications;
- chunk: so many elements of formed gradients there are at a time.

The last two are tried with the largest block that fits. One setting has its turn after another, all
in this process.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

import dynamical_jax as dj
from benchmarks import harness, jax_contenders
from benchmarks.task import Task
from benchmarks.worker import SECONDS_OF_A_TURN
from dynamical_jax.errors import reason
from dynamical_jax.gradients import scoring, shares
from dynamical_jax.programs import binary

for _name in ("models", "batch_sizes", "matmul_precision", "repetitions", "json"):
    flags.declare_key_flag(_name)

COSTS = flags.DEFINE_list("costs", ["1", "8", "50", "400"], "Multiplications for an element.")
CHUNKS = flags.DEFINE_list("chunks", ["18", "22", "26", "29"], "Powers of two of elements.")

BLOCK_SIZES = {
    "cnn": (256, 1024, 4096, 16384),
    "resnet18": (256, 1024, 4096),
    "vit_s": (16, 64, 256),
}


def main(argv: list[str]) -> int | None:
    """Tries the constants; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Times each network under each setting, and prints a table for each constant."""
    tasks, _, repetitions = harness.settings({"factored": ""}, BLOCK_SIZES)
    costs = binary.parse_positive("costs", COSTS.value)
    chunks = [2**power for power in binary.parse_positive("chunks", CHUNKS.value)]
    report = harness.Report("constants")
    print(report.head())

    def try_out(model: str, constant: str, settings: Mapping[str, Any]) -> list[str]:
        """Times the settings, the reference first; returns the names of those that ran."""
        turns, left_out = _take_turns(settings, repetitions)
        case = {"model": model, "constant": constant, "turns": turns, "left_out": left_out}
        report.add(case)
        print("\n" + _table(case), flush=True)
        return list(turns)

    for model in dict.fromkeys(task.model for task in tasks):
        blocks = [task for task in tasks if task.model == model]
        blocks.sort(key=lambda task: -task.batch_size)
        by_name = {str(task.batch_size): task for task in blocks}
        ran = try_out(model, "block", {name: (task, {}) for name, task in by_name.items()})
        if not ran:
            continue
        largest = by_name[ran[0]]
        own = shares.cost_of_forming()
        try_out(
            model,
            "cost of forming",
            {str(c): (largest, {"cost_of_forming": c}) for c in dict.fromkeys([own, *costs])},
        )
        own = shares.chunk_elements()
        try_out(
            model,
            "chunk",
            {
                f"2**{math.log2(c):g}": (largest, {"chunk_elements": c})
                for c in dict.fromkeys([own, *chunks])
            },
        )


def _take_turns(
    settings: Mapping[str, tuple[Task, Mapping[str, int]]], repetitions: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Returns the milliseconds for each image of each setting's turns, and why some have none."""
    calls, left_out = {}, {}
    for name, (task, constants) in settings.items():
        try:
            calls[name] = _compile(task, constants), task.batch_size
            calls[name][0]()
        except jax.errors.JaxRuntimeError as error:
            calls.pop(name, None)
            left_out[name] = reason(error)
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, (call, batch_size) in calls.items():
            seconds = []
            while sum(seconds) < SECONDS_OF_A_TURN:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            turns[name].append(1e3 * float(np.median(seconds)) / batch_size)
    return turns, left_out


def _compile(task: Task, constants: Mapping[str, int]) -> Callable[[], Any]:
    """Returns what scores the batch once, and waits; compiled under these constants."""
    model = jax_contenders._model(task)
    variables = jax_contenders._variables(model, task)
    direction = jax_contenders._variables(model, task, seed=1)["params"]
    block = dj.Examples(jax_contenders._images(task.batch_size, task), None)
    arguments = variables, block, direction
    jax.clear_caches()  # The constants are read while a program is traced.
    with contextlib.ExitStack() as given:
        for function, value in constants.items():
            given.enter_context(mock.patch.object(shares, function, lambda value=value: value))
        engine = dj.gradients.ENGINES["factored"]
        program = scoring._score_block.lower(model.apply, engine, *arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def _table(case: Mapping[str, Any]) -> str:
    title = f"{case['model']}, {case['constant']}"
    lines = [f"{title:28}{'ms / image':>12}{'/ first (range)':>28}"]
    rows = case["turns"]
    for name, turns in rows.items():
        first = next(iter(rows.values()))
        relative = harness.ratio({"milliseconds": turns}, {"milliseconds": first})
        lines.append(f"  {name:26}{np.median(turns):12.5f}{relative!s:>28}")
    lines += [f"  {name}: left out ({why})" for name, why in case["left_out"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    binary.launch(main)
