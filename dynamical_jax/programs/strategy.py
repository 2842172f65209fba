"""Makes the strategy that the flags describe."""

from absl import flags

from dynamical_jax import strategies
from dynamical_jax.programs import options

GAMMA = flags.DEFINE_float(
    "gamma", 2.0, "dynamical, its variants: the weight γ of g_u·g_S in Δ; inf uses g_u·g_S alone."
)
BETA = flags.DEFINE_float(
    "beta", 2.0, "dynamical_sampled, power_margin: power of the score; inf for no draw."
)
NUM_CANDIDATES = flags.DEFINE_integer(
    "num_candidates",
    None,
    "dynamical_joint, dynamical_diverse: choose among so many of largest Δ; by default ten for "
    "each label of a query.",
)
BLOCK_SIZE = flags.DEFINE_integer(
    "block_size", 100, "dynamical_repelled: how many are chosen between looks at each other."
)
RADIUS = flags.DEFINE_float(
    "radius",
    None,
    "probcover, max_herding, uncertainty_herding: radius of the balls, or of the kernel, among "
    "embeddings of norm 1; by default each one's own rule.",
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "uncertainty_herding: logits are divided by it."
)
OPTIONS = (
    GAMMA,
    BETA,
    NUM_CANDIDATES,
    BLOCK_SIZE,
    RADIUS,
    TEMPERATURE,
    options.ENGINE,
    options.CHUNK_SIZE,
)


def make(name: str) -> strategies.Strategy:
    """Returns a strategy with those of the flags that it takes.

    Raises:
      UserError: if there is no such strategy, or an option is out of range.
    """
    option_names = strategies.options(name)
    values = {flag.name: flag.value for flag in OPTIONS if flag.name in option_names}
    return strategies.create(name, **values)
