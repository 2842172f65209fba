"""The console script dynamical-embed (`dynamical_jax.programs.embed`), from a checkout.

python -m experiments.embed path/to/images --weights=weights.safetensors
"""

from dynamical_jax.programs.embed import main as main
from dynamical_jax.programs.embed import start

if __name__ == "__main__":
    start()
