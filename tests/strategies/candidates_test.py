"""Queries whose examples look at each other, against gradients formed and multiplied in NumPy."""

import math

import jax
import numpy as np
import pytest
import scipy.stats
import toy

import dynamical_jax as dj
from dynamical_jax import dynamics, gradients, strategies
from dynamical_jax.strategies import selection

KEY = jax.random.key(0)
SIZE = 24


@pytest.fixture
def view(float64):
    model = toy.models()["cnn"]
    variables = toy.variables(model, np.float64)
    return strategies.LearnerView(model.apply, variables, toy.examples(6), toy.images(SIZE, seed=5))


def flat_gradients(view):
    """Of the unlabeled examples at their pseudo-labels, and of S."""
    labels = np.argmax(toy.outputs(view.apply, view.variables, view.unlabeled).logits, axis=1)

    def flat(x, y):
        # As one program: operation by operation each one is compiled by itself.
        formed = jax.jit(gradients.per_example_gradients, static_argnums=0)
        trees = formed(view.apply, view.variables, x, y)
        return np.concatenate([np.reshape(g, (len(y), -1)) for g in jax.tree.leaves(trees)], 1)

    return flat(view.unlabeled, labels), flat(*view.labeled).sum(axis=0), labels


VARIANTS = {
    "joint": strategies.DynamicalJoint,
    "diverse": strategies.DynamicalDiverse,
    "repelled": strategies.DynamicalRepelled,
}


@pytest.mark.parametrize("kind", VARIANTS.values(), ids=VARIANTS)
def test_a_query_of_one_is_that_of_dynamical(view, kind):
    one, other = (strategy().query(KEY, view, 1) for strategy in (kind, strategies.Dynamical))
    np.testing.assert_array_equal(one.positions, other.positions)
    np.testing.assert_allclose(one.scores, other.scores)


class TestJoint:
    @pytest.mark.parametrize("gamma", [0.0, 2.0])
    def test_each_choice_lets_the_exact_change_grow_most(self, view, gamma):
        g, g_s, _ = flat_gradients(view)
        value = lambda q: (total := g[q].sum(axis=0)) @ total + gamma * total @ g_s
        chosen, gains = [], []
        for _ in range(6):
            rest = [u for u in range(SIZE) if u not in chosen]
            best = max(rest, key=lambda u: value([*chosen, u]))
            gains.append(value([*chosen, best]) - value(chosen))
            chosen.append(best)
        query = strategies.DynamicalJoint(gamma).query(KEY, view, 6)
        np.testing.assert_array_equal(query.positions, chosen)
        np.testing.assert_allclose(query.scores, gains, rtol=1e-9)

    @pytest.mark.slow  # Each gain is compared above.
    def test_gains_sum_to_the_change_by_the_set(self, view):
        query = strategies.DynamicalJoint(chunk_size=5).query(KEY, view, 7)
        _, _, labels = flat_gradients(view)
        of_set = lambda x, y: gradients.set_gradient(view.apply, view.variables, dj.Examples(x, y))
        grad_q = of_set(view.unlabeled[query.positions], labels[query.positions])
        change = dynamics.change_by_set(grad_q, of_set(*view.labeled))
        np.testing.assert_allclose(query.scores.sum(), change, rtol=1e-9)
        # What the records say of it is R of this very query.
        alone = strategies.Dynamical().score(KEY, view, None).change[query.positions]
        ratio = alone.sum() / query.scores.sum()
        np.testing.assert_allclose(query.facts["approximation_ratio"], ratio, rtol=1e-9)

    def test_candidates_are_the_best_alone(self, view):
        alone = strategies.Dynamical().query(KEY, view, 5).positions
        query = strategies.DynamicalJoint(num_candidates=5).query(KEY, view, 5)
        assert set(query.positions.tolist()) == set(alone.tolist())
        with pytest.raises(dj.UserError, match="cannot query 6 of 5 candidates"):
            strategies.DynamicalJoint(num_candidates=5).query(KEY, view, 6)


