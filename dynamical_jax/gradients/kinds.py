"""What a layer with parameters does, as arrays and options, whichever framework it is of.

`kind_of` reads the options off a layer. All that computes with gradients (`shares.py`, `pairs.py`)
knows `Kind`s and not frameworks; layers of Linen and of NNX have the same names for their options.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dynamical_jax import convolution
from dynamical_jax.errors import UserError


class Contraction(NamedTuple):
    """A layer with a kernel, `einsum(spec, inputs, kernel) + bias`.

    Attributes:
      spec: of letters; the first of inputs and outputs is the examples' and not in the kernel.
      dtype: in which it computes; None for that of its inputs and parameters.
      precision: of its products.
    """

    spec: str
    dtype: Any
    precision: Any


class Convolution(NamedTuple):
    """A layer with a kernel `[*sizes, c / groups, p]`, for inputs `[n, *sizes, c]`.

    Attributes:
      strides: distance between neighbouring outputs, for each axis, like all that follows.
      padding: (low, high) zeros around the inputs, once these are dilated.
      input_dilation: distance between neighbouring inputs, with zeros in between.
      kernel_dilation: distance between neighbouring taps.
      groups: of channels.
      transposed: whether the kernel is `[*sizes, p, c]`, and turned round along all axes.
      dtype: in which it computes; None for that of its inputs and parameters.
      precision: of its products.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    transposed: bool
    dtype: Any
    precision: Any


class Normalization(NamedTuple):
    """A layer that multiplies each feature, on the last axis, by `scale`, and adds `bias`."""


class Embedding(NamedTuple):
    """A table `[num_embeddings, features]`, of which each token takes a row."""

    num_embeddings: int
    features: int


class Bare(NamedTuple):
    """A parameter that is given to each example as it is."""


class Formed(NamedTuple):
    """Any other layer: its gradient is formed."""


class Custom(NamedTuple):
    """A layer whose shares are computed by a function of its author's (`register`)."""

    layer: Any
    shares: Callable[..., Any]


Kind = Contraction | Convolution | Normalization | Embedding | Bare | Formed | Custom


class Layer(NamedTuple):
    """A layer, without its parameters.

    Attributes:
      kind: what it does.
      apply: its function of variables (`params`, and statistics if it has any) and inputs.
    """

    kind: Kind
    apply: Callable[[Any, Any], Any]


PROMOTIONS = [nn.dtypes.promote_dtype]
CONVOLUTIONS = (lax.conv_general_dilated, convolution.conv_general_dilated)
LETTERS = "bcdefghijklmnopqrstuvwxyz"


def kind_of(layer: Any, shape: Sequence[int]) -> Kind | str:
    """Returns the kind of a layer for inputs of this shape, or why it has none with its options."""
    if not is_known(layer):
        return Formed()
    if getattr(layer, "promote_dtype", PROMOTIONS[0]) not in PROMOTIONS:
        return "its promote_dtype may do anything"
    if getattr(layer, "dot_general", None) not in (None, lax.dot_general) or getattr(
        layer, "dot_general_cls", None
    ):
        return "its dot_general may do anything"
    return KINDS[type(layer)](layer, tuple(shape))


def is_known(layer: Any) -> bool:
    """Whether the type of a layer is registered."""
    _register_nnx()
    return type(layer) in KINDS


def _register_nnx() -> None:
    """Registers the layers of NNX once somebody has imported it."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or nnx.Linear in KINDS:
        return
    PROMOTIONS.append(nnx.nn.dtypes.promote_dtype)
    KINDS.update(
        {
            nnx.Linear: dense,
            nnx.LinearGeneral: dense_general,
            nnx.Einsum: einsum,
            nnx.Conv: convolutional,
            nnx.ConvTranspose: transposed_convolutional,
            nnx.BatchNorm: batch_normalization,
            nnx.LayerNorm: normalization,
            nnx.RMSNorm: normalization,
            nnx.GroupNorm: normalization,
            nnx.InstanceNorm: normalization,
            nnx.Embed: embedding,
        }
    )


def dense(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes `nn.Dense` and `nnx.Linear`."""
    free = LETTERS[: len(shape) - 2]
    return Contraction(f"a{free}y,yz->a{free}z", layer.dtype, layer.precision)


