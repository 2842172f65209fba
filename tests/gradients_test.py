import jax
import numpy as np
import optax
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax import gradients

NAMES = list(toy.models())


def setting(name, size):
    model = toy.models()[name]
    return model.apply, toy.variables(model), toy.examples(size)


@pytest.mark.parametrize("name", NAMES)
def test_set_gradient_is_the_sum_of_gradients(name):
    apply, variables, examples = setting(name, 7)
    each = gradients.per_example_gradients(apply, variables, *examples)
    expected = jax.tree.map(lambda leaf: leaf.sum(axis=0), each)
    for chunk_size in (1, 3, 7, 16):
        gradient = gradients.set_gradient(apply, variables, examples, chunk_size)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", gradients.ENGINES)
def test_chunk_size_changes_nothing(name, engine):
    apply, variables, (x, y) = setting(name, 11)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    whole = gradients.norms_and_products(apply, variables, x, direction, engine=engine)
    for chunk_size in (1, 4, 11, 64):
        parts = gradients.norms_and_products(
            apply, variables, x, direction, engine=engine, chunk_size=chunk_size
        )
        np.testing.assert_array_equal(parts.label, whole.label)
        np.testing.assert_allclose(parts.squared_norm, whole.squared_norm, rtol=1e-5)
        np.testing.assert_allclose(parts.inner_product, whole.inner_product, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", gradients.ENGINES)
def test_score_does_not_depend_on_batch_mates(name, engine):
    apply, variables, (x, y) = setting(name, 6)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    others = np.concatenate([x[:1], toy.images(5, seed=9)])
    one, two = (
        gradients.norms_and_products(apply, variables, batch, direction, engine=engine)
        for batch in (x, others)
    )
    np.testing.assert_allclose(one.squared_norm[0], two.squared_norm[0], rtol=1e-5)
    np.testing.assert_allclose(one.inner_product[0], two.inner_product[0], rtol=1e-4)
    assert abs(one.squared_norm[1] - two.squared_norm[1]) > 1e-3  # The mates did differ.


def test_terms_from_the_gradients_themselves():
    apply, variables, (x, y) = setting("batch_norm", 5)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    terms = gradients.norms_and_products(apply, variables, x, direction, labels=y)
    for i in range(5):
        own = gradients.set_gradient(apply, variables, dj.Examples(x[i : i + 1], y[i : i + 1]))
        np.testing.assert_allclose(terms.squared_norm[i], optax.tree.norm(own) ** 2, rtol=1e-4)
        np.testing.assert_allclose(
            terms.inner_product[i], optax.tree.vdot(own, direction), rtol=1e-4
        )


def test_labels_are_the_predictions():
    apply, variables, (x, y) = setting("cnn", 8)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    predictions = np.argmax(apply(variables, x).logits, axis=-1)
    pseudo = gradients.norms_and_products(apply, variables, x, direction)
    given = gradients.norms_and_products(apply, variables, x, direction, labels=predictions)
    np.testing.assert_array_equal(pseudo.label, predictions)
    np.testing.assert_allclose(pseudo.squared_norm, given.squared_norm, rtol=1e-6)


def test_progress_and_empty_pool():
    apply, variables, (x, y) = setting("cnn", 5)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    seen = []
    gradients.norms_and_products(
        apply, variables, x, direction, chunk_size=2, on_progress=lambda *at: seen.append(at)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert gradients.norms_and_products(apply, variables, x[:0], direction).label.shape == (0,)


def test_unknown_engine():
    with pytest.raises(dj.UserError, match="unknown engine 'warp'; choose from factored, vmap"):
        gradients.norms_and_products(len, {}, np.zeros(1), None, engine="warp")


def test_default_chunk_size_keeps_to_its_budget():
    variables = {"params": {"w": np.zeros((1000, 1000), np.float32)}}  # 4 MB
    assert gradients.default_chunk_size(variables, budget_bytes=41_000_000) == 10
    assert gradients.default_chunk_size(variables, budget_bytes=1) == 1
