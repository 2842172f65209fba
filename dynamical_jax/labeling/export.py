"""Exports labels and predictions in the formats of other programs."""

import json
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from dynamical_jax.errors import UserError
from dynamical_jax.labeling.tables import Proposed

MARK = ".sorted-by-dynamical-label"
"""Name of a file that `sort` puts into its folder; it replaces no folder without that file."""


def label_studio(labels: Mapping[str, str], predictions: Iterable[Proposed]) -> str:
    """Returns tasks for Label Studio in JSON: annotations, and predictions of the rest.

    They are for the configuration `<Image name="image" value="$image"/><Choices name="label"
    toName="image">…`, with the folder of images as local storage (`/data/local-files/?d=…`).

    Args:
      labels: path → class name.
      predictions: of images that have no label.
    """
    tasks = [
        {"data": _data(path), "annotations": [{"result": _choice(label)}]}
        for path, label in labels.items()
    ]
    tasks += [
        {
            "data": _data(image.path),
            "predictions": [
                {
                    "model_version": "dynamical_jax",
                    "score": image.confidence,
                    "result": _choice(image.predicted),
                }
            ],
        }
        for image in predictions
    ]
    return json.dumps(tasks, indent=1)


def sort(
    images: pathlib.Path, labels: Mapping[str, str], into: pathlib.Path, copies: bool = False
) -> int:
    """Makes a folder with a folder for each class, of links to the images; returns how many.

    A folder that was made so before is replaced.

    Args:
      images: the folder of images.
      labels: path → class name.
      into: the folder to make.
      copies: of images instead of links. Where links cannot be made, there are copies, too.

    Raises:
      UserError: if there is something else, or it cannot be written.
    """
    if into.exists() and not (into / MARK).is_file():
        raise UserError(f"{into} is there already, and was not made by this program")
    partial = into.with_name(f"{into.name}.partial")
    names = _folder_names(set(labels.values()))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / MARK).touch()
        for path, label in labels.items():
            target = partial / names[label] / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _place((images / path).resolve(), target, copies)
        shutil.rmtree(into, ignore_errors=True)
        partial.rename(into)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or into}: {error.strerror}") from error
    return len(labels)


def _data(path: str) -> dict[str, Any]:
    return {"image": "/data/local-files/?d=" + urllib.parse.quote(os.fsencode(path)), "path": path}


def _choice(label: str) -> list[dict[str, Any]]:
    value = {"choices": [label]}
    return [{"from_name": "label", "to_name": "image", "type": "choices", "value": value}]


def _folder_names(labels: Iterable[str]) -> dict[str, str]:
    """Class name → name of a folder: no path, nothing hidden, none twice whatever the capitals."""
    names: dict[str, str] = {}
    for label in sorted(labels):
        plain = re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", label).strip(". ")[:80] or "_"
        name, number = plain, 1
        while name.lower() in {other.lower() for other in names.values()}:
            number += 1
            name = f"{plain} {number}"
        names[label] = name
    return names


def _place(source: pathlib.Path, target: pathlib.Path, copies: bool) -> None:
    if not copies:
        try:
            os.symlink(source, target)
            return
        except OSError:  # Windows asks for a right that few have.
            pass
    shutil.copy2(source, target)
