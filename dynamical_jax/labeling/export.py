"""Makes a folder for each class."""

import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping

from dynamical_jax.errors import UserError

MARK = ".sorted-by-dynamical-label"
"""Name of a file that `sort` puts into its folder; it replaces no folder without that file."""


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
