"""What the log of answers tells, against other ways to compute it."""

import functools

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import cohen_kappa_score

from dynamical_jax.labeling import answers, choosing, standing
from dynamical_jax.labeling.standing import Point


def answer(path, label, predicted, number=1, kind="audit", what="label"):
    return answers.Answer(path, what, label, kind, number, predicted, 0.5, "me", "me", 0.0, 1)


def batch(number, num_labeled, kappa=None, size=1000):
    return answers.Batch(number, num_labeled, [], [], kappa, size, 0.0)


def curve(generator, slope, sizes, of_each, half=50):
    """Random points: the logit is `slope` times the logarithm of the labels, 0 at `half` labels."""
    return [
        Point("audit", number, size, bool(generator.random() < p), True)
        for number, size in enumerate(sizes)
        for p in [1 / (1 + np.exp(-slope * np.log(size / half)))] * of_each
    ]


def test_the_first_prediction_and_the_last_label_count():
    log = [
        answer("a", "cat", "cat", 1),
        answer("b", "cat", "dog", 1, "query"),
        answer("c", "cat", "", 1),  # There was no model.
        answer("d", "cat", "cat", 1, what="skip"),
        answer("a", "dog", "dog", 2, "again"),
        answer("e", "cat", "cat", 2),
        answer("e", "", "", 2, what="undo"),
    ]
    labels = {"a": "dog", "b": "cat", "c": "cat", "d": "cat"}
    found = standing.points(log, [batch(1, 10), batch(2, 30)], labels)
    assert found == [Point("audit", 1, 10, False, True), Point("query", 1, 10, False, False)]


def test_random_images_and_those_asked_for_are_counted_apart():
    kinds = [("audit", True), ("random", False), ("query", False), ("grid", True), ("again", True)]
    found = [Point(kind, 1, 10, right, kind in answers.AT_RANDOM) for kind, right in kinds]
    (part,) = standing.by_round(found)
    assert (part["random"].right, part["random"].total) == (1, 2)
    assert (part["query"].right, part["query"].total) == (0, 1)
    assert len(standing.recent(found)) == 2


def test_the_present_model_is_judged_by_whole_rounds():
    """The part of a round that is answered last is no random sample of it."""
    sizes = {1: 40, 2: 30, 3: standing.RECENT - 10}
    found = [
        Point("audit", number, 10 * number, True, True)
        for number, size in sizes.items()
        for _ in range(size)
    ]
    assert [sum(p.round == number for p in standing.recent(found)) for number in sizes] == [
        0, 30, standing.RECENT - 10,
    ]  # fmt: skip
    assert standing.recent([]) == []


@pytest.mark.parametrize("num_drawn", [1, 3])
@pytest.mark.parametrize(("kind", "wanted"), [("query", False), ("query", True), ("grid", True)])
def test_what_is_drawn_between_batches_makes_a_sample_of_all_images(kind, wanted, num_drawn):
    """A strategy that asks for what the model has wrong, or right, does not move the estimates.

    Nor does a grid of what it has right. That holds for each round, for all together, and for the
    last ones, in a pool so small that each image matters.
    """
    num_rounds, pool, num_asked = 400, 20, 6
    right = {f"{i:02d}.png": i % 10 < 7 for i in range(pool)}
    asked = [path for path in right if right[path] == wanted][:num_asked]
    left_over = sorted(set(right) - set(asked))
    log = []
    for number in range(1, num_rounds + 1):
        place = functools.partial(choosing.place, 0, number)
        log += [
            answer(
                f"{number}/{path}", "cat", "cat" if right[path] else "dog", number, why
            )._replace(place=place(path))
            for why, paths in (
                (kind, asked),
                ("random", sorted(left_over, key=place)[:num_drawn]),
            )
            for path in paths
        ]
    batches = [batch(number, 10) for number in range(1, num_rounds + 1)]
    labels = dict.fromkeys((one.path for one in log), "cat")
    found = standing.points(log, batches, labels)
    shares = [part["random"] for part in standing.by_round(found)]
    of_rounds = [share.right / share.total for share in shares]
    error = np.std(of_rounds) / np.sqrt(num_rounds)
    assert np.mean(of_rounds) == pytest.approx(0.7, abs=3 * error)
    assert [share.total for share in shares] == [num_drawn] * num_rounds
    # The present model's, at many times.
    cut = [
        standing.recent([point for point in found if point.round <= last])
        for last in range(100, num_rounds + 1, 50)
    ]
    lasts = [point.right for points in cut for point in points]
    assert np.mean(lasts) == pytest.approx(0.7, abs=3 * 0.46 / np.sqrt(len(lasts)))
    # What the strategy left over would tell another tale.
    assert abs(np.mean([right[path] for path in left_over]) - 0.7) > 0.09


