"""The model that a round has trained, for other images.

>>> model = load("to_label.checkpoint")  # doctest: +SKIP
>>> for image in model.predict(["new/1.jpg", "new/2.jpg"], top=3):  # doctest: +SKIP
...     print(image.path, image.class_names, image.probabilities)
"""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dynamical_jax import embedding, models, words
from dynamical_jax.data import datasets, images
from dynamical_jax.errors import UserError
from dynamical_jax.labeling.learner import Description, Learner, Network
from dynamical_jax.store import Store, unflatten
from dynamical_jax.strategies import LearnerView, predictions
from dynamical_jax.types import Examples, OnProgress, ignore_progress

BLOCK = 1024
"""Images that are in memory at a time."""


class Prediction(NamedTuple):
    """The classes that a model predicts for an image, the most probable first.

    Attributes:
      path: of the image.
      class_names: none if the image cannot be read.
      probabilities: of these classes.
    """

    path: str
    class_names: tuple[str, ...]
    probabilities: tuple[float, ...]


class Model(NamedTuple):
    """A trained model.

    Attributes:
      learner: the model.
      shape: of the images that it takes; None if it takes vectors.
      interpolation: by which images are resized.
      embed: returns the vectors of image files that can be read, `[m, d]`, and the rows of these;
        None if it takes images, or vectors of an unknown origin.
    """

    learner: Learner
    shape: images.ImageShape | None
    interpolation: str = "bilinear"
    embed: Callable[[Sequence[str]], tuple[Any, np.ndarray]] | None = None

    def predict(
        self, paths: Sequence[str], top: int = 1, on_progress: OnProgress = ignore_progress
    ) -> list[Prediction]:
        """Returns the predictions for image files, in their order.

        Args:
          paths: of any size and format that `images.read` reads.
          top: how many classes to return, all if there are fewer.
          on_progress: called with (done, total).

        Raises:
          UserError: if the model learned from vectors of a file, or `paths` is one path.
        """
        _check_top(top)
        if isinstance(paths, str | os.PathLike):
            raise UserError(f"predict takes a list of paths, got {os.fspath(paths)!r}")
        if self.embed is not None and len(paths):
            vectors, rows = self.embed(paths)
            found = [Prediction(path, (), ()) for path in paths]
            known = self.predict_vectors([paths[row] for row in rows], vectors, top, on_progress)
            for row, prediction in zip(rows, known, strict=True):
                found[row] = prediction
            return found
        if self.shape is None and self.embed is None:
            raise UserError("the model learned from vectors of a file: it predicts from vectors")
        found = []
        for start in range(0, len(paths), BLOCK):
            block = paths[start : start + BLOCK]
            x, readable = images.read_all(block, self.shape, self.interpolation)
            found += [
                one if can_be_read else Prediction(one.path, (), ())
                for one, can_be_read in zip(self._predict(block, x, top), readable, strict=True)
            ]
            on_progress(len(found), len(paths))
        return found

    def predict_vectors(
        self,
        paths: Sequence[str],
        vectors: Any,
        top: int = 1,
        on_progress: OnProgress = ignore_progress,
    ) -> list[Prediction]:
        """Returns the predictions for images whose vectors are known, in their order.

        Args:
          paths: names of the images.
          vectors: `[n, d]`, made as those were that the model learned from.
          top: as in `predict`.
          on_progress: likewise.

        Raises:
          UserError: if the model takes images, or vectors of another length.
        """
        _check_top(top)
        size = len(self.learner.model.mean)
        if self.shape is not None or vectors.shape[1] != size:
            takes = "images" if self.shape else f"vectors of {words.count(size, 'number')}"
            raise UserError(f"the model takes {takes}, got vectors of {vectors.shape[1]}")
        found: list[Prediction] = []
        for start in range(0, len(paths), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(paths)))
            found += self._predict([paths[row] for row in rows], vectors[rows], top)
            on_progress(len(found), len(paths))
        return found

    def _predict(self, paths: Sequence[str], x: np.ndarray, top: int) -> list[Prediction]:
        view = LearnerView(
            self.learner.model.apply,
            self.learner.variables,
            Examples(x[:0], np.zeros(0, np.int32)),
            x,
        )
        probabilities = predictions.probabilities(predictions.predict(view, x).logits)
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top]
        return [
            Prediction(
                path,
                tuple(self.learner.class_names[i] for i in best),
                tuple(float(p[i]) for i in best),
            )
            for path, p, best in zip(paths, probabilities, order, strict=True)
        ]


