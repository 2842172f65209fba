"""Dense layers with ReLU between them, for vectors such as embeddings."""

from flax import linen as nn

from dynamical_jax.models import layers
from dynamical_jax.types import AnyArray, Outputs


class MLP(nn.Module):
    """Dense layers on vectors, or on images as one vector of all pixels each.

    Attributes:
      num_classes: K.
      hidden: the widths of the hidden layers.
    """

    num_classes: int
    hidden: tuple[int, ...] = (512,)

    @nn.compact
    def __call__(self, x: AnyArray, train: bool = False) -> Outputs:
        """Returns logits `[n, K]` and embedding, the last hidden layer, of x `[n, ...]`."""
        del train  # nothing here behaves differently in training
        x = x.reshape(x.shape[0], -1)
        for index, width in enumerate(self.hidden, start=1):
            x = nn.relu(layers.dense(width, x, f"fc{index}"))
        return Outputs(layers.dense(self.num_classes, x, f"fc{len(self.hidden) + 1}"), x)
