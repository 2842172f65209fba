"""Figure 5: how much does the weight γ of g_u·g_S in Δ matter?

Compares dynamicAL with ‖g_u‖² + γ g_u·g_S for several γ: 2 is the paper's method, 0 the gradient
norm alone, inf the inner product alone.

  python -m experiments.gamma_variants --preset=table3

Records, continuing and the report work as in experiments.active_learning.
"""

import functools
import sys

from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary, options
from experiments import active_learning, common

GAMMAS = flags.DEFINE_list("gammas", ["0", "1", "2", "inf"], "The values of γ to compare.")
flags.adopt_module_key_flags(common)


def main(argv: list[str]) -> int | None:
    """Runs the comparison that the flags describe; returns the exit status."""
    return binary.run_main(functools.partial(run, argv), common.INTERRUPTED)


def run(argv: list[str]) -> list[str]:
    """Checks the flags, then runs every γ with every seed; returns the failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    common.apply_preset(active_learning.PRESETS)
    budget = dj.Budget(common.INITIAL_SIZE.value, options.BATCH_SIZE.value, common.NUM_ROUNDS.value)
    arms = {}
    for text in GAMMAS.value:
        try:
            gamma = float(text)
        except ValueError as error:
            raise dj.UserError(f"gammas are numbers or inf, got {text!r}") from error
        strategy = dj.strategies.Dynamical(gamma, options.ENGINE.value, options.CHUNK_SIZE.value)
        if (name := f"gamma={gamma:g}") in arms:
            raise dj.UserError(f"a gamma is given twice: {','.join(GAMMAS.value)}")
        arms[name] = (strategy, budget)
    if not arms:
        raise dj.UserError("no gamma given; for example --gammas=0,1,2,inf")
    return common.compare(arms, sys.modules[__name__], "gamma_variants-{dataset}-{model}")


if __name__ == "__main__":
    binary.launch(main)
