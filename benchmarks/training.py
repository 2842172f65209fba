"""How fast is training? Compares a step with Adam with PyTorch's on the same network.

  python -m benchmarks.training

About 6 minutes on two cores, 12 GB of memory. Prints, for each model and batch size, a row for each
contender: the median of its turns, its time divided by PyTorch's (median and range over turns), and
its peak memory without parameters and images, in a new process whose program is compiled already.
The contenders:

- jax: an epoch of four steps as `training.fit` runs it, divided by four;
- torch: four steps of a usual training loop, divided by four, if PyTorch is installed;
- torch_fused: likewise with `torch.optim.Adam(..., fused=True)`.

For fewer cores: `taskset -c 0 python -m benchmarks.training`.
"""

from absl import flags

from benchmarks import harness
from dynamical_jax.programs import binary

flags.adopt_module_key_flags(harness)

CONTENDERS = {
    "jax": "jax_contenders.training_step",
    "torch": "torch_contenders.training_step",
    "torch_fused": "torch_contenders.fused_training_step",
}
BATCH_SIZES = {**harness.DEFAULT_BATCH_SIZES, "cnn": (128,)}


def main(argv: list[str]) -> int | None:
    """Runs the comparison that the flags describe; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then compares the contenders for each model and batch size."""
    tasks, contenders, repetitions = harness.settings(CONTENDERS, BATCH_SIZES)
    report = harness.Report("training")
    print(report.head())
    with harness.worker_environment() as environment:
        for task in tasks:
            case = harness.compare(task, contenders, repetitions, environment)
            report.add(case)
            print("\n" + harness.table(case, reference="torch"), flush=True)


if __name__ == "__main__":
    binary.launch(main)
