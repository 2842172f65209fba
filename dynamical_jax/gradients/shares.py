"""Computes what one layer adds to ‖g_u‖² and g_u·v, from its input and its output's cotangent.

A kernel's gradient is aᵀe, with a `[T, d]` the patches of one example's input (for a dense layer
its rows) and e `[T, p]` the cotangents at the T positions of the output. Two forms are exact:

- *formed*: aᵀe is formed, T·d·p multiplications, for a few examples at a time;
- *Gram*: ‖aᵀe‖² = ⟨aaᵀ, eeᵀ⟩ without it (Goodfellow, 2015, arXiv:1510.01799), and, a layer being
  linear in its parameters, aᵀe·v = ⟨layer(x; v), e⟩.

The cheaper is taken for each layer, as in mixed ghost clipping (Bu et al., 2022, arXiv:2205.10683).

Each function takes (layer, variables, direction, inputs, cotangent): a `kinds.Layer`, its
variables, its part of v, and arrays with the examples u on their first axis. It returns the layer's
part of (‖g_u‖², g_u·v), each `[n]`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dynamical_jax import convolution
from dynamical_jax.gradients import kinds
from dynamical_jax.gradients.kinds import Layer
from dynamical_jax.types import Array

Shares = tuple[Array, Array]

# Elements of the gradients that are formed together and of the patches they are formed from: about
# what a core's cache holds. On two x86-64 cores the CNN (batch 256) takes the same time with 2**17
# to 2**19, 1.2 times as long with 2**15, 1.4 with 2**20 and 2.6 with 2**23; ResNet-18 (batch 128)
# the same with 2**15 to 2**20.
CHUNK_ELEMENTS = 2**18

# An accelerator starves on so few: 256 MiB of float32, which is one product of matrices for a whole
# block of small networks. On an H100 the CNN (block 16,384) takes 0.95 times as long with 2**29,
# 1.2 with 2**22 and 4.3 with 2**18.
CHUNK_ELEMENTS_ON_ACCELERATORS = 2**26

# A formed gradient is written and read back; per element that takes as long as so many
# multiplications of a matrix product. Measured likewise, and relative to 8: ResNet-18 takes the
# same time with 2 to 12, 1.15 times as long with 32 and 1.7 with 0, which forms every gradient; the
# CNN the same with 1 to 128, twice as long with 0 and 7.5 times with 512, which forms too few.
COST_OF_FORMING = 8

# From data sheets: 8 bytes at 1.5 to 3 TB/s take as long as 50 to 80 multiplications in float32, or
# some 400 in TensorFloat-32. On an H100 the CNN takes the same time with 1 to 50, 1.1 with 400.
COST_OF_FORMING_ON_ACCELERATORS = 50


def shares_of(
    layer: Layer, variables: Any, direction: Any, inputs: Array, cotangent: Any
) -> Shares:
    """Returns the shares of a layer, by its kind."""
    return SHARES[type(layer.kind)](layer, variables, direction, inputs, cotangent)


def kernel_shares(
    layer: Layer, variables: Any, direction: Any, inputs: Array, cotangent: Array
) -> Shares:
    """Shares of a layer with a kernel, by the cheaper form."""
    setting = setting_of(layer.kind, direction, inputs, cotangent, accumulation_dtype(variables))
    kernel, bias, images, e, window, groups, precision = setting
    if forms_gradient(images.shape, e.shape, window, groups):
        parts = {"kernel": _split_into_groups(kernel, groups)}
        if bias is not None:
            parts["bias"] = bias

        def share(example: tuple[Array, Array]) -> Shares:
            return _square_and_product(_form_gradient(*example, parts, window, precision), parts)

        taps_and_channels = math.prod(window.size) * images.shape[-1]
        size = taps_and_channels * (math.prod(e.shape[1:-1]) + e.shape[-1] // groups)
        return lax.map(share, (images, e), batch_size=_chunk(size, len(images)))

    squared_norm = _gram_squared_norm(images, e, window, groups, precision)
    product = jnp.sum(_apply_kernel(setting) * e, axis=tuple(range(1, e.ndim)))
    if bias is not None:
        gradient = jnp.sum(e, axis=tuple(range(1, e.ndim - 1)))
        squared_norm += jnp.sum(gradient**2, axis=-1)
        product += gradient @ bias
    return squared_norm, product


class Setting(NamedTuple):
    """A layer with a kernel, as a convolution of images with any number of axes.

    Attributes:
      kernel: `[*taps, c / groups, p]`, v or parameters, without taps that meet no pixel.
      bias: `[p]` likewise, or None.
      images: `[n, *sizes, c]`, its input.
      e: `[n, *positions, p]`, the cotangent of its output.
      window: where the taps fall.
      groups: of channels.
      precision: of its products.
    """

    kernel: Array
    bias: Array | None
    images: Array
    e: Array
    window: convolution.Window
    groups: int
    precision: Any


def setting_of(
    kind: kinds.Contraction | kinds.Convolution,
    parameters: Any,
    inputs: Array,
    cotangent: Array,
    dtype: Any,
) -> Setting:
    """Returns a layer with a kernel, and what it met, as a convolution of images.

    Args:
      kind: what it does.
      parameters: "kernel" and perhaps "bias", or v at their place.
      inputs: `[n, ...]` its inputs.
      cotangent: `[n, ...]` the cotangents of its outputs.
      dtype: of the images and e.
    """
    if kind.dtype is not None:  # The layer multiplies its rounded input.
        inputs = inputs.astype(kind.dtype)
    make = _contraction if isinstance(kind, kinds.Contraction) else _convolution
    bias = parameters.get("bias")
    return make(kind, parameters["kernel"], bias, inputs.astype(dtype), cotangent.astype(dtype))


def _contraction(
    kind: kinds.Contraction, kernel: Array, bias: Array | None, inputs: Array, cotangent: Array
) -> Setting:
    """A convolution by one tap: axes of the kernel are groups, channels or features."""
    of_inputs, of_kernel, of_outputs = kind.spec.replace("->", ",").split(",")
    positions = [axis for axis in of_inputs if axis not in of_kernel]
    groups = [axis for axis in of_kernel if axis in of_inputs and axis in of_outputs]
    channels = [axis for axis in of_kernel if axis not in of_outputs]
    features = [axis for axis in of_kernel if axis not in of_inputs]

    def arranged(array: Array, axes: str, *parts: list[str]) -> Array:
        order = [axes.index(axis) for part in parts for axis in part]
        sizes = [math.prod(array.shape[axes.index(axis)] for axis in part) for part in parts]
        return array.transpose(order).reshape(sizes)

    length = dict(zip(of_kernel, kernel.shape, strict=True))
    if bias is not None:
        of_bias = "".join(axis for axis in of_outputs if axis in of_kernel)
        bias = bias.reshape([length[axis] for axis in of_bias])
        bias = arranged(bias, of_bias, groups + features)
    example, positions = positions[:1], positions[1:]
    return Setting(
        arranged(kernel, of_kernel, channels, groups + features)[None],
        bias,
        arranged(inputs, of_inputs, example, positions, groups + channels),
        arranged(cotangent, of_outputs, example, positions, groups + features),
        convolution.make_window((1,), (1,)),
        math.prod(length[axis] for axis in groups),
        kind.precision,
    )


def _convolution(
    kind: kinds.Convolution, kernel: Array, bias: Array | None, images: Array, e: Array
) -> Setting:
    if kind.transposed:
        rank = len(kind.strides)
        kernel = jnp.flip(kernel, range(rank)).swapaxes(rank, rank + 1)
    if max(kind.input_dilation) > 1:
        interior = [0, *(dilation - 1 for dilation in kind.input_dilation), 0]
        pads = [(0, 0, zeros) for zeros in interior]
        images = lax.pad(images, jnp.zeros((), images.dtype), pads)
    sizes = images.shape[1:-1]
    window = convolution.make_window(
        sizes, kernel.shape[:-2], kind.strides, kind.padding, kind.kernel_dilation
    )
    kernel, window = convolution.crop_kernel(sizes, kernel, window)
    return Setting(kernel, bias, images, e, window, kind.groups, kind.precision)


def normalization_shares(
    layer: Layer, variables: Any, direction: Any, inputs: Array, cotangent: Array
) -> Shares:
    """Shares of a normalisation: per feature, sums of normalised input times e, and of e."""
    gradients = normalization_gradients(layer, variables, inputs, cotangent)
    squared_norm = sum(jnp.sum(gradients[name] ** 2, axis=-1) for name in direction)
    inner_product = sum(gradients[name] @ direction[name] for name in direction)
    return squared_norm, inner_product


def normalization_gradients(
    layer: Layer, variables: Any, inputs: Array, cotangent: Array
) -> dict[str, Array]:
    """Returns gradients `[n, features]` in scale and bias, whether or not the layer has them."""
    n, features = inputs.shape[0], inputs.shape[-1]
    dtype = accumulation_dtype(variables)
    plain = {
        name: (jnp.ones_like if name == "scale" else jnp.zeros_like)(leaf)
        for name, leaf in variables["params"].items()
    }
    normalized = layer.apply({**variables, "params": plain}, inputs)
    e = cotangent.reshape(n, -1, features).astype(dtype)
    return {
        "scale": jnp.sum(normalized.reshape(e.shape).astype(dtype) * e, axis=1),
        "bias": jnp.sum(e, axis=1),
    }


def embedding_shares(
    layer: Layer, variables: Any, direction: Any, inputs: Array, cotangent: Array
) -> Shares:
    """Shares of an embedding: tokens t, t' of one example share a row, so Σ [t = t'] e_t·e_t'.

    A token beyond the table has no row. Flax returns NaN for it, which the model has to mask, and
    it adds nothing to any gradient.
    """
    rows, e = embedding_rows(layer, variables, inputs, cotangent)
    same = (rows[:, :, None] == rows[:, None, :]).astype(e.dtype)
    squared_norm = jnp.sum(same * jnp.einsum("nsp,ntp->nst", e, e), axis=(1, 2))
    outputs = direction["embedding"].astype(e.dtype)[rows]
    return squared_norm, jnp.sum(outputs * e, axis=(1, 2))


def embedding_rows(
    layer: Layer, variables: Any, inputs: Array, cotangent: Array
) -> tuple[Array, Array]:
    """Returns the row `[n, T]` of each token, −1 if there is none, and e `[n, T, p]`, then 0."""
    n, size = inputs.shape[0], layer.kind.num_embeddings
    e = cotangent.reshape(n, -1, layer.kind.features).astype(accumulation_dtype(variables))
    if size == 1:  # There Flax takes the one row for every token.
        rows = jnp.zeros(e.shape[:2], int)
    else:  # Indexed as Flax does: tokens below zero count from the end.
        rows = jnp.take(jnp.arange(size), inputs.reshape(n, -1), mode="fill", fill_value=-1)
    e = jnp.where((rows >= 0)[..., None], e, 0)
    return rows, e


def bare_shares(
    layer: Layer, variables: Any, direction: Any, inputs: Array, cotangent: Array
) -> Shares:
    """Shares of a parameter that every example is given: the cotangent is the gradient."""
    (v,) = jax.tree.leaves(direction)
    e = cotangent.reshape(len(cotangent), -1).astype(accumulation_dtype(variables))
    return jnp.sum(e**2, axis=1), e @ v.reshape(-1)


def formed_shares(
    layer: Layer, variables: Any, direction: Any, inputs: Array, cotangent: Any
) -> Shares:
    """Shares of any layer, from the gradient of its parameters for one example after another."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def share(example: tuple[Array, Any]) -> Shares:
        x, e = jax.tree.map(lambda leaf: leaf[None], example)
        outputs = lambda params: layer.apply({**rest, "params": params}, x)
        _, pullback = jax.vjp(outputs, variables["params"])
        return _square_and_product(*pullback(e), direction)

    size = sum(leaf.size for leaf in jax.tree.leaves(direction)) + math.prod(inputs.shape[1:])
    return lax.map(share, (inputs, cotangent), batch_size=_chunk(size, len(inputs)))


