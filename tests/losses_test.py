import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import losses


def test_cross_entropy_is_minus_log_probability():
    logits = jax.random.normal(jax.random.key(0), (6, 4))
    labels = jnp.array([0, 1, 2, 3, 1, 0])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(probabilities[np.arange(6), labels])
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-5)


def test_residual_is_gradient_of_cross_entropy():
    logits = jax.random.normal(jax.random.key(0), (6, 4))
    labels = jnp.array([0, 1, 2, 3, 1, 0])
    gradient = jax.grad(lambda logits: losses.cross_entropy(logits, labels).sum())(logits)
    np.testing.assert_allclose(losses.residual(logits, labels), gradient, atol=1e-6)


def test_gradient_of_squared_error_is_the_difference():
    outputs, targets = jax.random.normal(jax.random.key(0), (2, 5, 3))
    gradient = jax.grad(lambda outputs: losses.squared_error(outputs, targets).sum())(outputs)
    np.testing.assert_allclose(gradient, outputs - targets, atol=1e-6)
