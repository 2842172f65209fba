"""Logistic regression: one dense layer, for vectors such as embeddings."""

from flax import linen as nn

from dynamical_jax.types import AnyArray, Outputs


class Linear(nn.Module):
    """A dense layer on vectors, or on images as one vector of all pixels each.

    It starts from zero, unlike the other models: the loss is convex, so that there is no symmetry
    to break, and weights drawn at random would be noise in the predictions. With fewer labels than
    features gradient descent never changes the part of the weights that is orthogonal to all
    labeled examples; Adam, which scales each weight by itself, does not forget it either.

    Attributes:
      num_classes: K.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: AnyArray, train: bool = False) -> Outputs:
        """Returns logits `[n, K]` and embedding `[n, d]`, which is x, of x `[n, ...]`."""
        del train  # nothing here behaves differently in training
        x = x.reshape(x.shape[0], -1)
        zeros = nn.initializers.zeros
        return Outputs(nn.Dense(self.num_classes, kernel_init=zeros, name="fc")(x), x)