def _check_top(top: int) -> None:
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")


def load(
    checkpoint: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Model:
    """Returns the model of the last round of `dynamical-select` or `dynamical-label`.

    Args:
      checkpoint: the folder beside the table of images to label.
      weights: the file of the pretrained network whose embeddings it learned from, if that is no
        longer where it was.
      cache_dir: where these are kept; by default where the programs keep them.

    Raises:
      UserError: if there is no model in it, or it is damaged, or the network's file is not the one
        of the training.
    """
    store = Store(pathlib.Path(checkpoint), functools.partial(warnings.warn, stacklevel=4))
    try:
        found = store.restore(Description, lambda *made: made, tidy=False)
    except UserError as error:
        raise UserError(
            f"{error}: dynamical-select or dynamical-label, given as before, sets it aside and "
            "trains another model on the same labels"
        ) from error
    if found is None:
        raise UserError(f"there is no model in {checkpoint}; dynamical-select makes one")
    description, leaves = found
    network, described = description.network, dict(description.model_description)
    name, size = described.pop("model"), described.pop("image_size", None)
    is_trained_further = described.pop("weights", None) is not None
    for key in ("features", "feature_scale"):
        described.pop(key, None)
    if is_trained_further and network is None:
        raise UserError(
            f"the model in {checkpoint} is of an earlier version, which did not say how its "
            "network sees images: remove it, and train it anew"
        )
    embeds = network is not None and not is_trained_further
    if weights is not None and not embeds:
        raise UserError(f"the model in {checkpoint} needs no file of weights")
    attributes = network.attributes if is_trained_further else described
    attributes = {
        key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()
    }
    module = models.MODELS[name](len(description.class_names), **attributes)
    mean, std = tuple(description.mean), tuple(description.std)
    interpolation = "bilinear" if network is None else network.preprocessing.interpolation
    if is_trained_further:
        model = models.Pretrained(module, mean, std, None, network.image_size, interpolation)
    else:
        model = models.Standardized(module, mean, std)
    if size is None:
        shape, example = None, np.zeros((1, len(mean)), np.float32)
    else:
        shape = images.ImageShape(*size)
        example = np.zeros((1, *shape), np.uint8)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    variables = unflatten(jax.eval_shape(model.init, keys, example), leaves)
    learner = Learner(model, variables, description.class_names)
    embed = None
    if embeds:
        embed = functools.partial(
            embedding.embed_files,
            _weights_of(network, weights),
            cache_dir=cache_dir or datasets.default_cache_dir(),
            image_size=network.image_size,
        )
    return Model(learner, shape, interpolation, embed)


def _weights_of(network: Network, path: str | os.PathLike | None) -> models.Weights:
    """Returns the weights of a network, from its file or from where that is now."""
    path = network.path if path is None else os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(
            f"there is no file {path}, whose network embedded the images that the model learned "
            "from: give its place now as --weights"
        )
    loaded = models.weights.load(path)
    if loaded.checksum != network.checksum:
        raise UserError(
            f"{path} is not the file of weights by which the images were embedded that the model "
            f"learned from (checksum {loaded.checksum:08x}, then {network.checksum:08x})"
        )
    # A config.json beside the file may have changed.
    return dataclasses.replace(loaded, preprocessing=network.preprocessing)
