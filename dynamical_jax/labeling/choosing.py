"""Chooses the next batch of a session: images that the strategy asks for, and some at random."""

import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax import streams
from dynamical_jax.labeling import folder as folders
from dynamical_jax.labeling import learner, proposal
from dynamical_jax.labeling.folder import Folder
from dynamical_jax.labeling.learner import Config
from dynamical_jax.labeling.tables import Proposed
from dynamical_jax.store import Store
from dynamical_jax.strategies import Strategy

Report = Callable[[str, float | None], None]
"""Called with the name of the current task, and the share of it that is done, if known."""


class Settings(NamedTuple):
    """The configuration of a session.

    Attributes:
      images: the folder.
      table: of labels.
      output: table of images to label next; the model is beside it.
      strategy: asks for images; one without a state.
      config: of the model.
      reading: options of `folder.read`.
      batch_size: images of a batch.
      audit_fraction: share of them that is drawn at random.
      classes: names that are there from the beginning.
    """

    images: str
    table: pathlib.Path
    output: pathlib.Path
    strategy: Strategy
    config: Config
    reading: Mapping[str, Any]
    batch_size: int = 25
    audit_fraction: float = 0.1
    classes: tuple[str, ...] = ()

    @property
    def store(self) -> Store:
        """Where the model is kept, as `dynamical-select` does."""
        return Store(self.output.with_suffix(".checkpoint"))


class Chosen(NamedTuple):
    """The images to label next.

    Attributes:
      query: images that the strategy chose, its first choice first.
      audit: images drawn at random.
      predictions: path → prediction, for all images without a label.
      facts: of the training, for the records; empty where there is no model.
    """

    query: list[Proposed]
    audit: list[Proposed]
    predictions: dict[str, Proposed]
    facts: dict[str, Any]


def choose(
    folder: Folder, settings: Settings, is_open: Callable[[str], bool], report: Report
) -> Chosen:
    """Trains, predicts, and asks the strategy; returns the images to label next.

    Random images are drawn first, from all images without a label: if they were drawn from those
    that the strategy leaves over, the model would look better than it is.

    Args:
      folder: the images, and what is labeled.
      settings: of the session.
      is_open: whether a path may be asked for; called when the model is trained.
      report: called with the name of the current task.
    """
    config, size = settings.config, settings.batch_size

    def restricted() -> Folder:
        rows = [row for row in folder.unlabeled if is_open(folder.paths[row])]
        return folder._replace(unlabeled=np.array(rows, int))

    if len(folder.class_names) < 2:
        return Chosen([], proposal.draw(restricted(), size, config.seed), {}, {})
    model, facts = train(folder, settings, report)
    scoring = lambda done, total: report("looking at all images", done / total)
    predictions = predict(folder, model, scoring)
    left = restricted()
    num_audit = min(len(left.unlabeled), int(settings.audit_fraction * size + 0.5))
    generator = streams.generator(config.seed, "draws", len(folder.labels))
    rows = generator.choice(left.unlabeled, num_audit, replace=False)
    audit = [predictions[folder.paths[row]] for row in rows]
    left = folders.apart(left, rows)
    query = []
    if len(left.unlabeled) and size > num_audit:
        scoring = lambda done, total: report("choosing what to ask for", done / total)
        wanted = size - num_audit
        query = proposal.choose(settings.strategy, left, model, wanted, config.seed, scoring)
    return Chosen(query, audit, predictions, facts)


def train(
    folder: Folder, settings: Settings, report: Report
) -> tuple[learner.Learner, dict[str, Any]]:
    """Trains the model on all labels and saves it; returns it, and facts about the training.

    Args:
      folder: has labels of at least two classes.
      settings: of the session.
      report: called with the name of the current task.
    """
    config, store = settings.config, settings.store
    report("training", None)
    start = learner.warm_start(folder, config, store)
    if start.fit is not None:
        return start.learner, start.fit
    target, first = config.training.largest_loss(len(folder.labeled)), None

    def on_epoch(progress: Any, seen: Any) -> None:
        nonlocal first
        text, done = f"training, pass {progress.epoch} over the labels", None
        if seen is not None and target is not None:
            first = max(first or seen.loss, target * 1.001)
            passed = np.log(first / max(seen.loss, 1e-12)) / np.log(first / target)
            done = float(np.clip(passed, 0, 1))
        report(text, done)

    return learner.train(start, folder, config, store, on_epoch)


def predict(
    folder: Folder, model: learner.Learner, on_progress: Callable[[int, int], None]
) -> dict[str, Proposed]:
    """Returns path → prediction of all images without a label, copies included."""
    rows = np.setdiff1d(folder.readable, folder.labeled)
    if not len(rows):
        return {}
    images = proposal.predict(folder, model, rows, on_progress)
    return {image.path: image for image in images}


def place(seed: int, number: int, path: str) -> float:
    """Returns where an image stands, in [0, 1), in the order in which images are drawn at random.

    The order depends neither on what a strategy asks for, nor on when a session began.

    Args:
      seed: of the session.
      number: of the round.
      path: of the image.
    """
    name = f"{seed} {number} {path}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest()) / 2**48


def mix(chosen: Chosen, seed: int, number: int) -> list[Proposed]:
    """Returns the query in its order, with the random images at random positions."""
    total = len(chosen.query) + len(chosen.audit)
    generator = streams.generator(seed, "draws", number, 2)
    places = set(generator.permutation(total)[: len(chosen.audit)].tolist())
    query, audit = iter(chosen.query), iter(chosen.audit)
    return [next(audit if place in places else query) for place in range(total)]
