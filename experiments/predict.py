"""The console script dynamical-predict (`dynamical_jax.programs.predict`), from a checkout.

python -m experiments.predict path/to/images --top=3
"""

from dynamical_jax.programs.predict import main as main
from dynamical_jax.programs.predict import start

if __name__ == "__main__":
    start()
