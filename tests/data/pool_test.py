import numpy as np
import pytest

from dynamical_jax import streams
from dynamical_jax.data import pool


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


def test_oracle_answers_what_is_asked():
    np.testing.assert_array_equal(pool.Oracle(np.array([3, 1, 2]))(np.array([2, 0])), [2, 3])
