"""Data sets, your own images, and the pool from which images are queried."""

from dynamical_jax.data import datasets as datasets
from dynamical_jax.data import folders as folders
from dynamical_jax.data import images as images
from dynamical_jax.data import pool as pool
