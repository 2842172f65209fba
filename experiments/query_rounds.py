"""Is it better to ask often for few labels, or once for many, as in Table 1?

Lets dynamicAL spend one budget of labels in R queries of b = budget / R each, for several R.

  python -m experiments.query_rounds --preset=table1-cifar10-cnn

Records, continuing and the report work as in experiments.active_learning.
"""

import functools
import sys

from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary, options
from experiments import common, paper

BUDGET = flags.DEFINE_integer("budget", 120, "Labels to query, besides those of the initial set.")
ROUNDS = flags.DEFINE_list(
    "rounds", ["10", "4", "2", "1"], "Numbers of queries R to compare; each must divide the budget."
)
flags.adopt_module_key_flags(common)

PRESETS = [name for name, table in paper.tables().items() if "budget" in table.flags]
DERIVED_FLAGS = ("batch_size", "num_rounds")


def main(argv: list[str]) -> int | None:
    """Runs the comparison that the flags describe; returns the exit status."""
    return binary.run_main(functools.partial(run, argv), common.INTERRUPTED)


def run(argv: list[str]) -> list[str]:
    """Checks the flags, then runs every R with every seed; returns the failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    common.apply_preset(PRESETS)
    for name in DERIVED_FLAGS:
        if binary.is_given(name):
            raise dj.UserError(f"--{name} follows here from --budget and --rounds")
    strategy = dj.strategies.Dynamical(
        engine=options.ENGINE.value, chunk_size=options.CHUNK_SIZE.value
    )
    arms = {}
    for text in ROUNDS.value:
        if not text.isdecimal() or not int(text) or BUDGET.value % int(text):
            raise dj.UserError(f"rounds must divide the budget of {BUDGET.value}, got {text!r}")
        batch_size = BUDGET.value // int(text)
        if (name := f"R={int(text)} b={batch_size}") in arms:
            raise dj.UserError(f"a number of rounds is given twice: {','.join(ROUNDS.value)}")
        arms[name] = (strategy, dj.Budget(common.INITIAL_SIZE.value, batch_size, int(text)))
    if not arms:
        raise dj.UserError("no number of rounds given; for example --rounds=10,4,2,1")
    return common.compare(arms, sys.modules[__name__], "query_rounds-{dataset}-{model}")


if __name__ == "__main__":
    binary.launch(main)
