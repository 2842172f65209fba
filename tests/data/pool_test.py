import numpy as np
import pytest

from dynamical_jax import streams
from dynamical_jax.data import pool
from dynamical_jax.errors import UserError


def test_reveal_turns_positions_into_rows():
    before = pool.Pool(np.array([5, 0]), np.array([1, 2, 3, 4, 6]))
    after, rows = before.reveal(np.array([4, 1]))
    np.testing.assert_array_equal(rows, [6, 2])
    np.testing.assert_array_equal(after.labeled, [5, 0, 6, 2])
    np.testing.assert_array_equal(after.unlabeled, [1, 3, 4])


@pytest.mark.parametrize("positions", [[1, 1], [-1], [5]])
def test_reveal_refuses_what_no_query_may_hold(positions):
    with pytest.raises(ValueError, match="a query holds a position"):
        pool.Pool(np.array([]), np.arange(5)).reveal(np.array(positions))


def test_initial_pool_is_a_partition():
    drawn = pool.initial_pool(20, 6, streams.generator(0, "initial_set"))
    assert len(drawn.labeled) == 6
    np.testing.assert_array_equal(np.union1d(drawn.labeled, drawn.unlabeled), np.arange(20))


class TestImbalance:
    LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [40, 30, 20]))

    def test_shares_of_the_classes_are_left(self):
        rows = pool.imbalanced_rows(self.LABELS, (1, 0.1, 0.5), streams.generator(0, "imbalance"))
        assert np.bincount(self.LABELS[rows]).tolist() == [40, 3, 10]
        assert (np.diff(rows) > 0).all()

    def test_fewer_shares_are_repeated(self):
        rows = pool.imbalanced_rows(self.LABELS, (0.5, 0), streams.generator(0, "imbalance"))
        assert np.bincount(self.LABELS[rows]).tolist() == [20, 0, 10]

    def test_each_seed_draws_its_own(self):
        one, same, other = (
            pool.imbalanced_rows(self.LABELS, (0.5,), streams.generator(seed, "imbalance"))
            for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(one, same)
        assert set(one) != set(other)

    @pytest.mark.parametrize(
        ("shares", "message"),
        [
            ((), "numbers from 0 to 1, got ''"),
            ((1, 1.5), "numbers from 0 to 1, got '1,1.5'"),
            ((float("nan"),), "numbers from 0 to 1, got 'nan'"),
            ((1,) * 4, "4 shares are given for 3 classes"),
        ],
    )
    def test_shares_that_are_none(self, shares, message):
        with pytest.raises(UserError, match=message):
            pool.imbalanced_rows(self.LABELS, shares, streams.generator(0, "imbalance"))


def test_oracle_answers_what_is_asked():
    np.testing.assert_array_equal(pool.Oracle(np.array([3, 1, 2]))(np.array([2, 0])), [2, 3])
