"""What does Θ of many images cost, compared with neural-tangents on the same network?

  python -m benchmarks.ntk

Three convolutions of 64 channels on 32×32×3 images, one logit, 1,500 images; a quarter of an hour
on two cores. Prints, for each contender, the seconds, their ratio to those of `ntk.empirical_ntk`,
and the peak memory without images and parameters, in a new process whose program is compiled
already. neural-tangents computes the Jacobians of a block of rows anew for each block of columns:
its time falls and its memory grows with the block. --batch_sizes is the number of images, a
multiple of 300.
"""

from absl import flags

from benchmarks import harness
from dynamical_jax.programs import binary

for _name in harness.KEY_FLAGS_OF_ONE_TURN:
    flags.declare_key_flag(_name)

CONTENDERS = {
    "empirical_ntk": "ntk_contenders.empirical",
    "nt.batch of 60": "ntk_contenders.blocks_of_60",
    "nt.batch of 300": "ntk_contenders.blocks_of_300",
    "nt at once": "ntk_contenders.at_once",
}
BATCH_SIZES = {"ntk_cnn": (1500,)}


def main(argv: list[str]) -> int | None:
    """Compares the contenders; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then lets each contender compute Θ once."""
    tasks, contenders, _ = harness.settings(CONTENDERS, BATCH_SIZES)
    report = harness.Report("ntk")
    print(report.head())
    with harness.worker_environment() as environment:
        for task in tasks:
            print(f"\n{f'{task.batch_size} images':28}{'seconds':>10}{'ratio':>10}{'peak MiB':>12}")
            reference = None
            for name, contender in contenders.items():
                try:
                    case = {"contender": name, **harness.run_once(contender, task, environment)}
                except harness.LeftOutError as error:
                    print(f"  {name}: left out ({error})", flush=True)
                    continue
                report.add(case)
                if name == "empirical_ntk":
                    reference = case["seconds"]
                ratio = f"{case['seconds'] / reference:.2f}" if reference else ""
                numbers = f"{case['seconds']:10.1f}{ratio:>10}{case['peak_mib']:12.0f}"
                print(f"  {name:26}{numbers}", flush=True)


if __name__ == "__main__":
    binary.launch(main)
