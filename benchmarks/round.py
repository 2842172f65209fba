"""What does a whole round cost, and what do several at a time? CIFAR-10 with the small CNN.

  python -m benchmarks.round

About 4 minutes on two cores. Plays dynamicAL with four seeds, two rounds each, for each number of
processes, in a directory that is thrown away. Compiled programs are kept between processes, as the
programs of this project do; a run beforehand makes them. Prints the seconds of each part of round 0
and of round 1, and the runs per hour, the start of the processes included.
"""

import tempfile
import time

import jax
import numpy as np
from absl import flags

import dynamical_jax as dj
from benchmarks import harness, setting
from dynamical_jax.programs import binary
from dynamical_jax.runs import processes

flags.declare_key_flag("json")
NUM_RUNS = flags.DEFINE_integer("num_runs", 4, "How many seeds are played.", lower_bound=1)
PROCESSES = flags.DEFINE_list("processes", ["1", "2"], "Numbers of processes to compare.")
flags.adopt_module_key_flags(setting)

PARTS = ("train", "evaluate", "score", "select", "describe")


def main(argv: list[str]) -> int | None:
    """Plays the runs; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then plays all runs with each number of processes."""
    executors = [
        processes.Processes(count) for count in binary.parse_positive("processes", PROCESSES.value)
    ]
    data = dj.datasets.load(setting.DATA.value)
    model = dj.models.create(setting.NETWORK.value, data)
    budget = dj.Budget(setting.NUM_LABELS.value, setting.NUM_QUERIED.value, num_rounds=1)
    runs = [
        dj.comparison.Run(
            "dynamical",
            dj.Experiment(data, model, dj.STRATEGIES["dynamical"](), budget, seed=seed),
            {},
        )
        for seed in range(NUM_RUNS.value)
    ]
    report = harness.Report("round")
    print(report.head())
    title = f"{setting.DATA.value}, {setting.NETWORK.value}, {len(runs)} runs"
    print(f"\n{title:28}{'round':>6}" + "".join(f"{part:>11}" for part in PARTS))
    if jax.config.jax_compilation_cache_dir is None:
        compiled = tempfile.TemporaryDirectory()
        binary.keep_compiled_programs(compiled.name)
    play(runs[:1], executors[0])
    for executor in executors:
        with harness.measure_other_load() as others:
            seconds, records = play(runs, executor)
        case = {
            "workers": executor.count,
            "seconds": seconds,
            "runs_per_hour": 3600 * len(runs) / seconds,
            "rounds": [[record["round"], record["seconds"]] for record in records],
            "others_share": others(),
        }
        report.add(case)
        for index in (0, 1):
            parts = [record["seconds"] for record in records if record["round"] == index]
            medians = [np.median([part.get(name, 0.0) for part in parts]) for name in PARTS]
            name = f"{executor.count} at a time" if index == 0 else ""
            print(f"  {name:26}{index:6}" + "".join(f"{median:11.2f}" for median in medians))
        print(f"  {case['runs_per_hour']:.1f} runs per hour", flush=True)
        if (case["others_share"] or 0) > 0.05:
            print(f"  other programs took {case['others_share']:.0%} of the cores meanwhile")


def play(
    runs: list[dj.comparison.Run], executor: dj.comparison.Executor
) -> tuple[float, list[dj.records.Record]]:
    """Returns the seconds that the runs took, processes and compilation included, and records."""
    with (
        tempfile.TemporaryDirectory() as path,
        dj.run_directory.open_locked(path, {}) as directory,
    ):
        start = time.perf_counter()
        failures = dj.comparison.play(runs, directory, checkpoint_every=20, executor=executor)
        seconds = time.perf_counter() - start
        if failures:
            raise harness.LeftOutError(failures[0])
        return seconds, dj.records.read(directory.rounds)


if __name__ == "__main__":
    binary.launch(main)
