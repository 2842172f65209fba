"""ResNet-18 as in torchvision (He et al., 2016)."""

import functools

from flax import linen as nn

from dynamical_jax import words
from dynamical_jax.models import layers
from dynamical_jax.types import AnyArray, Array, Outputs

STEMS = ("imagenet", "cifar")

conv = functools.partial(layers.conv, use_bias=False, kernel_init=layers.kaiming_normal)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut.

    Attributes:
      features: channels of the output.
      stride: of the first convolution, and of the shortcut's 1×1 convolution where one is needed.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps `[n, h, w, c]` to `[n, h/stride, w/stride, features]`."""
        batch_norm = functools.partial(layers.BatchNorm, use_running_average=not train)
        stride = (self.stride, self.stride)
        pad = ((1, 1), (1, 1))
        shortcut = x
        x = conv(self.features, (3, 3), stride, padding=pad, name="conv1")(x)
        x = nn.relu(batch_norm(name="bn1")(x))
        x = conv(self.features, (3, 3), padding=pad, name="conv2")(x)
        x = batch_norm(name="bn2")(x)
        if shortcut.shape != x.shape:
            shortcut = conv(self.features, (1, 1), stride, padding="VALID", name="downsample_conv")(
                shortcut
            )
            shortcut = batch_norm(name="downsample_bn")(shortcut)
        return nn.relu(x + shortcut)


class ResNet18(nn.Module):
    """ResNet-18.

    Attributes:
      num_classes: K.
      stem: "imagenet", a 7×7 convolution of stride 2 and a max-pooling, as in torchvision and in
        the text of the paper; or "cifar", a 3×3 convolution, as in the authors' program.
    """

    num_classes: int
    stem: str = "imagenet"

    @nn.compact
    def __call__(self, x: AnyArray, train: bool = False) -> Outputs:
        """Returns logits `[n, K]` and embedding `[n, 512]` of images `[n, h, w, c]`."""
        words.check_known("stem", self.stem, STEMS)
        if self.stem == "imagenet":
            x = conv(64, (7, 7), (2, 2), padding=((3, 3), (3, 3)), name="conv1")(x)
        else:
            x = conv(64, (3, 3), padding=((1, 1), (1, 1)), name="conv1")(x)
        x = nn.relu(layers.BatchNorm(use_running_average=not train, name="bn1")(x))
        if self.stem == "imagenet":
            x = layers.max_pool(x, 3, 2, padding=1)
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = BasicBlock(64 * 2**stage, stride, name=name)(x, train)
        x = x.mean(axis=(1, 2))
        return Outputs(layers.dense(self.num_classes, x, "fc"), x)
