"""The model that a round has trained, for other images.

>>> model = load("to_label.checkpoint")  # doctest: +SKIP
>>> for image in model.predict(["new/1.jpg", "new/2.jpg"], top=3):  # doctest: +SKIP
...     print(image.path, image.class_names, image.probabilities)
"""

import os
import pathlib
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import jax
import numpy as np

from dynamical_jax import models
from dynamical_jax.data import images
from dynamical_jax.errors import UserError
from dynamical_jax.labeling.learner import Description, Learner
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
    """A trained model, and the shape of images that it takes."""

    learner: Learner
    shape: images.ImageShape

    def predict(
        self, paths: Sequence[str], top: int = 1, on_progress: OnProgress = ignore_progress
    ) -> list[Prediction]:
        """Returns the predictions for image files, in their order.

        Args:
          paths: of any size and format that `images.read` reads.
          top: how many classes to return, all if there are fewer.
          on_progress: called with (done, total).
        """
        if top < 1:
            raise UserError(f"top must be at least 1, got {top}")
        found: list[Prediction] = []
        for start in range(0, len(paths), BLOCK):
            found += self._predict_block(paths[start : start + BLOCK], top)
            on_progress(len(found), len(paths))
        return found

    def _predict_block(self, paths: Sequence[str], top: int) -> list[Prediction]:
        with ThreadPool() as threads:
            read = threads.map(self._read, paths)
        x = np.stack([np.zeros(self.shape, np.uint8) if one is None else one for one in read])
        view = LearnerView(
            self.learner.model.apply,
            self.learner.variables,
            Examples(x[:0], np.zeros(0, np.int32)),
            x,
        )
        probabilities = np.asarray(jax.nn.softmax(predictions.predict(view, x).logits))
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top]
        return [
            Prediction(path, (), ())
            if one is None
            else Prediction(
                path,
                tuple(self.learner.class_names[i] for i in best),
                tuple(float(p[i]) for i in best),
            )
            for path, one, p, best in zip(paths, read, probabilities, order, strict=True)
        ]

    def _read(self, path: str) -> np.ndarray | None:
        try:
            return images.read(path, self.shape)
        except Exception:  # See `images.read`.
            return None


def load(checkpoint: str | os.PathLike) -> Model:
    """Returns the model of the last round of `dynamical-select` or `dynamical-label`.

    Args:
      checkpoint: the folder beside the table of images to label.

    Raises:
      UserError: if there is no model in it, or one of vectors or of pretrained weights.
    """
    found = Store(pathlib.Path(checkpoint)).restore(
        Description, lambda description, leaves: (description, leaves), tidy=False
    )
    if found is None:
        raise UserError(f"there is no model in {checkpoint}; dynamical-select makes one")
    description, leaves = found
    described = dict(description.model_description)
    if "features" in described or "weights" in described:
        how = (
            "with --weights and --train=all"
            if "weights" in described
            else "on vectors, of a file (--features) or of a network (--weights), not on images"
        )
        raise UserError(
            f"the model in {checkpoint} was trained {how}: for the time being only "
            "dynamical-select --predictions predicts with it"
        )
    name, shape = described.pop("model"), images.ImageShape(*described.pop("image_size"))
    attributes = {
        key: tuple(value) if isinstance(value, list) else value for key, value in described.items()
    }
    module = models.MODELS[name](len(description.class_names), **attributes)
    model = models.Standardized(module, tuple(description.mean), tuple(description.std))
    fresh = models.init(model, jax.random.key(0), np.zeros((1, *shape), np.uint8))
    return Model(Learner(model, unflatten(fresh, leaves), description.class_names), shape)
