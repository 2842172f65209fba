"""Many runs: their directory, their records, and checkpoints to continue from."""

from dynamical_jax.runs import checkpoints as checkpoints
from dynamical_jax.runs import comparison as comparison
from dynamical_jax.runs import playing as playing
from dynamical_jax.runs import progress as progress
from dynamical_jax.runs import records as records
from dynamical_jax.runs import run_directory as run_directory
