"""Makes the strategy that the flags describe."""

from absl import flags

from dynamical_jax import strategies
from dynamical_jax.programs import options

GAMMA = flags.DEFINE_float(
    "gamma", 2.0, "For dynamical: the weight γ of g_u·g_S in Δ; inf uses g_u·g_S alone."
)


def make(name: str) -> strategies.Strategy:
    """Returns the strategy `name` with the options that the flags give it.

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
