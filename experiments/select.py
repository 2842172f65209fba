"""The console script dynamical-select (`dynamical_jax.programs.select`), from a checkout.

python -m experiments.select --images=path/to/images --batch_size=50
"""

from dynamical_jax.programs.select import main as main
from dynamical_jax.programs.select import start

if __name__ == "__main__":
    start()
