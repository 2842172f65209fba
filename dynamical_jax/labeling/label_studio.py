"""Tasks for Label Studio, and the annotations that it exports.

Images are served by Label Studio as local files: its document root is the folder that holds the
folder of images. The labeling configuration is `configuration`, with one choice for each image.
"""

import csv
import io
import json
import os
import pathlib
import urllib.parse
import xml.sax.saxutils
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from dynamical_jax.errors import UserError, reason
from dynamical_jax.labeling.tables import Proposed

CONTROLS = ("label", "choice")
"""Names of the choices in an export: ours, and that of Label Studio's own template."""

UPLOAD_PREFIX = 9
"""Characters that Label Studio puts before the name of an uploaded file."""


class Annotations(NamedTuple):
    """What people have annotated.

    Attributes:
      labels: path → class name.
      num_skipped: annotations that were skipped, or are empty.
      differing: path → class names, of images that were annotated differently; the latest counts.
      foreign: images that are not in the folder.
    """

    labels: dict[str, str]
    num_skipped: int
    differing: dict[str, list[str]]
    foreign: list[str]


class _Annotation(NamedTuple):
    """One annotation of an image; the class is "" where it was skipped."""

    image: str
    path: str
    label: str
    time: str


def tasks(
    images: str | os.PathLike, labels: Mapping[str, str], proposed: Iterable[Proposed]
) -> str:
    """Returns tasks in JSON: labeled images with annotations, then images to label.

    The latter come in the given order, with the prediction, whose score is the model's probability;
    `rank` and `score`, the strategy's, are columns of Label Studio's data manager.

    Args:
      images: the folder of images.
      labels: path → class name.
      proposed: images that have no label.
    """
    found = [
        {"data": _data(images, path), "annotations": [{"result": _choice(label)}]}
        for path, label in labels.items()
    ]
    for rank, image in enumerate(proposed, start=1):
        data = _data(images, image.path) | {"rank": rank}
        if image.score is not None:
            data["score"] = image.score
        task: dict[str, Any] = {"data": data}
        if image.predicted:
            prediction = {"model_version": "dynamical_jax", "score": image.confidence}
            task["predictions"] = [prediction | {"result": _choice(image.predicted)}]
        found.append(task)
    return json.dumps(found, indent=1)


def configuration(class_names: Iterable[str]) -> str:
    """Returns the labeling configuration, XML, for images of some classes."""
    quote = xml.sax.saxutils.quoteattr
    choices = "".join(f"    <Choice value={quote(name)}/>\n" for name in class_names)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        '  <Choices name="label" toName="image" choice="single" showInline="true">\n'
        f"{choices}  </Choices>\n</View>\n"
    )


def read(path: pathlib.Path, images: str | os.PathLike, paths: Sequence[str]) -> Annotations:
    """Returns the annotations of an export: JSON, JSON-MIN or CSV.

    An image is found by the field `path` of its task, else by the end of its address, else by the
    name of the file that was uploaded.

    Args:
      path: the exported file.
      images: the folder of images.
      paths: of its images.

    Raises:
      UserError: if it is no such export, an image has more than one class in an annotation, or no
        image of it is in the folder.
    """
    annotations = list(_annotations(path))
    find = _finder(images, paths)
    by_path: dict[str, list[_Annotation]] = {}
    foreign = []
    for one in annotations:
        name = find(one)
        if name is None:
            foreign.append(one.path or one.image)
        elif one.label:
            by_path.setdefault(name, []).append(one)
    if annotations and len(foreign) == len(annotations):
        raise UserError(
            f"{path}: none of its images is in {images}, such as {foreign[0]}; tasks that "
            "--label_studio has written name them"
        )
    latest = {
        name: max(reversed(of_image), key=lambda one: one.time)  # Of two at one time the last.
        for name, of_image in by_path.items()
    }
    differing = {
        name: list(dict.fromkeys(one.label for one in of_image))
        for name, of_image in by_path.items()
        if len({one.label for one in of_image}) > 1
    }
    return Annotations(
        {name: one.label for name, one in latest.items()},
        sum(not one.label for one in annotations),
        differing,
        sorted(set(foreign)),
    )


