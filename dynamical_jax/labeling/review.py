"""Finds labels that may be wrong: a model trained on the other labels predicts another class.

Each label is judged by a model that has not seen it, one of as many as there are folds. It is
suspect if the model predicts another class, as surely as it is on average where it predicts that
class. That is a simpler form of C. G. Northcutt, L. Jiang and I. L. Chuang, Confident learning:
estimating uncertainty in dataset labels, JAIR 2021, which takes the mean over a class's labels.
"""

import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np

from dynamical_jax.labeling import learner, proposal
from dynamical_jax.labeling.folder import Folder
from dynamical_jax.labeling.learner import Config
from dynamical_jax.types import OnProgress, ignore_progress

FOLDS = 5


class Suspect(NamedTuple):
    """A label that may be wrong.

    Attributes:
      path: of the image.
      label: its label.
      predicted: the class that the model predicts.
      confidence: the probability of that class.
    """

    path: str
    label: str
    predicted: str
    confidence: float


def suspects(
    folder: Folder, config: Config, on_progress: OnProgress = ignore_progress
) -> list[Suspect]:
    """Returns the labels that may be wrong, the most suspect first.

    Trains `FOLDS` models from the start. Classes of a single label cannot be judged.

    Args:
      folder: has labels of at least two classes.
      config: of the models.
      on_progress: called with (done, total) folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # here, because it takes a while

    counts = Counter(folder.labels.values())
    paths = [path for path, label in folder.labels.items() if counts[label] > 1]
    names = sorted({folder.labels[path] for path in paths})
    if len(names) < 2:
        return []
    row_of = dict(zip(folder.labels, folder.labeled, strict=True))
    rows = np.array([row_of[path] for path in paths])
    labels = np.array([folder.labels[path] for path in paths])
    # Stratified: of a class of two labels each is judged by a model that has seen the other. But
    # none by a model that has seen a copy of it, which would be sure of that label.
    count = min(FOLDS, max(counts.values()))
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That a class has fewer labels than there are folds.
        splits = list(folds.split(rows, labels, folder.first[rows]))
    predicted, confidence = np.empty(len(rows), object), np.zeros(len(rows))
    for done, (seen, held_out) in enumerate(splits):
        on_progress(done, count)
        part = folder._replace(
            labels={paths[i]: labels[i] for i in seen}, labeled=rows[seen], conflicts=[]
        )
        model, _ = learner.fit_labels(learner.fresh(part, config, names), part, config)
        for i, image in zip(held_out, proposal.predict(part, model, rows[held_out]), strict=True):
            predicted[i], confidence[i] = image.predicted, image.confidence
    threshold = {
        name: np.mean(confidence[predicted == name]) if np.any(predicted == name) else 1.0
        for name in names
    }
    found = [
        Suspect(paths[i], str(labels[i]), str(predicted[i]), float(confidence[i]))
        for i in range(len(rows))
        if predicted[i] != labels[i] and confidence[i] >= threshold[predicted[i]]
    ]
    return sorted(found, key=lambda suspect: -suspect.confidence)
