"""Rules of selection against their definitions, written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dynamical_jax.strategies import selection


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestTopB:
    def test_against_a_stable_sort(self):
        scores = np.random.default_rng(0).integers(0, 5, 200).astype(np.float32)
        expected = np.argsort(-scores, kind="stable")[:70]
        np.testing.assert_array_equal(selection.top_b(scores, 70), expected)

    def test_zeros_of_either_sign_are_equal(self):
        scores = np.array([-0.0, 0.0, -0.0, 0.0], np.float32)
        np.testing.assert_array_equal(selection.top_b(scores, 4), np.arange(4))

    def test_too_many(self):
        with pytest.raises(ValueError, match="cannot choose 3 of 2"):
            selection.top_b(np.zeros(2, np.float32), 3)


class TestFarthestFirst:
    @pytest.mark.parametrize("num_centers", [1, 9])
    def test_against_all_pairwise_distances(self, num_centers):
        points, centers = drawn(60, 5), drawn(num_centers, 5, seed=1)
        everything = np.concatenate([points, centers]).astype(np.float64)
        distance = np.linalg.norm(everything[:, None] - everything[None], axis=-1)
        taken = list(range(60, 60 + num_centers))
        expected, apart = [], []
        for _ in range(20):
            nearest = distance[:60, taken].min(axis=1)
            nearest[[i for i in taken if i < 60]] = -1
            expected.append(int(np.argmax(nearest)))
            apart.append(nearest.max())
            taken.append(expected[-1])
        chosen, distances = selection.farthest_first(points, centers, 20)
        np.testing.assert_array_equal(chosen, expected)
        np.testing.assert_allclose(distances, apart, rtol=1e-5)

    def test_without_centers_starts_nearest_the_mean(self):
        points = drawn(30, 4)
        first = np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1))
        alone, distance = selection.farthest_first(points, points[:0], 1)
        assert alone.tolist() == [first]
        assert distance.tolist() == [0]
        chosen, _ = selection.farthest_first(points, points[:0], 8)
        rest, _ = selection.farthest_first(points, points[first][None], 7)
        np.testing.assert_array_equal(chosen, [first, *rest])

    def test_points_at_one_place(self):
        # Every distance is 0: none twice all the same, and the lower position first.
        points = np.full((6, 3), 0.1, np.float32)
        chosen, distances = selection.farthest_first(points, points[:2], 6)
        assert chosen.tolist() == list(range(6))
        np.testing.assert_array_equal(distances, 0)

    def test_far_from_the_origin(self):
        # Where squared norms are 10⁸ times the squared distances, and would swallow them.
        points = np.float32(1e3) + np.float32(0.1) * drawn(50, 8)
        chosen, distances = selection.farthest_first(points, points[:5], 50)
        assert len(np.unique(chosen)) == 50
        apart = np.linalg.norm((points[:, None] - points[None]).astype(np.float64), axis=-1)
        assert chosen[0] == np.argmax(apart[:, :5].min(axis=1))
        np.testing.assert_allclose(distances[0], apart[:, :5].min(axis=1).max(), rtol=1e-2)
        # Those that are centers as well come last, at distance 0.
        assert set(chosen[-5:].tolist()) == set(range(5))
        np.testing.assert_array_equal(distances[-5:], 0)


def distances_of_products(left, right):
    points = np.einsum("nk,nd->nkd", left, right).reshape(len(left), -1).astype(np.float64)
    return np.linalg.norm(points[:, None] - points[None], axis=-1), np.linalg.norm(points, axis=-1)


@pytest.mark.parametrize("num_classes", [10, 101])
def test_memory_is_that_of_the_factors(num_classes):
    # Neither n × n nor n × K·d: temporary memory is a few vectors of n.
    n, d = 20_000, 128
    left, right = jnp.zeros((n, num_classes)), jnp.zeros((n, d))
    key = jax.random.key(0)
    program = selection._k_means_plus_plus.lower(key, left, right, None, n, batch_size=50).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * n * (num_classes + d)
    program = selection._farthest_first.lower(right, jnp.zeros(n), n, batch_size=50).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * n * d
    program = selection._nearer.lower(jnp.zeros(n), right, right[:64]).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * n * 2 * d


def test_more_labels_compile_no_more_programs():
    points = drawn(200, 3)

    def look(count):
        selection.coverage(points, points[:count], selection.gaussian, 1.0)
        selection.farthest_first(points, points[:count], 2)
        selection.smallest_distance(points[:count])
        return selection._nearer._cache_size(), selection._smallest_apart._cache_size()

    assert look(7) == look(100)


class TestKMeansPlusPlus:
    def test_distances_against_the_explicit_embedding(self):
        left, right = drawn(40, 3), drawn(40, 7, seed=1)
        chosen, distances = selection.k_means_plus_plus(jax.random.key(0), left, right, 15)
        apart, norms = distances_of_products(left, right)
        assert chosen[0] == np.argmax(norms)
        expected = [norms.max()]
        expected += [apart[chosen[i], chosen[:i]].min() for i in range(1, 15)]
        np.testing.assert_allclose(distances, expected, rtol=1e-5)

    def test_draws_have_the_exact_probabilities(self):
        # All ordered triples that can come out, with the product of their probabilities.
        left, right = drawn(5, 2), drawn(5, 3, seed=1)
        apart, norms = distances_of_products(left, right)
        first = int(np.argmax(norms))
        rest = [i for i in range(5) if i != first]
        probability = {}
        for second, third in itertools.permutations(rest, 2):
            after_one, after_two = apart[first] ** 2, apart[[first, second]].min(axis=0) ** 2
            probability[second, third] = (
                after_one[second] / after_one.sum() * after_two[third] / after_two.sum()
            )
        assert sum(probability.values()) == pytest.approx(1)

        keys = jax.random.split(jax.random.key(1), 4000)
        seeding = jax.vmap(lambda key: selection.k_means_plus_plus(key, left, right, 3)[0])
        outcomes = np.asarray(seeding(keys))
        np.testing.assert_array_equal(outcomes[:, 0], first)
        counts = [np.sum((outcomes[:, 1:] == pair).all(axis=1)) for pair in probability]
        expected = 4000 * np.array(list(probability.values()))
        assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3

    def test_no_ghost_center_at_the_origin(self):
        # Nearer to the origin than to each other: a center there would make all but one unlikely.
        left = np.array([[2.0], [1.0], [1e-3]], np.float32)
        right = np.ones((3, 1), np.float32)
        keys = jax.random.split(jax.random.key(0), 500)
        seeding = jax.vmap(lambda key: selection.k_means_plus_plus(key, left, right, 2)[0])
        second = np.asarray(seeding(keys))[:, 1]
        # From 2: squared distances 1 and 4. With a center at 0 the last would have 1e-6.
        assert np.mean(second == 2) == pytest.approx(0.8, abs=0.06)

    def test_copies_of_a_chosen_point_are_at_distance_0(self):
        left = np.repeat(1e3 * drawn(2, 3), 10, axis=0)
        right = np.repeat(drawn(2, 4, seed=1), 10, axis=0)
        chosen, distances = selection.k_means_plus_plus(jax.random.key(0), left, right, 20)
        assert len(np.unique(chosen)) == 20
        assert (np.asarray(distances[:2]) > 0).all()
        np.testing.assert_array_equal(distances[2:], 0)

    def test_uniform_where_every_distance_is_0(self):
        left, right = np.zeros((5, 2), np.float32), np.ones((5, 3), np.float32)
        keys = jax.random.split(jax.random.key(0), 2000)
        seeding = jax.vmap(lambda key: selection.k_means_plus_plus(key, left, right, 3)[0])
        outcomes = np.asarray(seeding(keys))
        assert (outcomes[:, 0] == 0).all()
        for column in (1, 2):
            counts = np.bincount(outcomes[:, column], minlength=5)
            assert counts[0] == 0
            assert scipy.stats.chisquare(counts[1:]).pvalue > 1e-3
