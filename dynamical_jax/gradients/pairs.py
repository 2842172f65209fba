"""Computes the products g_u·g_v of all pairs of two sets, layer by layer.

A layer's part of g_u is kept in one of three forms, whichever makes products of pairs cheap:

- `Formed`: the gradient itself, flattened;
- `Factors`: a `[T, d]` and e `[T, p]` of a kernel's gradient aᵀe, as in `shares.py`; then
  ⟨aᵤᵀeᵤ, aᵥᵀeᵥ⟩ = ⟨aᵤaᵥᵀ, eᵤeᵥᵀ⟩, and for T = 1, a dense layer of vectors, (aᵤ·aᵥ)(eᵤ·eᵥ);
- `Rows`: of a table, in each of which tokens t of u and t' of v meet or do not.

Functions of layers take (layer, variables, inputs, cotangent), as those of `shares.py` do, and
return a list of forms: of the kernel, of the bias.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynamical_jax import convolution
from dynamical_jax.gradients import kinds, shares
from dynamical_jax.gradients.kinds import Layer
from dynamical_jax.types import Array

# Accelerators would round to fewer digits than float32 has, and distances are differences.
PRECISION = lax.Precision.HIGHEST


class Formed(NamedTuple):
    """A part of the gradients of n examples, `[n, number of its parameters]`."""

    gradient: Array


class Factors(NamedTuple):
    """The factors of the gradient of a kernel: a `[n, T, groups, d]` and e `[n, T, groups, p]`."""

    a: Array
    e: Array


class Rows(NamedTuple):
    """The rows `[n, T]` of a table that tokens took, and e `[n, T, p]`."""

    rows: Array
    e: Array


Form = Formed | Factors | Rows


def products(left: list[Form], right: list[Form]) -> Array:
    """Returns g_u·g_v `[m, n]` of two sets, whose forms are of the same parameters in turn."""
    return sum(PRODUCTS[type(one)](one, other) for one, other in zip(left, right, strict=True))


def _products_of_formed(left: Formed, right: Formed) -> Array:
    return jnp.matmul(left.gradient, right.gradient.T, precision=PRECISION)


def _products_of_factors(left: Factors, right: Factors) -> Array:
    def with_all(one: Factors) -> Array:
        grams = [
            jnp.einsum("sgk,ntgk->ngst", mine, theirs, precision=PRECISION)
            for mine, theirs in zip(one, right, strict=True)
        ]
        return jnp.sum(grams[0] * grams[1], axis=(1, 2, 3))

    return _for_each(
        with_all, left, right.a.shape[0] * math.prod(left.a.shape[1:3]) * left.a.shape[1]
    )


def _products_of_rows(left: Rows, right: Rows) -> Array:
    def with_all(one: Rows) -> Array:
        same = one.rows[None, :, None] == right.rows[:, None]
        return jnp.sum(
            same * jnp.einsum("sp,ntp->nst", one.e, right.e, precision=PRECISION), axis=(1, 2)
        )

    return _for_each(with_all, left, right.rows.size * left.rows.shape[1])


def _for_each(function: Callable[[Any], Array], examples: Any, elements: int) -> Array:
    """Applies `function` to each example, to so many at a time that the results stay small."""
    n = len(jax.tree.leaves(examples)[0])
    batch_size = max(1, min(n, shares.chunk_elements() // elements))
    return lax.map(function, examples, batch_size=batch_size)


PRODUCTS: dict[type[Form], Callable[[Any, Any], Array]] = {
    Formed: _products_of_formed,
    Factors: _products_of_factors,
    Rows: _products_of_rows,
}


def forms_of(layer: Layer, variables: Any, inputs: Array, cotangent: Any) -> list[Form]:
    """Returns the forms of the gradients in a layer's parameters, by the kind of layer it is."""
    return FORMS.get(type(layer.kind), formed)(layer, variables, inputs, cotangent)


def of_kernel(layer: Layer, variables: Any, inputs: Array, cotangent: Array) -> list[Form]:
    """Returns the forms of a layer with a kernel."""
    kernel = kernel_of(layer, variables, inputs, cotangent)
    bias = [Formed(kernel.bias_gradient)] if "bias" in variables["params"] else []
    if forms_gradient(kernel.positions, kernel.depth, kernel.features):
        return [Formed(kernel.for_each(form_gradient)), *bias]
    return [kernel.factors(kernel.images, kernel.e), *bias]


