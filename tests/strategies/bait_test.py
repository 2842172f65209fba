"""BAIT, with every trace of an inverse written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynamical_jax as dj
from dynamical_jax import strategies
from dynamical_jax.strategies import selection

GENERATOR = np.random.default_rng(0)
OUTPUTS = GENERATOR.normal(size=(60, 3 + 5)).astype(np.float32) * ([1.5] * 3 + [1, 3, 1, 2, 1])
OUTPUTS = OUTPUTS.astype(np.float32)


def split(variables, x):
    return dj.Outputs(x[:, :3], x[:, 3:])


def trace(inverse_of, target):
    return np.trace(np.linalg.inv(inverse_of) @ target)


def reference(points, start, target, batch_size):
    """Twice as many as asked for, then the fewer: every trace anew."""
    outer = points[:, :, None] * points[:, None]
    chosen, falls = [], []
    for _ in range(min(2 * batch_size, len(points))):
        before = trace(start + outer[chosen].sum(axis=0), target)
        left = [i for i in range(len(points)) if i not in chosen]
        after = [trace(start + outer[[*chosen, i]].sum(axis=0), target) for i in left]
        chosen.append(left[int(np.argmin(after))])
        falls.append(before - min(after))
    kept = list(range(len(chosen)))
    while len(kept) > batch_size:
        without = [[j for j in kept if j != i] for i in kept]
        rows = [[chosen[j] for j in each] for each in without]
        kept = without[np.argmin([trace(start + outer[each].sum(axis=0), target) for each in rows])]
    return [chosen[j] for j in kept], [falls[j] for j in kept]


@pytest.mark.parametrize("num_labeled", [0, 10])
def test_against_traces_of_inverses(num_labeled):
    x = OUTPUTS.astype(np.float64)
    p = np.exp(x[:, :3])
    p = (p / p.sum(axis=1, keepdims=True)).max(axis=1)
    # The binary Fisher information, from its two gradients: p is the sigmoid of a logit along h.
    gradients = [(1 - p)[:, None] * x[:, 3:], -p[:, None] * x[:, 3:]]
    information = sum(
        odds[:, None, None] * g[:, :, None] * g[:, None]
        for odds, g in zip((p, 1 - p), gradients, strict=True)
    )
    b, m = 7, num_labeled
    start = np.eye(5)
    if m:
        start = start + m / (m + b) * information[:m].mean(axis=0)
    v = np.sqrt(b / (m + b)) * np.sqrt(p * (1 - p))[:, None] * x[:, 3:]
    np.testing.assert_allclose(v[:, :, None] * v[:, None], b / (m + b) * information)
    expected, falls = reference(v[m:], start, information.mean(axis=0), b)

    view = dj.LearnerView(split, {}, dj.Examples(OUTPUTS[:m], np.zeros(m, int)), OUTPUTS[m:])
    query = strategies.Bait().query(jax.random.key(0), view, b)
    np.testing.assert_array_equal(query.positions, expected)
    np.testing.assert_allclose(query.scores, falls, rtol=1e-3)


def test_updates_of_the_inverse_stay_true_over_many_choices():
    points = np.random.default_rng(1).normal(size=(300, 40)).astype(np.float32)
    points *= np.geomspace(0.01, 3, 300, dtype=np.float32)[:, None]
    second = (points.T @ points / 300).astype(np.float32)
    points, second = jnp.asarray(points), jnp.asarray(second)
    trace = selection._Trace.of(jnp.eye(40), points, second)
    update = jax.jit(selection._Trace.update, static_argnames="sign")
    for position in range(300):
        trace = update(trace, points, second, jnp.asarray(position), sign=1)
    points, second = np.asarray(points, float), np.asarray(second)
    inverse = np.linalg.inv(np.eye(40) + points.T @ points)
    np.testing.assert_allclose(trace.inverse, inverse, atol=2e-5)
    seen = points @ inverse
    np.testing.assert_allclose(trace.norms, np.sum(seen * points, axis=1), atol=1e-3)
    np.testing.assert_allclose(trace.weighted, np.sum(seen @ second * seen, axis=1), atol=1e-3)


def test_many_choices_among_large_points_are_those_of_float64():
    generator = np.random.default_rng(0)
    points = np.maximum(generator.normal(size=(400, 64)), 0) * np.arange(1, 65) ** -0.8
    points *= 60 * np.sqrt(generator.uniform(0.01, 0.25, (400, 1))) / np.linalg.norm(points[0])
    target, b = points.T @ points / 400, 60

    def falls(rows, matrix, sign):
        seen = points[rows] @ np.linalg.inv(matrix)
        weighted = np.sum(seen @ target * seen, axis=1)
        return weighted / (1 + sign * np.sum(seen * points[rows], axis=1))

    matrix, chosen = np.eye(64), []
    for _ in range(2 * b):
        gains = falls(slice(None), matrix, 1)
        gains[chosen] = -np.inf
        chosen.append(int(np.argmax(gains)))
        matrix = matrix + np.outer(points[chosen[-1]], points[chosen[-1]])
    for _ in range(b):
        dropped = chosen.pop(int(np.argmin(falls(chosen, matrix, -1))))
        matrix = matrix - np.outer(points[dropped], points[dropped])

    single = [jnp.asarray(each, jnp.float32) for each in (points, np.eye(64), target)]
    positions, _ = selection.least_trace(*single, b)
    assert len(set(chosen) & set(np.asarray(positions).tolist())) >= b - 1
