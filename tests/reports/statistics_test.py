"""Statistics against hand-worked numbers and against what they guarantee."""

import numpy as np
import pytest
import scipy.stats

from dynamical_jax.reports import statistics

GENERATOR = np.random.default_rng(0)


def test_area_under_curve():
    labels = np.array([0.0, 1.0, 3.0])
    curves = np.array([[0.2, 0.2, 0.2], [0.0, 1.0, 1.0]])
    areas = [statistics.area_under_curve(labels, curve) for curve in curves]
    np.testing.assert_allclose(areas, [0.2, 2.5 / 3])
    assert statistics.area_under_curve(labels[:1], curves[1, :1]) == 0.0


def test_labels_to_reach():
    labels, curve = np.array([10.0, 20.0, 40.0]), np.array([0.1, 0.3, 0.2])
    assert statistics.labels_to_reach(0.05, labels, curve) == 10
    assert statistics.labels_to_reach(0.25, labels, curve) == pytest.approx(17.5)
    assert np.isnan(statistics.labels_to_reach(0.31, labels, curve))


def test_paired_difference_by_hand():
    # Differences 1, 2, 3, 4: mean 2.5, standard error √(5/3)/2, t = 3.873 with 3 degrees; the
    # 97.5 % point of t is 3.182. All signs are equal, so Wilcoxon's p is 2 / 2⁴.
    b = np.array([5.0, 7.0, 1.0, 0.0])
    result = statistics.paired_difference(b + np.arange(1.0, 5.0), b)
    error = np.sqrt(5 / 3) / 2
    assert result.mean == pytest.approx(2.5)
    assert result.low == pytest.approx(2.5 - 3.18245 * error, rel=1e-5)
    assert result.high == pytest.approx(2.5 + 3.18245 * error, rel=1e-5)
    assert result.t_pvalue == pytest.approx(2 * scipy.stats.t.sf(2.5 / error, 3))
    assert result.wilcoxon_pvalue == pytest.approx(statistics.smallest_wilcoxon_pvalue(4))
    swapped = statistics.paired_difference(b, b + np.arange(1.0, 5.0))
    assert (swapped.mean, swapped.low, swapped.high) == (-result.mean, -result.high, -result.low)
    assert swapped.t_pvalue == result.t_pvalue


def test_pairing_is_what_counts():
    # Seeds differ by far more than strategies do; each pair by the same little.
    seeds = GENERATOR.normal(size=5)
    better = seeds + 0.01 + 0.001 * GENERATOR.normal(size=5)
    assert statistics.paired_difference(better, seeds).t_pvalue < 0.001
    assert statistics.paired_difference(better, seeds[::-1].copy()).t_pvalue > 0.1


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_equal_differences_prove_nothing(shift):
    a = np.array([1.0, 2.0, 4.0])
    result = statistics.paired_difference(a + shift, a)
    assert result == (shift, shift, shift, 1.0, 1.0)


def test_what_is_equal_as_a_fraction_is_equal():
    """Of 10,000 images each: k/n as binary numbers differ from one another in the last bit."""
    b = np.array([5551, 4910, 4533, 3809, 3923])
    one_more = (b + 1) / 10_000 - b / 10_000
    assert np.ptp(one_more) > 0
    result = statistics.paired_difference((b + 1) / 10_000, b / 10_000)
    assert result == (0.0001, 0.0001, 0.0001, 1.0, 1.0)
    # Two more and two fewer are ties, of which Wilcoxon's test is to know: ranks 1.5, 1.5, 3, 4, 5
    # and the sums 1.5 and 13.5. Of the 32 signs 6 have a sum of 1.5 or less on one side or other.
    differences = np.array([-2, 2, 3, 4, 5])
    result = statistics.paired_difference((b + differences) / 10_000, b / 10_000)
    assert result.wilcoxon_pvalue == pytest.approx(6 / 32)


def test_a_mean_that_is_equal_is_reached():
    target, mean = np.mean([0.3, 0.3002, 0.3001]), np.mean([0.3001, 0.3001, 0.3001])
    higher, lower = max(target, mean), min(target, mean)
    assert 0 < higher - lower < 1e-12
    labels = np.array([10.0, 20.0])
    assert statistics.labels_to_reach(higher, labels, np.array([0.1, lower])) == pytest.approx(20)


def test_holm_by_hand():
    # Sorted: 0.005·4, 0.01·3, 0.03·2 and 0.04·1, which must not be below what went before.
    pvalues = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(statistics.holm(pvalues), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm(np.array([0.9, 0.8])), [1, 1])


def test_holm_keeps_the_family_wise_error():
    # Ten true hypotheses: without correction 40 % of families have a false rejection.
    pvalues = np.random.default_rng(1).uniform(size=(4000, 10))
    false = np.array([statistics.holm(family).min() < 0.05 for family in pvalues])
    assert np.mean(pvalues.min(axis=1) < 0.05) > 0.35
    assert false.mean() == pytest.approx(0.05, abs=0.012)


def test_penalty_matrix():
    noise = 0.001 * GENERATOR.normal(size=(3, 5, 4))
    accuracy = noise + 0.5
    accuracy[0, :, :3] += 0.1  # Clearly best in three rounds of four.
    accuracy[2, :, 3] -= 0.1  # Clearly worst in the last.
    matrix = statistics.penalty_matrix(accuracy)
    np.testing.assert_array_equal(matrix[0, 1:] >= 0.75, True)
    assert matrix[0, 2] == 1
    np.testing.assert_array_equal(np.diag(matrix), 0)
    # As published: t = √5 μ/σ above 2.776 with five seeds.
    difference = accuracy[0] - accuracy[1]
    t = np.sqrt(5) * difference.mean(axis=0) / difference.std(axis=0, ddof=1)
    assert matrix[0, 1] == np.mean(t > 2.776)
