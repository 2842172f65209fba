"""Convolution and max-pooling on CPU, as products of slices.

XLA's convolution on CPU is very slow for small maps (a 3×3 convolution of 2×2 maps with 512
channels takes 730 ms where one matrix product takes 6), and its gradients do inside loops, where
they take up to a hundred times as long as outside. `conv_general_dilated` has the signature of
`jax.lax.conv_general_dilated`, so that a model takes it up without being rewritten:

    nn.Conv(64, (3, 3), conv_general_dilated=convolution.conv_general_dilated)

On other platforms, and where the rule below does not apply, it *is* `jax.lax.conv_general_dilated`.
The forms are made of slices, pads and products, so that `grad`, `jvp`, `vmap` and `jit` apply to
them as to any JAX function.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dynamical_jax.types import Array


class Window(NamedTuple):
    """The positions of the taps of a convolution, for each axis of the image in turn.

    Attributes:
      size: of the kernel, before dilation.
      stride: distance between neighbouring outputs.
      padding: (low, high) zeros around the input; negative for a crop.
      dilation: distance between neighbouring taps.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def output_size(self, image_size: Sequence[int]) -> tuple[int, ...]:
        """Returns the size of the output for an image of `image_size`."""
        return tuple(
            (image_size[axis] + sum(self.padding[axis]) - self.dilation[axis] * (size - 1) - 1)
            // self.stride[axis]
            + 1
            for axis, size in enumerate(self.size)
        )


def make_window(
    image_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
    dilation: Sequence[int] | None = None,
) -> Window:
    """Returns the `Window` that these arguments of `lax.conv_general_dilated` describe."""
    ones = (1,) * len(kernel_size)
    stride, dilation = tuple(stride or ones), tuple(dilation or ones)
    if isinstance(padding, str):
        extents = [d * (size - 1) + 1 for size, d in zip(kernel_size, dilation, strict=True)]
        padding = lax.padtype_to_pads(image_size, extents, stride, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return Window(tuple(kernel_size), stride, pads, dilation)


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    **options: Any,
) -> Array:
    """Computes `jax.lax.conv_general_dilated` up to rounding, on CPU in the fastest form known.

    This holds for finite images: a NaN or infinite pixel may spread further than with `lax`.

    Args:
      lhs: images; `[n, height, width, c]` to be lowered differently.
      rhs: kernel; `[kernel_height, kernel_width, c, features]` likewise.
      window_strides: as in `jax.lax.conv_general_dilated`, like all that follows.
      padding: likewise.
      lhs_dilation: likewise.
      rhs_dilation: likewise.
      dimension_numbers: likewise.
      **options: likewise.
    """
    reference = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        **options,
    )
    precision, dtype = (options.get(name) for name in ("precision", "preferred_element_type"))
    plain = (
        _is_nhwc(lhs, rhs, dimension_numbers)
        and options.get("feature_group_count", 1) == options.get("batch_group_count", 1) == 1
        and all(dilation == 1 for dilation in lhs_dilation or ())
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and 0 not in lhs.shape
    )
    if not plain:
        return reference(lhs, rhs)
    window = make_window(lhs.shape[1:3], rhs.shape[:2], window_strides, padding, rhs_dilation)
    if min(window.output_size(lhs.shape[1:3])) < 1:
        return reference(lhs, rhs)
    product = functools.partial(jnp.matmul, precision=precision, preferred_element_type=dtype)
    form = choose_form(lhs.shape, rhs.shape, window)
    if form is lax_form:
        form = functools.partial(lax_form, reference=reference)
    on_cpu = functools.partial(form, window=window, product=product)
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=reference)


def _is_nhwc(lhs: Any, rhs: Any, dimension_numbers: Any) -> bool:
    if lhs.ndim != 4:
        return False
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    return tuple(numbers) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


