"""Computes what one layer adds to ‖g_u‖² and g_u·v, from its input and its output's cotangent.

A kernel's gradient is aᵀe, with a `[T, d]` the patches of one example's input (for a dense layer
its rows) and e `[T, p]` the cotangents at the T positions of the output. Two forms are exact:

- *formed*: aᵀe is formed, T·d·p multiplications, for a few examples at a time;
- *Gram*: ‖aᵀe‖² = ⟨aaᵀ, eeᵀ⟩ without it (Goodfellow, 2015, arXiv:1510.01799), and, a layer being
  linear in its parameters, aᵀe·v = ⟨layer(x; v), e⟩.

The cheaper is taken for each layer, as in mixed ghost clipping (Bu et al., 2022, arXiv:2205.10683).

Each function takes (layer, variables, direction, inputs, cotangent): a Flax module without parent,
its variables, its part of v, and arrays with the examples u on their first axis. It returns the
layer's part of (‖g_u‖², g_u·v), each `[n]`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dynamical_jax import convolution
from dynamical_jax.errors import UserError
from dynamical_jax.types import Array

Shares = tuple[Array, Array]

# Elements of the gradients that are formed together and of the patches they are formed from: about
# what a core's cache holds. On two x86-64 cores the CNN (batch 256) takes the same time with 2**17
# to 2**19, 1.2 times as long with 2**15, 1.4 with 2**20 and 2.6 with 2**23; ResNet-18 (batch 128)
# the same with 2**15 to 2**20.
CHUNK_ELEMENTS = 2**18

# A formed gradient is written and read back; per element that takes as long as so many
# multiplications of a matrix product. Measured likewise, and relative to 8: ResNet-18 takes the
# same time with 2 to 12, 1.15 times as long with 32 and 1.7 with 0, which forms every gradient; the
# CNN the same with 1 to 128, twice as long with 0 and 7.5 times with 512, which forms too few.
COST_OF_FORMING = 8


def dense_shares(
    layer: nn.Module, variables: Any, direction: Any, inputs: Array, cotangent: Array
) -> Shares:
    """Shares of `nn.Dense`, for inputs `[n, ..., d]`."""
    setting = dense_setting(direction["kernel"], inputs, cotangent)
    return _kernel_shares(layer, variables, direction, inputs, setting)


def convolution_shares(
    layer: nn.Module, variables: Any, direction: Any, inputs: Array, cotangent: Array
) -> Shares:
    """Shares of `nn.Conv`, for inputs `[n, length, c]` or `[n, height, width, c]`."""
    setting = convolution_setting(layer, direction["kernel"], inputs, cotangent)
    return _kernel_shares(layer, variables, direction, inputs, setting)


class Setting(NamedTuple):
    """A layer with a kernel, as a convolution of images.

    Attributes:
      kernel: `[kh, kw, c / groups, p]`, without taps that meet no pixel.
      images: `[n, h, w, c]`, its input.
      e: `[n, oh, ow, p]`, the cotangent of its output.
      window: where the taps fall.
      groups: of channels.
    """

    kernel: Array
    images: Array
    e: Array
    window: convolution.Window
    groups: int


def dense_setting(kernel: Array, inputs: Array, cotangent: Array) -> Setting:
    """Returns what `nn.Dense` does to inputs `[n, ..., d]`: a convolution by one tap."""
    n, depth = inputs.shape[0], inputs.shape[-1]
    images = inputs.reshape(n, -1, 1, depth)
    e = cotangent.reshape(n, -1, 1, cotangent.shape[-1])
    window = convolution.make_window((1, 1), (1, 1))
    return Setting(kernel.reshape(1, 1, depth, -1), images, e, window, 1)


def convolution_setting(
    layer: nn.Module, kernel: Array, inputs: Array, cotangent: Array
) -> Setting:
    """Returns what `nn.Conv` does to inputs `[n, length, c]` or `[n, height, width, c]`."""
    rank = inputs.ndim - 2

    def per_axis(value: Any) -> tuple[int, ...]:
        return (value,) * rank if isinstance(value, int) else tuple(value or (1,) * rank)

    strides = per_axis(layer.strides)
    dilation = per_axis(layer.kernel_dilation)
    padding = nn.linear.canonicalize_padding(layer.padding, rank)
    if isinstance(padding, str):
        sizes = zip(dilation, kernel.shape[:rank], strict=True)
        extents = [spread * (size - 1) + 1 for spread, size in sizes]
        padding = lax.padtype_to_pads(inputs.shape[1:-1], extents, strides, padding)
    images, e = inputs, cotangent
    if rank == 1:  # An image of height one.
        images, e, kernel = images[:, None], e[:, None], kernel[None]
        strides, dilation, padding = (1, *strides), (1, *dilation), [(0, 0), *padding]
    image_size = images.shape[1:3]
    window = convolution.make_window(image_size, kernel.shape[:2], strides, padding, dilation)
    kernel, window = convolution.crop_kernel(image_size, kernel, window)
    return Setting(kernel, images, e, window, layer.feature_group_count)


def normalization_shares(
    layer: nn.Module, variables: Any, direction: Any, inputs: Array, cotangent: Array
) -> Shares:
    """Shares of a normalisation: per feature, sums of normalised input times e, and of e."""
    gradients = normalization_gradients(layer, variables, inputs, cotangent)
    squared_norm = sum(jnp.sum(gradients[name] ** 2, axis=-1) for name in direction)
    inner_product = sum(gradients[name] @ direction[name] for name in direction)
    return squared_norm, inner_product


def normalization_gradients(
    layer: nn.Module, variables: Any, inputs: Array, cotangent: Array
) -> dict[str, Array]:
    """Returns gradients `[n, features]` in scale and bias, whether or not the layer has them."""
    n, features = inputs.shape[0], inputs.shape[-1]
    off = {name: False for name in ("use_scale", "use_bias") if hasattr(layer, name)}
    dtype = accumulation_dtype(variables)
    normalized = layer.clone(**off).apply({**variables, "params": {}}, inputs)
    e = cotangent.reshape(n, -1, features).astype(dtype)
    return {
        "scale": jnp.sum(normalized.reshape(e.shape).astype(dtype) * e, axis=1),
        "bias": jnp.sum(e, axis=1),
    }


def embedding_shares(
    layer: nn.Module, variables: Any, direction: Any, inputs: Array, cotangent: Array
) -> Shares:
    """Shares of `nn.Embed`: tokens t, t' of one example share a row, so Σ [t = t'] e_t·e_t'.

    A token beyond the table has no row. `nn.Embed` returns NaN for it, which the model has to mask,
    and it adds nothing to any gradient.
    """
    rows, e = embedding_rows(layer, variables, inputs, cotangent)
    same = (rows[:, :, None] == rows[:, None, :]).astype(e.dtype)
    squared_norm = jnp.sum(same * jnp.einsum("nsp,ntp->nst", e, e), axis=(1, 2))
    outputs = direction["embedding"].astype(e.dtype)[rows]
    return squared_norm, jnp.sum(outputs * e, axis=(1, 2))


def embedding_rows(
    layer: nn.Module, variables: Any, inputs: Array, cotangent: Array
) -> tuple[Array, Array]:
    """Returns the row `[n, T]` of each token, −1 if there is none, and e `[n, T, p]`, then 0."""
    n = inputs.shape[0]
    e = cotangent.reshape(n, -1, layer.features).astype(accumulation_dtype(variables))
    if layer.num_embeddings == 1:  # There `nn.Embed` takes the one row for every token.
        rows = jnp.zeros(e.shape[:2], int)
    else:  # Indexed as `nn.Embed` does: tokens below zero count from the end.
        rows = jnp.take(
            jnp.arange(layer.num_embeddings), inputs.reshape(n, -1), mode="fill", fill_value=-1
        )
    e = jnp.where((rows >= 0)[..., None], e, 0)
    return rows, e


def formed_shares(
    layer: nn.Module, variables: Any, direction: Any, inputs: Array, cotangent: Any
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


def _kernel_shares(
    layer: nn.Module, variables: Any, direction: Any, inputs: Array, setting: Setting
) -> Shares:
    """Returns shares by the cheaper form."""
    kernel, images, e, window, groups = setting
    dtype = accumulation_dtype(variables)
    if layer.dtype is not None:  # The layer multiplies its rounded input.
        inputs, images = inputs.astype(layer.dtype), images.astype(layer.dtype)
    images, e = images.astype(dtype), e.astype(dtype)
    if forms_gradient(images.shape, e.shape, window, groups):
        parts = {**direction, "kernel": _split_into_groups(kernel, groups)}

        def share(example: tuple[Array, Array]) -> Shares:
            return _square_and_product(
                _form_gradient(*example, parts, window, layer.precision), parts
            )

        taps_and_channels = math.prod(window.size) * images.shape[-1]
        size = taps_and_channels * (math.prod(e.shape[1:3]) + e.shape[-1] // groups)
        return lax.map(share, (images, e), batch_size=_chunk(size, len(images)))

    squared_norm = _gram_squared_norm(images, e, window, groups, layer.precision)
    if "bias" in direction:
        squared_norm += jnp.sum(jnp.sum(e, axis=(1, 2)) ** 2, axis=-1)
    wide = layer.clone(dtype=dtype)  # v may overflow the type that the layer computes in.
    outputs = wide.apply({**variables, "params": direction}, inputs)
    return squared_norm, jnp.sum(outputs.reshape(e.shape) * e, axis=(1, 2, 3))


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
    taps, channels = math.prod(window.size), image_shape[3] // groups
    positions, features = math.prod(e_shape[1:3]), e_shape[3] // groups
    pixels = math.prod(image_shape[1:3])
    forming = COST_OF_FORMING * taps * channels * features
    return forming < pixels**2 * channels + positions**2 * (taps + features)


def accumulation_dtype(variables: Any) -> Any:
    """Returns the type in which shares are computed: the parameters', at least float32."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(variables["params"]))


