"""A folder of images: which of them a table labels, and which can be chosen.

Images are known by their paths relative to the folder, with slashes. A model learns from their
pixels, or from vectors that a file holds of them.
"""

import os
import pathlib
import types
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax import words
from dynamical_jax.data import folders, images, near_copies
from dynamical_jax.errors import UserError
from dynamical_jax.labeling import classes as names
from dynamical_jax.labeling import tables
from dynamical_jax.types import Rows


class Folder(NamedTuple):
    """The images of a folder, with their labels.

    Attributes:
      paths: of each, relative to the folder.
      x: `[n, h, w, c]`, or the vectors `[n, d]` that are learned from.
      labels: path → class name, in the order in which labels came, of images that can be read.
      labeled: rows of `x` that have a label, in this order.
      unlabeled: rows to choose from, without copies of each other or of labeled images.
      readable: rows that are images, and have a vector.
      num_copies: rows with the pixels, or the vector, of another.
      broken: labeled paths that cannot be read, whose labels are left out.
      conflicts: (path, label, other label) of each copy that is labeled differently.
      first: as in `Pictures`.
      near: as in `Pictures`.
      features: checksum of the vectors; None for pixels.
    """

    paths: list[str]
    x: Any
    labels: dict[str, str]
    labeled: np.ndarray
    unlabeled: np.ndarray
    readable: np.ndarray
    num_copies: int
    broken: list[str]
    conflicts: list[tuple[str, str, str]]
    first: np.ndarray
    near: np.ndarray
    features: int | None = None

    @property
    def num_near(self) -> int:
        """Images that are no copies, but nearly the same as an earlier one."""
        return len(np.unique(self.first[self.readable])) - len(np.unique(self.near[self.readable]))

    @property
    def copies(self) -> list[tuple[str, str]]:
        """(path, path of the first of its copies) of each image that is not chosen for that."""
        rows = self.readable[self.first[self.readable] != self.readable]
        return [(self.paths[row], self.paths[self.first[row]]) for row in rows]

    @property
    def kind(self) -> str:
        """What is learned from, "images" or "vectors"."""
        return "images" if self.features is None else "vectors"

    @property
    def class_names(self) -> list[str]:
        """The classes that have labels, sorted."""
        return sorted(set(self.labels.values()))

    @property
    def labels_checksum(self) -> int:
        """A checksum, which differs if labels have changed."""
        return zlib.crc32(repr(list(self.labels.items())).encode())


class Pictures(NamedTuple):
    """The images of a folder, without labels.

    Attributes:
      paths: of each, relative to the folder.
      x: `[n, h, w, c]`, or the vectors `[n, d]` that are learned from.
      readable: rows that are images, and have a vector.
      first: `[n]` for each row the first that has its pixels, or vector; -1 where it cannot be
        read.
      near: `[n]` likewise for each row the first that is nearly the same.
      features: checksum of the vectors; None for pixels.
    """

    paths: list[str]
    x: Any
    readable: np.ndarray
    first: np.ndarray
    near: np.ndarray
    features: int | None = None


class Update(NamedTuple):
    """All labels, including those that a person has filled in in a proposal.

    Attributes:
      labels: path → class name, all in the order in which they came.
      num_new: how many were added to the table.
      num_right: labels of the proposal that the model predicted correctly.
      num_predicted: labels of the proposal for which there was a prediction.
    """

    labels: dict[str, str]
    num_new: int
    num_right: int
    num_predicted: int


def find(folder: str, leave_out: pathlib.Path) -> list[str]:
    """Returns the paths of the images in a folder, relative to it, sorted.

    Args:
      folder: is searched with all folders in it.
      leave_out: a picture that does not count as one of them, such as the contact sheet.

    Raises:
      UserError: if there are none.
    """
    left_out = os.path.realpath(leave_out)
    # By name first: to resolve a hundred thousand paths takes half a minute.
    found = [
        path
        for path in images.find(folder)
        if not path.endswith(leave_out.name) or os.path.realpath(path) != left_out
    ]
    if not found:
        raise UserError(f"there are no image files in {folder}")
    start = len(os.path.join(folder, ""))
    return [path[start:].replace(os.sep, "/") for path in found]


def take_over(
    table: pathlib.Path,
    proposal: pathlib.Path,
    folder: str,
    paths: Sequence[str],
    more: Mapping[pathlib.Path, Mapping[str, str]] = types.MappingProxyType({}),
    classes: Sequence[str] = (),
) -> Update:
    """Adds to a table the labels that were filled in in a proposal; returns all labels.

    Args:
      table: of the labels so far; need not exist.
      proposal: a table that `write_proposal` wrote; need not exist.
      folder: of the images.
      paths: those that `find` found.
      more: file → further labels, path → class name.
      classes: names of all classes; by default any name is one.

    Raises:
      UserError: if tables cannot be read or contradict each other, or label what is not in the
        folder, or a label is not one of the classes. Then nothing was written.
    """
    with tables.locked(table):  # Another process may add labels, too.
        tables.remove_partial(table)
        known = tables.read_labels(table, folder).by_path
        filled = tables.read_labels(proposal, folder)
        labels = tables.join_labels(known, filled.by_path, proposal)
        for file, by_path in more.items():
            labels = tables.join_labels(labels, by_path, file)
        if classes:
            names.check_known(labels, classes)
        if missing := sorted(set(labels) - set(paths)):
            read = {table: known, proposal: filled.by_path, **more}
            where = " and ".join(str(file) for file in read if set(read[file]) & set(missing))
            raise UserError(
                f"{words.count(len(missing), 'labeled image is', 'labeled images are')} not in "
                f"{folder}: {_some(missing)}: correct the paths in {where}, which are relative to "
                "that folder, or put the files back; where they are gone for good remove the rows"
            )
        if new := {path: label for path, label in labels.items() if path not in known}:
            tables.add_labels(table, new)
    return Update(labels, len(new), filled.num_right, filled.num_predicted)