# --- The rule ---
#
# Milliseconds on two x86-64 cores for 128 images, forward / weight gradient / input gradient:
#
#                                lax               patches         rows
#   3×3, 2×2 map, 512→512        731 / 6 / 721     6 / 8 / 5
#   3×3, 8×8 map, 64→64          2.8 / 5 / 2.9     12 / 4 / 2
#   3×3, 32×32 map, 3→64         16 / 10 / 24      11 / 5 / 3      29 / 13 / 15
#   5×5, 32×32 map, 3→6          5 / 8 / 12        19 / 20 / 5     3 / 3 / 3
#
# In a loop the forward pass of `lax` keeps its time, but its gradients do not: the weight gradient
# of the second line takes 660.

SMALL_MAP = 16  # Output positions: maps of 4×4 and below.
THIN_INPUT = 8  # Input channels.
THIN_OUTPUT = 16  # Output channels.


def choose_form(
    image_shape: Sequence[int], kernel_shape: Sequence[int], window: Window
) -> Callable[..., Array]:
    """Returns the form for images `[n, h, w, c]` and a kernel `[kh, kw, c, p]`."""
    channels, features = kernel_shape[2:]
    if math.prod(window.output_size(image_shape[1:3])) <= SMALL_MAP or window.size == (1, 1):
        return patch_form
    if channels <= THIN_INPUT and features <= THIN_OUTPUT:
        return row_form
    if channels <= THIN_INPUT and window.stride == (1, 1):
        return patch_form
    return lax_form


# --- The forms ---
#
# Each takes images `[n, h, w, c]`, a kernel `[kh, kw, c, p]`, the window, and a matrix product.


def lax_form(
    images: Array, kernel: Array, *, window: Window, product: Any, reference: Any
) -> Array:
    """Convolution by `lax` itself, with the gradients of `patch_form`."""
    patches = functools.partial(patch_form, window=window, product=product)
    convolve = jax.custom_jvp(reference)

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        terms = []
        if not isinstance(tangents[0], SymbolicZero):
            terms.append(patches(tangents[0], primals[1]))
        if not isinstance(tangents[1], SymbolicZero):
            # Patches are as many times larger than the image as there are taps. Checkpointed, it is
            # the image that is kept until the gradient is due; they are cut from it again then.
            terms.append(jax.checkpoint(patches)(primals[0], tangents[1]))
        return convolve(*primals), sum(terms[1:], terms[0])

    convolve.defjvp(derivative, symbolic_zeros=True)
    return convolve(images, kernel)


def patch_form(images: Array, kernel: Array, *, window: Window, product: Any = jnp.matmul) -> Array:
    """Convolution as one product of image patches with the flattened kernel.

    Taps that see nothing but padding are left out: a 3×3 kernel on a 1×1 map is one matrix, nine
    times less work.
    """
    kernel, window = crop_kernel(images.shape[1:3], kernel, window)
    patches = image_patches(images, window)
    *shape, depth = patches.shape
    y = product(patches.reshape(-1, depth), kernel.reshape(depth, -1))
    return y.reshape(*shape, -1)


def row_form(images: Array, kernel: Array, *, window: Window, product: Any = jnp.matmul) -> Array:
    """Convolution as one product of image rows with a banded (Toeplitz) matrix.

    An output row is the product of the kernel_height input rows that it sees with a matrix
    `[kh·w·c, ow·p]`, along whose band each kernel row is repeated. That is w/kw times more
    multiplications than are needed, but it moves whole image rows: for thin images it is cutting
    out patches, not multiplying them, that takes time.
    """
    n, _, w, c = images.shape
    kh, kw, _, p = kernel.shape
    _, out_width = window.output_size(images.shape[1:3])
    band = np.zeros((kw, w, out_width), images.dtype)  # [tap, input, output]
    for tap, output in np.ndindex(kw, out_width):
        position = output * window.stride[1] + tap * window.dilation[1] - window.padding[1][0]
        if 0 <= position < w:
            band[tap, position, output] = 1
    # Each sum has at most one term, so the highest precision makes this exact.
    toeplitz = jnp.einsum("jwo,ijcp->iwcop", band, kernel, precision=lax.Precision.HIGHEST)

    rows = images.reshape(n, -1, 1, w * c)
    whole_rows = Window(
        (kh, 1), (window.stride[0], 1), (window.padding[0], (0, 0)), (window.dilation[0], 1)
    )
    patches = image_patches(rows, whole_rows)
    out_height = patches.shape[1]
    y = product(patches.reshape(n * out_height, -1), toeplitz.reshape(kh * w * c, out_width * p))
    return y.reshape(n, out_height, out_width, p)