def _chunk(elements: int, n: int) -> int:
    return max(1, min(n, CHUNK_ELEMENTS // elements))


def _square_and_product(gradient: Any, direction: Any) -> Shares:
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(gradient))
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(gradient)]
    pairs = list(zip(leaves, jax.tree.leaves(direction), strict=True))
    return sum(jnp.sum(g * g) for g, _ in pairs), sum(jnp.sum(g * v) for g, v in pairs)


def _split_into_groups(kernel: Array, groups: int) -> Array:
    """Reorders a kernel `[kh, kw, c/groups, p]` to `[groups, p/groups, taps, c/groups]`."""
    *taps, channels, features = kernel.shape
    kernel = kernel.reshape(math.prod(taps), channels, groups, features // groups)
    return kernel.transpose(2, 3, 0, 1)


def _form_gradient(
    image: Array, e: Array, direction: Any, window: convolution.Window, precision: Any
) -> dict[str, Array]:
    """Returns the gradient of one example, with image `[h, w, c]` and e `[oh, ow, p]`."""
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
    _, h, w, c = images.shape
    product = functools.partial(jnp.einsum, precision=precision)
    pixels = images.reshape(n, h * w, groups, c // groups)
    pixel_gram = product("nsgc,ntgc->ngst", pixels, pixels).reshape(n, groups, h, w, h, w)
    patch_gram = 0
    for i in range(window.size[0]):
        for j in range(window.size[1]):
            start = (i * window.dilation[0], j * window.dilation[1])
            stop = tuple(
                start[axis] + (out[axis] - 1) * window.stride[axis] + 1 for axis in range(2)
            )
            patch_gram += lax.slice(
                pixel_gram,
                (0, 0, *start, *start),
                (n, groups, *stop, *stop),
                (1, 1, *window.stride, *window.stride),
            )
    e = e.reshape(n, -1, groups, p // groups)
    e_gram = product("nsgp,ntgp->ngst", e, e)
    return jnp.sum(patch_gram.reshape(e_gram.shape) * e_gram, axis=(1, 2, 3))


SHARES: dict[type[nn.Module], Callable[..., Shares]] = {
    nn.Dense: dense_shares,
    nn.Conv: convolution_shares,
    nn.BatchNorm: normalization_shares,
    nn.LayerNorm: normalization_shares,
    nn.RMSNorm: normalization_shares,
    nn.GroupNorm: normalization_shares,
    nn.Embed: embedding_shares,
}
"""Type of layer → function. Gradients of other layers without inner layers are formed."""


def register(
    layer: type[nn.Module],
    *,
    like: type[nn.Module] | None = None,
    shares: Callable[..., Shares] | None = None,
) -> None:
    """Tells the factored engine how your own layer adds to ‖g_u‖² and g_u·v.

    Scores are exact without registration, too, but then gradients are formed example by example,
    which takes longer. A wrong registration gives wrong scores: `gradients.verify` finds it.

    Args:
      layer: a class of Flax Linen modules that own parameters.
      like: a registered type that has, in evaluation mode, the same parameters under the same names
        and the same output.
      shares: a function like those of this file, instead of `like`.

    Raises:
      UserError: unless exactly one of `like` and `shares` is given, and `like` is registered.
    """
    if (like is None) == (shares is None):
        raise UserError("register(layer, like=…) or register(layer, shares=…): give one of the two")
    if like is not None and like not in SHARES:
        registered = ", ".join(known.__name__ for known in SHARES)
        raise UserError(f"{like.__name__} is not registered itself; registered are {registered}")
    SHARES[layer] = SHARES[like] if shares is None else shares


CONVOLUTIONS = (None, lax.conv_general_dilated, convolution.conv_general_dilated)


def unsupported_reason(layer: nn.Module, ndim: int) -> str | None:
    """Returns why the shares of this layer's type do not hold with its options; None if they do."""
    if getattr(layer, "promote_dtype", nn.dtypes.promote_dtype) is not nn.dtypes.promote_dtype:
        return "its promote_dtype may do anything"
    if isinstance(layer, nn.Dense) and (layer.dot_general or layer.dot_general_cls):
        return "its dot_general may do anything"
    if isinstance(layer, nn.Conv):
        rank = 1 if isinstance(layer.kernel_size, int) else len(layer.kernel_size)
        if layer.conv_general_dilated not in CONVOLUTIONS or layer.conv_general_dilated_cls:
            return "its conv_general_dilated may do anything"
        if layer.mask is not None:
            return "its kernel is masked"
        if rank not in (1, 2) or ndim != rank + 2:
            return "its input is not [n, length, c] or [n, height, width, c]"
        if any(dilation != 1 for dilation in jax.tree.leaves(layer.input_dilation)):
            return "its input is dilated"
        if layer.padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
            return f"its padding is {layer.padding}"
    if isinstance(layer, nn.BatchNorm) and layer.axis not in (-1, ndim - 1):
        return "its features are not the last axis"
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        if getattr(layer, "feature_axes", -1) not in (-1, (-1,), ndim - 1, (ndim - 1,)):
            return "its features are not the last axis"
        if any(axis in (0, -ndim) for axis in jax.tree.leaves(layer.reduction_axes)):
            return "its statistics mix examples"
        if layer.axis_name is not None:
            return "its statistics mix examples"
    return None


def own_parameters(tree: Any) -> list[str]:
    """Returns the names of the parameters, not of the further layers, in a layer's `params`."""
    return [name for name, value in tree.items() if not isinstance(value, Mapping)]