def custom_shares(layer: Layer, *arguments: Any) -> Shares:
    """Shares of a layer by the function that was registered for it."""
    return layer.kind.shares(layer.kind.layer, *arguments)


SHARES: dict[type[kinds.Kind], Callable[..., Shares]] = {
    kinds.Contraction: kernel_shares,
    kinds.Convolution: kernel_shares,
    kinds.Normalization: normalization_shares,
    kinds.Embedding: embedding_shares,
    kinds.Bare: bare_shares,
    kinds.Formed: formed_shares,
    kinds.Custom: custom_shares,
}
"""Kind of layer → its shares."""


def forms_gradient(
    image_shape: tuple[int, ...],
    e_shape: tuple[int, ...],
    window: convolution.Window,
    groups: int,
) -> bool:
    """Returns whether forming aᵀe is cheaper than its norm and its product with v without it.

    Multiplications per example and group, with d = taps × channels: forming takes T·d·p and the
    writing of d·p elements; the other way takes T·d·p for the product with v, and for the norm
    pixels²·channels and T²·(taps + p). T·d·p is on both sides.
    """
    taps, channels = math.prod(window.size), image_shape[-1] // groups
    positions, features = math.prod(e_shape[1:-1]), e_shape[-1] // groups
    pixels = math.prod(image_shape[1:-1])
    forming = cost_of_forming() * taps * channels * features
    return forming < pixels**2 * channels + positions**2 * (taps + features)


