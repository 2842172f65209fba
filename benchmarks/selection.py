"""What does choosing cost, once the pool is scored? Strategies on the same features.

  python -m benchmarks.selection

About 3 minutes on two cores. 500 of 49,500 images are chosen from logits of 10 or 101 classes and
512 features, as ResNet-18 has them. Prints, for each strategy, the seconds and the peak memory
without the result of scoring, in a new process whose program is compiled already. --models
takes strategies here, --batch_sizes the number of images to choose.
"""

from absl import app, flags, logging

import dynamical_jax as dj
from benchmarks import harness

for _name in harness.KEY_FLAGS_OF_ONE_TURN:
    flags.declare_key_flag(_name)

POOL_SIZE = flags.DEFINE_integer("pool_size", 49_500, "Images to choose from.", lower_bound=1)

CONTENDERS = {
    "10 classes": "strategy_contenders.select_from_10_classes",
    "101 classes": "strategy_contenders.select_from_101_classes",
}
# Those that choose by gradients of the query need a network, and cost what that does.
BY_GRADIENTS = ("dynamical_joint", "dynamical_diverse", "dynamical_repelled")
BATCH_SIZES = dict.fromkeys((name for name in dj.STRATEGIES if name not in BY_GRADIENTS), (500,))


def main(argv: list[str]) -> int | None:
    """Lets each strategy choose; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then times each strategy."""
    tasks, contenders, _ = harness.settings(CONTENDERS, BATCH_SIZES)
    for task in tasks:
        if task.batch_size > POOL_SIZE.value:
            raise dj.UserError(f"cannot choose {task.batch_size} of {POOL_SIZE.value} images")
    report = harness.Report("selection")
    print(report.head())
    print(f"\n{'':28}{'seconds':>10}{'peak MiB':>12}")
    with harness.worker_environment() as environment:
        for task in tasks:
            for name, contender in contenders.items():
                task = task._replace(pool_size=POOL_SIZE.value)
                case = {"classes": name, **harness.run_once(contender, task, environment)}
                report.add(case)
                numbers = f"{case['seconds']:10.3f}{case['peak_mib']:12.0f}"
                print(f"{f'{task.model}, {name}':28}{numbers}", flush=True)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # JAX chats at INFO.
    app.run(main)
