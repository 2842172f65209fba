"""Coverage of the pool, against all pairs of examples written out in NumPy."""

import jax
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax import strategies, streams
from dynamical_jax.strategies import clusters, selection, typiclust

KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(90, 3)).astype(np.float32) * 2
# Three heaps, lengths apart, and points between them.
EMBEDDING = (
    np.repeat(5 * np.eye(3, 6), 30, axis=0) + GENERATOR.normal(size=(90, 6))
) * GENERATOR.uniform(0.5, 2, (90, 1))
OUTPUTS = np.concatenate([LOGITS, EMBEDDING], axis=1).astype(np.float32)[GENERATOR.permutation(90)]


def split(variables, x):
    return dj.Outputs(x[:, :3], x[:, 3:])


LABELS = np.arange(12) % 3


class Last(nn.Module):
    """A last layer of weights, so that there is something to differentiate."""

    @nn.compact
    def __call__(self, x):
        return dj.Outputs(nn.Dense(3, use_bias=False)(x[:, 3:]), x[:, 3:])


def make_view(num_labeled=12, outputs=OUTPUTS):
    labeled = dj.Examples(outputs[:num_labeled], np.zeros(num_labeled, np.int32))
    return dj.LearnerView(split, {}, labeled, outputs[num_labeled:])


def unit(outputs=OUTPUTS):
    embedding = outputs[:, 3:].astype(np.float64)
    return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)


def distances(x, y):
    return np.linalg.norm(x[:, None] - y[None], axis=2)


def uncertainty(logits):
    p = np.exp(logits.astype(np.float64))
    top = np.sort(p / p.sum(axis=1, keepdims=True), axis=1)
    return 1 - (top[:, -1] - top[:, -2])


def assert_greedy(query, similarity, weights, covered):
    """Every gain again in each step, of all pairs; of the largest any may be chosen.

    Two that cover nothing more but each other gain the same, so that rounding would decide.
    """
    left = np.ones(len(similarity), bool)
    for position, score in zip(query.positions, query.scores, strict=True):
        gains = np.mean(weights * np.maximum(similarity - covered, 0), axis=1)
        assert left[position]
        np.testing.assert_allclose([gains[position], score], gains[left].max(), 1e-4, 1e-7)
        left[position] = False
        covered = np.maximum(covered, similarity[position])


@pytest.mark.parametrize("num_labeled", [0, 12])
@pytest.mark.parametrize("name", ["max_herding", "uncertainty_herding"])
def test_herding_is_greedy_on_all_pairs(name, num_labeled):
    labeled, points = np.split(unit(), [num_labeled])
    radius, weights = 1, np.ones(len(points))
    if name == "uncertainty_herding":
        weights = uncertainty(OUTPUTS[num_labeled:, :3])
        if num_labeled:
            radius = distances(labeled, labeled)[~np.eye(num_labeled, dtype=bool)].min()
    kernel = lambda x, y: np.exp(-((distances(x, y) / radius) ** 2))
    covered = kernel(labeled, points).max(axis=0, initial=0)
    query = strategies.create(name).query(KEY, make_view(num_labeled), 40)
    assert_greedy(query, kernel(points, points), weights, covered)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_dynamical_herding_is_greedy_on_all_pairs(power):
    weights = GENERATOR.normal(size=(6, 3)).astype(np.float32) / 3
    labeled, unlabeled = np.split(OUTPUTS, [12])
    view = dj.LearnerView(
        Last().apply, {"params": {"Dense_0": {"kernel": weights}}}, (labeled, LABELS), unlabeled
    )
    # The gradient of a last layer is h (p − y)ᵀ.
    embedding = OUTPUTS[:, 3:].astype(np.float64)
    p = scipy.special.softmax(embedding @ weights, axis=1)
    labels = np.concatenate([LABELS, p[12:].argmax(axis=1)])
    gradients = embedding[:, :, None] * (p - np.eye(3)[labels])[:, None]
    of_labeled = gradients[:12].sum(axis=0)
    change = [np.sum(each**2) + 2 * np.sum(each * of_labeled) for each in gradients[12:]]
    assert min(change) < 0 < max(change)
    expected = (np.maximum(change, 0) / max(change)) ** power

    labeled, points = np.split(unit(), [12])
    radius = distances(labeled, labeled)[~np.eye(12, dtype=bool)].min()
    kernel = lambda x, y: np.exp(-((distances(x, y) / radius) ** 2))
    query = strategies.DynamicalHerding(power=power).query(KEY, view, 40)
    covered = kernel(labeled, points).max(axis=0)
    assert_greedy(query, kernel(points, points), expected, covered)


def test_the_temperature_divides_the_logits():
    view = make_view()
    warm = strategies.UncertaintyHerding(temperature=5.0).query(KEY, view, 10)
    cooled = np.concatenate([OUTPUTS[:, :3] / 5, OUTPUTS[:, 3:]], axis=1)
    expected = strategies.UncertaintyHerding().query(KEY, make_view(outputs=cooled), 10)
    np.testing.assert_array_equal(warm.positions, expected.positions)
    cold = strategies.UncertaintyHerding().query(KEY, view, 10)
    assert list(cold.positions) != list(expected.positions)


def test_copies_of_labeled_examples_do_not_make_the_radius():
    outputs = np.concatenate([OUTPUTS[:1], OUTPUTS])
    for given, num_labeled in ((OUTPUTS, 12), (outputs, 13)):
        score = strategies.UncertaintyHerding().score(KEY, make_view(num_labeled, given), None)
        radius = distances(unit()[:12], unit()[:12])[~np.eye(12, dtype=bool)].min()
        assert score.radius == pytest.approx(radius, rel=1e-4)


