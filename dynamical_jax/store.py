"""Arrays on disk, of which the newest that are whole are found again.

What is saved is a directory of arrays, written by Orbax under another name and renamed when it is
complete, and beside it a manifest, a JSON file written last: a few values, and a checksum of every
file of the directory. What has no manifest, or not those checksums, is torn.
"""

import contextlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from dynamical_jax import files
from dynamical_jax.errors import UserError

T = TypeVar("T")

KEPT = 2
"""Checkpoints that stay: should the newest be damaged, there is one before it."""


class Store:
    """The newest of what is saved in a directory, as arrays and a few JSON values.

    Args:
      directory: theirs alone; made when the first is saved.
      say: called with a line about what could not be used.
    """

    def __init__(self, directory: pathlib.Path, say: Callable[[str], None] = print):
        self._directory, self._say = directory, say

    def save(self, name: str, tree: Any, description: Mapping[str, Any]) -> None:
        """Writes the arrays of a tree, and then removes all but the newest `KEPT`.

        Args:
          name: names sort as what is saved follows each other.
          tree: of arrays.
          description: JSON values.

        Raises:
          UserError: if the disk is full.
        """
        import orbax.checkpoint as ocp  # here, because it takes a while

        self._directory.mkdir(parents=True, exist_ok=True)
        arrays = self._directory / name
        _remove(arrays)
        # With names that sort in the order of the tree.
        leaves = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(arrays.resolve(), args=ocp.args.StandardSave(leaves))
        except ValueError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(f"cannot write {arrays}: there is no space left") from error
        manifest = {**description, "files": _checksums(arrays)}
        files.write(arrays.with_suffix(".json"), json.dumps(manifest))
        for old in self._manifests()[KEPT:]:
            _remove(old.with_suffix(""))

    def restore(self, make: Callable[[dict[str, Any], list[np.ndarray]], T]) -> T | None:
        """Returns what `make` makes of the newest that is whole, or None; removes what is torn.

        Args:
          make: called with the description and the leaves of the tree, in its order; raises
            `ValueError` if it cannot use them.
        """
        if not self._directory.exists():
            return None
        import orbax.checkpoint as ocp

        for left in self._directory.iterdir():
            if left.is_dir() and not left.with_suffix(".json").exists():
                self._drop(left, "was not finished")
        for path in self._manifests():
            arrays = path.with_suffix("")
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                if manifest.pop("files") != _checksums(arrays):
                    raise ValueError("files are missing or not what was written")
                with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                    leaves = checkpointer.restore(arrays.resolve(), args=ocp.args.StandardRestore())
                return make(manifest, [leaves[name] for name in sorted(leaves)])
            except (ValueError, KeyError, OSError) as error:
                self._drop(arrays, f"is damaged ({str(error).splitlines()[0]})")
        return None

    def remove(self) -> None:
        """Removes all, and the directory above if it is then empty."""
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._directory.parent.rmdir()

    def _manifests(self) -> list[pathlib.Path]:
        return sorted(self._directory.glob("*.json"), reverse=True)

    def _drop(self, arrays: pathlib.Path, why: str) -> None:
        self._say(f"checkpoint {arrays} {why}: dropped")
        _remove(arrays)


def unflatten(like: Any, leaves: list[np.ndarray], growing: int = 0) -> Any:
    """Returns the leaves of a tree in the structure of another.

    Args:
      like: a tree of the same structure.
      leaves: in its order.
      growing: of so many leaves at the beginning the shapes may differ.

    Raises:
      ValueError: if structures or shapes differ.
    """
    expected, structure = jax.tree.flatten(like)
    if len(expected) != len(leaves):
        raise ValueError("it is of another model or optimizer")
    for saved, leaf in zip(leaves[growing:], expected[growing:], strict=True):
        if saved.shape != np.shape(leaf):
            raise ValueError("it is of a model of another size")
    return jax.tree.unflatten(structure, leaves)


def _checksums(directory: pathlib.Path) -> dict[str, int]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): zlib.crc32(path.read_bytes()) for path in files}


def _remove(arrays: pathlib.Path) -> None:
    arrays.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(arrays, ignore_errors=True)
