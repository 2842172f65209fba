"""Makes the strategies that the flags describe."""

from collections.abc import Sequence

from absl import flags

from dynamical_jax import strategies
from dynamical_jax.programs import binary, options

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
SKETCH_SIZE = flags.DEFINE_integer(
    "sketch_size",
    None,
    "dynamical_diverse: draw from the whole pool, by sketches of so many numbers (512 is plenty).",
)
BLOCK_SIZE = flags.DEFINE_integer(
    "block_size", 100, "dynamical_repelled: how many are chosen between looks at each other."
)
RADIUS = flags.DEFINE_float(
    "radius",
    None,
    "probcover, max_herding, uncertainty_herding, dynamical_herding: radius of the balls, or of "
    "the kernel, among embeddings of norm 1; by default each one's own rule.",
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "uncertainty_herding: logits are divided by it."
)
NUM_NETWORKS = flags.DEFINE_integer(
    "num_networks", 20, "bald, batch_bald: how many networks are drawn by dropout."
)
OPTIONS = (
    GAMMA,
    BETA,
    NUM_CANDIDATES,
    SKETCH_SIZE,
    BLOCK_SIZE,
    RADIUS,
    TEMPERATURE,
    NUM_NETWORKS,
    options.ENGINE,
    options.CHUNK_SIZE,
)
for _flag in OPTIONS:
    takers = [name for name in strategies.STRATEGIES if _flag.name in strategies.options(name)]
    binary.read_by(_flag, "strategy", takers)
binary.allow_infinity(GAMMA)
binary.allow_infinity(BETA)


def make(names: Sequence[str]) -> dict[str, strategies.Strategy]:
    """Returns name → strategy, each with those of the flags that it takes.

    Raises:
      UserError: if there is no such strategy, an option is out of range, or a flag is given that
        none of them takes.
    """
    made = {}
    for name in names:
        option_names = strategies.options(name)
        values = {flag.name: flag.value for flag in OPTIONS if flag.name in option_names}
        made[name] = strategies.create(name, **values)
    binary.check_read(strategy=list(made))
    return made
