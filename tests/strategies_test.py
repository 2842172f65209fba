"""The contract of every strategy, and what each promises of its own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax import gradients, strategies
from dynamical_jax.types import Rows

NAMES = list(dj.STRATEGIES)
KEY = jax.random.key(0)


def make_view(size=20, seed=0, **fields):
    model = toy.models()["cnn"]
    given = {
        "apply": model.apply,
        "variables": toy.variables(model),
        "labeled": toy.examples(6, seed=seed + 50),
        "unlabeled": toy.images(size, seed=seed),
    }
    return dj.LearnerView(**{**given, **fields})


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    @pytest.mark.parametrize("batch_size", [1, 7, 20])
    def test_as_many_as_asked_for_and_none_twice(self, name, batch_size):
        query = dj.STRATEGIES[name]().query(KEY, make_view(), batch_size)
        assert query.positions.shape == query.scores.shape == (batch_size,)
        assert len(np.unique(query.positions)) == batch_size
        assert query.positions.min() >= 0
        assert query.positions.max() < 20
        assert np.isfinite(query.scores).all()

    def test_never_a_labeled_example(self, name):
        # Positions count in the unlabeled set, so that rows of the pool come out unlabeled.
        images = toy.images(30)
        pool = dj.pool.initial_pool(30, 18, np.random.default_rng(0))
        view = make_view(
            labeled=dj.Examples(images[pool.labeled], toy.labels(18)),
            unlabeled=Rows(images, pool.unlabeled),
        )
        query = dj.STRATEGIES[name]().query(KEY, view, 12)
        after, rows = pool.reveal(query.positions)
        assert not np.isin(rows, pool.labeled).any()
        assert len(after.unlabeled) == 0

    def test_same_key_same_query(self, name):
        one, two = (dj.STRATEGIES[name]().query(KEY, make_view(), 8) for _ in range(2))
        np.testing.assert_array_equal(one.positions, two.positions)
        np.testing.assert_array_equal(one.scores, two.scores)

    def test_identical_examples_are_not_chosen_twice(self, name):
        view = make_view(unlabeled=np.repeat(toy.images(2), 10, axis=0))
        query = dj.STRATEGIES[name]().query(KEY, view, 15)
        assert len(np.unique(query.positions)) == 15

    @pytest.mark.parametrize("batch_size", [0, -1, 21])
    def test_impossible_batch_sizes(self, name, batch_size):
        with pytest.raises(dj.UserError, match=rf"cannot query {batch_size} of 20 .* 1 and 20"):
            dj.STRATEGIES[name]().query(KEY, make_view(), batch_size)

    def test_pool_may_live_on_host_or_device(self, name):
        images = toy.images(20)
        pools = images, jnp.asarray(images), Rows(jnp.asarray(images), np.arange(20))
        queries = [dj.STRATEGIES[name]().query(KEY, make_view(unlabeled=x), 5) for x in pools]
        for query in queries[1:]:
            np.testing.assert_array_equal(query.positions, queries[0].positions)


def test_score_and_select_draw_separately():
    drawn = []

    class Drawing(dj.strategies.Random):
        def score(self, key, view, state):
            drawn.append(jax.random.uniform(key))
            return super().score(key, view, state)

        def select(self, key, scored, batch_size, state):
            drawn.append(jax.random.uniform(key))
            return super().select(key, scored, batch_size, state)

    query = Drawing().query(KEY, make_view(), 3)
    assert drawn[0] != drawn[1]
    assert set(query.seconds) == {"score", "select"}


def test_no_labels_of_the_pool_can_be_reached():
    fields = {field.name for field in dataclasses.fields(dj.LearnerView)}
    assert fields == {"apply", "variables", "labeled", "unlabeled", "on_progress"}


def test_unknown_strategy_lists_the_choices():
    with pytest.raises(
        dj.UserError, match="unknown strategy 'best'; choose from dynamical, random"
    ):
        strategies.create("best")


def test_non_finite_scores_are_refused():
    x = toy.images(20).astype(np.float32)
    x[3] = np.nan
    with pytest.raises(dj.UserError, match="1 of 20 scores are not finite"):
        dj.STRATEGIES["dynamical"]().query(KEY, make_view(unlabeled=x), 5)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, math.inf])
def test_dynamical_chooses_the_largest_change(gamma):
    # Against gradients of every example, formed and multiplied in NumPy.
    view = make_view()
    labels = np.argmax(view.apply(view.variables, view.unlabeled).logits, axis=1)
    each = gradients.per_example_gradients(view.apply, view.variables, view.unlabeled, labels)
    flat = np.concatenate([np.reshape(leaf, (20, -1)) for leaf in jax.tree.leaves(each)], axis=1)
    of_s = gradients.per_example_gradients(view.apply, view.variables, *view.labeled)
    grad_s = np.concatenate([np.sum(leaf, axis=0).ravel() for leaf in jax.tree.leaves(of_s)])
    norm, product = (flat**2).sum(axis=1), flat @ grad_s
    change = product if math.isinf(gamma) else norm + gamma * product

    query = strategies.Dynamical(gamma=gamma, chunk_size=6).query(KEY, view, 5)
    np.testing.assert_array_equal(query.positions, np.argsort(-change)[:5])
    np.testing.assert_allclose(query.scores, np.sort(change)[::-1][:5], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma must be at least 0"),
        ({"gamma": math.nan}, "gamma must be at least 0"),
        ({"engine": "warp"}, "unknown engine 'warp'; choose from"),
        ({"chunk_size": 0}, "chunk size must be at least 1"),
    ],
)
def test_bad_options_of_dynamical(options, message):
    with pytest.raises(dj.UserError, match=message):
        strategies.create("dynamical", **options)


def test_random_is_uniform():
    view = make_view(size=5)
    strategy = dj.STRATEGIES["random"]()
    chosen = [strategy.query(jax.random.key(i), view, 1).positions[0] for i in range(200)]
    counts = np.bincount(chosen, minlength=5)
    assert ((counts - 40) ** 2 / 40).sum() < 18.5  # the 99.9 % point of chi-square with 4 degrees
