"""The model that learns from a person's labels, trained further in each round."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import msgspec
import numpy as np

from dynamical_jax import files, models, streams, training
from dynamical_jax.data import datasets
from dynamical_jax.labeling.folder import Folder
from dynamical_jax.store import Store, unflatten
from dynamical_jax.types import Examples, Rows


class Network(msgspec.Struct, frozen=True):
    """A pretrained network that images go through, so that a model can be used on other images.

    Attributes:
      path: of the file of its weights, absolute.
      checksum: of that file.
      attributes: of its module.
      preprocessing: of the images.
      image_size: height and width at which it sees them.
    """

    path: str
    checksum: files.Count
    attributes: dict[str, Any]
    preprocessing: models.weights.Preprocessing
    image_size: Annotated[int, msgspec.Meta(ge=1)]

    @classmethod
    def of(cls, weights: models.Weights, image_size: int) -> "Network":
        """Returns the network of a file of weights."""
        path, attributes = os.path.abspath(weights.path), dict(weights.attributes)
        return cls(path, weights.checksum, attributes, weights.preprocessing, image_size)


class Config(NamedTuple):
    """The configuration of a model and its training.

    Attributes:
      model: a key of `models.MODELS`.
      options: attributes of its module.
      training: how it is fitted to the labels.
      seed: of all randomness.
      feature_scale: of vectors, as in `models.scale`.
      weights: of the network, with which training begins; None for random ones.
      network: the network of these weights, or the one that embeds images.
      features: the file of vectors to learn from, absolute; None for images.
    """

    model: str
    options: Mapping[str, Any]
    training: training.TrainingConfig
    seed: int
    feature_scale: str = "shared"
    weights: models.Weights | None = None
    network: Network | None = None
    features: str | None = None

    def model_description(self, folder: Folder) -> dict[str, Any]:
        """Returns what must stay the same for a model to be trained further, named as flags are."""
        attributes = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.options.items()
        }
        described = {"model": self.model, **attributes}
        if self.weights is not None:
            described["weights"] = f"checksum {self.weights.checksum:08x}"
        if folder.features is None:
            return {**described, "image_size": list(folder.x.shape[1:])}
        vectors = f"{folder.x.shape[1]} numbers each, checksum {folder.features:08x}"
        return {**described, "features": vectors, "feature_scale": self.feature_scale}


class Facts(TypedDict):
    """How a fit went: epochs of training, and the share of S that is right, in [0, 1].

    And whether the targets of training were met, which models of earlier versions do not say.
    """

    epochs: files.Count
    train_accuracy: files.Share
    converged: NotRequired[bool]


class Description(msgspec.Struct):
    """The values of a model that is kept from round to round, beside its arrays.

    Attributes:
      model_description: `Config.model_description`.
      class_names: of its outputs.
      mean: of the images' channels, or of the features, which it subtracts.
      std: likewise, by which it divides.
      labels: checksum of those that it was trained on.
      round: in which it was trained.
      fit: how that went.
      network: as in `Config`; models of earlier versions do not say.
      features: likewise.
    """

    model_description: dict[str, Any]
    class_names: Annotated[list[str], msgspec.Meta(min_length=2)]
    mean: list[float]
    std: list[Annotated[float, msgspec.Meta(ge=0)]]
    labels: files.Count
    round: files.Count
    fit: Facts
    network: Network | None = None
    features: str | None = None


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
    """The state from which a round continues.

    Attributes:
      learner: to be trained, unless `fit` says that it was.
      round_index: of this round.
      fit: what `train` returned when it was trained on just these labels; None if it was not.
      difference: what the last round's model was that this one is not, so that this one starts
        anew, as the end of a sentence; "" otherwise.
      new_classes: that the last round's model did not know.
    """

    learner: Learner
    round_index: int
    fit: Facts | None = None
    difference: str = ""
    new_classes: tuple[str, ...] = ()


def warm_start(folder: Folder, config: Config, store: Store) -> Start:
    """Returns the learner of the last round, grown by the classes that are new, or a fresh one.

    Args:
      folder: has labels of at least two classes.
      config: of the learner.
      store: where `train` kept it.
    """
    model_description, names = config.model_description(folder), folder.class_names

    def resume(description: Description, leaves: list[np.ndarray]) -> Start:
        round_index = description.round + 1
        if description.model_description != model_description:
            difference = describe_difference(description, model_description, config)
            return Start(fresh(folder, config, names), round_index, difference=difference)
        mean, std, known = description.mean, description.std, description.class_names
        old = _learner(folder, config, known, mean, std)
        old = old._replace(variables=unflatten(old.variables, leaves))
        new = [name for name in names if name not in known]
        if not new:
            same = description.labels == folder.labels_checksum
            return Start(old, round_index, fit=description.fit if same else None)
        larger = _learner(folder, config, known + new, mean, std)
        grown = models.grow(old.variables, larger.variables)
        return Start(larger._replace(variables=grown), round_index, new_classes=tuple(new))

    resumed = store.restore(Description, resume)
    return resumed or Start(fresh(folder, config, names), 0)


def describe_difference(
    former: Description, model_description: Mapping[str, Any], config: Config
) -> str:
    """Returns how the model of earlier rounds and this one differ, in flags that a person gives.

    Args:
      former: of the last round's model.
      model_description: of this one.
      config: likewise.
    """
    theirs, ours = former.model_description, model_description
    network = former.network
    if network and config.network and network.checksum == config.network.checksum:
        network = config.network  # It may lie elsewhere now.
    source = _source(theirs, network, former.features)
    now = _source(ours, config.network, config.features)
    same_vectors = "features" in theirs and theirs["features"] == ours.get("features")
    if source != now and not same_vectors:  # The file may lie elsewhere now.
        none = "neither --weights nor --features"
        again = f"give {'that' if source else 'neither'} again if this was not meant"
        return f"the earlier rounds had {source or none}, and this one has {now or none}; {again}"
    differing = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    if set(differing) & {"features", "weights"}:
        return f"{now} gives other vectors than in the earlier rounds, or of other images"
    had, has = (
        ", ".join(_attribute(name, described[name]) for name in differing)
        for described in (theirs, ours)
    )
    return f"the earlier rounds had {had}, and this one has {has}"


def _source(described: Mapping[str, Any], network: Network | None, features: str | None) -> str:
    """The flags of what a model learns from; none for the images themselves."""
    if network is not None or "weights" in described:
        path = network.path if network is not None else "…"
        return f"--weights={path}" + " --train=all" * ("weights" in described)
    return f"--features={features or '…'}" if "features" in described else ""


def _attribute(name: str, value: Any) -> str:
    """An entry of a model's description, in words of the flags."""
    if name == "image_size":
        return f"images of {'×'.join(map(str, value))}"
    return f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}"


