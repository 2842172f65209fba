"""Sketches: their mean over seeds against exact products, and what chunks and layers do to them."""

import functools
import sys
from unittest import mock

import gradient_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn
from gradients.gram_test import LAYERS, SIZE, Alone, Shared, drawn, flat_gradients, flatten

import dynamical_jax as dj
from dynamical_jax import gradients
from dynamical_jax.gradients import factored, sketching

NUM_NUMBERS = 16
NUM_SEEDS = 300
# A program for each takes two seconds to compile.
QUICK = {"dense of rows", "groups", "two outputs"}
KINDS = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in LAYERS]
# Elements of one row of aᵀe meet in one number, so that the signs of a alone do not suffice.
WIDER = {"more outputs than numbers": (nn.Dense(40, use_bias=False), drawn(SIZE, 4))}


def assert_unbiased(sketches, gradient):
    """Of many seeds, `[seeds, n, k]`: the mean of all products is within what chance explains."""
    expected = gradient @ gradient.T
    products = np.einsum("suk,svk->suv", *[np.asarray(sketches)] * 2)
    error = products.mean(axis=0) - expected
    spread = products.std(axis=0) / np.sqrt(len(products))
    size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    # Products that are exact for every seed, as those of a layer with one number, do not spread.
    assert np.all(np.abs(error) <= 5 * spread + 1e-9 * size), np.max(error / (spread + 1e-9 * size))
    # Chance explains them all, too: ‖error‖² is about the sum of the variances.
    assert np.sum(error**2) <= 4 * np.sum(spread**2) + 1e-12 * np.sum(size**2)
    # The bound is no wider than what a sketch of so many numbers promises.
    assert np.max(products.std(axis=0) / size) < 4 / np.sqrt(sketches.shape[-1])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [*KINDS, *WIDER])
def test_layer(name):
    layer, x = {**LAYERS, **WIDER}[name]
    model = Alone(layer)
    variables, _ = checks.variables_and_direction(model, x)
    y = np.arange(SIZE) % 3

    def sketches(folds, variables, x, key):
        with mock.patch.object(sketching, "folds", return_value=folds):
            of_layer = functools.partial(sketching.of_layer, key, NUM_NUMBERS)
            return sum(
                factored.map_layers(of_layer, model.apply, variables, x, factored.total_loss(y))
            )

    keys = jax.random.split(jax.random.key(1), NUM_SEEDS)

    @jax.jit
    def compute(variables, x, keys):
        both = lambda key: [sketches(folds, variables, x, key) for folds in (True, False)]
        each = gradients.per_example_gradients(model.apply, variables, x, y)
        return jax.vmap(both)(keys), each

    both, each = compute(variables, x, keys)
    for found in both:
        assert_unbiased(found, flatten(each))


@pytest.fixture(params=["cnn", pytest.param("batch_norm", marks=pytest.mark.slow)])
def setting(request, float64):
    model = toy.models()[request.param]
    return model.apply, toy.variables(model, np.float64), *toy.examples(SIZE)


def of_seeds(setting, engine, size):
    """As `gradients.sketch`, but of all seeds in one program."""
    apply, variables, x, y = setting
    sketches = sys.modules["dynamical_jax.gradients.sketch"].engines(size)[engine]
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    program = lambda variables, x, key: sketches(apply, variables, x, y, key)[0]
    return jax.jit(jax.vmap(program, (None, None, 0)))(variables, x, keys)


@pytest.mark.parametrize("engine", ["factored", pytest.param("vmap", marks=pytest.mark.slow)])
def test_models(setting, engine, recwarn):
    gradient = flat_gradients(*setting)
    assert_unbiased(of_seeds(setting, engine, NUM_NUMBERS), gradient)
    assert not recwarn.list