def test_coverage_is_measured_on_examples_drawn_from_the_pool():
    score = strategies.MaxHerding(num_targets=20).score(KEY, make_view(), None)
    assert score.targets.shape == (20, 6)
    assert len(np.unique(score.targets, axis=0)) == 20
    assert all(any(np.array_equal(row, point) for point in score.points) for row in score.targets)


class TestProbCover:
    def test_balls_are_greedy_on_all_pairs(self):
        labeled, points = np.split(unit(), [12])
        near = (distances(points, points) < 0.4).astype(float)
        covered = (distances(labeled, points) < 0.4).any(axis=0).astype(float)
        query = strategies.ProbCover(radius=0.4).query(KEY, make_view(), 10)
        assert_greedy(query, near, 1, covered)

    def test_the_radius_keeps_95_percent_of_balls_pure(self):
        points = unit().astype(np.float32)
        classes = clusters.cluster(jax.random.split(jax.random.split(KEY)[1])[0], points, 3)
        radius = strategies.ProbCover().score(KEY, make_view(), None).radius
        pairs = distances(points, points)

        def pure(radius):
            inside = pairs < radius
            return np.mean([len(set(classes[row])) == 1 for row in inside])

        assert pure(radius - 1e-5) >= 0.95
        assert pure(radius + 1e-5) < 0.95

    def test_once_all_is_covered_the_rest_is_random(self):
        strategy = strategies.ProbCover(radius=3.0)
        rest = [strategy.query(jax.random.key(seed), make_view(), 20) for seed in range(2)]
        assert all(np.all(query.scores == 0) for query in rest)
        assert list(rest[0].positions) != list(rest[1].positions)


class TestTypiClust:
    def test_against_clusters_taken_one_by_one(self):
        points = unit()
        view = make_view()
        query = strategies.TypiClust().query(KEY, view, 25)
        _, key = jax.random.split(KEY)
        found = clusters.cluster(key, points.astype(np.float32), 37)
        sizes = np.bincount(found, minlength=37)
        labels = np.bincount(found[:12], minlength=37)
        turns = sorted(np.flatnonzero(sizes > 5), key=lambda each: (labels[each], -sizes[each]))
        free = np.arange(90) >= 12
        for turn, position in enumerate(query.positions[: len(turns)]):
            members = np.flatnonzero(free & (found == turns[turn]))
            pairs = np.sort(distances(points[members], points[members]), axis=1)[:, 1:]
            nearest = pairs[:, : min(20, len(members) // 2)].mean(axis=1)
            assert position + 12 == members[np.argmin(nearest)]
            assert query.scores[turn] == pytest.approx(1 / nearest.min(), rel=1e-3)
        assert len(turns) > 3

    def test_small_clusters_come_last(self, monkeypatch):
        found = np.repeat([0, 1, 2], [12 + 58, 15, 5])
        monkeypatch.setattr(typiclust, "cluster", lambda *_: found)
        positions = strategies.TypiClust().query(KEY, make_view(), 78).positions
        assert set(positions[-5:]) == set(range(73, 78))
        # The largest has labels: the one without them is first.
        assert positions[0] >= 58

    def test_typicality_of_one_is_none(self):
        assert typiclust.typicality(np.ones((1, 3))) == 0


def test_lazy_greedy_is_greedy_also_where_gains_are_equal():
    # Sets of numbers, of which many add as much as others: more of them than a block has.
    sets = np.random.default_rng(1).random((300, 40)) < 0.1
    expected, left, missing = [], np.ones(300, bool), np.ones(40, bool)
    for _ in range(300):
        gains = np.where(left, (sets & missing).sum(axis=1), -1)
        expected.append(int(np.argmax(gains)))
        left[expected[-1]] = False
        missing = missing & ~sets[expected[-1]]

    missing, looked_at = np.ones(40, bool), []

    def gains_now(positions):
        looked_at.extend(positions)
        return (sets[positions] & missing).sum(axis=1)

    def choose(position):
        nonlocal missing
        missing = missing & ~sets[position]

    positions, _ = selection.lazy_greedy(gains_now, choose, 300, 300)
    assert list(positions) == expected
    assert len(looked_at) < 300 * 300 / 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("probcover", {"radius": 0.0}, "radius must be above 0 and finite"),
        ("max_herding", {"radius": np.nan}, "radius must be above 0 and finite"),
        ("max_herding", {"num_targets": 0}, "num_targets must be at least 1"),
        ("uncertainty_herding", {"temperature": 0.0}, "temperature must be above 0"),
        ("dynamical_herding", {"gamma": -1.0}, "gamma must be at least 0"),
        ("dynamical_herding", {"power": np.nan}, "power must be above 0 and finite"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(dj.UserError, match=message):
        strategies.create(name, **options)


@pytest.mark.parametrize("name", ["typiclust", "probcover", "max_herding"])
def test_embeddings_that_overflow_when_squared_have_directions(name):
    queries = []
    for scale in (1, 1e30):
        outputs = OUTPUTS * np.array([1] * 3 + [scale] * 6, np.float32)
        queries.append(strategies.create(name).query(KEY, make_view(outputs=outputs), 10))
    np.testing.assert_array_equal(queries[0].positions, queries[1].positions)


def test_the_generator_of_a_key_is_its_own():
    drawn = [streams.generator_of(jax.random.key(seed)).random() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
