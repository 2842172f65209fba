"""Chooses the images to label next, and writes them to a table and a contact sheet."""

import dataclasses
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np

from dynamical_jax import files, streams
from dynamical_jax.data import images
from dynamical_jax.labeling import folder as folders
from dynamical_jax.labeling import tables
from dynamical_jax.labeling.folder import Folder
from dynamical_jax.labeling.learner import Learner
from dynamical_jax.strategies import LearnerView, Strategy, predictions
from dynamical_jax.types import Examples, OnProgress, Rows, ignore_progress

LARGEST_SHEET = 100
"""Images of a contact sheet."""

SIDE = 220
"""Of a picture in it, in pixels."""

OTHER_SCRIPTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Malgun Gothic",
    "Arial Unicode MS",
)
"""Fonts for names that matplotlib's own cannot write, where one is installed."""


def draw(folder: Folder, batch_size: int, seed: int) -> list[tables.Proposed]:
    """Returns random images, no two nearly the same, all if there are fewer than `batch_size`."""
    folder = folders.apart(folder)
    generator = streams.generator(seed, "strategy", len(folder.labels))
    size = min(batch_size, len(folder.unlabeled))
    rows = generator.choice(folder.unlabeled, size, replace=False)
    return [tables.Proposed(folder.paths[row]) for row in rows]


def choose(
    strategy: Strategy,
    folder: Folder,
    learner: Learner,
    batch_size: int,
    seed: int,
    on_progress: OnProgress = ignore_progress,
) -> list[tables.Proposed]:
    """Returns the images that a strategy chooses to be labeled next, the best first.

    No two of them are nearly the same, as `folder.near` has it.

    Args:
      strategy: one without a state.
      folder: has images to choose from.
      learner: is trained.
      batch_size: how many, all of them if there are fewer.
      seed: with the number of labels, the source of all randomness.
      on_progress: called with (done, total) while images are scored.
    """
    key = streams.key(seed, "strategy", len(folder.labels))
    folder = folders.apart(folder)
    size = min(batch_size, len(folder.unlabeled))
    view = _view(folder, learner, folder.unlabeled)
    query = strategy.query(key, dataclasses.replace(view, on_progress=on_progress), size)
    proposed = predict(folder, learner, folder.unlabeled[query.positions])
    return [
        image._replace(score=float(score))
        for image, score in zip(proposed, query.scores, strict=True)
    ]


def predict(
    folder: Folder,
    learner: Learner,
    rows: np.ndarray,
    on_progress: OnProgress = ignore_progress,
) -> list[tables.Proposed]:
    """Returns images with the class that the model predicts for each.

    Args:
      folder: of the images.
      learner: is trained.
      rows: which images.
      on_progress: called with (done, total).
    """
    view = _view(folder, learner, rows)
    outputs = predictions.predict(view, view.unlabeled, on_progress)
    probabilities = predictions.probabilities(outputs.logits)
    return [
        tables.Proposed(folder.paths[row], learner.class_names[np.argmax(p)], float(np.max(p)))
        for row, p in zip(rows, probabilities, strict=True)
    ]


def write(
    proposed: Sequence[tables.Proposed], folder: str, output: pathlib.Path, like: pathlib.Path
) -> pathlib.Path:
    """Writes a proposal and the contact sheet of its first images; returns the path of the latter.

    Args:
      proposed: the images, not none.
      folder: where they are.
      output: the table; the sheet is beside it.
      like: as in `write_proposal`.
    """
    shown = proposed[:LARGEST_SHEET]
    # Not the model's prediction, which biases people; the table has it.
    captions = [f"{rank}.\n{image.path[-30:]}" for rank, image in enumerate(shown, start=1)]
    thumbnails = [_thumbnail(pathlib.Path(folder) / image.path) for image in shown]
    sheet = output.with_suffix(".png")
    contact_sheet(thumbnails, captions, sheet)
    tables.write_proposal(output, proposed, like)
    return sheet


def _thumbnail(path: pathlib.Path) -> np.ndarray:
    """The image of a file, or white: it may be gone since it was decoded."""
    try:
        return images.thumbnail(path, SIDE)
    except Exception:  # See `images.read`.
        return np.full((1, 1, 3), 255, np.uint8)


def contact_sheet(
    thumbnails: Sequence[np.ndarray], captions: Sequence[str], path: pathlib.Path
) -> None:
    """Draws images in rows of ten, each with a caption.

    Args:
      thumbnails: `[h, w, 3]` uint8 each, not none.
      captions: of each, one line or two.
      path: of the picture.
    """
    from matplotlib import font_manager  # here, because drawing comes last and it takes a while
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)]
    columns = min(10, len(thumbnails))
    rows = -(-len(thumbnails) // columns)
    picture = Figure(figsize=(2.0 * columns, 2.3 * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption in zip(grid.flat, thumbnails, captions, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8, parse_math=False, fontfamily=fonts)
    with files.replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # Boxes, where there is no font.
        picture.savefig(partial, dpi=110, format="png")


def _view(folder: Folder, learner: Learner, rows: np.ndarray) -> LearnerView:
    """Returns the view of a strategy, with these rows as the unlabeled images."""
    labeled = Examples(Rows(folder.x, folder.labeled), learner.targets(folder))
    return LearnerView(learner.model.apply, learner.variables, labeled, Rows(folder.x, rows))