def dense_general(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes `nn.DenseGeneral` and `nnx.LinearGeneral`."""
    if jax.tree.leaves([getattr(layer, name, ()) for name in ("batch_dims", "batch_axis")]):
        return "its kernel has an axis of examples"
    axes = sorted(axis % len(shape) for axis in jax.tree.leaves(layer.axis))
    features = layer.features if hasattr(layer, "features") else layer.out_features
    inputs = "a" + LETTERS[: len(shape) - 1]
    new = LETTERS[len(shape) - 1 :][: len(jax.tree.leaves(features))]
    kernel = "".join(inputs[axis] for axis in axes) + new
    kept = "".join(letter for letter in inputs if letter not in kernel)
    return contraction(f"{inputs},{kernel}->{kept}{new}", layer)


def einsum(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes `nn.Einsum` and `nnx.Einsum`."""
    if getattr(layer, "einsum_op", jnp.einsum) is not jnp.einsum:
        return "its einsum_op may do anything"
    spec = (layer.einsum_str or "").replace(" ", "")
    if "->" not in spec or "..." in spec.split(",")[1].split("->")[0]:
        return "its einsum_str is not of the form inputs,kernel->outputs"
    inputs = spec.split(",")[0]
    if "..." in inputs:
        unused = [letter for letter in LETTERS + LETTERS.upper() if letter not in spec]
        spec = spec.replace("...", "".join(unused[: len(shape) - len(inputs) + 3]))
    return contraction(spec, layer)


def contraction(spec: str, layer: Any) -> Kind | str:
    """Describes a layer by its sum, unless a letter is where shares do not expect it."""
    inputs, kernel, outputs = spec.replace("->", ",").split(",")
    if any(len(set(part)) < len(part) for part in (inputs, kernel, outputs)):
        return f"an axis is met twice in {spec}"
    if not inputs or inputs[:1] != outputs[:1] or inputs[0] in kernel:
        return f"{spec} has not the examples on the first axis"
    if set(inputs) - set(kernel) - set(outputs) or set(kernel) - set(inputs) - set(outputs):
        return f"an axis is summed by itself in {spec}"
    return Contraction(spec, layer.dtype, layer.precision)


def convolutional(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes `nn.Conv` and `nnx.Conv`."""
    sizes = tuple(jax.tree.leaves(layer.kernel_size))
    rank = len(sizes)
    # One that is given by its class is made anew at each call.
    given = getattr(layer, "conv_general_dilated", None)
    if given not in (None, *CONVOLUTIONS) or getattr(layer, "conv_general_dilated_cls", None):
        return "its conv_general_dilated may do anything"
    if why := _unlike_convolution(layer, shape, rank):
        return why
    strides, dilation, input_dilation = (
        _per_axis(value, rank)
        for value in (layer.strides, layer.kernel_dilation, layer.input_dilation)
    )
    padding = nn.linear.canonicalize_padding(layer.padding, rank)
    if isinstance(padding, str):
        if padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
            return f"its padding is {padding}"
        extents = [d * (size - 1) + 1 for d, size in zip(dilation, sizes, strict=True)]
        padding = lax.padtype_to_pads(shape[1:-1], extents, strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    groups = layer.feature_group_count
    return Convolution(
        strides, padding, input_dilation, dilation, groups, False, layer.dtype, layer.precision
    )


def transposed_convolutional(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes `nn.ConvTranspose` and `nnx.ConvTranspose`: a convolution of dilated inputs."""
    sizes = tuple(jax.tree.leaves(layer.kernel_size))
    rank = len(sizes)
    if why := _unlike_convolution(layer, shape, rank):
        return why
    strides, dilation = (_per_axis(value, rank) for value in (layer.strides, layer.kernel_dilation))
    padding = nn.linear.canonicalize_padding(layer.padding, rank)
    if padding == "CIRCULAR":
        return "its padding is CIRCULAR"
    # JAX has rules of its own for "SAME" and "VALID".
    traced = jax.make_jaxpr(
        lambda x, kernel: lax.conv_transpose(x, kernel, strides, padding, rhs_dilation=dilation)
    )(jnp.zeros((1, *shape[1:-1], 1)), jnp.zeros((*sizes, 1, 1)))
    (padding,) = [
        tuple(equation.params["padding"])
        for equation in traced.jaxpr.eqns
        if equation.primitive.name == "conv_general_dilated"
    ]
    ones, turned = (1,) * rank, layer.transpose_kernel
    return Convolution(ones, padding, strides, dilation, 1, turned, layer.dtype, layer.precision)


def _unlike_convolution(layer: Any, shape: tuple[int, ...], rank: int) -> str | None:
    if layer.mask is not None:
        return "its kernel is masked"
    if rank > 3 or len(shape) != rank + 2:
        return "its input is not [n, length, c], [n, height, width, c] or [n, depth, …, c]"
    return None


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value or (1,) * rank)


def batch_normalization(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes `nn.BatchNorm` and `nnx.BatchNorm`, with running averages."""
    if layer.axis not in (-1, len(shape) - 1):
        return "its features are not the last axis"
    return Normalization()


def normalization(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes other normalisations."""
    last = len(shape) - 1
    if getattr(layer, "feature_axes", -1) not in (-1, (-1,), last, (last,)):
        return "its features are not the last axis"
    reduced = jax.tree.leaves(getattr(layer, "reduction_axes", ()))
    if any(axis in (0, -len(shape)) for axis in reduced) or layer.axis_name is not None:
        return "its statistics mix examples"
    return Normalization()


def embedding(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes `nn.Embed` and `nnx.Embed`."""
    return Embedding(layer.num_embeddings, layer.features)


def bare(layer: Any, shape: tuple[int, ...]) -> Kind | str:
    """Describes `models.Parameter`."""
    return Bare()


KINDS: dict[type, Callable[[Any, tuple[int, ...]], Kind | str]] = {
    nn.Dense: dense,
    nn.DenseGeneral: dense_general,
    nn.Einsum: einsum,
    nn.Conv: convolutional,
    nn.ConvTranspose: transposed_convolutional,
    nn.BatchNorm: batch_normalization,
    nn.LayerNorm: normalization,
    nn.RMSNorm: normalization,
    nn.GroupNorm: normalization,
    nn.InstanceNorm: normalization,
    nn.Embed: embedding,
}
"""Type of layer → function that describes it. Gradients of layers of other types are formed."""


def register(
    layer: type, *, like: type | None = None, shares: Callable[..., Any] | None = None
) -> None:
    """Tells the factored engine how your own layer adds to ‖g_u‖² and g_u·v.

    Scores are exact without registration, too, but then gradients are formed example by example,
    which takes longer. A wrong registration gives wrong scores: `gradients.verify` finds it.

    Args:
      layer: a class of Flax modules that own parameters.
      like: a registered type that has, in evaluation mode, the same parameters under the same names
        and the same output.
      shares: a function instead of `like`. It takes the layer without its parent, its variables,
        its part of v, its inputs and the cotangents of its outputs, both with the n examples on
        their first axis; it returns the layer's part of ‖g_u‖² and of g_u·v, each `[n]`.

    Raises:
      UserError: unless exactly one of `like` and `shares` is given, and `like` is registered.
    """
    if (like is None) == (shares is None):
        raise UserError("register(layer, like=…) or register(layer, shares=…): give one of the two")
    _register_nnx()
    if like is not None and like not in KINDS:
        registered = ", ".join(known.__name__ for known in KINDS)
        raise UserError(f"{like.__name__} is not registered itself; registered are {registered}")
    KINDS[layer] = KINDS[like] if shares is None else lambda module, shape: Custom(module, shares)
