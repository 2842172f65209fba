"""Deep active learning: which images should be labeled next?

Trains a model on a few labels of a data set, lets each strategy ask for more, round by round, and
draws accuracy against labels. Without flags the data set is scikit-learn's digits, which needs no
download, and the run takes two minutes on two cores.

  python -m experiments.active_learning

The paper's Table 3 (CIFAR-10, the small CNN, b = 500) with its eight strategies; expect 31–33
percent at 500 labels and 36–39 percent at 2,500:

  python -m experiments.active_learning --preset=table3

Writes to --output_dir: rounds.jsonl, a line for each round of each seed and strategy, and
accuracy.png. If it was stopped, the same command continues. `python -m experiments.report` makes
tables and statistics from the records.
"""

import functools
import sys

from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary, options, strategy
from experiments import common, paper

STRATEGIES = flags.DEFINE_list(
    "strategies",
    ["dynamical", "random"],
    f"Strategies to compare: some of {', '.join(dj.STRATEGIES)}.",
)
POOL_IMBALANCE = flags.DEFINE_list(
    "pool_imbalance",
    None,
    "Share of each class, from 0 to 1, that is left in the pool, in the order of the classes; a "
    "list with fewer is repeated: 1,0.1 leaves a tenth of every second class. Each seed draws its "
    "own. The test set stays as it is. By default all are left.",
)
flags.adopt_module_key_flags(common)
flags.adopt_module_key_flags(strategy)

PRESETS = [name for name, table in paper.tables().items() if "batch_size" in table.flags]


def main(argv: list[str]) -> int | None:
    """Runs the comparison that the flags describe; returns the exit status."""
    return binary.run_main(functools.partial(run, argv), common.INTERRUPTED)


def run(argv: list[str]) -> list[str]:
    """Checks the flags, then runs every strategy with every seed; returns the failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    common.apply_preset(PRESETS)
    names = STRATEGIES.value
    if common.PRESET.value and not binary.is_given("strategies"):
        names = paper.strategies()
        flags.FLAGS["strategies"].value = names
    if not names:
        raise dj.UserError(f"no strategy given; choose from {', '.join(dj.STRATEGIES)}")
    if len(set(names)) < len(names):
        raise dj.UserError(f"a strategy is given twice: {','.join(names)}")
    strategies = strategy.make(names)
    try:
        pool_shares = tuple(map(float, POOL_IMBALANCE.value or [1]))
    except ValueError as error:
        given = ",".join(POOL_IMBALANCE.value)
        raise dj.UserError(f"--pool_imbalance takes numbers from 0 to 1, got {given!r}") from error
    budget = dj.Budget(common.INITIAL_SIZE.value, options.BATCH_SIZE.value, common.NUM_ROUNDS.value)
    arms = {name: (chosen, budget) for name, chosen in strategies.items()}
    return common.compare(arms, sys.modules[__name__], "{dataset}-{model}", pool_shares)


if __name__ == "__main__":
    binary.launch(main)