def crop_kernel(image_size: Sequence[int], kernel: Array, window: Window) -> tuple[Array, Window]:
    """Drops the outer taps that fall on padding for every output."""
    size, padding, kept = [], [], []
    out = window.output_size(image_size)
    for axis in range(len(out)):
        (low, high), dilation = window.padding[axis], window.dilation[axis]
        last = (out[axis] - 1) * window.stride[axis]
        seen = [
            tap
            for tap in range(window.size[axis])
            if tap * dilation - low < image_size[axis] and tap * dilation - low + last >= 0
        ] or [0]
        first, stop = seen[0], seen[-1] + 1
        kept.append(slice(first, stop))
        size.append(stop - first)
        padding.append((low - first * dilation, high - (window.size[axis] - stop) * dilation))
    window = window._replace(size=tuple(size), padding=tuple(padding))
    return kernel[tuple(kept)], window


def image_patches(images: Array, window: Window) -> Array:
    """Returns the inputs that each output sees, `[n, oh, ow, kh·kw·c]` of images with two axes.

    By slicing, because `lax.conv_general_dilated_patches` is a convolution itself and as slow on
    CPU as the one to be avoided.
    """
    patches = jnp.stack(_shifted(images, window), axis=-2)
    return patches.reshape(*patches.shape[:-2], -1)


def _shifted(images: Array, window: Window, fill: float = 0.0) -> list[Array]:
    """For each tap, in row-major order, the inputs `[n, oh, ow, c]` that it meets."""
    n, *size, c = images.shape
    out = window.output_size(size)
    none = (0, 0, 0)
    pads = [none, *((low, high, 0) for low, high in window.padding), none]
    images = lax.pad(images, jnp.asarray(fill, images.dtype), pads)
    shifts = []
    for taps in np.ndindex(*window.size):
        start = [tap * dilation for tap, dilation in zip(taps, window.dilation, strict=True)]
        stop = [
            start[axis] + (length - 1) * window.stride[axis] + 1 for axis, length in enumerate(out)
        ]
        shifts.append(lax.slice(images, (0, *start, 0), (n, *stop, c), (1, *window.stride, 1)))
    return shifts


# --- Pooling ---


def max_pool(
    images: Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
) -> Array:
    """Computes `flax.linen.max_pool` of floats `[n, h, w, c]`, with a gradient fast on CPU.

    The values and the gradient are the same: where several inputs of a window are largest, the
    first in row-major order receives the cotangent, as with `lax`'s select-and-scatter and in
    PyTorch.
    """
    window = make_window(images.shape[1:3], window_shape, strides, padding)
    return lax.platform_dependent(
        images,
        cpu=functools.partial(_largest_shift, window=window),
        default=functools.partial(_reduce_window_max, window=window),
    )


def _reduce_window_max(images: Array, *, window: Window) -> Array:
    sizes, strides = (1, *window.size, 1), (1, *window.stride, 1)
    pads = ((0, 0), *window.padding, (0, 0))
    return lax.reduce_window(images, -jnp.inf, lax.max, sizes, strides, pads)


def _largest_shift(images: Array, *, window: Window) -> Array:
    # Of equals the earlier is kept whole; `lax.max` would give each half of the cotangent.
    largest, *others = _shifted(images, window, fill=-jnp.inf)
    for other in others:
        largest = jnp.where((largest >= other) | jnp.isnan(largest), largest, other)
    return largest
