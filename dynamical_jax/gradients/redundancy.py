"""How alike the gradients of a query are."""

from typing import Any, NamedTuple

from dynamical_jax import dynamics, losses
from dynamical_jax.gradients.sketch import sketch
from dynamical_jax.types import ApplyFn, Variables


class Redundancy(NamedTuple):
    """How alike the gradients of a query are: `dynamics.mean_cosine` and `.near_copies`."""

    mean_cosine: float
    near_copies: float


def redundancy(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    labels: Any = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Redundancy:
    """Returns how alike the gradients of a query are, from sketches of 512 numbers.

    The standard error of the cosine of two sketches is about 0.04 for images that are not alike, up
    to twice that where layers are projected and see nearly the same (`gradients.sketch`); of many
    pairs, some err by several times as much. Copies have the same sketch: their cosine is 1.

    Args:
      apply: the model, `apply(variables, x)`.
      variables: its variables.
      x: `[b, ...]` inputs of the query, at least two, in its order.
      labels: `[b]`; pseudo-labels if None.
      loss: whose gradients these are.
    """
    sketches = sketch(apply, variables, x, labels, loss=loss)
    products = sketches @ sketches.T
    return Redundancy(float(dynamics.mean_cosine(products)), float(dynamics.near_copies(products)))
