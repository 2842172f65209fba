"""Rules that turn scores or points into a query. All are deterministic for a given key."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dynamical_jax import parallel
from dynamical_jax.types import AnyArray

CENTERS_AT_A_TIME = 64
POINTS_AT_A_TIME = 512
# With large points values fall by orders of magnitude, so many updates would leave few true digits.
UPDATES = 16

Kernel = Callable[[Array, float | Array], Array]
"""Similarity, from 0 to 1, of points at squared distances d², given a radius r."""

# Squared distances below so many roundings of the squared norms count as 0: copies of a point.
ROUNDING = 16


def top_b(scores: Float[AnyArray, "n"], batch_size: int) -> Int[Array, "b"]:
    """Returns the positions of the `batch_size` largest scores, largest first, Eq. 12.

    Guaranteed: no position twice, and of equal scores the lower position first.

    Raises:
      ValueError: if `batch_size` exceeds the number of scores.

    >>> top_b(jnp.array([1.0, 3.0, 2.0, 3.0]), 3)
    Array([1, 3, 2], dtype=int32)
    """
    _check_batch_size(batch_size, len(scores))
    # −0 and 0 are equal, but not to `top_k`.
    return jax.lax.top_k(jnp.where(scores == 0, 0, scores), batch_size)[1]


def with_noise(key: Array, scores: Float[AnyArray, "n"], beta: float) -> Float[Array, "n"]:
    """Returns β log s + Gumbel noise of each score s: the order of draws in proportion to s^β.

    The largest is s_i with probability s_i^β / Σ s^β, the largest of the rest likewise among them:
    so the b largest are a draw without replacement (Kirsch et al., 2023). Scores that are not above
    0 end up below all others, the larger the higher, and finite.

    Args:
      key: of the noise.
      scores: s.
      beta: β, 0 for a uniform draw, whatever the scores; `inf` for the scores themselves.
    """
    scores = jnp.asarray(scores)
    if beta == math.inf:
        return scores
    noise = jax.random.gumbel(key, scores.shape, scores.dtype)
    if beta == 0:
        return noise
    positive = scores > 0
    noisy = beta * jnp.log(jnp.where(positive, scores, 1)) + noise
    lowest = jnp.min(noisy, where=positive, initial=0)
    # By rank: the scores themselves may differ by less than rounding leaves of them here.
    rank = jnp.argsort(jnp.argsort(-scores)).astype(noisy.dtype)
    return jnp.where(positive, noisy, lowest - 1 - rank)


def greedy(
    scores: Float[AnyArray, "n"], pairs: Float[AnyArray, "n n"], batch_size: int
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """Returns a greedy maximisation of Σ_u s_u + Σ_{u<v} pairs_uv, and the gain of each choice.

    One after the other, the position whose gain is largest: its score, and its pairs with all that
    were chosen before.

    Guaranteed: no position twice, of equal gains the lower position first, and the gains sum to
    the value of what was chosen.

    Raises:
      ValueError: if `batch_size` exceeds the number of scores.

    >>> greedy(jnp.array([3.0, 2.0, 1.0]), jnp.array([[0.0, -2, 0], [-2, 0, 0], [0, 0, 0]]), 2)
    (Array([0, 2], dtype=int32), Array([3., 1.], dtype=float32))
    """
    _check_batch_size(batch_size, len(scores))
    return _greedy(jnp.asarray(scores), jnp.asarray(pairs), batch_size)


def farthest_first(
    points: Float[AnyArray, "n d"],
    centers: Float[AnyArray, "m d"],
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """Returns a farthest-first traversal (k-center greedy), and distances at the time of choice.

    Each next point is the one farthest from all centers and all points chosen before (Sener &
    Savarese, 2018). Without centers the first is the point nearest the mean, whose distance is
    reported as 0. Only distances to the nearest are kept: memory is O((n + m) d). With a mesh each
    device holds an equal share of the points; for each choice it is given one of them.

    Guaranteed: no position twice, and of equal distances the lower position first. Distances of
    copies are equal up to rounding, which differs with the number of devices.

    Raises:
      ValueError: if `batch_size` exceeds the number of points.

    >>> farthest_first(jnp.array([[0.0], [1.0], [5.0]]), jnp.array([[0.0]]), 2)
    (Array([2, 1], dtype=int32), Array([5., 1.], dtype=float32))
    """
    _check_batch_size(batch_size, len(points))
    count, points, centers = len(points), parallel.shares(points, mesh), jnp.asarray(centers)
    # Distances come from products, which lose least where the points lie around the origin.
    mean = jnp.mean(points, axis=0, keepdims=True) * (len(points) / max(count, 1))
    points, centers = points - mean, parallel.replicate(centers - mean, mesh)
    if len(centers):
        nearest = _squared_distances_to_nearest(points, centers)
        return _farthest_first(points, nearest, count, batch_size, mesh)
    first, nearest = _nearest_to_origin(points, count, mesh)
    chosen, distances = _farthest_first(points, nearest, count, batch_size - 1, mesh)
    return jnp.append(first, chosen), jnp.append(0.0, distances)


def k_means_plus_plus(
    key: Array,
    left: Float[AnyArray, "n k"],
    right: Float[AnyArray, "n d"],
    batch_size: int,
    weights: Float[AnyArray, "n"] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """Returns a k-means++ seeding of the points left_i ⊗ right_i, and the distance of each.

    The first is the point of largest norm (Ash et al., 2020); each next one is drawn with
    probability proportional to D², the squared distance to the nearest chosen one, uniformly among
    the rest if every D² is 0. The products are never formed: memory is O(n (k + d)). The distance
    of a point is to the nearest chosen before; that of the first is its norm.

    With weights, at least 0, the first is the point of largest weight, and the probability of each
    next one is proportional to its weight times D². With a mesh each device holds an equal share of
    the points; for each choice it is given one of them. Draws are the same on any number of
    devices.

    Guaranteed: no position twice.

    Raises:
      ValueError: if `batch_size` exceeds the number of points.
    """
    _check_batch_size(batch_size, len(left))
    count = len(left)
    left, right = parallel.shares(left, mesh), parallel.shares(right, mesh)
    weights = None if weights is None else parallel.shares(weights, mesh)
    return _k_means_plus_plus(key, left, right, weights, count, batch_size, mesh)


def weighted_k_means_plus_plus(
    key: Array,
    products: Float[AnyArray, "n n"],
    weights: Float[AnyArray, "n"],
    batch_size: int,
) -> Int[Array, "b"]:
    """Returns a k-means++ seeding of weighted points, of which inner products are given.

    The first is the point of largest weight; each next one is drawn with probability proportional
    to its weight times D², uniformly among the rest where all of these are 0.

    Guaranteed: no position twice.

    Args:
      key: of the draws.
      products: x_i·x_j of all pairs of points.
      weights: at least 0.
      batch_size: how many.

    Raises:
      ValueError: if `batch_size` exceeds the number of points.
    """
    _check_batch_size(batch_size, len(weights))
    return _k_means_plus_plus_of_products(
        key, jnp.asarray(products), jnp.asarray(weights), batch_size
    )


def gaussian(squared: Array, radius: float | Array) -> Array:
    """The kernel exp(−d² / r²)."""
    return jnp.exp(-squared / radius**2)


def ball(squared: Array, radius: float | Array) -> Array:
    """The kernel that is 1 where d < r."""
    return (squared < radius**2).astype(squared.dtype)


def coverage(
    targets: Float[AnyArray, "m d"],
    centers: Float[AnyArray, "c d"],
    kernel: Kernel,
    radius: float,
) -> Float[Array, "m"]:
    """Returns how far each target is covered: its kernel with the nearest center; 0 without."""
    targets, centers = jnp.asarray(targets), jnp.asarray(centers)
    if not len(centers):
        return jnp.zeros(len(targets), targets.dtype)
    return kernel(_squared_distances_to_nearest(targets, centers), radius)


@functools.partial(jax.jit, static_argnames="kernel")
def coverage_gains(
    points: Float[AnyArray, "n d"],
    targets: Float[AnyArray, "m d"],
    weights: Float[AnyArray, "m"],
    covered: Float[AnyArray, "m"],
    kernel: Kernel,
    radius: float | Array,
) -> Float[Array, "n"]:
    """Returns what each point adds to the mean over targets v of w_v times how far v is covered."""
    more = kernel(_squared_distances(points, targets), radius) - covered[None]
    return _product(jnp.maximum(more, 0), weights) / len(weights)


def cover(
    points: Float[AnyArray, "n d"],
    targets: Float[AnyArray, "m d"],
    weights: Float[AnyArray, "m"],
    covered: Float[AnyArray, "m"],
    kernel: Kernel,
    radius: float,
    batch_size: int,
) -> tuple[Int[np.ndarray, "b"], Float[np.ndarray, "b"]]:
    """Returns a greedy maximisation of the mean of w_v max(covered_v, max_c k(c, v)) over v.

    One after the other, the point c that adds most, with what it adds; v are the targets. No array
    of all pairs is formed, memory is O((n + m) d).

    Guaranteed: no position twice, and of equal gains the lower position first.

    Raises:
      ValueError: if `batch_size` exceeds the number of points.
    """
    _check_batch_size(batch_size, len(points))
    # Few at a time are looked at: they are gathered on the host, which needs no program.
    points, covered = np.asarray(points), jnp.asarray(covered)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)

    def gains(positions: np.ndarray) -> Array:
        return coverage_gains(points[positions], targets, weights, covered, kernel, radius)

    def choose(position: int) -> None:
        nonlocal covered
        covered = _cover_more(points[[position]], targets, covered, kernel, radius)

    return lazy_greedy(gains, choose, len(points), batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def least_trace(
    points: Float[AnyArray, "n d"],
    start: Float[AnyArray, "d d"],
    target: Float[AnyArray, "d d"],
    batch_size: int,
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """Returns a greedy minimisation of tr((M + Σ v vᵀ)⁻¹ F) over points v, and the gain of each.

    Twice as many as asked for are chosen, one after the other, each the one by which the trace
    falls most. Then those are dropped, one after the other, by which it rises least. The gain is
    what the trace fell when the point was chosen. Inverses are updated, which takes O(n d) for each
    choice, and computed anew after `UPDATES` choices, O(n d²); memory is O(n d + d²).

    Guaranteed: no position twice, and of equal gains the lower position first.

    Args:
      points: v.
      start: M, positive definite.
      target: F.
      batch_size: how many to choose.
    """

    def add(carry: tuple["_Trace", Array], step: Array) -> tuple:
        trace, taken = carry
        trace = trace.refreshed(points, target, step)
        gains = jnp.where(taken, -jnp.inf, trace.fall(1))
        chosen = jnp.argmax(gains)
        return (trace.update(points, target, chosen, 1), taken.at[chosen].set(True)), (
            chosen,
            gains[chosen],
        )

    count = min(2 * batch_size, len(points))
    carry = _Trace.of(start, points, target), jnp.zeros(len(points), bool)
    (trace, _), (chosen, gains) = jax.lax.scan(add, carry, jnp.arange(count))
    found = points[chosen]

    def drop(carry: tuple["_Trace", Array], step: Array) -> tuple:
        trace, kept = carry
        trace = trace.refreshed(found, target, step)
        dropped = jnp.argmin(jnp.where(kept, trace.fall(-1), jnp.inf))
        return (
            trace.update(found, target, dropped, -1),
            kept.at[dropped].set(False),
        ), None

    carry = _Trace.of(trace.matrix, found, target), jnp.ones(count, bool)
    (_, kept), _ = jax.lax.scan(drop, carry, jnp.arange(count - batch_size))
    kept = jnp.flatnonzero(kept, size=batch_size)
    return chosen[kept], gains[kept]


def trace_falls(
    points: Float[AnyArray, "n d"], start: Float[AnyArray, "d d"], target: Float[AnyArray, "d d"]
) -> Float[Array, "n"]:
    """Returns what tr(M⁻¹ F) falls by if v vᵀ is added to M, of each point v by itself.

    Args:
      points: v.
      start: M, positive definite.
      target: F.
    """
    return _Trace.of(start, points, target).fall(1)


class _Trace(NamedTuple):
    """M, M⁻¹, and for each point v: vᵀ M⁻¹ v and vᵀ M⁻¹ F M⁻¹ v."""

    matrix: Array
    inverse: Array
    norms: Array
    weighted: Array

    @classmethod
    def of(cls, matrix: Array, points: Array, target: Array) -> "_Trace":
        inverse = jnp.linalg.inv(matrix)
        seen = _product(points, inverse)
        weighted = jnp.sum(_product(seen, target) * seen, axis=-1)
        return cls(matrix, inverse, jnp.sum(seen * points, axis=-1), weighted)

    def refreshed(self, points: Array, target: Array, step: Array) -> "_Trace":
        """The same, in each step that `UPDATES` divides computed anew."""
        anew = (step > 0) & (step % UPDATES == 0)
        return jax.lax.cond(anew, lambda: _Trace.of(self.matrix, points, target), lambda: self)

    def fall(self, sign: int) -> Array:
        """What tr(M⁻¹ F) falls by where v is added, or rises by where it is dropped, sign −1."""
        return self.weighted / (1 + sign * self.norms)

    def update(self, points: Array, target: Array, chosen: Array, sign: int) -> "_Trace":
        """After M becomes M + sign v vᵀ of the chosen v, by the formula of Sherman and Morrison."""
        a = _product(self.inverse, points[chosen])
        c = sign / (1 + sign * self.norms[chosen])
        w = _product(self.inverse, _product(target, a))
        to_a, to_w = _product(points, a), _product(points, w)  # At once XLA takes 40 times as long.
        twice = jnp.sum(a * _product(target, a))
        return _Trace(
            self.matrix + sign * jnp.outer(points[chosen], points[chosen]),
            self.inverse - c * jnp.outer(a, a),
            self.norms - c * to_a**2,
            self.weighted - 2 * c * to_a * to_w + c**2 * twice * to_a**2,
        )


def lazy_greedy(
    gains: Callable[[np.ndarray], AnyArray],
    choose: Callable[[int], None],
    size: int,
    batch_size: int,
) -> tuple[Int[np.ndarray, "b"], Float[np.ndarray, "b"]]:
    """Returns a greedy maximisation of a set function whose gains only fall, and the gains.

    The gain of a position when it was last computed bounds what it is now. So gains are computed
    again for the largest bounds alone, until the largest of all is up to date (Minoux, 1978).

    Guaranteed: no position twice, and of equal gains the lower position first.

    Args:
      gains: returns the present gains of positions.
      choose: called with each position that is chosen.
      size: number of positions.
      batch_size: how many to choose.
    """
    bounds = np.concatenate([np.zeros(0), *(gains(part) for part in _parts(size))])[:size]
    at_a_time = min(CENTERS_AT_A_TIME, size)
    seen = np.zeros(size, int)  # How many were chosen when the gain was computed.
    taken = np.zeros(size, bool)
    chosen, values = np.empty(batch_size, int), np.empty(batch_size)
    for step in range(batch_size):
        while seen[best := int(np.argmax(bounds))] < step:
            stale = np.where(seen < step, bounds, -np.inf)
            part = np.argpartition(stale, -at_a_time)[-at_a_time:]
            part[0] = best  # Of equal bounds any may be in the part.
            bounds[part] = np.where(taken[part], -np.inf, gains(part))
            seen[part] = step
        chosen[step], values[step] = best, bounds[best]
        bounds[best], taken[best] = -np.inf, True
        choose(best)
    return chosen, values


def smallest_distance(points: Float[AnyArray, "n d"]) -> float:
    """Returns the smallest distance between two points that is not 0; 0 if there is none."""
    points = np.asarray(points)
    parts = [jnp.asarray(points[part]) for part in _parts(len(points))]
    pairs = itertools.combinations_with_replacement(parts, 2)
    least = min(jax.device_get([_smallest_apart(*pair) for pair in pairs]), default=np.inf)
    return math.sqrt(least) if least < np.inf else 0.0


def distances_to_others(
    some: Float[np.ndarray, "k d"],
    classes_of_some: Int[np.ndarray, "k"],
    points: Float[np.ndarray, "n d"],
    classes: Int[np.ndarray, "n"],
) -> Float[np.ndarray, "k"]:
    """Returns the distance of some points to the nearest point of another class; inf without."""
    least = np.full(len(some), np.inf)
    for part in _parts(len(points)):
        squared = np.asarray(_pairs(some, points[part]))
        other = classes_of_some[:, None] != classes[part]
        least = np.minimum(least, np.min(squared, axis=1, where=other, initial=np.inf))
    return np.sqrt(least)


def _parts(size: int) -> Iterator[np.ndarray]:
    """Yields all positions in parts of one length, so that one program serves all, of every round.

    The last part goes on with the first positions.
    """
    for start in range(0, size, POINTS_AT_A_TIME):
        yield np.arange(start, start + POINTS_AT_A_TIME) % size


def _check_batch_size(batch_size: int, size: int) -> None:
    if batch_size > size:
        raise ValueError(f"cannot choose {batch_size} of {size}")


def _squared_distances_from_products(own: Array, others: Array, products: Array) -> Array:
    """Returns ‖x − y‖² from ‖x‖², ‖y‖² and x·y; exactly 0 where it is within rounding."""
    squared = own + others - 2 * products
    return jnp.where(squared <= ROUNDING * jnp.finfo(squared).eps * (own + others), 0, squared)


def _squared_distances(points: Array, centers: Array) -> Array:
    norms = [jnp.sum(part**2, axis=-1) for part in (points, centers)]
    return _squared_distances_from_products(
        norms[0][:, None], norms[1][None], _product(points, centers.T)
    )


def _product(left: Array, right: Array) -> Array:
    # Accelerators would round to fewer digits than float32 has.
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _pairs(points: Array, others: Array) -> Array:
    return _squared_distances(points, others)


@jax.jit
def _smallest_apart(points: Array, others: Array) -> Array:
    """Returns the smallest squared distance that is not 0; infinity without."""
    squared = _squared_distances(points, others)
    return jnp.min(squared, where=squared > 0, initial=jnp.inf)


@functools.partial(jax.jit, static_argnames="kernel")
def _cover_more(
    point: Array, targets: Array, covered: Array, kernel: Kernel, radius: Array
) -> Array:
    return jnp.maximum(covered, kernel(_squared_distances(targets, point)[:, 0], radius))


def _squared_distances_to_nearest(points: Array, centers: Array) -> Array:
    """Returns squared distances to the nearest center, computed a few centers at a time.

    One program serves any number of centers: an accelerator takes seconds to compile one.
    """
    least = jnp.full_like(points[:, 0], jnp.inf)
    for start in range(0, len(centers), CENTERS_AT_A_TIME):
        rows = np.arange(start, start + CENTERS_AT_A_TIME) % len(centers)
        least = _nearer(least, points, centers[rows])
    return least


@jax.jit
def _nearer(least: Array, points: Array, centers: Array) -> Array:
    return jnp.minimum(least, jnp.min(_squared_distances(points, centers), axis=-1))


@functools.partial(jax.jit, static_argnames="mesh")
def _nearest_to_origin(points: Array, count: Array, mesh: Mesh | None) -> tuple[Array, Array]:
    """Returns the point nearest the origin, and squared distances to it, −1 for itself."""
    places = jnp.arange(len(points))
    nearness = jnp.where(places < count, -jnp.sum(points**2, axis=-1), -jnp.inf)
    first = parallel.argmax(nearness, mesh)
    squared = _squared_distances(points, parallel.row(points, first, mesh)[None])[:, 0]
    return first, jnp.where(places == first, -1, squared)


@functools.partial(jax.jit, static_argnames=("batch_size", "mesh"))
def _farthest_first(
    points: Array, nearest: Array, count: Array, batch_size: int, mesh: Mesh | None = None
) -> tuple[Array, Array]:
    """Continues from squared distances to the nearest, which are −1 at chosen points.

    Only the first `count` rows are points; others fill up the shares of devices.
    """
    places, norms = jnp.arange(len(points)), jnp.sum(points**2, axis=-1)
    nearest = jnp.where(places < count, nearest, -1)

    def step(nearest: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        chosen = parallel.argmax(nearest, mesh)
        point, norm, squared = parallel.row((points, norms, nearest), chosen, mesh)
        product = _product(points, point)
        # The minimum leaves −1 as it is: no point is chosen again.
        nearest = jnp.minimum(nearest, _squared_distances_from_products(norms, norm, product))
        return jnp.where(places == chosen, -1, nearest), (chosen, squared)

    _, (chosen, squared) = jax.lax.scan(step, nearest, length=batch_size)
    return parallel.together((chosen, jnp.sqrt(squared)), mesh)


@functools.partial(jax.jit, static_argnames="batch_size")
def _greedy(gains: Array, pairs: Array, batch_size: int) -> tuple[Array, Array]:
    def step(gains: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        chosen = jnp.argmax(gains)
        return (gains + pairs[chosen]).at[chosen].set(-jnp.inf), (chosen, gains[chosen])

    return jax.lax.scan(step, gains, length=batch_size)[1]


@functools.partial(jax.jit, static_argnames=("batch_size", "mesh"))
def _k_means_plus_plus(
    key: Array,
    left: Array,
    right: Array,
    weights: Array | None,
    count: Array,
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    # ⟨a⊗h, b⊗g⟩ = ⟨a, b⟩ ⟨h, g⟩.
    norms = jnp.sum(left**2, axis=-1) * jnp.sum(right**2, axis=-1)

    def to_chosen(chosen: Array) -> Array:
        one, other, norm = parallel.row((left, right, norms), chosen, mesh)
        product = _product(left, one) * _product(right, other)
        return _squared_distances_from_products(norms, norm, product)

    first = norms if weights is None else weights
    weights = jnp.ones_like(norms) if weights is None else weights
    filling = jnp.arange(len(norms)) >= count  # Rows that fill up the shares of devices.
    found = _seeding(key, first, norms, weights, filling, to_chosen, batch_size, mesh)
    return parallel.together(found, mesh)


@functools.partial(jax.jit, static_argnames="batch_size")
def _k_means_plus_plus_of_products(
    key: Array, products: Array, weights: Array, batch_size: int
) -> Array:
    norms = jnp.diagonal(products)

    def to_chosen(chosen: Array) -> Array:
        return _squared_distances_from_products(norms, norms[chosen], products[chosen])

    none = jnp.zeros(len(norms), bool)
    return _seeding(key, weights, norms, weights, none, to_chosen, batch_size)[0]


def _seeding(
    key: Array,
    first: Array,
    norms: Array,
    weights: Array,
    filling: Array,
    to_chosen: Callable[[Array], Array],
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """Runs k-means++ from the point where `first` is largest, by squared distances `to_chosen`.

    None that is `filling` is chosen.
    """
    places = jnp.arange(len(norms))
    first = jnp.where(filling, -jnp.inf, first)

    def step(carry: tuple[Array, Array], key: Array) -> tuple:
        nearest, taken = carry
        is_first = jnp.all(taken == filling)
        odds = jnp.where(taken, 0, weights * nearest)
        odds = jnp.where(jnp.any(odds > 0), odds, ~taken)
        # The largest of log-odds and Gumbel noise is a draw by the odds.
        draw = jnp.log(odds) + jax.random.gumbel(key, odds.shape, odds.dtype)
        chosen = parallel.argmax(jnp.where(is_first, first, draw), mesh)
        distance = jnp.sqrt(parallel.row(nearest, chosen, mesh))
        # Before the first there is no center: norms are no distances to a point at the origin.
        nearest = jnp.minimum(jnp.where(is_first, jnp.inf, nearest), to_chosen(chosen))
        return (nearest, taken | (places == chosen)), (chosen, distance)

    return jax.lax.scan(step, (norms, filling), jax.random.split(key, batch_size))[1]