def test_an_image_drawn_before_its_batch_was_chosen_tells_nothing_of_the_order():
    log = [
        answer("a", "cat", "cat", 1, "query")._replace(place=0.5),
        answer("b", "cat", "cat", 1, "random")._replace(place=0.0),
        answer("c", "cat", "cat", 2, "random")._replace(place=0.9),
    ]
    batches = [batch(1, 10), batch(2, 30)]
    found = standing.points(log, batches, dict.fromkeys("abc", "cat"))
    assert [point.at_random for point in found] == [False, True, True]


def test_interval_is_wilsons():
    share = standing.share([Point("audit", 1, 10, i < 41, True) for i in range(50)])
    z, p, n = scipy.stats.norm.ppf(0.975), 41 / 50, 50
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose([share.low, share.high], [middle - half, middle + half])
    assert standing.share([]) is None


def test_kappa_is_cohens():
    generator = np.random.default_rng(0)
    one = generator.choice(["a", "b", "c"], 200)
    two = np.where(generator.random(200) < 0.7, one, generator.choice(["a", "b", "d"], 200))
    before = {str(i): name for i, name in enumerate(one)} | {"labeled since": "a"}
    after = {str(i): name for i, name in enumerate(two)}
    kappa, size = standing.kappa(before, after)
    assert size == 200
    assert kappa == pytest.approx(cohen_kappa_score(one, two))
    assert standing.kappa({"1": "a", "2": "a"}, {"1": "a", "2": "a"}) == (None, 2)
    assert standing.kappa({}, after) == (None, 0)


def test_stopping():
    stop = lambda *kappas, size=1000: standing.may_stop(
        [batch(0, 5), *(batch(i, 10, kappa, size) for i, kappa in enumerate(kappas, 1))]
    )
    assert not stop()[0]
    assert stop(1.0, 1.0) == (False, "2 of 3 rounds with two models to compare")
    assert stop(0.5, 0.99, 0.995, 0.99) == (
        True,
        "0.992, mean κ of the last 3 rounds, to stop at 0.99",
    )
    assert not stop(0.99, 0.99, 0.98)[0]
    assert stop(1.0, 1.0, 1.0, size=99)[1].startswith("fewer than 100 images")


@pytest.mark.parametrize(
    ("slope", "sizes", "of_each", "half"),
    [(0.8, [50, 100, 200, 300, 400], 40, 50), (1.0, range(25, 401, 25), 3, 33)],
)
def test_gain_is_that_of_the_curve_and_its_interval_holds_it(slope, sizes, of_each, half):
    """Over many data sets drawn from a known curve, the interval of 95 % misses it in few."""
    generator, now = np.random.default_rng(0), 400
    truth = lambda size: 1 / (1 + np.exp(-slope * np.log(size / half)))
    true_gain = truth(now + standing.MORE) - truth(now)
    gains = [standing.gain(curve(generator, slope, sizes, of_each, half), now) for _ in range(200)]
    gains = [gain for gain in gains if gain.expected is not None]
    assert len(gains) > 150
    assert np.mean([not gain.low <= true_gain <= gain.high for gain in gains]) <= 0.08
    assert np.mean([gain.expected for gain in gains]) == pytest.approx(true_gain, abs=0.0035)


@pytest.mark.parametrize(
    ("sizes", "of_each", "right", "reason"),
    [
        ([50, 100, 200], 10, None, "30 of at least 40 random images"),
        ([50, 100], 30, None, "2 of at least 3 batches"),
        ([50, 100, 200], 30, True, "0 of at least 5 random images both right and wrong"),
    ],
)
def test_what_cannot_be_told_is_not_told(sizes, of_each, right, reason):
    found = curve(np.random.default_rng(0), 1.0, sizes, of_each)
    if right is not None:
        found = [point._replace(right=right) for point in found]
    # Points of the query are no help, however many.
    found += [point._replace(kind="query", at_random=False) for point in found * 10]
    gain = standing.gain(found, 300)
    assert gain.expected is gain.low is gain.high is None
    assert reason in gain.reason


def test_no_gain_is_told_where_the_labels_hardly_grew():
    generator = np.random.default_rng(0)
    found = curve(generator, 0.3, [2000, 2025, 2050], 30)
    gain = standing.gain(found, 2100)
    assert gain.expected is None
    assert "random images at 2000 to 2050 labels" in gain.reason