def decode(folder: str, paths: Sequence[str], labels: Mapping[str, str], **options: Any) -> Folder:
    """Reads the images of a folder; returns them with their labels.

    Args:
      folder: of the images.
      paths: those that `find` found.
      labels: path → class name, of some of them.
      **options: of `read`.
    """
    return with_labels(read(folder, paths, **options), labels)


def read(
    folder: str,
    paths: Sequence[str],
    features: str | None = None,
    near: int | None = None,
    embed: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Pictures:
    """Reads the images of a folder.

    Args:
      folder: of the images.
      paths: those that `find` found.
      features: a file of vectors to learn from, as in `folders.read_features`. Images of which it
        has none are left out, with a warning, and so are vectors of no image.
      near: bits in which near-copies may differ, as in `near_copies.first_near`. By default, and
        always for `features`, images are nearly the same if they are the same.
      embed: makes vectors `[n, d]` to learn from of the images.
      **options: of `images.decode`, of which only `unreadable` has an effect on vectors.

    Raises:
      UserError: if none of the vectors is of an image in the folder; or as in `images.decode`.
    """
    files = [str(pathlib.Path(folder) / path) for path in paths]
    if features is None:
        x, is_readable, _ = images.decode(files, **options)
        checksum = None
    else:
        vectors = folders.read_features(features, options.get("unreadable", "skip"))
        checksum = vectors.checksum
        row_of = {path: row for row, path in enumerate(vectors.paths)}
        rows = np.array([row_of.get(path, -1) for path in paths])
        _report_unmatched(folder, paths, features, vectors.paths)
        is_readable = images.check_headers(files)
        if broken := [path for path, opens in zip(paths, is_readable, strict=True) if not opens]:
            warnings.warn(
                f"{len(broken)} of {words.count(len(paths), 'image file')} cannot be read: "
                f"{_some(broken)}; they are left out",
                stacklevel=2,
            )
        is_readable &= np.isin(rows, vectors.finite)
        x = Rows(vectors.x, rows)
    readable = np.flatnonzero(is_readable)
    first = np.full(len(paths), -1)
    first[readable] = readable[images.find_first_equal(Rows(x, readable))]
    nearest = np.arange(len(paths))
    if near is not None and features is None:
        unique = np.unique(first[readable])
        nearest[unique] = unique[near_copies.first_near(Rows(x, unique), near)]
    if embed is not None and features is None:
        x = embed(x)
        checksum = images.compute_checksum(x)
    return Pictures(list(paths), x, readable, first, nearest[first], checksum)


def _report_unmatched(
    folder: str, paths: Sequence[str], features: str, named: Sequence[str]
) -> None:
    """Warns of images without a vector, and of vectors without an image."""
    strangers = sorted(set(named) - set(paths))
    if len(strangers) == len(named):
        raise UserError(
            f"none of the paths in {features} is of an image in {folder}, where they look like "
            f"{paths[0]!r}; it has {_some(strangers)}"
        )
    if without := sorted(set(paths) - set(named)):
        warnings.warn(
            f"{len(without)} of {words.count(len(paths), 'image')} in {folder} have no vector in "
            f"{features}: {_some(without)}; they are left out",
            stacklevel=3,
        )
    if strangers:
        warnings.warn(
            f"{len(strangers)} of {words.count(len(named), 'vector')} in {features} are of no "
            f"image in {folder}: {_some(strangers)}",
            stacklevel=3,
        )


def _some(paths: Sequence[str]) -> str:
    return f"{', '.join(paths[:3])}{', …' if len(paths) > 3 else ''}"


def with_labels(pictures: Pictures, labels: Mapping[str, str]) -> Folder:
    """Returns images with their labels, and the rows to choose from.

    Images that cannot be read, are labeled, or are copies are not among the latter.

    Args:
      pictures: what `read` returned.
      labels: path → class name, of some of them.
    """
    paths, x, readable, first, near, features = pictures
    row_of = {path: row for row, path in enumerate(paths)}
    broken = [path for path in labels if first[row_of[path]] < 0]
    labels = {path: label for path, label in labels.items() if path not in broken}
    labeled = np.array([row_of[path] for path in labels], int)
    unique = np.unique(first[readable])
    by_image: dict[int, str] = {}
    conflicts = []
    for path, label in labels.items():
        other = by_image.setdefault(first[row_of[path]], label)
        if other != label:
            conflicts.append((path, label, other))
    return Folder(
        list(paths),
        x,
        labels,
        labeled,
        np.setdiff1d(unique, first[labeled]),
        readable,
        len(readable) - len(unique),
        broken,
        conflicts,
        first,
        near,
        features,
    )


def without(folder: Folder, paths: Collection[str]) -> Folder:
    """Returns the folder without some paths among the rows to choose from."""
    rows = [row for row in folder.unlabeled if folder.paths[row] not in paths]
    return folder._replace(unlabeled=np.array(rows, int))


def apart(folder: Folder, others: Sequence[int] | np.ndarray = ()) -> Folder:
    """Returns the folder with only one of near-copies among the rows to choose from.

    Args:
      folder: the images.
      others: rows whose near-copies are left out, too.
    """
    rows = folder.unlabeled[
        ~np.isin(folder.near[folder.unlabeled], folder.near[np.array(others, int)])
    ]
    _, positions = np.unique(folder.near[rows], return_index=True)
    return folder._replace(unlabeled=rows[np.sort(positions)])
