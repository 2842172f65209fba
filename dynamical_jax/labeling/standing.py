"""Estimates, from the log of answers, how good the model is and whether labeling may stop.

The accuracy of a model is measured on images drawn at random. Images that a strategy chooses are
harder, and the accuracy on them says how hard. Both use predictions made before the model was
trained on the answer.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax.labeling.answers import AUDIT, GRID, LABEL, QUERY, RANDOM, Answer, Batch

CONFIDENCE_LEVEL = 0.95

RECENT = 50
"""The last rounds with so many random images, or more, are those by which the present model is
judged."""

AGREEMENT, ROUNDS, SMALLEST_STOP_SET = 0.99, 3, 100
"""When to stop: Cohen's κ of each model's predictions with those of the one before, on images that
have no label yet, averages at least 0.99 over the last three rounds. M. Bloodgood and K.
Vijay-Shanker, A method for stopping active learning based on stabilizing predictions and the need
for user-adjustable stopping, CoNLL 2009. Theirs is one set of 2000 for all rounds; ours is all that
is unlabeled at both times, and says nothing if that is fewer than a hundred."""

FEWEST_POINTS, FEWEST_ROUNDS, FEWEST_WRONG = 40, 3, 5
"""Random images, batches and mistakes below which no learning curve is drawn."""

LEAST_SPREAD = 2
"""Where the labels have grown by less since the first random image, the data hardly determine the
slope of the curve, and the gain would be told by the prior on it."""

MORE = 100
"""Number of further labels whose gain is estimated."""


class Point(NamedTuple):
    """Whether the model predicted an image correctly before it was trained on it.

    Attributes:
      kind: the reason why the image was asked for.
      round: the number of batches that had been chosen.
      num_labeled: the number of labels that the model was trained on.
      right: whether the prediction was correct.
      at_random: whether the image belongs to a random sample of the images without a label.
    """

    kind: str
    round: int
    num_labeled: int
    right: bool
    at_random: bool


class Share(NamedTuple):
    """The number of correct predictions of a total, with Wilson's 95 % interval."""

    right: int
    total: int
    low: float
    high: float


class Gain(NamedTuple):
    """The change of accuracy by `MORE` further labels; None where it cannot be estimated.

    Attributes:
      expected: change of accuracy.
      low: with `high` the interval of 95 %.
      high: see `low`.
      reason: why it cannot be estimated.
    """

    expected: float | None
    low: float | None
    high: float | None
    reason: str


def points(
    answers: Sequence[Answer], batches: Sequence[Batch], labels: Mapping[str, str]
) -> list[Point]:
    """Returns a point for each labeled image that the model had a prediction for.

    The prediction is that at the first answer, the truth is the label that counts now.

    Which of them are a random sample of all images without a label, `_drawn` says.

    Args:
      answers: all, in their order.
      batches: likewise.
      labels: path → class name.
    """
    num_labeled = {batch.round: batch.num_labeled for batch in batches}
    first: dict[str, Answer] = {}
    for answer in answers:
        if answer.what == LABEL and answer.path in labels:
            first.setdefault(answer.path, answer)
    predicted = [answer for answer in first.values() if answer.predicted]
    drawn = _drawn(predicted)
    return [
        Point(
            answer.kind,
            answer.round,
            num_labeled.get(answer.round, 0),
            answer.predicted == labels[answer.path],
            answer.kind == AUDIT or answer.path in drawn,
        )
        for answer in predicted
    ]


def _drawn(answers: Sequence[Answer]) -> set[str]:
    """Returns the paths of a random sample, from what was labeled between two batches.

    Images drawn there come from those that the strategy left over, on which the model is better
    than on all. But their order was set for all images. Where k were drawn, the first k of the
    order, asked for by the strategy or not, are a sample of all images. (All up to the last one
    drawn are not: such a sample always ends with an image that was left over.)

    Images of the grid have their places, too. People saw the prediction, and a label may follow it;
    but they are those that the model is surest of, and without them it would look much worse.

    Args:
      answers: the first to each image.
    """
    # An image drawn before its batch was chosen has place 0; logs without places have 1.
    has_place = lambda answer: 0 < answer.place < 1
    drawn = {one.path for one in answers if one.kind == RANDOM and not has_place(one)}
    order = sorted(
        (one for one in answers if one.kind in (QUERY, GRID, RANDOM) and has_place(one)),
        key=lambda one: (one.round, one.place),
    )
    for _, part in itertools.groupby(order, lambda one: one.round):
        of_round = list(part)
        size = sum(one.kind == RANDOM for one in of_round)
        drawn |= {one.path for one in of_round[:size]}
    return drawn


def share(found: Sequence[Point]) -> Share | None:
    """Returns the share of correct predictions with its interval; None if there are no points."""
    if not found:
        return None
    right, total = sum(point.right for point in found), len(found)
    import scipy.stats  # here, because it is a third of the time that the package takes to import

    interval = scipy.stats.binomtest(right, total).proportion_ci(CONFIDENCE_LEVEL, "wilson")
    return Share(right, total, float(interval.low), float(interval.high))


def recent(found: Sequence[Point]) -> list[Point]:
    """Returns the random points of the last rounds, at least `RECENT` if there are so many.

    They measure the present model or one shortly before. Part of a round would be no random sample:
    what the strategy asks for is labeled before what is drawn between batches.
    """
    random = [point for point in found if point.at_random]
    oldest = min((point.round for point in random[-RECENT:]), default=0)
    return [point for point in random if point.round >= oldest]


