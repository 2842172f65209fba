"""Saves arrays on disk, and restores the newest ones that are complete.

Each save is a directory of arrays, which Orbax writes under another name and renames when it is
complete, and beside it a manifest, a JSON file written last: a few values, and a checksum of every
file of the directory. A directory without a manifest was not finished, and is removed. One that
does not agree with its manifest is damaged: it is moved to another folder, and never used.
"""

import contextlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from dynamical_jax import files, resources
from dynamical_jax.errors import UserError, reason

T = TypeVar("T")

NUM_KEPT = 2
"""Number of checkpoints that are kept: if the newest is damaged, the one before it is used."""


DAMAGED_FOLDER = "damaged"
"""Name of the folder for damaged checkpoints."""


class _Manifest(msgspec.Struct):
    """The fields of every manifest; those of its description stand beside them."""

    files: dict[str, files.Count]


class Store:
    """A directory of checkpoints, each of arrays and a few JSON values.

    Args:
      directory: holds nothing else; created by the first save.
      say: called with a line about each checkpoint that cannot be used.
    """

    def __init__(self, directory: pathlib.Path, say: Callable[[str], None] = print):
        self._directory, self.say = directory, say

    def save(self, name: str, tree: Any, description: Mapping[str, Any]) -> None:
        """Writes the arrays of a tree, and then removes all but the newest `KEPT`.

        Nothing is written if a number is not finite: what was saved before is of more use.

        Args:
          name: later checkpoints have names that sort later.
          tree: of arrays.
          description: JSON values.

        Raises:
          UserError: if it cannot be written; nothing is left of it then.
        """
        import orbax.checkpoint as ocp  # here, because it takes a while

        if not _is_finite(jax.tree.leaves(tree)):
            return
        arrays = self._directory / name
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {arrays}: {error.strerror}") from error
        _remove(arrays)
        # With names that sort in the order of the tree.
        leaves = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        resources.check_disk(
            arrays,
            resources.tree_bytes(leaves),
            f"the checkpoint {arrays}",
            "make place, and give the same command again",
        )
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(arrays.resolve(), args=ocp.args.StandardSave(leaves))
            manifest = {**description, "files": _checksums(arrays)}
            files.write(arrays.with_suffix(".json"), json.dumps(manifest))
        except (ValueError, OSError) as error:
            for left in self._directory.glob(f"{name}*"):
                _remove(left)  # Also what Orbax has begun under another name.
            if not isinstance(error, OSError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            why = getattr(error, "strerror", None) or "there is no space left"
            raise UserError(f"cannot write {arrays}: {why}") from error
        for old in self._manifests()[NUM_KEPT:]:
            _remove(old.with_suffix(""))

    def restore(
        self, form: Any, make: Callable[[Any, list[np.ndarray]], T], tidy: bool = True
    ) -> T | None:
        """Restores the newest checkpoint that can be used; returns the result of `make`, or None.

        Args:
          form: type of the descriptions, as in `files.parse`.
          make: called with the description and the leaves of the tree, in its order; raises
            `ValueError` if it cannot use them.
          tidy: removes what was not finished, and sets aside what is damaged; not to be done while
            another process may be writing.

        Raises:
          UserError: without `tidy`, if there are checkpoints and all of them are damaged.
        """
        if not self._directory.exists():
            return None
        import orbax.checkpoint as ocp

        for left in self._directory.iterdir() if tidy else ():
            unfinished = left.is_dir() and not left.with_suffix(".json").exists()
            if unfinished and left.name != DAMAGED_FOLDER:
                self.say(f"checkpoint {left} was not finished: removed")
                _remove(left)
        damage = ""
        for path in self._manifests():
            arrays = path.with_suffix("")
            try:
                if files.read_json(path, _Manifest).files != _checksums(arrays):
                    raise ValueError("files are missing or not what was written")
                description = files.read_json(path, form)
                with _checkpointer() as checkpointer:
                    leaves = checkpointer.restore(arrays.resolve(), args=ocp.args.StandardRestore())
                leaves = [leaves[name] for name in sorted(leaves)]
                if not _is_finite(leaves):
                    raise ValueError("it holds numbers that are not finite")
                made = make(description, leaves)
                if damage and not tidy:
                    self.say(f"{damage}: the one before it is used, {arrays}")
                return made
            except (ValueError, OSError) as error:
                if tidy:
                    self._set_aside(arrays, reason(error))
                damage = damage or f"{arrays} is damaged ({reason(error)})"
        if damage and not tidy:
            raise UserError(damage)
        return None

    def remove(self) -> None:
        """Removes all, and the directory above if it is then empty."""
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._directory.parent.rmdir()

    def _manifests(self) -> list[pathlib.Path]:
        return sorted(self._directory.glob("*.json"), reverse=True)

    def _set_aside(self, arrays: pathlib.Path, why: str) -> None:
        aside = self._directory / DAMAGED_FOLDER / arrays.name
        self.say(f"checkpoint {arrays} is damaged ({why}): set aside in {aside.parent}")
        _remove(aside)
        aside.parent.mkdir(exist_ok=True)
        for path in (arrays, arrays.with_suffix(".json")):
            if path.exists():
                path.rename(aside.parent / path.name)


def _checkpointer() -> Any:
    """Returns Orbax's writer and reader, which wait for no other process of the same run."""
    import orbax.checkpoint as ocp

    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process-{here}"
    )
    return ocp.Checkpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    )


def unflatten(like: Any, leaves: list[np.ndarray], growing: int = 0) -> Any:
    """Returns the leaves of a tree in the structure of another.

    Args:
      like: a tree of the same structure.
      leaves: in its order.
      growing: number of leaves, from the first, whose shapes may differ.

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


def _is_finite(leaves: list[Any]) -> bool:
    """Whether all numbers of arrays are; those of whole numbers always are."""
    return all(
        np.all(np.isfinite(np.asarray(leaf, np.float64)))
        for leaf in leaves
        if jnp.issubdtype(np.asarray(leaf).dtype, jnp.floating)
    )


def _remove(arrays: pathlib.Path) -> None:
    arrays.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(arrays, ignore_errors=True)
