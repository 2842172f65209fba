"""Does memory stay bounded? Scores whole pools through `gradients.norms_and_products`.

  python -m benchmarks.pool --pool_sizes=5000,49500

About 6 minutes on two cores. Prints, for each model and pool size, the seconds and the peak memory
without parameters and images, each in a new process whose program is compiled already.
--batch_sizes is the number of images in a block; by default the library chooses.
"""

from absl import flags

from benchmarks import harness
from dynamical_jax.programs import binary

for _name in harness.KEY_FLAGS_OF_ONE_TURN:
    flags.declare_key_flag(_name)

POOL_SIZES = flags.DEFINE_list("pool_sizes", ["5000", "49500"], "Images in each pool.")

CONTENDERS = {"factored": "jax_contenders.pool"}
BLOCK_SIZES = {"cnn": (None,), "resnet18": (None,)}


def main(argv: list[str]) -> int | None:
    """Scores the pools that the flags describe; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then scores each pool with each model."""
    sizes = binary.parse_positive("pool_sizes", POOL_SIZES.value)
    tasks, contenders, _ = harness.settings(CONTENDERS, BLOCK_SIZES)
    report = harness.Report("pool")
    print(report.head())
    print(f"\n{'':28}{'seconds':>10}{'ms / image':>12}{'peak MiB':>12}")
    (contender,) = contenders.values()
    with harness.worker_environment() as environment:
        for task in (task._replace(pool_size=size) for task in tasks for size in sizes):
            case = harness.run_once(contender, task, environment)
            report.add(case)
            per_image = 1e3 * case["seconds"] / task.pool_size
            title = f"{task.model}, {task.pool_size} images"
            numbers = f"{case['seconds']:10.1f}{per_image:12.3f}{case['peak_mib']:12.0f}"
            print(f"{title:28}{numbers}", flush=True)


if __name__ == "__main__":
    binary.launch(main)
