"""The contract of every strategy, and what each promises of its own."""

import dataclasses
import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy

import dynamical_jax as dj
from dynamical_jax import gradients, strategies
from dynamical_jax.strategies import selection
from dynamical_jax.types import Rows

NAMES = list(dj.STRATEGIES)
KEY = jax.random.key(0)
# One program; operation by operation each would be compiled by itself.
per_example_gradients = jax.jit(gradients.per_example_gradients, static_argnums=0)


def make_view(size=20, seed=0, strategy=None, **fields):
    needs_dropout = strategy is not None and dj.STRATEGIES[strategy]().needs_dropout
    model = toy.with_dropout() if needs_dropout else toy.models()["cnn"]
    given = {
        "apply": model.apply,
        "variables": toy.variables(model),
        "labeled": toy.examples(6, seed=seed + 50),
        "unlabeled": toy.images(size, seed=seed),
    }
    return dj.LearnerView(**{**given, **fields})


@functools.cache
def strategy_of_the_docs():
    (block,) = [
        block for block in toy.python_blocks(toy.ROOT / "docs/extend.md") if "(dj.strat" in block
    ]
    names = {}
    exec(block, names)
    return names["Balanced"]


@pytest.mark.parametrize("name", NAMES)
def test_can_be_sent_to_other_processes(name):
    strategy = dj.STRATEGIES[name]()
    assert type(pickle.loads(pickle.dumps(strategy))) is type(strategy)


@pytest.mark.parametrize("name", [*NAMES, "of the docs"])
class TestContract:
    @pytest.fixture(autouse=True)
    def _add_strategy_of_the_docs(self, monkeypatch):
        monkeypatch.setitem(dj.STRATEGIES, "of the docs", strategy_of_the_docs())

    @pytest.mark.parametrize(
        "batch_size", [5, *[pytest.param(size, marks=pytest.mark.slow) for size in (1, 20)]]
    )
    def test_as_many_as_asked_for_and_none_twice(self, name, batch_size):
        query = dj.STRATEGIES[name]().query(KEY, make_view(strategy=name), batch_size)
        assert query.positions.shape == query.scores.shape == (batch_size,)
        assert len(np.unique(query.positions)) == batch_size
        assert query.positions.min() >= 0
        assert query.positions.max() < 20
        assert np.isfinite(query.scores).all()

    def test_never_a_labeled_example(self, name):
        # Positions count in the unlabeled set, so that rows of the pool come out unlabeled.
        images = toy.images(26)
        pool = dj.pool.initial_pool(26, 6, np.random.default_rng(0))
        view = make_view(
            strategy=name,
            labeled=dj.Examples(images[pool.labeled], toy.labels(6)),
            unlabeled=Rows(images, pool.unlabeled),
        )
        query = dj.STRATEGIES[name]().query(KEY, view, 20)
        after, rows = pool.reveal(query.positions)
        assert not np.isin(rows, pool.labeled).any()
        assert len(after.unlabeled) == 0

    def test_same_key_same_query(self, name):
        one, two = (dj.STRATEGIES[name]().query(KEY, make_view(strategy=name), 5) for _ in range(2))
        np.testing.assert_array_equal(one.positions, two.positions)
        np.testing.assert_array_equal(one.scores, two.scores)

    def test_identical_examples_are_not_chosen_twice(self, name):
        view = make_view(strategy=name, unlabeled=np.repeat(toy.images(2), 10, axis=0))
        query = dj.STRATEGIES[name]().query(KEY, view, 20)
        assert len(np.unique(query.positions)) == 20

    @pytest.mark.parametrize("batch_size", [0, -1, 21])
    def test_impossible_batch_sizes(self, name, batch_size):
        with pytest.raises(dj.UserError, match=rf"cannot query {batch_size} of 20 .* 1 and 20"):
            dj.STRATEGIES[name]().query(KEY, make_view(strategy=name), batch_size)

    def test_pool_may_live_on_host_or_device(self, name):
        images = toy.images(20)
        pools = images, jnp.asarray(images), Rows(jnp.asarray(images), np.arange(20))
        queries = [
            dj.STRATEGIES[name]().query(KEY, make_view(strategy=name, unlabeled=x), 5)
            for x in pools
        ]
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
    assert fields == {"apply", "variables", "labeled", "unlabeled", "on_progress", "mesh"}


def test_labels_must_be_as_many_as_inputs():
    with pytest.raises(dj.UserError, match="6 inputs and 4 labels"):
        make_view(labeled=dj.Examples(toy.images(6), toy.labels(4)))


