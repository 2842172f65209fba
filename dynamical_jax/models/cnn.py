"""The small convolutional network of PyTorch's CIFAR-10 tutorial (App. C.1)."""

from flax import linen as nn

from dynamical_jax.errors import UserError
from dynamical_jax.models import layers
from dynamical_jax.types import AnyArray, Outputs


class CNN(nn.Module):
    """Two 5×5 convolutions (6 and 16 channels) with max-pooling, then dense layers 120, 84, K.

    As in the tutorial the convolutions have no padding. On images smaller than 16×16, of which
    nothing would be left, they keep the size of the map instead (padding "SAME").

    Attributes:
      num_classes: K.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: AnyArray, train: bool = False) -> Outputs:
        """Returns logits `[n, K]` and embedding `[n, 84]` of images `[n, h, w, c]`."""
        del train  # nothing here behaves differently in training
        if min(x.shape[1:3]) < 4:
            raise UserError(f"cnn needs images of at least 4×4, got {x.shape[1]}×{x.shape[2]}")
        padding = "VALID" if min(x.shape[1:3]) >= 16 else "SAME"
        for name, features in (("conv1", 6), ("conv2", 16)):
            x = layers.conv(
                features,
                (5, 5),
                padding=padding,
                kernel_init=layers.default_kernel,
                bias_init=layers.default_bias(25 * x.shape[-1]),
                name=name,
            )(x)
            x = layers.max_pool(nn.relu(x), 2, 2)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(layers.dense(120, x, "fc1"))
        x = nn.relu(layers.dense(84, x, "fc2"))
        return Outputs(layers.dense(self.num_classes, x, "fc3"), x)
