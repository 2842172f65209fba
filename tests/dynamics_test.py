import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax import dynamics, gradients, losses

NAMES = ["cnn", pytest.param("batch_norm", marks=pytest.mark.slow)]


def setting(name, size):
    model = toy.models()[name]
    return model.apply, toy.variables(model, np.float64), toy.examples(size)


def set_gradient(apply, variables, examples):
    return gradients.set_gradient(apply, variables, examples, chunk_size=4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("float64")
def test_kernel_form_equals_norm_of_gradient(name):
    # Eq. 8 by its definition, from Jacobians of the logits, against the square of one gradient.
    apply, variables, (x, y) = setting(name, 7)
    rest = {key: value for key, value in variables.items() if key != "params"}
    logits = jax.jit(apply)(variables, x).logits
    logits_of = lambda params: apply({"params": params, **rest}, x).logits
    jacobian = jax.jit(jax.jacrev(logits_of))(variables["params"])
    flat = jnp.concatenate([leaf.reshape(7, 3, -1) for leaf in jax.tree.leaves(jacobian)], axis=-1)
    ntk = jnp.einsum("xip,yjp->xyij", flat, flat)
    residual = losses.residual(logits, jnp.asarray(y))
    expected = dynamics.training_dynamics_from_kernel(ntk, residual)
    grad_s = set_gradient(apply, variables, dj.Examples(x, y))
    np.testing.assert_allclose(dynamics.training_dynamics(grad_s), expected, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("float64")
def test_change_is_difference_of_training_dynamics(name):
    apply, variables, (x, y) = setting(name, 9)
    labeled = dj.Examples(x[:5], y[:5])
    grad_s = set_gradient(apply, variables, labeled)
    terms = gradients.norms_and_products(apply, variables, x[5:], grad_s, labels=y[5:])
    changes = dynamics.change_of_training_dynamics(
        jnp.asarray(terms.squared_norm), jnp.asarray(terms.inner_product)
    )
    assert abs(changes).min() > 1e-3  # No example is so well fitted that there is nothing to see.
    for position, change in enumerate(changes):
        rows = [*range(5), 5 + position]
        joined = set_gradient(apply, variables, dj.Examples(x[rows], y[rows]))
        expected = dynamics.training_dynamics(joined) - dynamics.training_dynamics(grad_s)
        np.testing.assert_allclose(change, expected, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_change_by_set_and_approximation_ratio():
    # Eq. 13: what the sum of single changes misses is the sum over ordered pairs u ≠ u'.
    apply, variables, (x, y) = setting("cnn", 9)
    grad_s = set_gradient(apply, variables, dj.Examples(x[:5], y[:5]))
    grad_q = set_gradient(apply, variables, dj.Examples(x[5:], y[5:]))
    joined = set_gradient(apply, variables, dj.Examples(x, y))
    exact = dynamics.change_by_set(grad_q, grad_s)
    expected = dynamics.training_dynamics(joined) - dynamics.training_dynamics(grad_s)
    np.testing.assert_allclose(exact, expected, rtol=1e-9)

    single = [
        set_gradient(apply, variables, dj.Examples(x[i : i + 1], y[i : i + 1])) for i in range(5, 9)
    ]
    changes = jnp.stack([dynamics.change_by_set(gradient, grad_s) for gradient in single])
    flat = [jax.flatten_util.ravel_pytree(gradient)[0] for gradient in single]
    pairs = sum(flat[i] @ flat[j] for i in range(4) for j in range(4) if i != j)
    ratio = dynamics.approximation_ratio(changes, grad_q, grad_s)
    np.testing.assert_allclose(ratio, changes.sum() / (changes.sum() + pairs), rtol=1e-9)


def test_redundancy_by_pairs():
    # Of 5 gradients the fourth is near the first, the last near none; lengths do not count.
    g = np.array([[1.0, 0, 0], [0, 2, 0], [1, 1, 1], [5, 1, 0], [-1, 0, 0.1]])
    cosines = [
        np.dot(g[i], g[j]) / np.linalg.norm(g[i]) / np.linalg.norm(g[j])
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    np.testing.assert_allclose(dynamics.mean_cosine(g @ g.T), np.mean(cosines), rtol=1e-5)
    np.testing.assert_allclose(dynamics.near_copies(g @ g.T), 1 / 5)
    np.testing.assert_allclose(dynamics.near_copies(g @ g.T, cosine=0.5), 2 / 5)
    np.testing.assert_allclose(dynamics.near_copies(np.ones((4, 4))), 3 / 4)
    zero = np.zeros((3, 3))
    assert (dynamics.mean_cosine(zero), dynamics.near_copies(zero)) == (0, 0)


@pytest.mark.usefixtures("float64")
def test_ratio_of_a_single_example_is_one():
    apply, variables, (x, y) = setting("cnn", 4)
    grad_s = set_gradient(apply, variables, dj.Examples(x[:3], y[:3]))
    grad_q = set_gradient(apply, variables, dj.Examples(x[3:], y[3:]))
    changes = dynamics.change_by_set(grad_q, grad_s)[None]
    np.testing.assert_allclose(dynamics.approximation_ratio(changes, grad_q, grad_s), 1, rtol=1e-6)


def test_limits_of_gamma():
    norm, product = jnp.array([1.0, 4.0, 9.0]), jnp.array([0.5, -3.0, 0.1])
    change = dynamics.change_of_training_dynamics
    np.testing.assert_array_equal(change(norm, product, 0.0), norm)
    np.testing.assert_array_equal(change(norm, product, math.inf), product)
    # A large γ orders examples as the inner product does.
    order = jnp.argsort(change(norm, product, 1e6))
    np.testing.assert_array_equal(order, jnp.argsort(change(norm, product, math.inf)))
    np.testing.assert_allclose(change(norm, product, 1.0), norm + product)