def by_round(found: Sequence[Point]) -> list[dict[str, Any]]:
    """Returns for each batch the accuracy of its model on random images and on the query.

    An image may count in both. Points of the grid, where people see the prediction, are not of the
    query.
    """
    rounds = sorted({(point.round, point.num_labeled) for point in found})
    return [
        {
            "round": number,
            "num_labeled": num_labeled,
            "random": share([p for p in found if p.round == number and p.at_random]),
            "query": share([p for p in found if p.round == number and p.kind == QUERY]),
        }
        for number, num_labeled in rounds
    ]


def kappa(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[float | None, int]:
    """Returns Cohen's κ of two models' predictions, and on how many images they both have some.

    κ is None where both predict one and the same class everywhere: there it is 0/0.

    Args:
      before: path → class name, of one.
      after: likewise, of the other.
    """
    both = sorted(set(before) & set(after))
    if not both:
        return None, 0
    one, two = (np.array([names[path] for path in both]) for names in (before, after))
    agreement = np.mean(one == two)
    classes = sorted(set(one) | set(two))
    chance_agreement = sum(np.mean(one == name) * np.mean(two == name) for name in classes)
    if chance_agreement == 1:
        return None, len(both)
    return float((agreement - chance_agreement) / (1 - chance_agreement)), len(both)


def may_stop(batches: Sequence[Batch]) -> tuple[bool, str]:
    """Returns whether to stop by the rule of `AGREEMENT`, and the reason."""
    with_kappa = [batch for batch in batches if batch.kappa is not None]
    last = with_kappa[-ROUNDS:]
    rule = f"mean κ of the last {ROUNDS} rounds, to stop at {AGREEMENT}"
    if len(last) < ROUNDS:
        return False, f"{len(last)} of {ROUNDS} rounds with two models to compare"
    mean = float(np.mean([batch.kappa for batch in last]))
    if min(batch.kappa_size for batch in last) < SMALLEST_STOP_SET:
        return False, f"fewer than {SMALLEST_STOP_SET} images without a label to compare on"
    return mean >= AGREEMENT, f"{mean:.3f}, {rule}"


def gain(found: Sequence[Point], num_labeled: int) -> Gain:
    """Estimates the gain of `MORE` further labels from the random points.

    The learning curve is a logistic regression of "right" on the logarithm of the number of labels,
    with weak priors on intercept and slope (standard deviations 10 and 3), which keep it finite.
    The expected gain is that of the most probable curve. The interval is one of the posterior,
    approximated by a Gaussian about that curve (Laplace). That the curve has this form is assumed:
    how wrong that is the interval does not know. Where it is true, the interval held the gain in 92
    to 99.6 % of the simulated sets of points, depending on the curve; they had 48 to 200 points.

    Args:
      found: all points.
      num_labeled: present number of labels.
    """
    random = [point for point in found if point.at_random and point.num_labeled > 0]
    rounds = len({point.round for point in random})
    wrong = sum(not point.right for point in random)
    for count, minimum, counted in (
        (len(random), FEWEST_POINTS, "random images"),
        (rounds, FEWEST_ROUNDS, "batches with random images"),
        (min(wrong, len(random) - wrong), FEWEST_WRONG, "random images both right and wrong"),
    ):
        if count < minimum:
            return Gain(None, None, None, f"{count} of at least {minimum} {counted}")
    sizes = [point.num_labeled for point in random]
    if max(sizes) < LEAST_SPREAD * min(sizes):
        return Gain(
            None,
            None,
            None,
            f"random images at {min(sizes)} to {max(sizes)} labels; the slope of the curve can be "
            f"told when the labels have grown {LEAST_SPREAD} times",
        )
    x = np.log([point.num_labeled for point in random])
    y = np.array([point.right for point in random], float)
    now, later = np.log(num_labeled), np.log(num_labeled + MORE)
    curve, covariance = _logistic(x - now, y)
    # Always the same draws: the page shows the same interval until there is another answer.
    generator = np.random.default_rng(0)
    curves = generator.multivariate_normal(curve, covariance, 2000)
    accuracy = lambda intercept, slope, at: 1 / (1 + np.exp(-(intercept + slope * (at - now))))
    expected, gains = (
        accuracy(*weights.T, later) - accuracy(*weights.T, now) for weights in (curve, curves)
    )
    low, high = np.quantile(gains, [0.025, 0.975])
    return Gain(float(expected), float(low), float(high), "")


def _logistic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope by Newton's method, with Gaussian priors of deviation 10 and 3.

    Returns:
      Both, and the inverse of the curvature there: the posterior's covariance by Laplace.
    """
    design = np.stack([np.ones_like(x), x], axis=1)
    precision = np.diag([1 / 10**2, 1 / 3**2])
    weights = np.zeros(2)
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        slope = design.T @ (y - p) - precision @ weights
        curvature = (design * (p * (1 - p))[:, None]).T @ design + precision
        step = np.linalg.solve(curvature, slope)
        weights = weights + np.clip(step, -5, 5)
        if np.max(np.abs(step)) < 1e-8:
            break
    return weights, np.linalg.inv(curvature)
