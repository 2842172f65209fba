"""Rules that turn scores into a query."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamical_jax.types import AnyArray


def top_b(scores: Float[AnyArray, "n"], batch_size: int) -> Int[Array, "b"]:
    """Returns the positions of the `batch_size` largest scores, largest first, Eq. 12.

    Guaranteed: no position twice, and of equal scores the lower position first.

    Raises:
      ValueError: if `batch_size` exceeds the number of scores.

    >>> top_b(jnp.array([1.0, 3.0, 2.0, 3.0]), 3)
    Array([1, 3, 2], dtype=int32)
    """
    if batch_size > len(scores):
        raise ValueError(f"cannot choose {batch_size} of {len(scores)}")
    # −0 and 0 are equal, but not to `top_k`.
    return jax.lax.top_k(jnp.where(scores == 0, 0, scores), batch_size)[1]