class _Result(msgspec.Struct):
    """A part of an annotation."""

    type: str = ""
    value: dict[str, Any] = {}


class _Full(msgspec.Struct):
    """An annotation in a JSON export."""

    result: list[_Result]
    was_cancelled: bool = False
    updated_at: str = ""


class _Task(msgspec.Struct):
    """A task of a JSON export, which holds all of its annotations."""

    data: dict[str, Any]
    annotations: list[_Full]


def _annotations(path: pathlib.Path) -> Iterator[_Annotation]:
    """Yields the annotations of an export."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if not text.lstrip().startswith("["):
        yield from _flat(path, csv.DictReader(io.StringIO(text, newline=""), strict=True))
        return
    try:
        rows = json.loads(text)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("its entries are no tasks")
        if not any("data" in row for row in rows):
            yield from _flat(path, rows)
            return
        for task in msgspec.convert(rows, list[_Task]):
            for one in task.annotations:
                parts = [part.value.get("choices") for part in one.result]
                label = "" if one.was_cancelled else _single(path, [p for p in parts if p])
                yield _annotation(task.data, label, one.updated_at)
    except (ValueError, msgspec.ValidationError) as error:
        raise UserError(f"{path} is no export of Label Studio: {error}") from error


def _flat(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[_Annotation]:
    """Yields the annotations of JSON-MIN or CSV, a row each; a skipped one has no choice."""
    try:
        for row in rows:
            if "annotation_id" not in row:
                raise ValueError(
                    f"its rows have no annotation_id, but {', '.join(map(str, list(row)[:8]))}"
                )
            value = next((row[name] for name in CONTROLS if row.get(name)), "")
            if isinstance(value, str) and value.startswith("{"):
                value = json.loads(value)
            if isinstance(value, dict):
                value = value.get("choices", [])
            yield _annotation(row, _single(path, [value]), row.get("updated_at"))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is no export of Label Studio: {error}") from error


def _annotation(data: Mapping[str, Any], label: str, time: Any) -> _Annotation:
    image = next((str(data[name]) for name in ("image", "img") if data.get(name)), "")
    return _Annotation(image, str(data.get("path") or ""), label, str(time or ""))


def _single(path: pathlib.Path, choices: Sequence[Any]) -> str:
    """Returns the class of an annotation, "" if there is none."""
    names = [name for part in choices for name in (part if isinstance(part, list) else [part])]
    names = [str(name).strip() for name in names if name]
    if len(names) > 1:
        raise UserError(f"{path}: an annotation has the classes {', '.join(names)}; one is allowed")
    return names[0] if names else ""


def _finder(images: str | os.PathLike, paths: Sequence[str]) -> Any:
    """Returns the function that finds the image of an annotation among the paths."""
    known, folder = frozenset(paths), pathlib.Path(images).resolve().name
    names = [pathlib.PurePosixPath(path).name for path in paths]
    by_name = dict(zip(names, paths, strict=True))
    counts = Counter(names)

    def find(one: _Annotation) -> str | None:
        if one.path in known:
            return one.path
        address = urllib.parse.urlsplit(one.image)
        query = urllib.parse.parse_qs(address.query).get("d", [""])[0]
        parts = pathlib.PurePosixPath(query or urllib.parse.unquote(address.path)).parts
        for start in range(len(parts)):
            if start and parts[start - 1] == folder and "/".join(parts[start:]) in known:
                return "/".join(parts[start:])
        uploaded = parts[-1][UPLOAD_PREFIX:] if "upload" in parts else ""
        return by_name[uploaded] if counts[uploaded] == 1 else None

    return find


def _data(images: str | os.PathLike, path: str) -> dict[str, Any]:
    root = pathlib.Path(images).resolve().name
    address = urllib.parse.quote(os.fsencode(f"{root}/{path}"))
    return {"image": f"/data/local-files/?d={address}", "path": path}


def _choice(label: str) -> list[dict[str, Any]]:
    value = {"choices": [label]}
    return [{"from_name": "label", "to_name": "image", "type": "choices", "value": value}]
