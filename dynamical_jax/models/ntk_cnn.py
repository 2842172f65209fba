"""The network of the theory: convolutions, global average pooling, one linear layer (App. D.1)."""

import math

from flax import linen as nn

from dynamical_jax.models import layers
from dynamical_jax.types import AnyArray, Outputs


class NTKCNN(nn.Module):
    """3×3 convolutions with ReLU, the mean over all pixels, then a linear layer, no biases.

    In the NTK parameterisation: weights are drawn from N(0, 1) and outputs scaled by 1/√fan_in (and
    by √2 before a ReLU), so that the NTK has a limit as widths grow (Jacot et al., 2018).

    Attributes:
      num_classes: K.
      widths: channels of each convolution.
    """

    num_classes: int
    widths: tuple[int, ...] = (64, 64, 64)

    @nn.compact
    def __call__(self, x: AnyArray, train: bool = False) -> Outputs:
        """Returns logits `[n, K]` and embedding `[n, d]` of images `[n, h, w, c]`."""
        del train  # nothing here behaves differently in training
        unit = nn.initializers.normal(1.0)
        for index, width in enumerate(self.widths, start=1):
            scale = math.sqrt(2 / (9 * x.shape[-1]))
            convolved = layers.conv(
                width, (3, 3), use_bias=False, kernel_init=unit, name=f"conv{index}"
            )(x)
            x = nn.relu(scale * convolved)
        x = x.mean(axis=(1, 2))
        logits = nn.Dense(self.num_classes, use_bias=False, kernel_init=unit, name="fc")(x)
        return Outputs(logits / math.sqrt(x.shape[-1]), x)
