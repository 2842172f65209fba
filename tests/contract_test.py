"""What a model does that it must not do is told in a line that says what to do."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import dynamical_jax as dj

TOKENS = 5


class InTraining(nn.Module):
    """A layer that stays in training mode, whatever it is told."""

    layer: str

    @nn.compact
    def __call__(self, x, train=False):
        if self.layer == "dropout":
            x = nn.Dropout(0.5, deterministic=False)(x)
        elif self.layer == "batch_norm":
            x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(3)(x)


class OfTokens(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.Embed(TOKENS, 2)(x).mean(axis=1))


def x(size=4, width=6, dtype=np.float32):
    return np.random.default_rng(0).integers(0, TOKENS, (size, width)).astype(dtype)


def uses(model, variables, pool, labeled=None):
    """Returns all ways to use a model that must refuse it."""
    labeled = pool if labeled is None else labeled
    labels = np.zeros(len(labeled), np.int32)
    ask = lambda name: dj.strategies.create(name).query(
        jax.random.key(0), dj.LearnerView(model.apply, variables, (labeled, labels), pool), 1
    )
    return {
        "train": lambda: dj.training.fit(
            model, variables, dj.Examples(labeled, labels), dj.TrainingConfig(max_epochs=1), 0
        ),
        "margin": lambda: ask("margin"),
        "dynamical": lambda: ask("dynamical"),
    }


@pytest.mark.parametrize("use", ["train", "margin", "dynamical"])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("dropout", "let each Dropout have deterministic=not train"),
        ("batch_norm", "let each BatchNorm have use_running_average=not train"),
    ],
)
def test_a_layer_in_training_mode(layer, message, use):
    model, keys = InTraining(layer), jax.random.key(0)
    variables = model.init({"params": keys, "dropout": keys}, x(), train=True)
    with pytest.raises(dj.UserError, match=message):
        uses(model, variables, x())[use]()


@pytest.mark.parametrize("use", ["train", "margin", "dynamical"])
def test_inputs_of_another_size(use):
    model = InTraining("none")
    variables = model.init(jax.random.key(0), x())
    with pytest.raises(dj.UserError, match=r"weights are of .* another size than \(7,\): resize"):
        uses(model, variables, x(width=7))[use]()


def test_labeled_inputs_of_another_size():
    model = InTraining("none")
    variables = model.init(jax.random.key(0), x())
    with pytest.raises(dj.UserError, match=r"labeled inputs are of shape \(7,\), unlabeled ones"):
        uses(model, variables, x(), x(width=7))["margin"]()


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (lambda variables: variables["params"].pop("Dense_0"), "lack a parameter"),
        (lambda variables: variables.pop("batch_stats"), "such as batch_stats"),
    ],
)
def test_variables_that_lack_something(lose, message):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

    variables = Model().init(jax.random.key(0), x())
    lose(variables)
    with pytest.raises(dj.UserError, match=message):
        dj.contract.output_shapes(Model().apply, variables, x())


@pytest.mark.parametrize("use", ["train", "margin", "dynamical"])
def test_a_token_beyond_the_table(use):
    model = OfTokens()
    pool = x(dtype=np.int32)
    variables = model.init(jax.random.key(0), pool)
    pool[1, 2] = TOKENS
    with pytest.raises(dj.UserError, match=r"tokens go from 0 to 5, and .* nn.Embed has 5 rows"):
        uses(model, variables, pool)[use]()
