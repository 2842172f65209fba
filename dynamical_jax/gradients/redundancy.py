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

    The standard error of g_u·g_v is about 0.04 ‖g_u‖ ‖g_v‖ where g_u and g_v are not alike, and more
    where they are (`gradients.sketch`); single pairs err by several times that. Copies have the same
    sketch: their cosine is 1.

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
