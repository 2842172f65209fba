"""The strategy that flags describe, for programs that take one by name."""

from absl import flags

from dynamical_jax import strategies
from dynamical_jax.programs import options

GAMMA = flags.DEFINE_float("gamma", 2.0, "dynamical: weight of g_u·g_S; inf for it alone.")


def make(name: str) -> strategies.Strategy:
    """Returns a strategy with the options that the flags give it.

    Raises:
      UserError: if there is no such strategy, or an option is out of range.
    """
    strategy_options = {}
    if name == "dynamical":
        strategy_options = {
            "gamma": GAMMA.value,
            "engine": options.ENGINE.value,
            "chunk_size": options.CHUNK_SIZE.value,
        }
    return strategies.create(name, **strategy_options)
