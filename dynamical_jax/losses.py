"""Losses of single examples and their gradients with respect to the outputs.

Logits in half precision are first made float32: where p is near 1, loss and residual are about
1 − p, of which bfloat16, with steps of 0.004 below 1, and float16 keep little or nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dynamical_jax.types import AnyArray


@jax.jit
def cross_entropy(logits: Float[AnyArray, "n k"], labels: Int[AnyArray, "n"]) -> Float[Array, "n"]:
    """Returns ℓ(f(x), y) = −log σ(f(x))_y of each example, Eq. 4.

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))  # log 4
    Array([1.3862944], dtype=float32)
    """
    return optax.softmax_cross_entropy_with_integer_labels(_at_least_single(logits), labels)


def most_likely(logits: Float[AnyArray, "k"]) -> Int[Array, ""]:
    """Returns the class of the largest logit of one example, its pseudo-label by Eq. 10."""
    return jnp.argmax(logits)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of one example, and the target that it is given where none is known.

    Programs are compiled for each function: keep one object, and no lambda within a loop.

    Attributes:
      of_row: of (outputs `[K]`, target) to a scalar; the cross-entropy of a class by default.
      pseudo_label: of the outputs `[K]` to a target, which is held constant. With `most_likely`
        targets are classes, and checked to be.
    """

    of_row: Callable[[Array, Any], Array] | None = None
    pseudo_label: Callable[[Array], Any] = most_likely

    @property
    def of_classes(self) -> bool:
        """Whether targets are classes."""
        return self.pseudo_label is most_likely

    def __call__(self, outputs: Float[AnyArray, "n k"], targets: Any) -> Float[Array, "n"]:
        """Returns the loss of each example."""
        if self.of_row is None:
            return cross_entropy(outputs, targets)
        return jax.vmap(self.of_row)(_at_least_single(outputs), targets)

    def pseudo_labels(self, outputs: Float[AnyArray, "n k"]) -> Any:
        """Returns the target `[n, ...]` of each example."""
        return jax.lax.stop_gradient(jax.vmap(self.pseudo_label)(outputs))


CROSS_ENTROPY = Loss()


@jax.jit
def squared_error(
    outputs: Float[AnyArray, "n k"], targets: Float[AnyArray, "n k"]
) -> Float[Array, "n"]:
    """Returns ½ Σ_k (f^k(x) − y^k)² of each example, App. A.3 without its stray minus sign."""
    return 0.5 * jnp.sum((outputs - targets) ** 2, axis=-1)


@jax.jit
def residual(logits: Float[AnyArray, "n k"], labels: Int[AnyArray, "n"]) -> Float[Array, "n k"]:
    """Returns d = σ(f) − y, the gradient of the cross-entropy in the logits, Eq. 6 and 8.

    >>> residual(jnp.zeros((1, 2)), jnp.array([0]))
    Array([[-0.5,  0.5]], dtype=float32)
    """
    probabilities = jax.nn.softmax(_at_least_single(logits))
    return probabilities - jax.nn.one_hot(labels, logits.shape[-1], dtype=probabilities.dtype)


def _at_least_single(logits: AnyArray) -> Array:
    """Returns logits in float32, or in float64 if they have that type."""
    return jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32))