def test_unknown_strategy_lists_the_choices():
    with pytest.raises(
        dj.UserError, match="unknown strategy 'best'; choose from dynamical, random, confidence"
    ):
        strategies.create("best")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_a_non_finite_input_is_no_query(name):
    x = toy.images(20).astype(np.float32)
    x[3] = np.nan
    with pytest.raises(dj.UserError, match=r"1 of 20 .* not finite"):
        dj.STRATEGIES[name]().query(KEY, make_view(strategy=name, unlabeled=x), 5)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, math.inf])
def test_dynamical_chooses_the_largest_change(gamma):
    # Against gradients of every example, formed and multiplied in NumPy.
    view = make_view()
    labels = np.argmax(toy.outputs(view.apply, view.variables, view.unlabeled).logits, axis=1)
    each = per_example_gradients(view.apply, view.variables, view.unlabeled, labels)
    flat = np.concatenate([np.reshape(leaf, (20, -1)) for leaf in jax.tree.leaves(each)], axis=1)
    of_s = per_example_gradients(view.apply, view.variables, *view.labeled)
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


def linear_view(logits, labeled=0, **fields):
    """A view of a learner whose logits, and embedding, are its inputs."""
    logits = np.asarray(logits, np.float32)
    return dj.LearnerView(
        **{
            "apply": identity,
            "variables": {},
            "labeled": dj.Examples(logits[:labeled], np.zeros(labeled, np.int32)),
            "unlabeled": logits,
            **fields,
        }
    )


def identity(variables, x):
    return dj.Outputs(x, x)


LOGITS = np.random.default_rng(0).normal(size=(300, 6)) * np.geomspace(0.1, 100, 300)[:, None]


def probabilities(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.sort(shifted / shifted.sum(axis=1, keepdims=True), axis=1)[:, ::-1]


UNCERTAINTIES = {
    "confidence": lambda p: -np.log(p[:, 0]),
    "margin": lambda p: np.log((1 - p[:, 0] + p[:, 1]) / (p[:, 0] - p[:, 1])),
    "entropy": lambda p: -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=1),
}


@pytest.mark.parametrize("name", UNCERTAINTIES)
class TestUncertainty:
    def test_against_probabilities_in_float64(self, name):
        expected = UNCERTAINTIES[name](probabilities(LOGITS.astype(np.float32).astype(np.float64)))
        query = dj.STRATEGIES[name]().query(KEY, linear_view(LOGITS), 100)
        np.testing.assert_allclose(query.scores, np.sort(expected)[::-1][:100], rtol=1e-4)
        np.testing.assert_allclose(expected[query.positions], query.scores, rtol=1e-4)

    def test_certain_examples_are_finite_and_last(self, name):
        logits = np.array([[1e30, 0, 0], [0, 1, 0], [0, -1e4, 1e4], [0, 0, 0]])
        query = dj.STRATEGIES[name]().query(KEY, linear_view(logits), 4)
        assert query.positions.tolist()[:2] == [3, 1]
        assert np.isfinite(query.scores).all()

    def test_order_among_certain_examples(self, name):
        # Probabilities of 1 − 10⁻⁸ and above, which float32 does not tell from 1.
        logits = np.array([[gap, 0.0, 0.0] for gap in (40, 30, 25, 20, 18)])
        query = dj.STRATEGIES[name]().query(KEY, linear_view(logits), 5)
        assert query.positions.tolist() == [4, 3, 2, 1, 0]

    def test_order_among_equally_probable_classes(self, name):
        logits = np.array([[gap, 0.0] for gap in (4e-3, 3e-3, 2e-3, 0)])
        query = dj.STRATEGIES[name]().query(KEY, linear_view(logits), 4)
        assert query.positions.tolist() == [3, 2, 1, 0]


def test_coreset_is_farthest_first_from_the_labeled_set():
    view = linear_view(LOGITS[40:], labeled=0)
    view = dataclasses.replace(view, labeled=dj.Examples(LOGITS[:40], np.zeros(40, np.int32)))
    query = dj.STRATEGIES["coreset"]().query(KEY, view, 30)
    taken, expected = list(range(40)), []
    for _ in range(30):
        distance = np.linalg.norm(LOGITS[:, None] - LOGITS[taken][None], axis=-1).min(axis=1)
        taken.append(int(np.argmax(distance)))
        expected.append(taken[-1] - 40)
    np.testing.assert_array_equal(query.positions, expected)


def split(variables, x):
    """Three logits and the embedding beside them, so that one is not taken for the other."""
    return dj.Outputs(x[:, :3], x[:, 3:])


