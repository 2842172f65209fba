"""What do several devices cost? Scoring and training divided among simulated devices.

  python -m benchmarks.scaling

About 5 minutes on two cores. The devices share the cores of this machine, so the best that there
can be is the throughput of one device: what is below is overhead. Prints, for each model, a row for
each number of devices, all with the same total batch: the median of its turns, and its throughput
over that of one device (median and range over turns). Then what eight devices exchange in a block
that is scored and in a step of training, as the compiled programs say, and what follows from a
model (no overlap of work and exchange, rings):

  efficiency = T / (T + 2 (n − 1) / n · bytes / bandwidth + 2 (n − 1) · latency),

with T the time of a device for its share of a step, at `OPERATIONS` operations per second.
"""

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import device_contenders, harness
from benchmarks.task import Task
from dynamical_jax.programs import binary

flags.adopt_module_key_flags(harness)

COUNTS = (1, 2, 4, 8)
CONTENDERS = {
    f"{work} on {count}": f"device_contenders.{work}_on_{count}"
    for work in ("score", "train")
    for count in COUNTS
}
BATCH_SIZES = {"cnn": (256,), "resnet18": (128,)}

OPERATIONS = 2e13
"""Of one GPU, in float32 or TensorFloat-32 with the usual losses."""


class Link(NamedTuple):
    """Devices, the bandwidth between neighbours in bytes per second, and latency in seconds."""

    name: str
    num_devices: int
    bandwidth: float
    latency: float


LINKS = (
    Link("8 GPUs, NVLink at 300 GB/s", 8, 300e9, 5e-6),
    Link("16 hosts, 100 Gb/s", 16, 12.5e9, 20e-6),
)


def main(argv: list[str]) -> int | None:
    """Runs the comparison that the flags describe; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then compares numbers of devices for each model and batch size."""
    tasks, contenders, repetitions = harness.settings(CONTENDERS, BATCH_SIZES)
    report = harness.Report("scaling")
    print(report.head())
    with harness.worker_environment() as environment:
        count = device_contenders.MOST_DEVICES
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
        for task in tasks:
            left_out: dict[str, str] = {}
            with harness.measure_other_load() as others:
                seconds = harness.take_turns(task, contenders, repetitions, environment, left_out)
            case = {
                "model": task.model,
                "batch_size": task.batch_size,
                "seconds": seconds,
                "left_out": left_out,
                "others_share": others(),
                **_facts(task, environment),
            }
            case["efficiency"] = {link.name: efficiency(case, link) for link in LINKS}
            report.add(case)
            print("\n" + table(case), flush=True)


def efficiency(case: dict[str, Any], link: Link) -> float:
    """Returns the modelled efficiency of a training step, each device having a whole batch."""
    n, exchanged = link.num_devices, sum(size for _, size in case["train"])
    work = case["gradient_flops"] / OPERATIONS
    exchange = 2 * (n - 1) / n * exchanged / link.bandwidth
    exchange += 2 * (n - 1) * link.latency * len(case["train"])
    return work / (work + exchange)


def table(case: dict[str, Any]) -> str:
    """Returns the table of a case."""
    title = f"{case['model']}, {case['batch_size']} images"
    lines = [f"{title:28}{'ms':>10}{'throughput / 1 device (range)':>34}"]
    for name, turns in case["seconds"].items():
        one = case["seconds"].get(f"{name.split()[0]} on 1")
        ratios = np.divide(one, turns) if one else np.full(1, np.nan)
        ratio = harness.Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))
        lines.append(f"  {name:26}{1e3 * np.median(turns):10.1f}{ratio!s:>34}")
    lines += [f"  {name}: left out ({why})" for name, why in case["left_out"].items()]
    if (case["others_share"] or 0) > 0.05:
        lines.append(f"  other programs took {case['others_share']:.0%} of the cores meanwhile")
    for work in ("score", "train"):
        sizes = [size for _, size in case[work]]
        lines.append(
            f"  {work}, 8 devices: {len(sizes)} exchanges, {sum(sizes) / 1e6:.2f} MB "
            f"(parameters {case['parameter_bytes'] / 1e6:.2f} MB)"
        )
    for name, value in case["efficiency"].items():
        lines.append(f"  modelled efficiency of training, {name}: {value:.1%}")
    return "\n".join(lines)


def _facts(task: Task, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.device_contenders", task.model]
    done = subprocess.run(
        [*command, str(task.batch_size)],
        cwd=harness.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise harness.LeftOutError(f"facts about {task.model}: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    binary.launch(main)
