"""The obvious engine: `jax.grad` of one example, under `vmap`.

It forms an array of batch × parameters, so it is slow and needs much memory. But it is simple: it
is the reference for faster engines.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Shaped

from dynamical_jax import contract, losses
from dynamical_jax.gradients import pairs
from dynamical_jax.types import AnyArray, ApplyFn, GradientTerms, Params, Variables


def per_example_gradients(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    labels: Shaped[AnyArray, "n ..."],
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Params:
    """Returns ∇_θ ℓ(x_u, y_u) of every example, a pytree of parameters with a leading axis n."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def of_one(params: Params, x: Any, label: Any) -> Array:
        logits = contract.as_outputs(apply({"params": params, **rest}, x[None]), 1).logits
        return loss(logits, label[None])[0]

    return jax.vmap(jax.grad(of_one), (None, 0, 0))(variables["params"], x, labels)


def gradient_terms(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    labels: Any,
    direction: Params,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> GradientTerms:
    """Returns ‖g_u‖² and g_u·v of every example u, v being `direction`.

    Args:
      apply: `model.apply`, in evaluation mode.
      variables: with all parameters in `params`.
      x: `[n, ...]` inputs.
      labels: `[n]`, or None for pseudo-labels.
      direction: a pytree like `variables["params"]`.
      loss: whose gradients these are.
    """
    labels = _labels(apply, variables, x, labels, loss)
    gradients = per_example_gradients(apply, variables, x, labels, loss)
    gradients = jax.tree.map(
        lambda leaf: leaf.astype(jnp.result_type(jnp.float32, leaf)), gradients
    )
    squared_norm = jax.vmap(lambda gradient: optax.tree.norm(gradient, squared=True))(gradients)
    inner_product = jax.vmap(optax.tree.vdot, (0, None))(gradients, direction)
    return GradientTerms(squared_norm, inner_product, labels)


def forms(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    labels: Any,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> list[pairs.Form]:
    """Returns the gradients of all examples, formed and flattened, for `pairs.products`.

    Args:
      apply: `model.apply`, in evaluation mode.
      variables: with all parameters in `params`.
      x: `[n, ...]` inputs.
      labels: `[n]`, or None for pseudo-labels.
      loss: whose gradients these are.
    """
    labels = _labels(apply, variables, x, labels, loss)
    gradients = per_example_gradients(apply, variables, x, labels, loss)
    return [pairs.Formed(jax.vmap(pairs.flat)(gradients))]


def _labels(apply: ApplyFn, variables: Variables, x: Any, labels: Any, loss: losses.Loss) -> Any:
    """Returns the labels, or the predictions if there are none."""
    if labels is not None:
        return labels
    return loss.pseudo_labels(contract.as_outputs(apply(variables, x), len(x)).logits)
