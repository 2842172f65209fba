"""Maximum mean discrepancy between a set and a larger set that contains it (App. D.1)."""

import math

import numpy as np
from jaxtyping import Float

from dynamical_jax.errors import UserError
from dynamical_jax.ntk.alignment import symmetric
from dynamical_jax.types import AnyArray


def squared_mmd(kernel: Float[AnyArray, "n n"], size: int) -> float:
    """Returns the unbiased estimate of MMD²(S, S ∪ Q), Eq. 32.

    All three sums leave out pairs of a sample with itself. The estimate may be negative.

    Args:
      kernel: Θ on S ∪ Q, with S first.
      size: m = |S|.

    Raises:
      UserError: unless 2 ≤ m < n.
    """
    kernel, m, n = symmetric(kernel), size, len(kernel)
    if not 2 <= m < n:
        raise UserError(f"|S| must be at least 2 and less than |S ∪ Q| = {n}, got {m}")
    within = np.trace(kernel[:m, :m])
    a = np.sum(kernel[:m, :m]) - within
    b = np.sum(kernel) - np.trace(kernel)
    c = np.sum(kernel[:m]) - within
    return float(a / (m**2 - m) + b / (n**2 - n) - 2 * c / (m * (n - 1)))


def mmd(kernel: Float[AnyArray, "n n"], size: int) -> float:
    """Returns MMD(S, S ∪ Q) of Eq. 23: the root of `squared_mmd`, 0 where that is negative."""
    return math.sqrt(max(0.0, squared_mmd(kernel, size)))
