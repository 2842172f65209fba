"""Statistics of differences between strategies, paired over seeds."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

# Accuracies and their means are fractions, of which binary numbers hold 15 digits. Those that are
# equal as fractions must not differ in the last bit where equality decides.
DECIMALS = 12


class PairedDifference(NamedTuple):
    """The difference a − b of two strategies over the seeds that both have.

    Attributes:
      mean: of the differences.
      low: lower end of the 95 % confidence interval of their mean, by Student's t.
      high: upper end.
      t_pvalue: of the two-sided paired t-test.
      wilcoxon_pvalue: of the two-sided Wilcoxon signed-rank test, exact for up to 50
        seeds, or up to 13 if some of the differences are equal or zero.
    """

    mean: float
    low: float
    high: float
    t_pvalue: float
    wilcoxon_pvalue: float


def area_under_curve(
    num_labeled: Float[np.ndarray, "r"], accuracy: Float[np.ndarray, "r"]
) -> float:
    """Returns the mean height of a curve over the labels spent, by the trapezoidal rule.

    >>> area_under_curve(np.array([100.0, 200.0, 400.0]), np.array([0.0, 0.5, 0.5]))
    0.4166666666666667
    """
    if len(num_labeled) == 1:
        return float(accuracy[0])
    return float(np.trapezoid(accuracy, num_labeled) / (num_labeled[-1] - num_labeled[0]))


def labels_to_reach(
    target: float, num_labeled: Float[np.ndarray, "r"], accuracy: Float[np.ndarray, "r"]
) -> float:
    """Returns after how many labels a curve, linear between rounds, first reaches `target`.

    NaN if it never does.

    >>> labels_to_reach(0.3, np.array([100.0, 200.0]), np.array([0.2, 0.4]))
    150.0
    """
    reached = np.flatnonzero(np.round(accuracy, DECIMALS) >= np.round(target, DECIMALS))
    if not len(reached):
        return float("nan")
    after = reached[0]
    if after == 0:
        return float(num_labeled[0])
    before = after - 1
    share = (target - accuracy[before]) / (accuracy[after] - accuracy[before])
    return float(num_labeled[before] + share * (num_labeled[after] - num_labeled[before]))


def paired_difference(
    a: Float[np.ndarray, "seeds"], b: Float[np.ndarray, "seeds"]
) -> PairedDifference:
    """Returns the difference of two strategies over at least two common seeds.

    If all differences are equal, the tests are not defined: then p is 1, and the interval has no
    width.
    """
    differences = np.round(a - b, DECIMALS)
    mean = float(np.mean(differences))
    if np.ptp(differences) == 0:
        return PairedDifference(mean, mean, mean, 1.0, 1.0)
    import scipy.stats  # here, because it is a third of the time that the package takes to import

    t_test = scipy.stats.ttest_1samp(differences, 0)
    interval = t_test.confidence_interval()
    wilcoxon = scipy.stats.wilcoxon(differences)
    return PairedDifference(
        mean,
        float(interval.low),
        float(interval.high),
        float(t_test.pvalue),
        float(wilcoxon.pvalue),
    )


def holm(pvalues: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
    """Returns p-values corrected for testing m hypotheses at once (Holm, 1979).

    Rejecting those below α keeps the probability of any false rejection below α.

    >>> holm(np.array([0.01, 0.04, 0.03]))
    array([0.03, 0.06, 0.06])
    """
    order = np.argsort(pvalues)
    factors = np.arange(len(pvalues), 0, -1)
    corrected = np.empty(len(pvalues))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * pvalues[order]), 1)
    return corrected


def smallest_wilcoxon_pvalue(num_seeds: int) -> float:
    """Returns 2^(1 − n), below which the two-sided signed-rank test cannot go with n seeds.

    >>> smallest_wilcoxon_pvalue(5)
    0.0625
    """
    return 2.0 ** (1 - num_seeds)


def penalty_matrix(
    accuracy: Float[np.ndarray, "strategies seeds rounds"], significance: float = 0.05
) -> Float[np.ndarray, "strategies strategies"]:
    """Returns the share of the rounds in which strategy i (row) beats strategy j (column).

    It beats it where its mean is higher and the two-sided paired t-test rejects at `significance`
    (Ash et al., 2020, who add up such matrices over experiments). Callers leave out round 0, in
    which all strategies with one seed are the same.
    """
    beats = np.array([[_beats(i, j, significance) for j in accuracy] for i in accuracy])
    return beats.mean(axis=-1)


def _beats(
    ours: Float[np.ndarray, "seeds rounds"],
    theirs: Float[np.ndarray, "seeds rounds"],
    significance: float,
) -> Bool[np.ndarray, "rounds"]:
    results = [paired_difference(*pair) for pair in zip(ours.T, theirs.T, strict=True)]
    return np.array([r.mean > 0 and r.t_pvalue < significance for r in results])
