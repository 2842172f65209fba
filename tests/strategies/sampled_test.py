"""Queries drawn in proportion to a power of the score."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import dynamical_jax as dj
from dynamical_jax import strategies
from dynamical_jax.strategies import selection

KEY = jax.random.key(0)
LOGITS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)


def identity(variables, x):
    return dj.Outputs(x, x)


def view_of(logits):
    return dj.LearnerView(identity, {}, dj.Examples(logits[:0], np.zeros(0, int)), logits)


class Given(strategies.Strategy):
    """Scores are the inputs."""

    def score(self, key, view, state):
        return view.unlabeled[:, 0]


def query_of_scores(scores, beta, batch_size, key=KEY):
    x = np.asarray(scores, np.float32)[:, None]
    return strategies.Sampled(Given(), beta).query(key, view_of(x), batch_size)


@functools.partial(jax.jit, static_argnames=("beta", "batch_size"))
def draws(keys, scores, beta, batch_size):
    one = lambda key: selection.top_b(selection.with_noise(key, scores, beta), batch_size)
    return jax.vmap(one)(keys)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
def test_ordered_pairs_come_with_the_probabilities_of_draws_without_replacement(beta):
    scores = np.array([0.2, 1.0, 1.5, 3.0], np.float32)
    odds = scores.astype(float) ** beta
    expected = {
        (i, j): odds[i] / odds.sum() * odds[j] / (odds.sum() - odds[i])
        for i, j in itertools.permutations(range(4), 2)
    }
    drawn = np.asarray(draws(jax.random.split(KEY, 4000), jnp.asarray(scores), beta, 2))
    counts = [np.sum(np.all(drawn == pair, axis=1)) for pair in expected]
    assert sum(counts) == 4000
    assert scipy.stats.chisquare(counts, 4000 * np.array([*expected.values()])).pvalue > 1e-3


def test_beta_zero_is_uniform_whatever_the_scores():
    scores = np.array([-1.0, 0.0, 1e-30, 1.0, 1e30], np.float32)
    drawn = draws(jax.random.split(KEY, 2000), jnp.asarray(scores), 0.0, 1)
    counts = np.bincount(np.asarray(drawn)[:, 0], minlength=5)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_beta_infinite_is_the_query_without_noise():
    scores = np.array([1.0, -2.0, 3.0, 3.0, 0.0], np.float32)
    query = query_of_scores(scores, math.inf, 5)
    assert query.positions.tolist() == [2, 3, 0, 4, 1]
    np.testing.assert_array_equal(query.scores, scores[query.positions])
    for beta, same in ((math.inf, True), (1.0, False)):
        of_margin = strategies.Margin().query(KEY, view_of(LOGITS), 20)
        power = strategies.power_margin(beta=beta).query(KEY, view_of(LOGITS), 20)
        assert np.array_equal(power.positions, of_margin.positions) == same


@pytest.mark.parametrize("beta", [0.01, 1.0, 4.0])
def test_scores_not_above_zero_come_last_the_larger_first(beta):
    scores = np.array([-3.0, 1e-30, -1.0, 2.0, 0.0, 1e-3], np.float32)
    for seed in range(20):
        query = query_of_scores(scores, beta, 6, jax.random.key(seed))
        assert set(query.positions[:3].tolist()) == {1, 3, 5}
        assert query.positions[3:].tolist() == [4, 2, 0]
        assert np.all(np.diff(query.scores) <= 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(dj.UserError, match="1 of 3 scores are not finite"):
        query_of_scores([1.0, bad, 2.0], 1.0, 2)


@pytest.mark.parametrize("make", [strategies.power_margin, strategies.dynamical_sampled])
@pytest.mark.parametrize("beta", [-1.0, math.nan])
def test_bad_beta(make, beta):
    with pytest.raises(dj.UserError, match="beta must be at least 0"):
        make(beta=beta)


def test_the_score_of_a_margin_is_one_minus_it():
    strategy = strategies.power_margin(beta=1.5)
    scored = strategy.score(KEY, view_of(LOGITS), None)
    top = -np.sort(-scipy.special.softmax(LOGITS.astype(float), axis=1), axis=1)
    expected = 1 - (top[:, 0] - top[:, 1])
    np.testing.assert_allclose(strategy.scores(scored.scored), expected, rtol=1e-5)
    _, key_noise = jax.random.split(KEY)
    noise = jax.random.gumbel(key_noise, (60,))
    np.testing.assert_allclose(scored.scores, 1.5 * np.log(expected) + noise, atol=1e-4)


def test_noise_follows_seed_and_round():
    # `Experiment` takes the key from the seed's stream of strategies, at the round.
    keys = [dj.streams.key(seed, "strategy", at) for seed in (0, 1) for at in (0, 1)]
    queries = [
        strategies.power_margin().query(key, view_of(LOGITS), 10).positions.tolist()
        for key in (*keys, keys[0])
    ]
    assert queries[0] == queries[4]
    assert len({tuple(query) for query in queries}) == 4


def test_needs_are_those_of_the_strategy_that_scores():
    assert not strategies.power_margin().needs_embedding
    assert strategies.Sampled(strategies.Badge()).needs_embedding


def test_scores_just_below_zero_keep_their_order():
    scores = jnp.array([-1e-9, -3e-9, -2e-9, -1e-3, 2, 1e-20])
    order = np.argsort(-np.asarray(selection.with_noise(jax.random.key(0), scores, 2.0)))
    assert order[2:].tolist() == [0, 2, 1, 3]
