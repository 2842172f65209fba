"""Is a round on embeddings interactive? Training, scoring and choosing, by each strategy.

  python -m benchmarks.vectors

About 5 minutes on two cores, most of them scikit-activeml's. 200 of 20,000 vectors of 128 numbers,
and of 50,000 of 512, are chosen with 500 labels of 10 classes; the model is logistic regression.
Prints seconds and peak memory without the vectors, each in a new process whose programs are
compiled already. --models takes strategies here, --batch_sizes the number of vectors to choose.
Where scikit-activeml is not installed, it is left out.
"""

from absl import flags

import dynamical_jax as dj
from benchmarks import harness
from dynamical_jax.programs import binary

for _name in harness.KEY_FLAGS_OF_ONE_TURN:
    flags.declare_key_flag(_name)

SIZES = flags.DEFINE_list(
    "sizes", ["20000x128", "50000x512"], "Pools: the number of vectors, and of numbers in each."
)

CONTENDERS = {
    "dynamical_jax": "vector_contenders.dynamical_jax",
    "scikit-activeml": "vector_contenders.scikit_activeml",
}
DEFAULTS = ("dynamical", "dynamical_sampled", "badge", "coreset", "margin")
BATCH_SIZES = dict.fromkeys((*DEFAULTS, *(n for n in dj.STRATEGIES if n not in DEFAULTS)), (200,))


def main(argv: list[str]) -> int | None:
    """Times a round of each strategy; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then times each strategy on each pool."""
    if harness.MODELS.value is None:
        flags.FLAGS["models"].value = list(DEFAULTS)
    sizes = [parse(size) for size in SIZES.value]
    tasks, contenders, _ = harness.settings(CONTENDERS, BATCH_SIZES)
    report = harness.Report("vectors")
    print(report.head())
    print(f"\n{'':44}{'seconds':>10}{'peak MiB':>12}")
    with harness.worker_environment() as environment:
        for task in tasks:
            for pool_size, num_features in sizes:
                task = task._replace(pool_size=pool_size, num_features=num_features)
                for name, contender in contenders.items():
                    title = f"{task.model}, {pool_size}×{num_features}, {name}"
                    try:
                        case = harness.run_once(contender, task, environment)
                    except harness.LeftOutError as error:
                        print(f"{title:44}  left out ({error})", flush=True)
                        continue
                    report.add({"contender": name, **case})
                    numbers = f"{case['seconds']:10.2f}{case['peak_mib']:12.0f}"
                    print(f"{title:44}{numbers}", flush=True)


def parse(size: str) -> tuple[int, int]:
    """Returns both numbers of a size such as 20000x128.

    Raises:
      UserError: if it is none.
    """
    parts = size.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise dj.UserError(f"sizes look like 20000x128, got {size!r}")
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    binary.launch(main)
