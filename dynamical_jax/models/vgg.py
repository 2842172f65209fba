"""VGG-11 as in torchvision, without batch normalisation (Simonyan & Zisserman, 2015)."""

from flax import linen as nn

from dynamical_jax.errors import UserError
from dynamical_jax.models import layers
from dynamical_jax.types import AnyArray, Outputs

# Features of each 3×3 convolution, grouped by the max-pooling that ends the group.
GROUPS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(nn.Module):
    """VGG-11: eight 3×3 convolutions, 7×7 adaptive pooling, dense layers 4096, 4096, K.

    Attributes:
      num_classes: K.
      dropout: rate after each hidden dense layer, in training only.
    """

    num_classes: int
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: AnyArray, train: bool = False) -> Outputs:
        """Returns logits `[n, K]` and embedding `[n, 4096]` of images `[n, h, w, c]`."""
        if min(x.shape[1:3]) < 32:
            raise UserError(f"vgg11 needs images of at least 32×32, got {x.shape[1]}×{x.shape[2]}")
        pad = ((1, 1), (1, 1))
        index = 0
        for group in GROUPS:
            for features in group:
                conv = layers.conv(
                    features,
                    (3, 3),
                    padding=pad,
                    kernel_init=layers.kaiming_normal,
                    name=f"conv{index}",
                )
                x = nn.relu(conv(x))
                index += 1
            x = layers.max_pool(x, 2, 2)
        x = layers.adaptive_average_pool(x, 7).reshape(x.shape[0], -1)
        normal = nn.initializers.normal(0.01)
        for name in ("fc1", "fc2"):
            x = nn.relu(nn.Dense(4096, kernel_init=normal, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes, kernel_init=normal, name="fc3")(x), x)
