"""The vision transformer (Dosovitskiy et al., 2021), if wanted with the LayerScale of DINOv2.

Parameters that belong to no layer of Flax, such as the class token, are layers by themselves
(`Parameter`), so that gradients can be had layer by layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dynamical_jax.errors import UserError
from dynamical_jax.models.parameter import Parameter
from dynamical_jax.types import AnyArray, Array, Outputs

normal = nn.initializers.truncated_normal(0.02)
layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class Block(nn.Module):
    """Self-attention, then two dense layers, each beside a shortcut and behind a LayerNorm.

    Attributes:
      num_heads: of the attention.
      layer_scale: whether what is added to the shortcuts has a factor for each feature that is
        learned (LayerScale; Touvron et al., 2021).
      gelu: "exact" or "tanh", its approximation.
    """

    num_heads: int
    layer_scale: bool = False
    gelu: str = "exact"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps tokens `[n, t, d]` to as many."""
        x = x + self.scaled(self.attend(layer_norm(name="norm1")(x)), "ls1")
        y = nn.Dense(4 * x.shape[-1], kernel_init=normal, name="fc1")(layer_norm(name="norm2")(x))
        y = nn.gelu(y, approximate=self.gelu == "tanh")
        return x + self.scaled(nn.Dense(x.shape[-1], kernel_init=normal, name="fc2")(y), "ls2")

    def attend(self, x: Array) -> Array:
        """Returns what the attention makes of tokens `[n, t, d]`."""
        n, t, d = x.shape
        together = nn.Dense(3 * d, kernel_init=normal, name="qkv")(x)
        parts = together.reshape(n, t, 3, self.num_heads, d // self.num_heads)
        y = jax.nn.dot_product_attention(*jnp.moveaxis(parts, 2, 0))
        return nn.Dense(d, kernel_init=normal, name="proj")(y.reshape(n, t, d))

    def scaled(self, x: Array, name: str) -> Array:
        """Returns tokens `[n, t, d]`, scaled if they are to be."""
        if not self.layer_scale:
            return x
        return x * Parameter((1, x.shape[-1]), nn.initializers.constant(1e-5), name=name)(x)


class ViT(nn.Module):
    """The vision transformer; the embedding is the class token after the last LayerNorm.

    Attributes:
      num_classes: K.
      width: features of a token.
      num_heads: of each attention.
      depth: number of blocks.
      patch_size: height and width of the patches, each of which is a token.
      layer_scale: whether blocks have a LayerScale.
      gelu: "exact", as in PyTorch, or "tanh", as in JAX by default.
    """

    num_classes: int
    width: int = 192
    num_heads: int = 3
    depth: int = 12
    patch_size: int = 16
    layer_scale: bool = False
    gelu: str = "exact"

    @nn.compact
    def __call__(self, x: AnyArray, train: bool = False) -> Outputs:
        """Returns logits `[n, K]` and embedding `[n, width]` of images `[n, h, w, c]`."""
        del train  # nothing here behaves differently in training
        n, height, width, channels = x.shape
        size = self.patch_size
        if height % size or width % size:
            raise UserError(
                f"patches of {size}×{size} need images whose sides are multiples of {size}, got "
                f"{height}×{width}"
            )
        # A convolution whose windows do not overlap is a dense layer on patches.
        patches = x.reshape(n, height // size, size, width // size, size, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, size * size * channels)
        x = nn.Dense(self.width, kernel_init=normal, name="patch_embed")(patches)
        token = Parameter((1, self.width), nn.initializers.normal(1e-6), name="class_token")(x)
        x = jnp.concatenate([token, x], axis=1)
        x = x + Parameter(x.shape[1:], normal, name="positions")(x)
        for index in range(self.depth):
            block = Block(self.num_heads, self.layer_scale, self.gelu, name=f"block{index}")
            x = block(x)
        x = layer_norm(name="norm")(x)[:, 0]
        return Outputs(nn.Dense(self.num_classes, kernel_init=normal, name="head")(x), x)


ViTTi = functools.partial(ViT, width=192, num_heads=3)
ViTS = functools.partial(ViT, width=384, num_heads=6)
ViTB = functools.partial(ViT, width=768, num_heads=12)


def resize_positions(table: np.ndarray, num_tokens: int) -> np.ndarray:
    """Returns a table of positions for images of another size, by bicubic interpolation.

    Args:
      table: `[1 + g², d]`: the class token's, then those of g × g patches, row by row.
      num_tokens: 1 + h², of square images.
    """
    old, new = (round((count - 1) ** 0.5) for count in (len(table), num_tokens))
    if old == new:
        return table
    grid = table[1:].reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True)
    return np.concatenate([table[:1], np.asarray(grid).reshape(new * new, -1)])
