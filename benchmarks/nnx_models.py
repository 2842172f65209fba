"""The vision transformer of `dynamical_jax.models` in Flax NNX, with the same names."""

import jax
import jax.numpy as jnp
from flax import nnx

from dynamical_jax import gradients, models


class Parameter(nnx.Module):
    """A parameter that is a layer by itself, as `models.Parameter`."""

    def __init__(self, shape: tuple[int, ...]):
        self.value = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the parameter once for each of the n examples in x."""
        value = self.value[...]
        return jnp.broadcast_to(value[None], (len(x), *value.shape))


gradients.register(Parameter, like=models.Parameter)


class Block(nnx.Module):
    """Self-attention, then two dense layers, each beside a shortcut and behind a LayerNorm."""

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs) for _ in range(2))
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens `[n, t, d]` to as many."""
        n, t, d = x.shape
        parts = self.qkv(self.norm1(x)).reshape(n, t, 3, self.num_heads, d // self.num_heads)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(parts, 2, 0))
        x = x + self.proj(attended.reshape(n, t, d))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """The vision transformer for square images `[n, size, size, 3]`."""

    def __init__(
        self,
        size: int = 224,
        patch_size: int = 16,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 10,
    ):
        rngs = nnx.Rngs(0)
        self.patch_size, self.depth = patch_size, depth
        self.patch_embed = nnx.Linear(3 * patch_size**2, width, rngs=rngs)
        self.class_token = Parameter((1, width))
        self.positions = Parameter((1 + (size // patch_size) ** 2, width))
        for index in range(depth):
            setattr(self, f"block{index}", Block(width, num_heads, rngs))
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits `[n, K]`."""
        n, size, grid = len(x), self.patch_size, x.shape[1] // self.patch_size
        patches = x.reshape(n, grid, size, grid, size, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embed(patches.reshape(n, grid**2, -1))
        x = jnp.concatenate([self.class_token(x), x], axis=1)
        x = x + self.positions(x)
        for index in range(self.depth):
            x = getattr(self, f"block{index}")(x)
        return self.head(self.norm(x)[:, 0])


MODELS = {"vit_s": ViT}