def test_coreset_looks_at_the_embedding_and_badge_seeds():
    view = linear_view(LOGITS, labeled=40, apply=split)
    query = strategies.Coreset().query(KEY, view, 20)
    embedding = LOGITS[:, 3:].astype(np.float32)
    expected, _ = selection.farthest_first(embedding, embedding[:40], 20)
    np.testing.assert_array_equal(query.positions, expected)

    query = strategies.Badge().query(KEY, view, 20)
    factors = strategies.Badge().score(KEY, view, None)
    _, key_select = jax.random.split(KEY)
    expected, distances = selection.k_means_plus_plus(key_select, *factors[:2], 20)
    np.testing.assert_array_equal(query.positions, expected)
    np.testing.assert_array_equal(query.scores, distances)


@pytest.mark.parametrize("name", ["coreset", "badge"])
def test_half_precision_is_wide_enough(name):
    # Squares of these overflow in float16.
    x = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float16) * np.float16(20)
    queries = []
    for dtype in (np.float16, np.float32):
        apply = lambda variables, x, dtype=dtype: split(variables, jnp.asarray(x, dtype))
        view = linear_view(x, labeled=5, apply=apply)
        queries.append(dj.STRATEGIES[name]().query(KEY, view, 10))
    np.testing.assert_array_equal(queries[0].positions, queries[1].positions)


@pytest.mark.parametrize("name", ["coreset", "badge"])
def test_distances_that_overflow_are_no_query(name):
    view = linear_view(np.float32(1e25) * LOGITS.astype(np.float32), labeled=5, apply=split)
    with pytest.raises(dj.UserError, match="scores are not finite"):
        dj.STRATEGIES[name]().query(KEY, view, 10)


def test_coreset_without_labels_ends():
    query = dj.STRATEGIES["coreset"]().query(KEY, linear_view(LOGITS, labeled=0), 300)
    assert len(np.unique(query.positions)) == 300
    center = np.linalg.norm(LOGITS - LOGITS.mean(axis=0), axis=1)
    assert query.positions[0] == np.argmin(center)


def test_badge_seeds_with_gradients_of_the_last_layer():
    # The gradient of the loss at the pseudo-label in the last layer's kernel, by autodiff.
    model = toy.models()["cnn"]
    view = make_view()
    factors = strategies.Badge().score(KEY, view, None)
    labels = np.argmax(toy.outputs(view.apply, view.variables, view.unlabeled).logits, axis=1)
    each = per_example_gradients(model.apply, view.variables, view.unlabeled, labels)
    (last,) = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(each)
        if leaf.shape[1:] == (factors.embedding.shape[1], toy.NUM_CLASSES)
    ]
    formed = np.einsum("nk,nd->ndk", factors.residual, factors.embedding)
    np.testing.assert_allclose(formed, last, rtol=1e-4, atol=1e-5)


class TestALBL:
    def test_two_rounds_by_hand(self):
        strategy = strategies.ALBL()
        state = strategy.init()
        np.testing.assert_allclose(strategy.probabilities(state), [0.5, 0.5])
        # K = 2, p_min = 0.05, √(ln(2/0.1)/2) = 1.22387. Arm 0 was right on 0.8 of its query:
        # gains 0.025 (0.8/0.5 + 1.22387/0.5) = 0.101194 and 0.025 · 1.22387/0.5 = 0.061194.
        state = strategy.reward_last_arm(state._replace(arm=np.array(0)), 0.8)
        np.testing.assert_allclose(state.weights, [0.101194, 0.061194], atol=1e-6)
        # p_0 = 0.9 / (1 + e^−0.04) + 0.05 = 0.508999. Then arm 1, right on half of its query:
        # gains 0.025 · 1.22387/0.508999 and 0.025 (0.5 + 1.22387) / 0.491001.
        np.testing.assert_allclose(strategy.probabilities(state), [0.508999, 0.491001], atol=1e-6)
        state = strategy.reward_last_arm(state._replace(arm=np.array(1)), 0.5)
        np.testing.assert_allclose(state.weights, [0.161305, 0.148967], atol=1e-5)

    def test_each_query_is_that_of_one_arm(self):
        view = make_view()
        arms = {name: dj.STRATEGIES[name]() for name in ("coreset", "confidence")}
        alone = [set(arm.query(KEY, view, 6).positions.tolist()) for arm in arms.values()]
        assert alone[0] != alone[1]
        drawn = []
        for seed in range(12):
            query = strategies.ALBL(arms).query(jax.random.key(seed), view, 6)
            assert set(query.positions.tolist()) == alone[query.state.arm]
            drawn.append(int(query.state.arm))
        assert set(drawn) == {0, 1}

    def test_reward_is_accuracy_on_the_last_query(self):
        # Of five labeled examples the last four were the query; the learner is right on three.
        labeled = dj.Examples(
            np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2]], np.array([1, 0, 1, 2, 0])
        )
        view = linear_view(LOGITS[:20, :3], labeled=0)
        view = dataclasses.replace(view, labeled=labeled)
        strategy = strategies.ALBL()
        state = strategy.init()._replace(arm=np.array(1), batch_size=np.array(4))
        query = strategy.query(KEY, view, 4, state)
        np.testing.assert_array_equal(
            query.state.weights, strategy.reward_last_arm(state, 0.75).weights
        )
        assert query.state.batch_size == 4

    def test_no_arm_dies_out(self):
        strategy = strategies.ALBL()
        state = strategy.init()._replace(weights=np.array([0.0, -1e6]))
        np.testing.assert_allclose(strategy.probabilities(state), [0.95, 0.05])

    def test_arms_are_drawn_by_their_probabilities(self):
        strategy = strategies.ALBL({"a": strategies.Random(), "b": strategies.Random()})
        state = strategy.init()._replace(weights=np.log([4.0, 1.0]))
        view = linear_view(LOGITS)
        keys = jax.random.split(KEY, 300)
        drawn = [int(strategy.score(key, view, state)[0].arm) for key in keys]
        expected = 300 * strategy.probabilities(state)
        np.testing.assert_allclose(expected, [231, 69])
        assert scipy.stats.chisquare(np.bincount(drawn), expected).pvalue > 1e-3

    def test_bad_options(self):
        for least in (0.6, 0.0):
            with pytest.raises(dj.UserError, match=rf"above 0 and at most 1/2, got {least}"):
                strategies.ALBL(minimum_probability=least)
        with pytest.raises(dj.UserError, match="delta must be between 0 and 1, got 5"):
            strategies.ALBL(delta=5.0)
        with pytest.raises(dj.UserError, match="at least one arm"):
            strategies.ALBL({})
        with pytest.raises(dj.UserError, match="cannot keep a state"):
            strategies.ALBL({"albl": strategies.ALBL()})


