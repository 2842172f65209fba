"""Draws the pictures of docs/gallery.md: what each strategy asks for in two dimensions.

  python -m docs.gallery

One network is trained on a few labeled points of the plane. Each strategy then asks it for ten
more. Its picture shows them in the order in which they were chosen, over the score that a point
would have had at any place of the plane. Half a minute on two cores; the same pictures each time.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from matplotlib import colors
from sklearn.neighbors import NearestNeighbors

import dynamical_jax as dj
from dynamical_jax import strategies
from dynamical_jax.reports import plotting

FOLDER = pathlib.Path(__file__).parent / "gallery"
SEED = 0
BATCH_SIZE = 10
GRID_SIZE = 120
KEY = jax.random.key(SEED)
CLASS_COLORS = ("tab:blue", "tab:orange", "tab:green")
QUERY_COLOR = "crimson"
# With its own default the whole query would be one block.
OPTIONS = {"dynamical_repelled": {"block_size": 2}}

Background = Callable[[Any], np.ndarray]


class MLP(nn.Module):
    """A network of the plane, with the embedding and the dropout that some strategies look at.

    It is trained without dropout, so that it is one network for all strategies.
    """

    @nn.compact
    def __call__(self, x: Any) -> dj.Outputs:
        """Returns logits and embedding of points `[n, 2]`."""
        for _ in range(2):
            x = nn.Dropout(0.3, deterministic=True)(nn.tanh(nn.Dense(32)(x)))
        return dj.Outputs(nn.Dense(len(CLASS_COLORS))(x), x)


class Task(NamedTuple):
    """A pool, its labeled points, and the network trained on these."""

    pool: dj.Examples
    labeled: np.ndarray
    model: nn.Module
    variables: Any

    def view(self, unlabeled: np.ndarray | None = None) -> dj.LearnerView:
        """Returns what a strategy sees, with these points to choose from, or the pool's."""
        if unlabeled is None:
            unlabeled = np.delete(self.pool.x, self.labeled, axis=0)
        labeled = dj.Examples(self.pool.x[self.labeled], self.pool.y[self.labeled])
        return dj.LearnerView(self.model.apply, self.variables, labeled, unlabeled)


def main() -> None:
    """Draws all pictures."""
    FOLDER.mkdir(exist_ok=True)
    task = make_task()
    draw_task(task, FOLDER / "task.png")
    for name, strategy in dj.STRATEGIES.items():
        draw(task, strategy(**OPTIONS.get(name, {})), FOLDER / f"{name}.png")
        print(FOLDER / f"{name}.png")


def make_task(num_labeled: int = 12) -> Task:
    """Returns three classes that meet and an island of one, and a network that has not seen it."""
    generator = np.random.default_rng(SEED)
    angle = 2 * np.pi * np.arange(3) / 3 + 0.6
    centers = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    parts = [
        generator.normal(center, 0.45, (count, 2))
        for center, count in zip(centers, (150, 110, 150), strict=True)
    ]
    island = generator.normal((3.2, -0.6), 0.2, (50, 2))
    x = np.concatenate([*parts, island]).astype(np.float32)
    pool = dj.Examples(x, np.repeat([0, 1, 2, 1], [150, 110, 150, 50]).astype(np.int32))
    labeled = generator.choice(len(x) - len(island), num_labeled, replace=False)
    model = MLP()
    start = dj.models.init(model, dj.streams.key(SEED, "weights"), pool.x)
    examples = dj.Examples(pool.x[labeled], pool.y[labeled])
    fit = dj.training.fit(model, start, examples, dj.TrainingConfig(learning_rate=1e-2), SEED)
    return Task(pool, labeled, model, fit.variables)


def background(strategy: strategies.Strategy, task: Task, points: np.ndarray) -> np.ndarray:
    """Returns the score of each of the points, by which the first one is chosen.

    Strategies that choose one point after the other score the others again each time, by the
    distance to those that are chosen. This returns their first scores.
    """
    key_score, _ = jax.random.split(KEY)  # As `Strategy.query` does.
    look = lambda view: strategy.score(key_score, view, strategy.init())
    scored = look(task.view(points))
    if isinstance(strategy, strategies.TypiClust):
        nearest = NearestNeighbors(n_neighbors=20).fit(look(task.view()).unlabeled)
        return 1 / np.mean(nearest.kneighbors(scored.unlabeled)[0], axis=1)
    # What is to be covered is the pool, not the plane.
    if isinstance(scored, strategies.coverage.Coverage):
        *covering, radius = look(task.view())._replace(points=scored.points)
        gains = strategies.selection.coverage_gains(*covering, strategy.kernel, radius)
        return np.asarray(gains)
    if isinstance(scored, strategies.bait.Fisher):
        factors = strategies.bait.information(*scored, BATCH_SIZE)[0]
        of_pool = strategies.bait.information(*look(task.view()), BATCH_SIZE)[1:]
        return np.asarray(strategies.selection.trace_falls(factors, *of_pool))
    if isinstance(strategy, strategies.BatchBald):
        return np.asarray(strategies.bald.mutual_information(scored))
    return first_look(scored)