@pytest.mark.slow
def test_pseudo_labels_are_the_predictions(setting):
    apply, variables, x, _ = setting
    predictions = np.argmax(apply(variables, x).logits, axis=-1)
    of_predictions = gradients.sketch(apply, variables, x, predictions)
    found = gradients.sketch(apply, variables, x)
    np.testing.assert_allclose(found, of_predictions, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_error_falls_with_the_root_of_the_size(float64):
    model = toy.models()["cnn"]
    setting = (model.apply, toy.variables(model, np.float64), *toy.examples(SIZE))
    gradient = flat_gradients(*setting)
    expected, norm = gradient @ gradient.T, np.linalg.norm(gradient, axis=1)
    errors = []
    for size in (NUM_NUMBERS, 16 * NUM_NUMBERS):
        sketches = of_seeds(setting, "factored", size)
        products = np.einsum("suk,svk->suv", sketches, sketches)
        errors.append(np.sqrt(np.mean(((products - expected) / np.outer(norm, norm)) ** 2)))
    assert 3.2 < errors[0] / errors[1] < 5  # √16 = 4.
    assert 0.7 < errors[1] * np.sqrt(16 * NUM_NUMBERS) < 1.5


@pytest.mark.parametrize(("engine", "num_classes"), [("factored", 100), ("vmap", 64)])
def test_few_classes_that_matter_do_not_meet(engine, num_classes):
    """Two of them, of elements that are all `size` apart in a kernel."""
    size, x = 64, np.abs(drawn(SIZE, 32)).astype(np.float32)
    bias = np.full(num_classes, -20, np.float32)
    bias[[0, 1 if num_classes == size else size]] = 0
    kernel = 0.01 * drawn(32, num_classes).astype(np.float32)
    model = Alone(nn.Dense(num_classes))
    variables = {"params": {"layer": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}}
    setting = model.apply, variables, x, np.zeros(SIZE, int)
    gradient = flat_gradients(*setting)
    with mock.patch.object(sketching, "folds", return_value=True):
        sketches = of_seeds(setting, engine, size)
    norm = np.linalg.norm(gradient, axis=1)
    products = np.einsum("suk,svk->suv", sketches, sketches)
    errors = (products - gradient @ gradient.T) / np.outer(norm, norm)
    cosines = gradient @ gradient.T / np.outer(norm, norm)
    promised = np.sqrt(np.mean(1 + cosines**2) / size)
    assert np.sqrt(np.mean(errors**2)) < 1.1 * promised


@pytest.mark.slow
def test_the_variance_of_projections_of_one_position():
    """The bound of `sketching`, less what signs spare: their fourth moment is 1, no normal's 3."""
    size, (a, e) = 64, (drawn(SIZE, 40), drawn(SIZE, 30))
    layer, x = Alone(nn.Dense(30, use_bias=False)), a.astype(np.float32)
    variables = {"params": {"layer": {"kernel": jnp.zeros((40, 30))}}}
    weights = jnp.asarray(e, jnp.float32)
    objective = lambda outputs: jnp.sum(outputs * weights)

    def sketches(x, key):
        of_layer = functools.partial(sketching.of_layer, key, size)
        return sum(factored.map_layers(of_layer, layer.apply, variables, x, objective))

    keys = jax.random.split(jax.random.key(0), 4 * NUM_SEEDS)
    with mock.patch.object(sketching, "folds", return_value=False):
        found = jax.jit(jax.vmap(sketches, (None, 0)))(x, keys)
    cosines = [part @ part.T / np.outer(*[np.linalg.norm(part, axis=1)] * 2) for part in (a, e)]
    squared = np.square(cosines)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(e, axis=1)
    products = np.einsum("suk,svk->suv", found, found) / np.outer(norms, norms)
    bound = (np.prod(1 + 2 * squared, axis=0) - np.prod(squared, axis=0)) / size
    shares = [part**2 / np.sum(part**2, axis=1, keepdims=True) for part in (a, e)]
    spared = 2 * np.array([share @ share.T for share in shares])
    exact = (np.prod(1 + 2 * squared - spared, axis=0) - np.prod(squared, axis=0)) / size
    assert np.all(exact < bound)
    ratio, same = np.var(products, axis=0) / exact, np.eye(SIZE, dtype=bool)
    for ratios in (ratio[same], ratio[~same]):
        np.testing.assert_allclose(np.mean(ratios), 1, atol=0.08)


@pytest.mark.parametrize("engine", ["factored", pytest.param("vmap", marks=pytest.mark.slow)])
def test_a_seed_is_a_map_of_each_example_alone(engine, float64):
    model, x, y = Alone(nn.Dense(3)), drawn(SIZE, 4), np.arange(SIZE) % 3
    apply, (variables, _) = model.apply, checks.variables_and_direction(model, x)
    sketch = functools.partial(gradients.sketch, apply, variables, size=NUM_NUMBERS, engine=engine)
    whole = sketch(x, y)
    assert whole.shape == (SIZE, NUM_NUMBERS)
    np.testing.assert_array_equal(sketch(x, y), whole)
    assert not np.allclose(sketch(x, y, seed=1), whole)
    seen = []
    parts = sketch(x, y, chunk_size=3, on_progress=lambda done, _: seen.append(done))
    assert seen == [3, 6, 7]
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-9)
    some = sketch(x[2:5], y[2:5], chunk_size=3)
    np.testing.assert_allclose(some, whole[2:5], rtol=1e-9, atol=1e-9)


def test_as_many_numbers_as_parameters_lose_nothing():
    gradient = jnp.asarray(drawn(SIZE, 40), jnp.float32)
    found = jax.jit(sketching.fold_formed, static_argnums=1)(jax.random.key(0), 40, gradient)
    np.testing.assert_allclose(found @ found.T, gradient @ gradient.T, rtol=1e-5, atol=1e-4)


def test_what_cannot_be_taken_apart_is_formed():
    x, model = drawn(5, 4).astype(np.float32), Shared()
    variables, _ = checks.variables_and_direction(model, x)
    with pytest.warns(UserWarning, match="called more than once.*using vmap"):
        found = gradients.sketch(model.apply, variables, x, size=8)
    np.testing.assert_array_equal(
        found, gradients.sketch(model.apply, variables, x, size=8, engine="vmap")
    )


def test_bad_arguments():
    model = toy.models()["cnn"]
    variables, (x, y) = toy.variables(model), toy.examples(3)
    with pytest.raises(dj.UserError, match="unknown engine 'warp'; choose from factored, vmap"):
        gradients.sketch(model.apply, variables, x, y, engine="warp")
    with pytest.raises(dj.UserError, match="the size of a sketch must be at least 1, got 0"):
        gradients.sketch(model.apply, variables, x, y, size=0)
    with pytest.raises(dj.UserError, match="labels must be integers"):
        gradients.sketch(model.apply, variables, x, y + 5)
    assert gradients.sketch(model.apply, variables, x[:0]).shape == (0, 512)
