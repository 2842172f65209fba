"""Training dynamics G, its change Δ by a query, and the approximation ratio (§3).

The loss is the *sum* of cross-entropies over a set (Eq. 4), and `grad_s` = Σ_{x∈S} ∇_θ ℓ(x, y).

Functions of gradients are compiled: operation by operation, each shape of parameter would take
several programs of its own.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dynamical_jax.types import AnyArray


@jax.jit
def training_dynamics(grad_s: Any) -> Float[Array, ""]:
    """Returns G(S) = ‖g_S‖², the decrease of the loss on S per unit of gradient flow, Eq. 8.

    Args:
      grad_s: pytree of parameters, the gradient of the loss summed over S.
    """
    return optax.tree.norm(grad_s, squared=True)


@jax.jit
def training_dynamics_from_kernel(
    ntk: Float[AnyArray, "n n k k"], residual: Float[AnyArray, "n k"]
) -> Float[Array, ""]:
    """Returns G(S) = Σ_ij (d^i)ᵀ 𝒦^ij d^j, the definition of Eq. 8.

    Equal to `training_dynamics` of the same set; kept as its reference.

    Args:
      ntk: the empirical NTK, 𝒦[x, x', i, j] = ∇f^i(x) · ∇f^j(x').
      residual: d = σ(f) − y.
    """
    return jnp.einsum("xi,xyij,yj->", residual, ntk, residual)


@jax.jit
def squared_error_training_dynamics(
    ntk: Float[AnyArray, "n n"], residual: Float[AnyArray, "n k"]
) -> Float[Array, ""]:
    """Returns G_MSE(S) = Tr[(f − Y)ᵀ Θ (f − Y)], the G of the squared error (App. A.3).

    Args:
      ntk: Θ, where 𝒦 = Θ ⊗ I_K as in the limit of infinite width; not divided by K.
      residual: f(X) − Y.
    """
    product = jnp.matmul(ntk, residual, precision="highest")
    return jnp.vdot(residual, product, precision="highest")


def change_of_training_dynamics(
    squared_norm: Float[AnyArray, "n"], inner_product: Float[AnyArray, "n"], gamma: float = 2.0
) -> Float[Array, "n"]:
    """Returns Δ({u}|S) = ‖g_u‖² + γ g_u·g_S of each example u.

    With γ = 2 this is G(S ∪ u) − G(S), Eq. 11. Eq. 15 prints the sum over S before both terms,
    which would count ‖g_u‖² |S| times and break that identity; here it belongs to the second term.

    Args:
      squared_norm: ‖g_u‖².
      inner_product: g_u · g_S.
      gamma: weight of the inner product (Figure 5). `math.inf` means the inner product alone.

    >>> change_of_training_dynamics(jnp.array([1.0, 4.0]), jnp.array([0.5, -1.0]))
    Array([2., 2.], dtype=float32)
    """
    squared_norm, inner_product = jnp.asarray(squared_norm), jnp.asarray(inner_product)
    if gamma == math.inf:
        return inner_product
    return squared_norm + gamma * inner_product


@jax.jit
def inner_product_share(
    squared_norm: Float[AnyArray, "b"], inner_product: Float[AnyArray, "b"]
) -> Float[Array, ""]:
    """Returns Σ_u |2 g_u·g_S| / Σ_u (‖g_u‖² + |2 g_u·g_S|), its share of Δ over a query.

    0 where S is fitted, since g_S is 0 then and Δ is the norm of g_u alone, or where all is 0; 1
    where g_S decides.

    Args:
      squared_norm: ‖g_u‖² of each u in the query.
      inner_product: g_u · g_S.

    >>> inner_product_share(jnp.array([1.0, 4.0]), jnp.array([0.5, -1.0]))
    Array(0.375, dtype=float32)
    """
    product = 2 * jnp.sum(jnp.abs(jnp.asarray(inner_product)))
    total = jnp.sum(jnp.asarray(squared_norm)) + product
    return jnp.where(total == 0, 0, product / jnp.where(total == 0, 1, total))


@jax.jit
def mean_cosine(products: Float[AnyArray, "b b"]) -> Float[Array, ""]:
    """Returns the mean cosine of the gradients of two examples of a query: 1 if all are alike.

    A gradient that is 0 has a cosine of 0 with any other.

    Args:
      products: g_u·g_v of all pairs, at least two examples.

    >>> mean_cosine(jnp.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 9.0]]))
    Array(0.33333334, dtype=float32)
    """
    cosines = _cosines(products)
    return jnp.mean(cosines, where=~jnp.eye(len(cosines), dtype=bool))


@functools.partial(jax.jit, static_argnames="cosine")
def near_copies(products: Float[AnyArray, "b b"], cosine: float = 0.9) -> Float[Array, ""]:
    """Returns the share of a query whose gradient is nearly that of an example before it.

    Args:
      products: g_u·g_v of all pairs, in the order of the query.
      cosine: from which two gradients are nearly the same in direction.

    >>> near_copies(jnp.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 9.0]]))
    Array(0.33333334, dtype=float32)
    """
    return jnp.mean(jnp.any(jnp.tril(_cosines(products), -1) >= cosine, axis=1))


def _cosines(products: AnyArray) -> Array:
    products = jnp.asarray(products)
    norms = jnp.sqrt(jnp.diagonal(products))
    size = norms[:, None] * norms[None]
    return jnp.where(size > 0, products / jnp.where(size > 0, size, 1), 0)


@jax.jit
def change_by_set(grad_q: Any, grad_s: Any) -> Float[Array, ""]:
    """Returns Δ(Q|S) = G(S ∪ Q) − G(S) = ‖g_Q‖² + 2 g_Q·g_S exactly, Eq. 11 and 13.

    Args:
      grad_q: pytree of parameters, the gradient of the loss summed over Q.
      grad_s: the same over S.
    """
    return optax.tree.norm(grad_q, squared=True) + 2 * optax.tree.vdot(grad_q, grad_s)


@jax.jit
def approximation_ratio(
    changes: Float[AnyArray, "b"], grad_q: Any, grad_s: Any
) -> Float[Array, ""]:
    """Returns R(Q|S) = Σ_{u∈Q} Δ({u}|S) / Δ(Q|S), Eq. 14.

    Args:
      changes: Δ({u}|S) of each u in Q, with γ = 2.
      grad_q: pytree of parameters, the gradient of the loss summed over Q.
      grad_s: the same over S.
    """
    return jnp.sum(changes) / change_by_set(grad_q, grad_s)
