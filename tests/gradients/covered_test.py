"""Uses of layers that the factored engine covers."""

import gradient_checks as checks
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import dynamical_jax as dj


class Activation(nn.Module):
    def __call__(self, x):
        return nn.tanh(x)


class Pair(nn.Module):
    """Owns parameters, holds a layer without, and returns two arrays."""

    activation: nn.Module

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.ones, (4, 3))
        return self.activation(y), y**2


class Linear(nn.Module):
    """A model that is one layer."""

    @nn.compact
    def __call__(self, x):
        return dj.Outputs(x @ self.param("kernel", nn.initializers.ones, (4, 3)), x)


class Encoder(nn.Module):
    def setup(self):
        self.layer = nn.Dense(3)

    def encode(self, x):
        return self.layer(x)


def attention(self, x):
    tokens = jnp.stack([x, jnp.sin(x), x**2], axis=1)
    return nn.MultiHeadDotProductAttention(2)(tokens, jnp.cos(tokens), deterministic=True)


def shares_scope(self, x):
    """Low-rank adaptation as its authors write it in Flax."""

    class LowRank(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3)
            nn.share_scope(self, layer)
            a = self.param("a", nn.initializers.ones, (4, 2))
            return layer(x) + x @ a @ self.param("b", nn.initializers.ones, (2, 3))

    return LowRank()(x)


def partitioned(self, x):
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    return nn.Dense(3, kernel_init=init)(x)


COVERED = {
    "two outputs": lambda self, x: sum(Pair(Activation())(nn.Dense(4)(x))),
    "output used twice": checks.used_twice,
    "output not used": lambda self, x: (nn.Dense(2, name="idle")(x), nn.Dense(3)(x))[1],
    "gradient stopped": lambda self, x: nn.Dense(3)(x) + lax.stop_gradient(nn.Dense(3)(x)),
    "constant input": lambda self, x: nn.Dense(4)(jnp.ones((len(x), 2))) * x,
    "dropout": lambda self, x: nn.Dense(3)(nn.Dropout(0.5, deterministic=True)(nn.Dense(4)(x))),
    "Sequential": lambda self, x: nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])(x),
    "method of a container": lambda self, x: Encoder().encode(x),
    "attention": attention,
    "recurrent cell": lambda self, x: nn.LSTMCell(4)((x, jnp.sin(x)), x)[1],
    "BatchNorm told when called": lambda self, x: nn.BatchNorm()(x, use_running_average=True),
    "no mask": lambda self, x: nn.LayerNorm()(x, mask=None),
    "shared scope": shares_scope,
    "partitioned": partitioned,
}


@pytest.mark.parametrize("function", COVERED.values(), ids=COVERED)
def test_uses_that_are_covered(function):
    checks.check_terms(checks.model_from(function), checks.rows())


@pytest.mark.parametrize("labels", [None, np.array([2, 1, 0, 0, 2])], ids=["pseudo", "given"])
def test_labels(labels):
    checks.check_terms(Linear(), checks.rows(), labels)
