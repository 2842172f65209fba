"""g_u·g_v of all pairs, against gradients formed by `vmap(jax.grad)`, flattened and multiplied."""

import sys
from unittest import mock

import gradient_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax import gradients
from dynamical_jax.gradients import factored, pairs

NAMES = ["cnn", pytest.param("batch_norm", marks=pytest.mark.slow)]
SIZE = 7


def flat_gradients(apply, variables, x, y):
    # As one program: operation by operation each one is compiled by itself.
    return flatten(
        jax.jit(gradients.per_example_gradients, static_argnums=0)(apply, variables, x, y)
    )


def flatten(trees):
    leaves = [np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(trees)]
    return np.concatenate(leaves, axis=1)


def assert_products(found, left, right):
    """Relative to ‖g_u‖‖g_v‖, the size without cancellation."""
    size = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)[None]
    assert np.all(np.abs(found - left @ right.T) <= 1e-10 * size)


# --- Layer by layer ---


class Alone(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        outputs = self.layer(x)
        return sum(leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(outputs))


class Pair(nn.Module):
    """Of no known kind, and returns two arrays."""

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.lecun_normal(), (4, 3))
        return nn.tanh(y), y**2


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Embed(5, 4)(x).mean(axis=1))


class Shifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(x + dj.models.Parameter((1, 5, 4), nn.initializers.normal())(x))


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape)


IMAGES = drawn(SIZE, 6, 5, 4)
LAYERS = {
    "dense": (nn.Dense(3), drawn(SIZE, 4)),
    "dense, no bias": (nn.Dense(3, use_bias=False), drawn(SIZE, 4)),
    "dense of rows": (nn.Dense(3), drawn(SIZE, 2, 3, 4)),
    "convolution": (nn.Conv(6, (3, 2)), IMAGES),
    "strides": (nn.Conv(6, (3, 3), strides=(2, 1), use_bias=False), IMAGES),
    "dilation": (nn.Conv(6, (3, 2), kernel_dilation=(2, 3), padding=2), IMAGES),
    "groups": (nn.Conv(6, (3, 3), feature_group_count=2, strides=2), IMAGES),
    "larger than the map": (nn.Conv(6, (7, 9), strides=(2, 1)), IMAGES),
    "sequence": (nn.Conv(6, (3,), strides=2), IMAGES[:, :, 0]),
    "volume": (nn.Conv(6, (2, 1, 3)), drawn(SIZE, 3, 2, 3, 4)),
    "transposed": (nn.ConvTranspose(3, (3, 2), strides=(2, 1)), IMAGES),
    "kernel for each head": (nn.Einsum((5, 4, 2), "abhc,hcp->aphb"), IMAGES),
    "parameter": (Shifted(), IMAGES),
    "layer norm": (nn.LayerNorm(), IMAGES),
    "group norm": (nn.GroupNorm(2, use_scale=False), IMAGES),
    "rms norm": (nn.RMSNorm(), IMAGES),
    "tokens": (Tokens(), np.random.default_rng(0).integers(-5, 5, (SIZE, 6))),
    "tokens beyond the table": (Tokens(), np.arange(SIZE * 6).reshape(SIZE, 6) % 5),
    "of another type": (nn.PReLU(), drawn(SIZE, 4)),
    "two outputs": (Pair(), drawn(SIZE, 4)),
}


# A program for each takes 0.7 s to compile. Those of images are compiled as one, too.
QUICK = {"dense of rows", "groups", "tokens beyond the table", "of another type", "two outputs"}


@pytest.mark.usefixtures("float64")
def test_layers_of_images():
    layers = [layer for name, (layer, x) in LAYERS.items() if x is IMAGES]
    assert len(layers) == 11
    check_layers(checks.side_by_side(layers), IMAGES)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", checks.params({name: name for name in LAYERS}, QUICK))
def test_layer(name):
    layer, x = LAYERS[name]
    check_layers(Alone(layer), x)


def check_layers(model, x):
    variables, _ = checks.variables_and_direction(model, x)
    y = np.arange(SIZE) % 3

    def products(formed, variables, x):
        with mock.patch.object(pairs, "forms_gradient", return_value=formed):
            forms = factored.forms(model.apply, variables, x, y)
        return pairs.products(forms, forms)

    @jax.jit  # One program of all compiles faster than several.
    def compute(variables, x):
        each = gradients.per_example_gradients(model.apply, variables, x, y)
        return [products(formed, variables, x) for formed in (True, False)], each

    both, each = compute(variables, x)
    expected = flatten(each)
    for found in both:
        assert_products(found, expected, expected)


def test_large_layers_are_not_formed():
    # A dense layer of vectors has as many parameters as d·p; its factors have d + p numbers.
    forms = jax.eval_shape(
        lambda variables, x: factored.forms(Alone(nn.Dense(50)).apply, variables, x, None),
        {"params": {"layer": {"kernel": jnp.ones((40, 50)), "bias": jnp.ones(50)}}},
        jnp.ones((3, 40)),
    )
    assert [sorted(part.size for part in form) for form in forms] == [[3 * 40, 3 * 50], [3 * 50]]
    assert pairs.forms_gradient(positions=1024, depth=27, features=64)
    assert pairs.forms_gradient(positions=8, depth=288, features=32)  # 9,216 < 64 · 320.
    assert not pairs.forms_gradient(positions=4, depth=4608, features=512)


