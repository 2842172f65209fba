"""Losses other than the cross-entropy, of a linear model: its gradients are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax import gradients, losses, training

K, D, N = 3, 4, 6
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(N, D)).astype(np.float32)
PARAMS = {
    "kernel": GENERATOR.normal(size=(D, K)).astype(np.float32),
    "bias": GENERATOR.normal(size=K).astype(np.float32),
}
OUTPUTS = X @ PARAMS["kernel"] + PARAMS["bias"]
P = np.exp(OUTPUTS) / np.exp(OUTPUTS).sum(axis=1, keepdims=True)
CLASSES = np.arange(N) % K
MANY = (GENERATOR.uniform(size=(N, K)) < 0.5).astype(np.float32)
TARGETS = GENERATOR.normal(size=(N, K)).astype(np.float32)


apply = nn.Dense(K).apply


def smoothed(logits, label):
    return -jnp.sum(jax.nn.log_softmax(logits) * (0.9 * jax.nn.one_hot(label, K) + 0.1 / K))


def focal(logits, label):
    p = jax.nn.softmax(logits)[label]
    return -((1 - p) ** 2) * jnp.log(p)


def several(logits, target):
    return jnp.sum(jax.nn.softplus(logits) - target * logits)


def squared(outputs, target):
    return 0.5 * jnp.sum((outputs - target) ** 2)


def focal_residual(p, hot):
    p_y = np.sum(p * hot, axis=1, keepdims=True)
    slope = 2 * (1 - p_y) * np.log(p_y) - (1 - p_y) ** 2 / p_y
    return slope * p_y * (hot - p)


def above(logits):
    return (logits > 0).astype(logits.dtype)


HOT = np.eye(K, dtype=np.float32)[CLASSES]
LOSSES = {
    "cross-entropy": (losses.CROSS_ENTROPY, CLASSES, P - HOT, np.argmax(OUTPUTS, axis=1)),
    "label smoothing": (
        dj.Loss(smoothed),
        CLASSES,
        P - 0.9 * HOT - 0.1 / K,
        np.argmax(OUTPUTS, axis=1),
    ),
    "focal": (dj.Loss(focal), CLASSES, focal_residual(P, HOT), np.argmax(OUTPUTS, axis=1)),
    "several labels": (
        dj.Loss(several, above),
        MANY,
        1 / (1 + np.exp(-OUTPUTS)) - MANY,
        OUTPUTS > 0,
    ),
    "regression": (
        dj.Loss(squared, lambda outputs: outputs + 1),
        TARGETS,
        OUTPUTS - TARGETS,
        OUTPUTS + 1,
    ),
}


@pytest.mark.parametrize("engine", gradients.ENGINES)
@pytest.mark.parametrize(("loss", "y", "residual", "pseudo"), LOSSES.values(), ids=LOSSES)
def test_gradients(loss, y, residual, pseudo, engine):
    variables = {"params": PARAMS}
    ones = np.concatenate([X, np.ones((N, 1), np.float32)], axis=1)
    g_s = gradients.set_gradient(apply, variables, dj.Examples(X, y), loss=loss)
    np.testing.assert_allclose(g_s["kernel"], X.T @ residual, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g_s["bias"], residual.sum(axis=0), rtol=1e-4, atol=1e-5)

    terms = gradients.norms_and_products(
        apply, variables, X, g_s, labels=y, engine=engine, loss=loss
    )
    products = (residual @ residual.T) * (ones @ ones.T)
    np.testing.assert_allclose(terms.squared_norm, np.diag(products), rtol=1e-4)
    np.testing.assert_allclose(terms.inner_product, products.sum(axis=1), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(terms.label, y)
    found = gradients.gram(apply, variables, X, y, engine=engine, loss=loss)
    np.testing.assert_allclose(found, products, rtol=1e-4, atol=1e-4)

    at_none = gradients.norms_and_products(apply, variables, X, g_s, engine=engine, loss=loss)
    np.testing.assert_allclose(at_none.label, pseudo, rtol=1e-5)


def test_regression_is_trained_and_queried_by_its_own_loss():
    loss = LOSSES["regression"][0]
    model = dj.models.Linear(K)
    variables = dj.models.init(model, jax.random.key(0), X)
    config = training.TrainingConfig(
        learning_rate=0.1, max_epochs=400, target_accuracy=None, target_total_loss=1e-3, loss=loss
    )
    y = (X @ TARGETS[:D] + 1).astype(np.float32)
    fit = training.fit(model, variables, dj.Examples(X, y), config, seed=0)
    assert fit.converged
    np.testing.assert_allclose(model.apply(fit.variables, X).logits, y, atol=0.05)
    # At f + 1 the residual is one: the score is the NTK of an example with itself.
    pool = GENERATOR.normal(size=(9, D)).astype(np.float32)
    view = dj.LearnerView(model.apply, fit.variables, (X, y), pool)
    strategy = dj.strategies.Dynamical(gamma=0.0, loss=loss)
    query = strategy.query(jax.random.key(0), view, 3)
    expected = K * (np.sum(pool**2, axis=1) + 1)
    np.testing.assert_array_equal(query.positions, np.argsort(-expected)[:3])
    np.testing.assert_allclose(query.scores, np.sort(expected)[::-1][:3], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {**v, "extra": np.ones(3)}, r"extra is \(3,\) there, and missing in the par"),
        (lambda v: {"kernel": v["kernel"]}, "bias is missing there"),
        (lambda v: {**v, "bias": np.ones(9)}, r"bias is \(9,\) there, and \(3,\) in the param"),
    ],
)
def test_a_direction_unlike_the_parameters_is_refused(change, message):
    with pytest.raises(dj.UserError, match=message):
        gradients.norms_and_products(apply, {"params": PARAMS}, X, change(PARAMS))
    with pytest.raises(dj.UserError, match="6 inputs have 5 labels"):
        gradients.set_gradient(
            apply, {"params": PARAMS}, dj.Examples(X, TARGETS[:5]), loss=LOSSES["regression"][0]
        )