class Kernel(NamedTuple):
    """The input of a layer with a kernel as images, and the cotangent of its output.

    Attributes:
      images: `[n, *sizes, c]`.
      e: `[n, *positions, groups · features]`.
      window: where the taps of the kernel fall.
      groups: of channels.
    """

    images: Array
    e: Array
    window: convolution.Window
    groups: int

    @property
    def positions(self) -> int:
        """T, of the output."""
        return math.prod(self.e.shape[1:-1])

    @property
    def depth(self) -> int:
        """The size d of what one output sees."""
        return math.prod(self.window.size) * self.images.shape[-1] // self.groups

    @property
    def features(self) -> int:
        """The outputs p of a group."""
        return self.e.shape[-1] // self.groups

    @property
    def bias_gradient(self) -> Array:
        """The gradients `[n, groups · features]` of a bias."""
        return jnp.sum(self.e, axis=tuple(range(1, self.e.ndim - 1)))

    def factors(self, images: Array, e: Array) -> Factors:
        """Returns a and e of some of the images."""
        patches = convolution.image_patches(images, self.window)
        channels = self.images.shape[-1] // self.groups
        a = patches.reshape(len(e), self.positions, -1, self.groups, channels)
        a = a.transpose(0, 1, 3, 2, 4).reshape(len(e), self.positions, self.groups, self.depth)
        return Factors(a, e.reshape(len(e), self.positions, self.groups, self.features))

    def for_each(self, function: Callable[[Array, Array], Array], elements: int = 0) -> Array:
        """Returns a function of a and e of each image, of so many together as keeps it small.

        Args:
          function: of a `[T, groups, d]` and e `[T, groups, p]`.
          elements: that it makes beside the patches; by default those of the gradient.
        """

        def run(example: tuple[Array, Array]) -> Array:
            a, e = self.factors(*(part[None] for part in example))
            return function(a[0], e[0])

        elements = elements or self.groups * self.depth * self.features
        patches = self.groups * self.depth * self.positions
        return _for_each(run, (self.images, self.e), patches + elements)


def kernel_of(layer: Layer, variables: Any, inputs: Array, cotangent: Array) -> Kernel:
    """Returns what a layer with a kernel saw, as it saw it."""
    dtype = shares.accumulation_dtype(variables)
    setting = shares.setting_of(layer.kind, variables["params"], inputs, cotangent, dtype)
    return Kernel(setting.images, setting.e, setting.window, setting.groups)


def form_gradient(a: Array, e: Array) -> Array:
    """Returns aᵀe of an example, flattened."""
    return jnp.einsum("tgd,tgp->gdp", a, e, precision=PRECISION).reshape(-1)


def forms_gradient(positions: int, depth: int, features: int) -> bool:
    """Whether products of pairs cost less from aᵀe than from a and e.

    Multiplications for each pair and group: d·p from what is formed, T²(d + p) from the factors.
    """
    return depth * features <= positions**2 * (depth + features)


def of_normalization(layer: Layer, variables: Any, inputs: Array, cotangent: Array) -> list[Form]:
    """Returns the forms of a normalisation: scale and bias have small gradients."""
    gradients = shares.normalization_gradients(layer, variables, inputs, cotangent)
    return [Formed(gradients[name]) for name in sorted(variables["params"])]


def of_embedding(layer: Layer, variables: Any, inputs: Array, cotangent: Array) -> list[Form]:
    """Returns the form of an embedding: no array of tokens × rows of the table."""
    return [Rows(*shares.embedding_rows(layer, variables, inputs, cotangent))]


def of_bare(layer: Layer, variables: Any, inputs: Array, cotangent: Array) -> list[Form]:
    """Returns the form of a parameter that every example is given: its cotangent."""
    dtype = shares.accumulation_dtype(variables)
    return [Formed(cotangent.reshape(len(cotangent), -1).astype(dtype))]


def formed(layer: Layer, variables: Any, inputs: Array, cotangent: Any) -> list[Form]:
    """Returns the form of any layer, its gradients formed for one example after another."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def form(example: tuple[Array, Any]) -> Array:
        x, e = jax.tree.map(lambda leaf: leaf[None], example)
        outputs = lambda params: layer.apply({**rest, "params": params}, x)
        _, pullback = jax.vjp(outputs, variables["params"])
        return flat(*pullback(e))

    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return [Formed(_for_each(form, (inputs, cotangent), size + math.prod(inputs.shape[1:])))]


def flat(gradient: Any) -> Array:
    """Returns a tree of gradients as one vector, in float32 at least."""
    leaves = jax.tree.leaves(gradient)
    dtype = jnp.result_type(jnp.float32, *leaves)
    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in leaves])


FORMS: dict[type[kinds.Kind], Callable[..., list[Form]]] = {
    kinds.Contraction: of_kernel,
    kinds.Convolution: of_kernel,
    kinds.Normalization: of_normalization,
    kinds.Embedding: of_embedding,
    kinds.Bare: of_bare,
}
"""Kind of layer → its forms. Gradients of layers of other kinds are formed."""