class TestDiverse:
    def test_draws_have_the_exact_probabilities(self, view):
        g, g_s, _ = flat_gradients(view)
        change = (g**2).sum(axis=1) + 2 * g @ g_s
        top = np.argsort(-change)[:6]
        apart = ((g[top][:, None] - g[top][None]) ** 2).sum(axis=-1)
        odds = np.maximum(change[top], 0) * apart[0]
        strategy = strategies.DynamicalDiverse(num_candidates=6)
        scored = strategy.score(KEY, view, None)
        products = gradients.gram(view.apply, view.variables, view.unlabeled[top])
        np.testing.assert_allclose(np.diag(products), (g[top] ** 2).sum(axis=1), rtol=1e-9)
        weights = np.maximum(scored.change[top], 0)
        draw = lambda key: selection.weighted_k_means_plus_plus(key, products, weights, 2)
        keys = jax.random.split(KEY, 600)
        drawn = np.asarray(jax.vmap(draw)(keys))
        for i in range(5):
            chosen, change_of_chosen = strategy.choose(keys[i], scored.change[top], products, 2)
            np.testing.assert_array_equal(chosen, drawn[i])
            np.testing.assert_allclose(change_of_chosen, change[top][drawn[i]], rtol=1e-9)
        assert np.all(drawn[:, 0] == 0)
        counts = np.bincount(drawn[:, 1], minlength=6)
        possible = odds > 0
        assert counts[~possible].sum() == 0
        expected = 600 * odds[possible] / odds.sum()
        assert scipy.stats.chisquare(counts[possible], expected).pvalue > 1e-3

    @pytest.mark.slow  # 3 s; sketch_test.py has the products.
    def test_a_large_sketch_of_the_pool_draws_as_the_exact_products_do(self, view):
        strategy = strategies.DynamicalDiverse(sketch_size=2**14)
        change = np.maximum(strategy.score(KEY, view, None).change, 0)
        g, _, _ = flat_gradients(view)
        for key in jax.random.split(KEY, 3):
            key_draw, _ = jax.random.split(jax.random.split(key)[1])
            expected = selection.weighted_k_means_plus_plus(key_draw, g @ g.T, change, 6)
            query = strategy.query(key, view, 6)
            np.testing.assert_array_equal(query.positions, expected)
            np.testing.assert_allclose(query.scores, change[query.positions], rtol=1e-9)

    def test_distances_are_to_the_nearest(self):
        # Of three places the copies come last: 0 and 1 at one, 2 and 3 at another.
        points = np.array([[3.0, 0], [3, 0], [0, 2], [0, 2], [-1, -1]])
        weights = np.array([5.0, 4, 3, 2, 1])
        for key in jax.random.split(KEY, 10):
            chosen = selection.weighted_k_means_plus_plus(key, points @ points.T, weights, 5)
            assert chosen[0] == 0
            assert sorted(map(tuple, points[np.asarray(chosen[:3])])) == [(-1, -1), (0, 2), (3, 0)]
            assert sorted(chosen.tolist()) == list(range(5))

    def test_weight_zero_comes_last(self):
        points = np.diag([1.0, 2, 3, 4])
        for seed in range(10):
            chosen = selection.weighted_k_means_plus_plus(
                jax.random.key(seed), points @ points.T, np.array([1.0, 0, 2, 0]), 4
            )
            assert chosen[:2].tolist() == [2, 0]


class TestRepelled:
    @pytest.mark.parametrize("block_size", [pytest.param(1, marks=pytest.mark.slow), 3, 4])
    def test_by_definition(self, view, block_size):
        g, g_s, _ = flat_gradients(view)
        change = (g**2).sum(axis=1) + 2 * g @ g_s
        chosen, scores = [], []
        while len(chosen) < 8:
            order = [u for u in np.argsort(-change) if u not in chosen]
            block = order[: min(block_size, 8 - len(chosen))]
            chosen += block
            scores += change[block].tolist()
            change = change - g @ g[block].sum(axis=0)
        query = strategies.DynamicalRepelled(block_size=block_size).query(KEY, view, 8)
        np.testing.assert_array_equal(query.positions, chosen)
        np.testing.assert_allclose(query.scores, scores, rtol=1e-8, atol=1e-9)

    def test_a_block_as_large_as_the_query_is_dynamical(self, view):
        alone = strategies.Dynamical().query(KEY, view, 8)
        for block_size in (8, 100):
            query = strategies.DynamicalRepelled(block_size=block_size).query(KEY, view, 8)
            np.testing.assert_array_equal(query.positions, alone.positions)
            np.testing.assert_array_equal(query.scores, alone.scores)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dynamical_joint", {"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ("dynamical_joint", {"gamma": math.inf}, "gamma must be finite"),
        ("dynamical_diverse", {"gamma": -1.0}, "gamma must be at least 0"),
        ("dynamical_diverse", {"sketch_size": 0}, "sketch_size must be at least 1, got 0"),
        ("dynamical_diverse", {"sketch_size": 9, "num_candidates": 9}, "give no num_candidates"),
        ("dynamical_repelled", {"block_size": 0}, "block_size must be at least 1, got 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(dj.UserError, match=message):
        strategies.create(name, **options)
