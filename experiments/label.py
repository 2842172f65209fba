"""The console script dynamical-label (`dynamical_jax.programs.label`), from a checkout.

python -m experiments.label path/to/images
"""

from dynamical_jax.programs.label import main as main
from dynamical_jax.programs.label import start

if __name__ == "__main__":
    start()