def first_look(scored: Any) -> np.ndarray:
    """Returns `[n]` scores of what a strategy's `score` returns."""
    match scored:
        case strategies.dynamical.Changes():
            return scored.change
        case strategies.coreset.Embeddings() as embeddings:
            between = embeddings.unlabeled[:, None] - embeddings.labeled[None]
            return np.min(np.linalg.norm(between, axis=-1), axis=1)
        case strategies.badge.Factors(residual, embedding):
            return np.linalg.norm(residual, axis=-1) * np.linalg.norm(embedding, axis=-1)
        case strategies.albl.BanditState(), arm_scores:
            return first_look(arm_scores)
        case strategies.sampled.Noisy():
            return np.asarray(scored.scores)
    return np.asarray(scored)


def draw(task: Task, strategy: strategies.Strategy, path: pathlib.Path) -> None:
    """Draws the score over the plane, the points, and those that are asked for."""
    picture, axes = canvas()
    sides, points = grid(task)
    score = background(strategy, task, points).reshape(GRID_SIZE, GRID_SIZE)
    # Few points with a score far above the rest would leave one colour for all others.
    low, high = np.quantile(score, (0.02, 0.98))
    axes.pcolormesh(
        *sides,
        score,
        cmap="Greys",
        norm=colors.Normalize(low, high + (high - low) / 2),
        rasterized=True,
    )
    draw_points(axes, task)
    view = task.view()
    query = strategy.query(KEY, view, BATCH_SIZE)
    chosen = view.unlabeled[query.positions]
    axes.scatter(*chosen.T, s=70, color=QUERY_COLOR, edgecolors="white", linewidths=0.8, zorder=4)
    for number, point in enumerate(chosen, start=1):
        style = {"ha": "center", "va": "center_baseline", "fontsize": 6, "color": "white"}
        axes.text(*point, str(number), zorder=5, **style)
    save(picture, path)


def draw_task(task: Task, path: pathlib.Path) -> None:
    """Draws the points, and the class that the network predicts at each place of the plane."""
    picture, axes = canvas()
    sides, points = grid(task)
    logits = jax.jit(task.model.apply)(task.variables, points).logits
    predicted = np.argmax(logits, axis=-1).reshape(GRID_SIZE, GRID_SIZE)
    classes = colors.ListedColormap(CLASS_COLORS)
    axes.pcolormesh(*sides, predicted, cmap=classes, alpha=0.25, vmin=0, vmax=2, rasterized=True)
    draw_points(axes, task, truth=True)
    save(picture, path)


def draw_points(axes: Any, task: Task, truth: bool = False) -> None:
    """Draws the pool, with the classes that no strategy sees if `truth`, and what is labeled."""
    classes = np.array(CLASS_COLORS)
    pool_colors = classes[task.pool.y] if truth else "tab:cyan"
    axes.scatter(*task.pool.x.T, s=5, c=pool_colors, linewidths=0, zorder=2)
    x, y = task.pool.x[task.labeled], task.pool.y[task.labeled]
    axes.scatter(*x.T, s=45, c=classes[y], marker="s", edgecolors="black", zorder=3)


def grid(task: Task) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the sides of a grid over the plane, and its points `[GRID_SIZE², 2]`."""
    low, high = task.pool.x.min(axis=0) - 0.3, task.pool.x.max(axis=0) + 0.3
    sides = [np.linspace(*ends, GRID_SIZE) for ends in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
    return sides, points.astype(np.float32)


def canvas() -> tuple[Any, Any]:
    """Returns an empty picture and its axes."""
    picture = plotting.figure(5.0, 3.2)
    axes = picture.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal")
    return picture, axes


def save(picture: Any, path: pathlib.Path) -> None:
    """Writes a picture, without the version of what drew it."""
    picture.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