def accumulation_dtype(variables: Any) -> Any:
    """Returns the type in which shares are computed: the parameters', at least float32."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(variables["params"]))


def chunk_elements() -> int:
    """Returns how many elements of gradients are formed together, on this platform."""
    return CHUNK_ELEMENTS if jax.default_backend() == "cpu" else CHUNK_ELEMENTS_ON_ACCELERATORS


def cost_of_forming() -> int:
    """Returns the multiplications that forming one element of a gradient costs as much as."""
    return COST_OF_FORMING if jax.default_backend() == "cpu" else COST_OF_FORMING_ON_ACCELERATORS


def _chunk(elements: int, n: int) -> int:
    return max(1, min(n, chunk_elements() // elements))


def _square_and_product(gradient: Any, direction: Any) -> Shares:
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(gradient))
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(gradient)]
    pairs = list(zip(leaves, jax.tree.leaves(direction), strict=True))
    return sum(jnp.sum(g * g) for g, _ in pairs), sum(jnp.sum(g * v) for g, v in pairs)


def _split_into_groups(kernel: Array, groups: int) -> Array:
    """Reorders a kernel `[*taps, c/groups, p]` to `[groups, p/groups, taps, c/groups]`."""
    *taps, channels, features = kernel.shape
    kernel = kernel.reshape(math.prod(taps), channels, groups, features // groups)
    return kernel.transpose(2, 3, 0, 1)


def _form_gradient(
    image: Array, e: Array, direction: Any, window: convolution.Window, precision: Any
) -> dict[str, Array]:
    """Returns the gradient of one example, with image `[*sizes, c]` and e `[*positions, p]`."""
    groups, _, taps, channels = direction["kernel"].shape
    patches = convolution.image_patches(image[None], window).reshape(-1, taps, groups, channels)
    e = e.reshape(len(patches), groups, -1)
    gradient = {"kernel": jnp.einsum("tgp,tkgc->gpkc", e, patches, precision=precision)}
    if "bias" in direction:
        gradient["bias"] = jnp.sum(e, axis=0).reshape(-1)
    return gradient


def _gram_squared_norm(
    images: Array, e: Array, window: convolution.Window, groups: int, precision: Any
) -> Array:
    """‖aᵀe‖² = ⟨aaᵀ, eeᵀ⟩ of each example, `[n]`, with no patches and no gradient.

    aaᵀ of patches is the sum over taps of aaᵀ of the pixels, shifted along both axes: fewer
    multiplications than from patches, by as many times as there are taps.
    """
    n, *out, p = e.shape
    none = (0, 0, 0)
    pads = [none, *((low, high, 0) for low, high in window.padding), none]
    images = lax.pad(images, jnp.zeros((), images.dtype), pads)
    *sizes, c = images.shape[1:]
    product = functools.partial(jnp.einsum, precision=precision)
    pixels = images.reshape(n, -1, groups, c // groups)
    pixel_gram = product("nsgc,ntgc->ngst", pixels, pixels).reshape(n, groups, *sizes, *sizes)
    patch_gram = 0
    for tap in np.ndindex(*window.size):
        start = [place * window.dilation[axis] for axis, place in enumerate(tap)]
        stop = [
            start[axis] + (length - 1) * window.stride[axis] + 1 for axis, length in enumerate(out)
        ]
        patch_gram += lax.slice(
            pixel_gram,
            (0, 0, *start, *start),
            (n, groups, *stop, *stop),
            (1, 1, *window.stride, *window.stride),
        )
    e = e.reshape(n, -1, groups, p // groups)
    e_gram = product("nsgp,ntgp->ngst", e, e)
    return jnp.sum(patch_gram.reshape(e_gram.shape) * e_gram, axis=(1, 2, 3))


def _apply_kernel(setting: Setting) -> Array:
    """Returns the images convolved with the kernel, `[n, *positions, p]`, in the type of e."""
    kernel, _, images, e, window, groups, precision = setting
    kernel = kernel.astype(e.dtype)  # In the type that the layer computes in v may overflow.
    if window == convolution.make_window(images.shape[1:-1], (1,) * len(window.size)):
        parts = images.reshape(*images.shape[:-1], groups, -1)
        kernel = kernel.reshape(*kernel.shape[-2:-1], groups, -1)
        outputs = jnp.einsum("n...gc,cgp->n...gp", parts, kernel, precision=precision)
        return outputs.reshape(e.shape)
    channels_last = f"N{'DHW'[-len(window.size) :]}C"
    return convolution.conv_general_dilated(
        images,
        kernel,
        window.stride,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=(channels_last, f"{channels_last[1:-1]}IO", channels_last),
        feature_group_count=groups,
        precision=precision,
    )
