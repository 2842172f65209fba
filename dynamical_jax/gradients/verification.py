"""Checks that the factored engine gives the numbers of `vmap(jax.grad)` for your layers."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from dynamical_jax import losses
from dynamical_jax.gradients import factored, per_example
from dynamical_jax.gradients.set_gradient import set_gradient
from dynamical_jax.types import ApplyFn, Examples, GradientTerms, Variables


class Verification(NamedTuple):
    """The differences between the factored engine and `vmap(jax.grad)`.

    Attributes:
      squared_norm: the largest difference of ‖g_u‖², relative to the larger of the two.
      inner_product: the largest difference of g_u·v, relative to ‖g_u‖ ‖v‖.
    """

    squared_norm: float
    inner_product: float


def verify(
    model: Any,
    variables: Variables,
    x: Any,
    labels: Any = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Verification:
    """Compares the factored engine with `vmap(jax.grad)`, and prints the largest difference.

    In float32 differences of 1e-5 are rounding. Larger ones mean that a layer is registered wrongly
    (`gradients.register`), or that the model mixes examples.

    Args:
      model: a Flax Linen module, such as `models.from_nnx` makes, or its `apply`.
      variables: its variables.
      x: `[n, ...]` inputs, at least two.
      labels: `[n]`; pseudo-labels if None.
      loss: whose gradients are compared.

    Raises:
      UnsupportedError: if the model has no factored form: then it is scored by `vmap(jax.grad)`.
    """
    apply: ApplyFn = getattr(model, "apply", model)
    reference, engine = (_compiled(module, apply, loss) for module in (per_example, factored))
    exact = reference(variables, x, labels, variables["params"])
    # A direction as in dynamicAL: the gradient of a set.
    direction = set_gradient(apply, variables, Examples(x, np.asarray(exact.label)), loss=loss)
    ours, exact = (
        jax.tree.map(np.asarray, terms(variables, x, exact.label, direction))
        for terms in (engine, reference)
    )
    length = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(direction)))
    largest = np.maximum(ours.squared_norm, exact.squared_norm)
    tiny = np.finfo(largest.dtype).tiny
    result = Verification(
        float(np.max(np.abs(ours.squared_norm - exact.squared_norm) / (largest + tiny))),
        float(
            np.max(
                np.abs(ours.inner_product - exact.inner_product)
                / (np.sqrt(largest) * length + tiny)
            )
        ),
    )
    print(
        f"largest relative difference of the factored engine from vmap(jax.grad) over {len(x)} "
        f"examples: {result.squared_norm:.1e} in ‖g_u‖², {result.inner_product:.1e} in g_u·v"
    )
    return result


def _compiled(
    engine: ModuleType, apply: ApplyFn, loss: losses.Loss
) -> Callable[..., GradientTerms]:
    # A function of its own each time: another registration must not meet an earlier one's program.
    return jax.jit(functools.partial(engine.gradient_terms, apply, loss=loss))
