"""Layers of others: registered rightly they are exact and fast, wrongly they are found out."""

import pytest
import toy
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax import gradients
from dynamical_jax.gradients import kinds, shares


class Renamed(nn.Dense):
    """A dense layer by another name."""


class Doubled(nn.Dense):
    """Like a dense layer without bias, but for a factor of two."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return x @ (2 * kernel)


class Net(nn.Module):
    """A layer of the kind in question, and one on top."""

    kind: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(self.kind(4)(x.reshape(len(x), -1))))


def doubled_shares(layer, variables, direction, inputs, cotangent):
    """By the chain rule a gradient of twice the size: four times the square, twice the product."""
    squared_norm, product = dense_shares(layer, variables, direction, inputs, cotangent)
    return 4 * squared_norm, 2 * product


def dense_shares(layer, *arguments):
    plain = kinds.Layer(kinds.kind_of(nn.Dense(layer.features), arguments[2].shape), None)
    return shares.kernel_shares(plain, *arguments)


@pytest.fixture
def setting(monkeypatch):
    """A model with a layer of a kind, its variables and inputs; registrations end with the test."""
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))

    def make(kind):
        model = toy.standardized(Net(kind))
        return model, toy.variables(model), toy.images(5)

    return make


def test_like(setting):
    gradients.register(Renamed, like=nn.Dense)
    assert max(gradients.verify(*setting(Renamed))) < 1e-5


def test_shares(setting, capsys):
    gradients.register(Doubled, shares=doubled_shares)
    assert max(gradients.verify(*setting(Doubled))) < 1e-5
    assert "over 5 examples" in capsys.readouterr().out


def test_wrong_registration_is_found(setting):
    gradients.register(Doubled, shares=dense_shares)
    assert gradients.verify(*setting(Doubled)).squared_norm > 0.1


def test_not_registered_is_exact_too(setting):
    assert max(gradients.verify(*setting(Doubled))) < 1e-5


def test_inner_product_alone_is_found(setting):
    def half(*arguments):
        squared_norm, product = doubled_shares(*arguments)
        return squared_norm, product / 2

    gradients.register(Doubled, shares=half)
    found = gradients.verify(*setting(Doubled))
    assert found.squared_norm < 1e-5
    assert found.inner_product > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of the two"),
        ({"like": nn.Dense, "shares": dense_shares}, "give one of the two"),
        ({"like": nn.LSTMCell}, "LSTMCell is not registered itself; registered are Dense, "),
    ],
)
def test_bad_registrations(options, message):
    before = dict(kinds.KINDS)
    with pytest.raises(dj.UserError, match=message):
        gradients.register(Renamed, **options)
    assert before == kinds.KINDS
