import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    gradient = jax.jit(jax.grad(lambda logits: losses.cross_entropy(logits, labels).sum()))(logits)
    np.testing.assert_allclose(losses.residual(logits, labels), gradient, atol=1e-6)


def test_gradient_of_squared_error_is_the_difference():
    outputs, targets = jax.random.normal(jax.random.key(0), (2, 5, 3))
    gradient = jax.jit(jax.grad(lambda outputs: losses.squared_error(outputs, targets).sum()))(
        outputs
    )
    np.testing.assert_allclose(gradient, outputs - targets, atol=1e-6)


CERTAIN = np.array([[0, 1, 2, m] for m in range(3, 14)])  # p of the last is 0.67 to 0.99998.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("label", [2, 3])
def test_half_precision_keeps_what_is_left_to_one(dtype, label):
    logits, labels = jnp.asarray(CERTAIN, dtype), np.full(len(CERTAIN), label)
    probabilities = np.exp(CERTAIN - np.log(np.exp(CERTAIN).sum(axis=1, keepdims=True)))  # float64
    assert 0.99 < probabilities[5, 3] < 0.997 < probabilities[6, 3]
    loss, residual = losses.cross_entropy(logits, labels), losses.residual(logits, labels)
    np.testing.assert_allclose(loss, -np.log(probabilities[:, label]), rtol=2e-2)
    np.testing.assert_allclose(residual, probabilities - np.eye(4)[labels], rtol=2e-2)
    assert loss.dtype == residual.dtype == jnp.float32
    gradient = jax.jit(jax.grad(lambda logits: losses.cross_entropy(logits, labels).sum()))(logits)
    assert gradient.dtype == dtype  # Rounded, but no more than once.
    np.testing.assert_allclose(
        gradient.astype(np.float32), residual, rtol=float(jnp.finfo(dtype).eps), atol=1e-7
    )


@pytest.mark.usefixtures("float64")
def test_double_precision_stays():
    labels = np.full(len(CERTAIN), 3)
    probabilities = np.exp(CERTAIN - np.log(np.exp(CERTAIN).sum(axis=1, keepdims=True)))
    for logits in (CERTAIN.astype(float), jnp.asarray(CERTAIN, float)):
        loss, residual = losses.cross_entropy(logits, labels), losses.residual(logits, labels)
        assert loss.dtype == residual.dtype == jnp.float64
        np.testing.assert_allclose(loss, -np.log(probabilities[:, 3]), rtol=1e-9)
        np.testing.assert_allclose(residual, probabilities - np.eye(4)[labels], atol=1e-15)


def test_residual_is_at_most_root_two_times_the_loss(float64):
    # So that the total loss bounds g_S, which is why training stops by it (docs/convergence.md).
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2000, 5)) * generator.exponential(5, size=(2000, 1))
    labels = generator.integers(0, 5, 2000)
    norms = np.linalg.norm(losses.residual(logits, labels), axis=1)
    bound = np.sqrt(2) * np.asarray(losses.cross_entropy(logits, labels))
    assert np.all(norms <= bound * (1 + 1e-12) + 1e-15)
    assert np.max(norms / bound) > 0.9  # And no smaller factor would do.
