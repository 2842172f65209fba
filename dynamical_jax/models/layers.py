"""Layers with PyTorch's conventions, so that the models here equal PyTorch's official ones.

Initialisations are those of `torch.nn` and `torchvision`, with the same fan_in and fan_out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dynamical_jax import convolution, gradients
from dynamical_jax.types import Array

# torch.nn.Linear and Conv2d: U(−1/√fan_in, 1/√fan_in), that is Kaiming uniform with a = √5.
default_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# torchvision's ResNet and VGG: Kaiming normal in mode fan_out with ReLU's gain.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def default_bias(fan_in: int) -> nn.initializers.Initializer:
    """Returns PyTorch's default for biases: U(−1/√fan_in, 1/√fan_in)."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = 1 / np.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


conv = functools.partial(nn.Conv, conv_general_dilated=convolution.conv_general_dilated)
"""`nn.Conv` by the convolution of this package, which is fast on CPU."""


def dense(features: int, x: Array, name: str) -> Array:
    """Applies a dense layer initialised as `torch.nn.Linear` by default."""
    bias = default_bias(x.shape[-1])
    return nn.Dense(features, kernel_init=default_kernel, bias_init=bias, name=name)(x)


def max_pool(x: Array, window: int, stride: int, padding: int = 0) -> Array:
    """Applies `torch.nn.MaxPool2d`: incomplete windows at the far edges are dropped."""
    pad = ((padding, padding), (padding, padding))
    return convolution.max_pool(x, (window, window), (stride, stride), pad)


def adaptive_average_pool(x: Array, size: int) -> Array:
    """Applies `torch.nn.AdaptiveAvgPool2d(size)` to images `[n, h, w, c]`.

    Cell i of `size` averages rows ⌊i h/size⌋ to ⌈(i+1) h/size⌉, so a map smaller than `size` is
    repeated and a larger one is averaged.
    """

    def average(length: int) -> np.ndarray:
        start = np.arange(size) * length // size
        end = -((-np.arange(1, size + 1) * length) // size)
        position = np.arange(length)
        inside = (start[:, None] <= position) & (position < end[:, None])
        return inside / inside.sum(axis=1, keepdims=True)

    rows, columns = (jnp.asarray(average(length), x.dtype) for length in x.shape[1:3])
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x)


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` with `torch.nn.BatchNorm2d`'s defaults and running variance.

    PyTorch normalises with the biased variance of the batch, as Flax does, but averages the
    unbiased one into the running statistics.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    use_fast_variance: bool = False

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalises x `[n, h, w, c]`; statistics leave out examples where `mask` is False."""
        averages = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        updates = self.is_mutable_collection("batch_stats") and not (
            averages or self.is_initializing()
        )
        before = self.get_variable("batch_stats", "var") if updates else None
        y = super().__call__(x, use_running_average, mask=mask)
        if updates:
            count = x.size // x.shape[self.axis]
            if mask is not None:
                count = jnp.sum(mask) * (count // x.shape[0])
            kept = self.momentum * before
            batch = self.get_variable("batch_stats", "var") - kept
            # A statistic of a single value has no unbiased variance: leave it biased.
            unbiased = batch * count / jnp.maximum(count - 1, 1)
            self.put_variable("batch_stats", "var", kept + unbiased)
        return y


# In evaluation it is `nn.BatchNorm`.
gradients.register(BatchNorm, like=nn.BatchNorm)