class TestWhatDynamicalSaysOfItsQuery:
    @pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, np.inf])
    def test_share_and_ratio_by_definition(self, gamma, float64, recwarn):
        model = toy.models()["cnn"]
        variables = toy.variables(model, np.float64)
        labeled, unlabeled = toy.examples(5), toy.images(12, seed=7).astype(np.float64)
        view = strategies.LearnerView(model.apply, variables, labeled, unlabeled)
        query = strategies.Dynamical(gamma).query(KEY, view, 4)

        chosen = unlabeled[query.positions]
        labels = np.argmax(toy.outputs(model.apply, variables, chosen).logits, axis=1)

        def flat(x, y):
            trees = per_example_gradients(model.apply, variables, x, y)
            return np.concatenate([np.reshape(g, (len(y), -1)) for g in jax.tree.leaves(trees)], 1)

        g_s, g_u = flat(*labeled).sum(axis=0), flat(chosen, labels)
        norms, products = (g_u**2).sum(axis=1), g_u @ g_s
        # G of sets: the definition, Eq. 11, with γ = 2 whatever was taken to choose.
        change = lambda g: (g + g_s) @ (g + g_s) - g_s @ g_s
        ratio = sum(change(g) for g in g_u) / change(g_u.sum(axis=0))
        weighed = 2 * np.abs(products)
        share = weighed.sum() / (norms.sum() + weighed.sum())
        assert set(query.facts) == {"inner_product_share", "approximation_ratio"}
        np.testing.assert_allclose(query.facts["inner_product_share"], share, rtol=1e-9)
        np.testing.assert_allclose(query.facts["approximation_ratio"], ratio, rtol=1e-9)
        # One line where g_S decides, and none where it was asked for.
        told = [str(warning.message) for warning in recwarn]
        assert bool(told) == (share > 0.5 and 0 < gamma < np.inf)
        assert all(f"makes up {share:.0%} of the chosen Δ" in line for line in told)

    def test_others_have_nothing_to_say(self):
        assert strategies.Margin().query(KEY, make_view(), 3).facts == {}

    def test_where_no_gradient_is_left_there_is_nothing_to_share(self):
        model = dj.models.Linear(2)
        variables = {"params": {"fc": {"kernel": 500 * jnp.eye(2), "bias": jnp.zeros(2)}}}
        x = np.float32([[1, 0], [0, 1], [2, 0], [0, 3]])  # Their residuals are 0 in float32.
        view = strategies.LearnerView(model.apply, variables, dj.Examples(x[:2], np.arange(2)), x)
        query = strategies.Dynamical().query(KEY, view, 2)
        assert query.facts == {"inner_product_share": 0.0, "approximation_ratio": None}
