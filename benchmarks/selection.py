r"""What does choosing cost, once the pool is scored? Strategies on the same features.

  python -m benchmarks.selection

About 10 minutes on two cores. 500 of 49,500 images are chosen from logits of 10 or 101 classes and
512 features, as ResNet-18 has them. Prints, for each strategy, the seconds of the clock and of all
cores, and the peak memory without the result of scoring, in a new process whose program is
compiled already. --models takes strategies here, --batch_sizes the number of images to choose.

With scikit-activeml, its strategies beside ours, scoring included, in sizes that both can bear:

  python -m benchmarks.selection --contenders=ours,scikit-activeml --pool_size=5000 \
    --batch_sizes=100
"""

import importlib.util

from absl import flags

import dynamical_jax as dj
from benchmarks import harness, skactiveml_contenders
from dynamical_jax.programs import binary

for _name in harness.KEY_FLAGS_OF_ONE_TURN:
    flags.declare_key_flag(_name)

POOL_SIZE = flags.DEFINE_integer("pool_size", 49_500, "Images to choose from.", lower_bound=1)

PEER = "scikit-activeml"
CONTENDERS = {
    "10 classes": "strategy_contenders.select_from_10_classes",
    "101 classes": "strategy_contenders.select_from_101_classes",
    "ours": "strategy_contenders.query_from_small_features",
    PEER: "skactiveml_contenders.select",
}
DEFAULT = ["10 classes", "101 classes"]
# Those that choose by gradients of the query need a network, and cost what that does.
BY_GRADIENTS = ("dynamical_joint", "dynamical_diverse", "dynamical_repelled")
BATCH_SIZES = dict.fromkeys((name for name in dj.STRATEGIES if name not in BY_GRADIENTS), (500,))
BATCH_SIZES["batch_bald"] = (10,)  # More of them can hardly be told apart.


def main(argv: list[str]) -> int | None:
    """Lets each strategy choose; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then times each strategy."""
    if harness.CONTENDERS.value is None:
        flags.FLAGS["contenders"].value = DEFAULT
    if harness.MODELS.value is None and not set(DEFAULT) & set(harness.CONTENDERS.value):
        flags.FLAGS["models"].value = list(skactiveml_contenders.STRATEGIES)
    tasks, contenders, _ = harness.settings(CONTENDERS, BATCH_SIZES)
    if PEER in contenders and importlib.util.find_spec("skactiveml") is None:
        print(f"{PEER} is not installed, and left out")
        del contenders[PEER]
    for task in tasks:
        if task.batch_size > POOL_SIZE.value:
            raise dj.UserError(f"cannot choose {task.batch_size} of {POOL_SIZE.value} images")
    report = harness.Report("selection")
    print(report.head())
    print(f"\n{'':36}{'seconds':>10}{'of cores':>10}{'peak MiB':>12}")
    with harness.worker_environment() as environment:
        for task in tasks:
            for name, contender in contenders.items():
                if name == PEER and task.model not in skactiveml_contenders.STRATEGIES:
                    continue
                task = task._replace(pool_size=POOL_SIZE.value)
                with harness.measure_other_load() as others:
                    case = harness.run_once(contender, task, environment)
                case = {"classes": name, **case, "others_share": others()}
                report.add(case)
                numbers = f"{case['seconds']:10.3f}{case['cpu_seconds']:10.3f}"
                print(f"{f'{task.model}, {name}':36}{numbers}{case['peak_mib']:12.0f}", flush=True)


if __name__ == "__main__":
    binary.launch(main)
