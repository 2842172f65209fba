"""The model that learns what a person labels, round after round, from where it stood."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax import models, streams, training
from dynamical_jax.data import datasets
from dynamical_jax.labeling.folder import Folder
from dynamical_jax.store import Store, unflattened
from dynamical_jax.types import Examples, Rows


class Config(NamedTuple):
    """What a model is, and how it is trained.

    Attributes:
      model: a key of `models.MODELS`.
      options: attributes of its module.
      training: how it is fitted to the labels.
      seed: of all randomness.
    """

    model: str
    options: Mapping[str, Any]
    training: training.TrainingConfig
    seed: int

    def kind(self, folder: Folder) -> dict[str, Any]:
        """Returns what must be the same for a model to be trained further, as flags name it."""
        return {"model": self.model, **self.options, "image_size": list(folder.x.shape[1:])}


class Learner(NamedTuple):
    """A model, its variables, and the classes of its outputs."""

    model: models.Standardized
    variables: Any
    class_names: list[str]

    def targets(self, folder: Folder) -> np.ndarray:
        """Returns the labels as numbers."""
        names = folder.labels.values()
        return np.array([self.class_names.index(name) for name in names], np.int32)


class Start(NamedTuple):
    """From where a round goes on.

    Attributes:
      learner: to be trained, unless `fit` says that it was.
      round_index: of this round.
      fit: what `train` returned when it was trained on just these labels; None if it was not.
      former_kind: `Config.kind` of the last round's model, if that was of another kind, so that
        this one starts anew; None else.
      new_classes: that the last round's model did not know.
    """

    learner: Learner
    round_index: int
    fit: dict[str, Any] | None = None
    former_kind: dict[str, Any] | None = None
    new_classes: tuple[str, ...] = ()


def warm_start(folder: Folder, config: Config, store: Store) -> Start:
    """Returns the learner of the last round, grown by the classes that are new, or a fresh one.

    Args:
      folder: has labels of at least two classes.
      config: of the learner.
      store: where `train` kept it.
    """
    kind, names = config.kind(folder), folder.class_names
    kept = store.restore(lambda description, leaves: (description, leaves))
    if kept is None:
        return Start(fresh(folder, config, names), 0)
    description, leaves = kept
    round_index = description["round"] + 1
    former = {name: description.get(name) for name in kind}
    if former != kind:
        return Start(fresh(folder, config, names), round_index, former_kind=former)
    mean, std, known = (description[name] for name in ("mean", "std", "class_names"))
    old = _learner(folder, config, known, mean, std)
    old = old._replace(variables=unflattened(old.variables, leaves))
    new = [name for name in names if name not in known]
    if not new:
        same = description["labels"] == folder.labels_checksum
        return Start(old, round_index, fit=description["fit"] if same else None)
    larger = _learner(folder, config, known + new, mean, std)
    grown = models.grown(old.variables, larger.variables)
    return Start(larger._replace(variables=grown), round_index, new_classes=tuple(new))


def train(
    start: Start,
    folder: Folder,
    config: Config,
    store: Store,
    on_epoch: training.OnEpoch = lambda progress, labeled: None,
) -> tuple[Learner, dict[str, Any]]:
    """Trains a learner on all labels and keeps it for the next round.

    Args:
      start: from where it goes on.
      folder: as in `warm_start`.
      config: likewise.
      store: likewise.
      on_epoch: as in `training.fit`.

    Returns:
      The learner, and of the training "epochs" and "train_accuracy".
    """
    learner, fit = fitted(start.learner, folder, config, on_epoch)
    facts = {"epochs": fit.epochs, "train_accuracy": fit.labeled.accuracy}
    description = {
        **config.kind(folder),
        "class_names": learner.class_names,
        "mean": learner.model.mean,
        "std": learner.model.std,
        "labels": folder.labels_checksum,
        "round": start.round_index,
        "fit": facts,
    }
    store.save(f"round-{start.round_index:05d}", learner.variables, description)
    return learner, facts


def fitted(
    learner: Learner,
    folder: Folder,
    config: Config,
    on_epoch: training.OnEpoch = lambda progress, labeled: None,
) -> tuple[Learner, training.Fit]:
    """Returns a learner, trained on all labels of a folder, and how that went; keeps nothing.

    Args:
      learner: knows their classes.
      folder: has labels.
      config: of the learner.
      on_epoch: as in `training.fit`.
    """
    labeled = Examples(Rows(folder.x, folder.labeled), learner.targets(folder))
    count = len(labeled.y)
    fit = training.fit(
        learner.model,
        learner.variables,
        labeled,
        config.training,
        config.seed,
        count,
        capacity=1 << (count - 1).bit_length(),  # So that few programs are compiled.
        on_epoch=on_epoch,
    )
    return learner._replace(variables=fit.variables), fit


def fresh(folder: Folder, config: Config, class_names: list[str]) -> Learner:
    """Returns a learner with fresh weights, which knows of the images their statistics alone.

    Args:
      folder: of the images.
      config: of the learner.
      class_names: of its outputs.
    """
    mean, std = datasets.channel_statistics(Rows(folder.x, folder.readable))
    return _learner(folder, config, class_names, mean.tolist(), std.tolist())


def _learner(
    folder: Folder, config: Config, class_names: list[str], mean: Any, std: Any
) -> Learner:
    """A learner with fresh weights."""
    module = models.MODELS[config.model](len(class_names), **config.options)
    model = models.Standardized(module, tuple(mean), tuple(std))
    variables = models.init(model, streams.key(config.seed, "weights"), folder.x)
    return Learner(model, variables, class_names)
