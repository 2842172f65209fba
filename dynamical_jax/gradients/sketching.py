"""A short vector for each g_u, whose inner products are g_u·g_v up to a random error.

Each layer gives a linear map, drawn once for all examples, of its part of g_u to k numbers; the sum
over layers is the sketch. A kernel's gradient is aᵀe, with a `[T, d]` and e `[T, p]` as in
`shares.py`, and the map is one of two, whichever takes fewer multiplications:

- *fold*: aᵀe is formed, its elements get signs, and pieces of k in a row, each turned by a number
  of places of its own, are added up;
- *project*: number m is Σ_t (a_t·r_m)(e_t·q_m) / √k = r_mᵀ aᵀe q_m / √k, without aᵀe.

The signs, r and q (of signs), and the turns are random. So a product of two numbers is in
expectation that of the two elements they come from, and 0 for two different elements or two layers:
sketches are unbiased. The variance of a layer's part of s_u·s_v is, with u and v its parts of g_u
and g_v, for

- *fold* at most (‖u‖²‖v‖² + (u·v)²) / k, as for a dense matrix of signs: two elements meet with
  probability 1/k at most, wherever they are in the kernel;
- *project* at most ((1 + 2ρ₁²)(1 + 2ρ₂²) − ρ₁²ρ₂²) ‖u‖²‖v‖² / k for kernels of one position
  (T = 1), where ρ₁ is the cosine of a_u and a_v, ρ₂ that of e_u and e_v: 8 ‖u‖⁴ / k for u = v.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dynamical_jax.gradients import pairs, shares
from dynamical_jax.gradients.kinds import Layer
from dynamical_jax.types import Array

WORD = 32


def of_layer(
    key: Array, size: int, layer: Layer, variables: Any, inputs: Array, cotangent: Any
) -> Array:
    """Returns a layer's part of the sketches, `[n, size]`, from what `pairs` makes forms of."""
    key, key_rest = jax.random.split(key)
    if pairs.FORMS.get(type(layer.kind)) is not pairs.of_kernel:
        return of_forms(key_rest, size, pairs.forms_of(layer, variables, inputs, cotangent))
    kernel = pairs.kernel_of(layer, variables, inputs, cotangent)
    sketch = of_kernel(key, size, kernel)
    if "bias" in variables["params"]:
        sketch += fold_formed(key_rest, size, kernel.bias_gradient)
    return sketch


def of_forms(key: Array, size: int, forms: list[pairs.Form]) -> Array:
    """Returns the sketches `[n, size]` of gradients that are formed, or rows of a table."""
    keys = jax.random.split(key, len(forms))
    return sum(
        of_rows(key, size, form)
        if isinstance(form, pairs.Rows)
        else fold_formed(key, size, form.gradient)
        for key, form in zip(keys, forms, strict=True)
    )


def of_kernel(key: Array, size: int, kernel: pairs.Kernel) -> Array:
    """Returns the sketches `[n, size]` of the gradients of a kernel."""
    cheaper = fold if folds(kernel.positions, kernel.depth, kernel.features, size) else project
    return cheaper(key, size, kernel)


def fold(key: Array, size: int, kernel: pairs.Kernel) -> Array:
    """Returns `of_kernel` by forming aᵀe of a few examples at a time."""
    length = kernel.groups * kernel.depth * kernel.features
    fold_one = folding(key, size, length, kernel.e.dtype)
    return kernel.for_each(lambda a, e: fold_one(jnp.einsum("tgd,tgp->gdp", a, e).reshape(-1)))


def project(key: Array, size: int, kernel: pairs.Kernel) -> Array:
    """Returns `of_kernel` by projecting a and e."""
    key_a, key_e = jax.random.split(key)
    groups, dtype = kernel.groups, kernel.e.dtype
    project_a = signs(key_a, (groups, kernel.depth, size), dtype) / math.sqrt(size)
    project_e = signs(key_e, (groups, kernel.features, size), dtype)

    def projected(a: Array, e: Array) -> Array:
        left = jnp.einsum("tgd,gdk->tgk", a, project_a)
        return jnp.sum(left * jnp.einsum("tgp,gpk->tgk", e, project_e), axis=(0, 1))

    return kernel.for_each(projected, 2 * kernel.positions * groups * size)


def folds(positions: int, depth: int, features: int, size: int) -> bool:
    """Returns whether folding aᵀe is cheaper than projecting a and e.

    Multiplications per example and group: T·d·p and the writing of d·p elements, or T·k·(d + p).
    """
    forming = (positions + shares.cost_of_forming()) * depth * features
    return forming <= positions * size * (depth + features)


def of_rows(key: Array, size: int, form: pairs.Rows) -> Array:
    """Returns the sketches `[n, size]` of the gradients of a table, by projecting."""
    key_row, key_e = jax.random.split(key)
    # The signs of a row follow from its number, so that those of a large table are never held.
    draw = lambda row: jax.random.bits(jax.random.fold_in(key_row, row), -(-size // WORD))
    words = jax.vmap(jax.vmap(draw))(form.rows)
    project_e = signs(key_e, (form.e.shape[-1], size), form.e.dtype) / math.sqrt(size)
    return jnp.sum(_signs_of(words, size, form.e.dtype) * (form.e @ project_e), axis=1)


def fold_formed(key: Array, size: int, gradient: Array) -> Array:
    """Returns the sketches `[n, size]` of gradients `[n, number of parameters]`."""
    return jax.vmap(folding(key, size, gradient.shape[1], gradient.dtype))(gradient)


def folding(key: Array, size: int, length: int, dtype: Any) -> Callable[[Array], Array]:
    """Returns the map that folds a vector of this length to `size` numbers."""
    key_sign, key_turn = jax.random.split(key)
    sign = signs(key_sign, (length,), dtype)
    # Without turns of their own, all elements of one output meet where p and k have a divisor.
    turns = jax.random.randint(key_turn, (-(-length // size),), 0, size)

    def add(total: Array, piece_and_turn: tuple[Array, Array]) -> tuple[Array, None]:
        return total + jnp.roll(*piece_and_turn), None

    def fold_one(values: Array) -> Array:
        pieces = jnp.pad(values * sign, (0, -length % size)).reshape(-1, size)
        # In turn: to turn all at once takes ten times as long on CPUs.
        return jax.lax.scan(add, jnp.zeros(size, values.dtype), (pieces, turns))[0]

    return fold_one


def signs(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns random signs, of which a draw of 32 bits gives 32."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // WORD)), jnp.uint32)
    return _signs_of(words, shape[-1], dtype)


def _signs_of(words: Array, size: int, dtype: Any) -> Array:
    places = jnp.arange(WORD, dtype=jnp.uint32).reshape(*(1,) * words.ndim, WORD)
    bits = words[..., None] >> places & 1
    return 1 - 2 * bits.reshape(*words.shape[:-1], -1)[..., :size].astype(dtype)