def train(
    start: Start,
    folder: Folder,
    config: Config,
    store: Store,
    on_epoch: training.OnEpoch = lambda progress, labeled: None,
) -> tuple[Learner, Facts]:
    """Trains a learner on all labels and keeps it for the next round.

    Args:
      start: from where it goes on.
      folder: as in `warm_start`.
      config: likewise.
      store: likewise; its `say` is told where the last round had another model.
      on_epoch: as in `training.fit`.

    Returns:
      The learner, and how its training went.
    """
    if start.difference:
        store.say(f"the model is trained from the start: {start.difference}")
    learner, fit = fit_labels(start.learner, folder, config, on_epoch)
    facts = Facts(epochs=fit.epochs, train_accuracy=fit.labeled.accuracy, converged=fit.converged)
    description = Description(
        config.model_description(folder),
        learner.class_names,
        list(learner.model.mean),
        list(learner.model.std),
        folder.labels_checksum,
        start.round_index,
        facts,
        config.network,
        config.features,
    )
    name = f"round-{start.round_index:05d}"
    store.save(name, learner.variables, msgspec.to_builtins(description))
    return learner, facts


def fit_labels(
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
    """Returns a learner with fresh weights, which knows of the inputs their statistics alone.

    Args:
      folder: of the images.
      config: of the learner.
      class_names: of its outputs.
    """
    mean, std = datasets.channel_statistics(Rows(folder.x, folder.readable))
    std = models.scale(std.tolist(), folder.kind, config.feature_scale)
    return _learner(folder, config, class_names, mean.tolist(), std)


def _learner(
    folder: Folder, config: Config, class_names: list[str], mean: Any, std: Any
) -> Learner:
    """A learner with fresh weights."""
    if config.weights is None:
        module = models.MODELS[config.model](len(class_names), **config.options)
        model = models.Standardized(module, tuple(mean), tuple(std))
    else:
        model = models.pretrained(config.weights, len(class_names), folder.x.shape[1])
    variables = models.init(model, streams.key(config.seed, "weights"), folder.x)
    return Learner(model, variables, class_names)
