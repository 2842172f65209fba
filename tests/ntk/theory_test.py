"""The theorems, on kernels of every kind, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynamical_jax as dj
from dynamical_jax import dynamics, ntk
from dynamical_jax.ntk import alignment, generalization, mmd

GENERATOR = np.random.default_rng(0)
N, K = 24, 3


def of_random_features():
    features = GENERATOR.normal(size=(N, 40))
    return features @ features.T / 40


def of_a_network():
    model = dj.models.NTKCNN(K, (16, 16))
    x = jnp.asarray(GENERATOR.normal(size=(N, 6, 6, 2)))
    drawn = model.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), drawn)
    return ntk.empirical_ntk(model.apply, variables, x)


KERNELS = [
    pytest.param(of_random_features, id="random features"),
    pytest.param(of_a_network, id="network", marks=pytest.mark.slow),
]


@pytest.fixture(params=KERNELS)
def kernel(request, float64):
    return request.param()


def targets():
    return np.eye(K)[GENERATOR.integers(0, K, N)] - 1 / K


def test_alignment_by_trace_and_by_eigenvectors(kernel):
    y = targets()
    eigenvalues, eigenvectors = alignment.spectrum(kernel)
    expected = sum(
        eigenvalues[i] * (eigenvectors[:, i] @ y[:, k]) ** 2 for i in range(N) for k in range(K)
    )
    assert alignment.alignment(kernel, y) == pytest.approx(expected)
    assert alignment.alignment(kernel, y) == pytest.approx(np.trace(y.T @ kernel @ y))


def test_convergence_term_is_gradient_descent(kernel):
    # f ← f − ηΘ(f − Y) from f = 0, step by step.
    y, of_kernel = targets(), alignment.spectrum(kernel)
    rate = 0.7 / of_kernel.eigenvalues[-1]
    f, errors = np.zeros_like(y), []
    for _ in range(20):
        errors.append(np.sum((y - f) ** 2))
        f -= rate * kernel @ (f - y)
    terms = alignment.squared_convergence_term(of_kernel, y, rate, np.arange(20.0))
    np.testing.assert_allclose(terms, errors, rtol=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_theorem_1(kernel, share):
    y, of_kernel = targets(), alignment.spectrum(kernel)
    rate, steps = share / of_kernel.eigenvalues[-1], np.array([1.0, 2, 5, 20, 100])
    terms = alignment.squared_convergence_term(of_kernel, y, rate, steps)
    lower, upper = alignment.convergence_bounds(of_kernel, y, rate, steps)
    assert np.all(lower <= terms + 1e-9)
    assert np.all(terms <= upper + 1e-9)
    # Of one step the lower bound misses Σ (ηλ)² c: tight where ηλ is small.
    missed = (rate * of_kernel.eigenvalues) ** 2 @ np.sum((of_kernel.eigenvectors.T @ y) ** 2, 1)
    assert terms[0] - lower[0] == pytest.approx(missed)


def test_theorem_1_says_what_it_needs(kernel):
    of_kernel = alignment.spectrum(kernel)
    most = of_kernel.eigenvalues[-1]
    with pytest.raises(dj.UserError, match="a learning rate of at most 1/λ_max"):
        alignment.convergence_bounds(of_kernel, targets(), 1.1 / most, np.array([1.0]))
    with pytest.raises(dj.UserError, match="t of at least 1, got 0"):
        alignment.convergence_bounds(of_kernel, targets(), 1 / most, np.array([1.0, 0.0]))
    indefinite = alignment.spectrum(kernel - 0.5 * most * np.eye(N))
    with pytest.raises(dj.UserError, match="eigenvalues of at least 0; the smallest is -"):
        alignment.convergence_bounds(indefinite, targets(), 1 / most, np.array([1.0]))


def test_theorem_2(kernel):
    y = targets()
    bound = generalization.generalization_bound(kernel, y)
    expected = np.sqrt(2 * np.trace(y.T @ np.linalg.inv(kernel) @ y) / N)
    assert bound == pytest.approx(expected, rel=1e-6)
    lower, upper = generalization.bounds_by_alignment(kernel, y)
    assert lower <= N / 2 * bound**2 <= upper
    total, aligned = np.sum(y**2), alignment.alignment(kernel, y)
    eigenvalues = np.linalg.eigvalsh(kernel)
    assert lower == pytest.approx(total**2 / aligned)
    assert upper == pytest.approx(eigenvalues[-1] / eigenvalues[0] * total**2 / aligned, rel=1e-5)


def test_theorem_2_is_tight_where_the_targets_are_an_eigenvector(kernel):
    of_kernel = alignment.spectrum(kernel)
    y = of_kernel.eigenvectors[:, [3]]
    bound = generalization.generalization_bound(kernel, y)
    lower, _ = generalization.bounds_by_alignment(kernel, y)
    assert N / 2 * bound**2 == pytest.approx(lower)


def test_scales_of_bound_and_mmd(kernel):
    # ℬ goes with Θ^(−1/2), MMD with Θ^(1/2).
    y = targets()
    one, four = (generalization.generalization_bound(c * kernel, y) for c in (1, 4))
    assert four == pytest.approx(one / 2)
    one, four = (mmd.squared_mmd(c * kernel, 7) for c in (1, 4))
    assert four == pytest.approx(4 * one)
    assert np.mean(np.diag(alignment.normalized(kernel))) == pytest.approx(1)


def test_a_singular_kernel_is_named_and_jitter_helps(kernel):
    twice = np.block([[kernel, kernel], [kernel, kernel]])
    y = np.concatenate([targets(), targets()])
    for function in (generalization.generalization_bound, generalization.bounds_by_alignment):
        with pytest.raises(dj.UserError, match=r"not positive definite: λ_min = .*e-1"):
            function(twice, y)
        function(twice, y, jitter=1e-3)
    jittered = twice + 1e-3 * np.mean(np.diag(twice)) * np.eye(2 * N)
    assert generalization.generalization_bound(twice, y, 1e-3) == pytest.approx(
        generalization.generalization_bound(jittered, y)
    )
    with pytest.raises(dj.UserError, match="λ_min = -"):
        generalization.generalization_bound(kernel - 2 * np.max(kernel) * np.eye(N), targets())
    with pytest.raises(dj.UserError, match="jitter must not be negative"):
        generalization.generalization_bound(kernel, targets(), jitter=-1.0)


def test_float32_kernels_are_judged_by_their_own_rounding():
    eigenvectors = np.linalg.qr(GENERATOR.normal(size=(N, N)))[0]
    kernel = eigenvectors @ np.diag(np.geomspace(1e-9, 1, N)) @ eigenvectors.T
    generalization.generalization_bound(kernel, targets())
    with pytest.raises(dj.UserError, match="not positive definite"):
        generalization.generalization_bound(kernel.astype(np.float32), targets())


def test_what_is_no_kernel():
    with pytest.raises(dj.UserError, match="not symmetric"):
        alignment.alignment(np.triu(np.ones((3, 3))), np.ones((3, 1)))
    with pytest.raises(dj.UserError, match="not finite"):
        alignment.alignment(np.full((3, 3), np.nan), np.ones((3, 1)))
    with pytest.raises(dj.UserError, match="targets are all zero"):
        generalization.bounds_by_alignment(np.eye(3), np.zeros((3, 1)))


def test_mmd_by_a_double_loop(kernel):
    m, n = 7, N
    a = sum(kernel[i, j] for i in range(m) for j in range(m) if i != j)
    b = sum(kernel[i, j] for i in range(n) for j in range(n) if i != j)
    c = sum(kernel[i, j] for i in range(m) for j in range(n) if i != j)
    expected = a / (m**2 - m) + b / (n**2 - n) - 2 * c / (m * (n - 1))
    assert mmd.squared_mmd(kernel, m) == pytest.approx(expected)


def test_mmd_is_unbiased():
    # Of Q from the distribution of S it is 0 on average; of Q moved by d in a linear kernel it is
    # ‖(1 − m/n) d‖² but for the pairs that S has in common with itself.
    generator, squares = np.random.default_rng(0), []
    for _ in range(2000):
        x = generator.normal(size=(20, 2))
        squares.append(mmd.squared_mmd(x @ x.T, 8))
    assert np.mean(squares) == pytest.approx(0, abs=3 * np.std(squares) / np.sqrt(2000))
    assert min(squares) < 0
    moved = x + np.array([5.0, 0]) * (np.arange(20) >= 8)[:, None]
    assert mmd.mmd(moved @ moved.T, 8) > 1


def test_a_negative_estimate_has_root_0():
    x = np.random.default_rng(1).normal(size=(20, 1))
    kernel = next(
        k for k in (np.roll(x, i) @ np.roll(x, i).T for i in range(20)) if mmd.squared_mmd(k, 8) < 0
    )
    assert mmd.mmd(kernel, 8) == 0
    for size in (1, 20):
        with pytest.raises(dj.UserError, match=rf"less than .* = 20, got {size}"):
            mmd.squared_mmd(kernel, size)


def test_squared_error_training_dynamics(float64):
    # With 𝒦 = Θ ⊗ I_K the definition of Eq. 8 is the trace.
    theta, residual = of_random_features(), GENERATOR.normal(size=(N, K))
    full = np.einsum("xy,ij->xyij", theta, np.eye(K))
    assert dynamics.squared_error_training_dynamics(theta, residual) == pytest.approx(
        float(dynamics.training_dynamics_from_kernel(full, residual))
    )


def test_singular_kernels_are_told_from_regular_ones():
    # Centred features: exactly one eigenvalue is 0, which comes out as ± rounding.
    for seed in range(20):
        features = np.random.default_rng(seed).normal(size=(50, 80))
        features = features - features.mean(axis=0)
        with pytest.raises(dj.UserError, match="not positive definite"):
            dj.generalization.generalization_bound(features @ features.T, np.ones((50, 1)))