# --- Models ---


@pytest.fixture(params=NAMES)
def setting(request, float64):
    model = toy.models()[request.param]
    return model.apply, toy.variables(model, np.float64), *toy.examples(SIZE)


@pytest.mark.parametrize("engine", ["factored", "vmap"])
def test_gram_of_models(setting, engine, recwarn):
    apply, variables, x, y = setting
    predictions = np.argmax(toy.outputs(apply, variables, x).logits, axis=-1)
    for labels, taken in ((y, y), (None, predictions)):
        expected = flat_gradients(apply, variables, x, taken)
        found = gradients.gram(apply, variables, x, labels, engine=engine)
        assert_products(found, expected, expected)
        np.testing.assert_array_equal(found, found.T)
    assert not recwarn.list


def test_what_gram_is_to_the_other_quantities(setting):
    apply, variables, x, y = setting
    found = gradients.gram(apply, variables, x, y)
    grad_q = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    terms = gradients.norms_and_products(apply, variables, x, grad_q, labels=y)
    np.testing.assert_allclose(np.diag(found), terms.squared_norm, rtol=1e-10)
    np.testing.assert_allclose(found.sum(axis=1), terms.inner_product, rtol=1e-8)
    np.testing.assert_allclose(found.sum(), dj.dynamics.training_dynamics(grad_q), rtol=1e-10)


@pytest.mark.parametrize("engine", ["factored", pytest.param("vmap", marks=pytest.mark.slow)])
def test_blocks_change_nothing(setting, engine):
    apply, variables, x, y = setting
    left, right = dj.Examples(x, y), dj.Examples(toy.images(5, seed=3), None)
    whole = gradients.gram(apply, variables, *left, engine=engine)
    cross = gradients.cross_gram(apply, variables, left, right, engine=engine)
    for chunk_size in (3, 64):  # One at a time: below.
        options = {"engine": engine, "chunk_size": chunk_size}
        parts = gradients.gram(apply, variables, *left, **options)
        np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12)
        parts = gradients.cross_gram(apply, variables, left, right, **options)
        np.testing.assert_allclose(parts, cross, rtol=1e-9, atol=1e-12)


def test_cross_gram(setting):
    apply, variables, x, y = setting
    other, labels = toy.examples(4, seed=3)
    found = gradients.cross_gram(apply, variables, (x, y), (other, labels))
    assert_products(
        found,
        flat_gradients(apply, variables, x, y),
        flat_gradients(apply, variables, other, labels),
    )
    alone = gradients.cross_gram(apply, variables, (x, y), (x, y))
    np.testing.assert_allclose(alone, gradients.gram(apply, variables, x, y), rtol=1e-10)


def test_short_memory_makes_small_blocks(monkeypatch):
    model = toy.standardized(dj.models.Linear(3))
    variables, (x, y) = toy.variables(model), toy.examples(16)
    whole = gradients.gram(model.apply, variables, x, y)
    scoring = sys.modules["dynamical_jax.gradients.scoring"]
    monkeypatch.setattr(scoring.resources, "free_device_memory", lambda: 1)
    seen = []
    on_progress = lambda done, total: seen.append(done)
    parts = gradients.gram(model.apply, variables, x, y, on_progress=on_progress)
    assert seen == list(range(1, 17))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4)
        return layer(nn.tanh(layer(x)))


def test_what_cannot_be_taken_apart_is_formed(float64):
    x, y = drawn(5, 4), np.arange(5) % 3
    model = Shared()
    variables, _ = checks.variables_and_direction(model, x)
    with pytest.warns(UserWarning, match="called more than once.*using vmap"):
        found = gradients.gram(model.apply, variables, x, y)
    expected = flat_gradients(model.apply, variables, x, y)
    assert_products(found, expected, expected)


def test_bad_arguments():
    model = toy.models()["cnn"]
    variables, (x, y) = toy.variables(model), toy.examples(3)
    with pytest.raises(dj.UserError, match="unknown engine 'warp'; choose from factored, vmap"):
        gradients.gram(model.apply, variables, x, y, engine="warp")
    with pytest.raises(dj.UserError, match="labels must be integers"):
        gradients.gram(model.apply, variables, x, y + 5)
    assert gradients.gram(model.apply, variables, x[:0]).shape == (0, 0)


@pytest.mark.parametrize("engine", ["factored", "vmap"])
def test_sets_that_have_no_products_are_refused(engine):
    model = toy.models()["cnn"]
    variables, x = toy.variables(model), toy.images(4)
    mixed = lambda variables, x: (logits := model.apply(variables, x).logits) - logits.mean(0)[None]
    with pytest.raises(dj.UserError, match="depends on the others in its batch"):
        gradients.gram(mixed, variables, x, engine=engine)
    with pytest.raises(dj.UserError, match="both sets need inputs of one shape"):
        gradients.cross_gram(model.apply, variables, (x, None), (x[:, :5], None), engine=engine)
