"""BALD and BatchBALD, with every joint distribution of labels written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax import strategies
from dynamical_jax.strategies import dropout

KEY = jax.random.key(0)
T, K = 4, 3


def draw_log_p(size, networks=T, spread=2.0, seed=0):
    logits = np.random.default_rng(seed).normal(size=(size, networks, K)) * spread
    return np.asarray(jax.nn.log_softmax(logits), np.float32)


def entropy(p):
    return -np.sum(p * np.log(np.maximum(p, 1e-300)))


def information(p):
    """Of labels of the examples p `[b, t, K]` together and the network: all ways of labels."""
    joint = [
        np.mean(np.prod([p[i, :, label] for i, label in enumerate(labels)], axis=0))
        for labels in itertools.product(range(K), repeat=len(p))
    ]
    return entropy(np.array(joint)) - np.mean([[entropy(q) for q in each] for each in p], 1).sum()


def test_bald_against_entropies():
    log_p = draw_log_p(30)
    expected = [information(np.exp(each.astype(float))[None]) for each in log_p]
    score = strategies.bald.mutual_information(jnp.asarray(log_p))
    np.testing.assert_allclose(score, expected, atol=1e-6)


def test_batch_bald_is_greedy_on_the_joint_distribution():
    log_p = jnp.asarray(draw_log_p(30))
    query = strategies.BatchBald().select(KEY, log_p, 6, None)  # 3⁵ ways before the last choice.
    chosen, before = [], 0.0
    for position, score in zip(query.positions, query.scores, strict=True):
        left = [i for i in range(30) if i not in chosen]
        after = [information(np.exp(np.array(log_p)[[*chosen, i]].astype(float))) for i in left]
        np.testing.assert_allclose(after[left.index(position)] - before, max(after) - before, 1e-3)
        np.testing.assert_allclose(score, max(after) - before, atol=1e-5)
        chosen.append(int(position))
        before = max(after)
    # The largest scores by themselves are not the query.
    alone = np.argsort(-strategies.bald.mutual_information(jnp.asarray(log_p)))[:6]
    assert set(alone.tolist()) != set(chosen)


def test_drawn_ways_estimate_the_joint_distribution():
    log_p = draw_log_p(12, spread=1.0)
    drawn, exact = (
        strategies.batch_bald.Joint(T, limit, np.random.default_rng(0)) for limit in (4_000, 3**8)
    )
    for each in log_p[:8]:
        drawn.add(each)
        exact.add(each)
    assert drawn._networks is not None
    assert exact._networks is None
    gains = [strategies.batch_bald._gains(log_p[8:], *of.configurations) for of in (drawn, exact)]
    np.testing.assert_allclose(gains[0], gains[1], rtol=0.1, atol=0.005)


def test_draws_are_unbiased_where_networks_draw_unequally_often():
    # Six draws by four networks: two of them draw twice.
    log_p = draw_log_p(7, spread=2.5)
    p = np.exp(log_p.astype(float))
    estimates = []
    for seed in range(400):
        joint = strategies.batch_bald.Joint(T, 6, np.random.default_rng(seed))
        for each in log_p[:4]:
            joint.add(each)
        estimates.append(strategies.batch_bald._gains(log_p[4:], *joint.configurations))
    before = information(p[:4])
    exact = [information(p[[0, 1, 2, 3, i]]) - before for i in (4, 5, 6)]
    error = np.mean(estimates, axis=0) - exact
    assert np.all(np.abs(error) < 4 * np.std(estimates, axis=0) / 20), error


@pytest.mark.parametrize("limit", [9, 3, 2])  # All ways, and ways that are drawn.
def test_labels_that_networks_rule_out(limit):
    # Of three labels one is ruled out by both networks, another by either: who knows the label
    # knows the network, and a label more tells nothing.
    certain = np.array([[0, -np.inf, -np.inf], [-np.inf, 0, -np.inf]], np.float32)
    joint = strategies.batch_bald.Joint(2, limit, np.random.default_rng(0))
    gains = lambda: strategies.batch_bald._gains(certain[None], *joint.configurations)
    np.testing.assert_allclose(gains(), np.log(2), rtol=1e-6)
    for _ in range(2):
        joint.add(certain)
        np.testing.assert_allclose(gains(), 0, atol=1e-6)
    log_p, log_weights = joint.configurations
    of_ways = np.exp(log_weights) @ np.exp(log_p)
    np.testing.assert_allclose(of_ways, [1, 1], rtol=1e-6)  # Each network's add up to 1.


def test_a_model_may_rule_a_class_out():
    log_p = np.log(0.7) + draw_log_p(20)
    log_p = np.concatenate([log_p, np.full((20, T, 1), -np.inf, np.float32)], axis=2)
    log_p -= np.logaddexp.reduce(log_p, axis=2, keepdims=True)
    with_class = strategies.BatchBald().select(KEY, log_p, 5, None)  # 4⁴ ways.
    without = strategies.BatchBald().select(KEY, log_p[..., :K], 5, None)
    np.testing.assert_array_equal(with_class.positions, without.positions)
    np.testing.assert_allclose(with_class.scores, without.scores, atol=1e-5)


def test_many_labels_together_do_not_underflow():
    query = strategies.BatchBald(num_configurations=50).select(KEY, draw_log_p(200), 150, None)
    assert np.isfinite(query.scores).all()
    assert len(np.unique(query.positions)) == 150


class Dropping(nn.Module):
    """Shows what is dropped: the outputs are the inputs after dropout."""

    rate: float = 0.5
    broadcast_dims: tuple = ()

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(self.rate, self.broadcast_dims, deterministic=not train)(x)


def test_one_mask_for_all_examples_and_one_for_each_network():
    x = np.ones((300, 40), np.float32)  # More than a block.
    log_p = dropout.log_probabilities(Dropping().apply, {}, x, jax.random.split(KEY, 50))
    assert log_p.shape == (300, 50, 40)
    np.testing.assert_array_equal(log_p, np.broadcast_to(log_p[:1], log_p.shape))
    # Kept entries are doubled: their log-probabilities lie 2 above those of dropped ones.
    kept = np.asarray(log_p[0] - np.min(log_p[0], axis=-1, keepdims=True))
    np.testing.assert_allclose(np.unique(np.round(kept, 4)), [0, 2])
    assert len(np.unique(kept, axis=0)) == 50
    assert 0.45 < np.mean(kept > 1) < 0.55


def test_all_else_of_the_model_is_in_evaluation_mode():
    model = toy.with_dropout()
    variables = toy.variables(model)
    keys = jax.random.split(KEY, 3)
    x = toy.images(6)
    together = dropout.log_probabilities(model.apply, variables, x, keys)
    alone = dropout.log_probabilities(model.apply, variables, x[2:3], keys)
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["bald", "batch_bald"])
def test_models_without_dropout_are_refused_before_training(name):
    strategy = dj.STRATEGIES[name]()
    for model in (toy.models()["cnn"], toy.models()["batch_norm"]):  # Its rate is 0.
        experiment = dj.Experiment(toy.dataset(), model, strategy, dj.Budget(6, 4, 1))
        with pytest.raises(dj.UserError, match=r"Bald needs a model with dropout, and this one"):
            experiment.init()
    with_dropout = dj.Experiment(toy.dataset(), toy.with_dropout(), strategy, dj.Budget(6, 4, 1))
    with_dropout.init()
    assert strategies.Sampled(strategy).needs_dropout
    assert strategies.ALBL({name: strategy}).needs_dropout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_networks": 1}, "at least 2, got 1"),
        ({"num_configurations": 19}, "at most num_configurations, got 20 and 19"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(dj.UserError, match=message):
        strategies.create("batch_bald", **options)
