"""The state of a run on disk, so that a killed process can be continued bit for bit.

A checkpoint is a directory of arrays, written by Orbax under another name and renamed when it is
complete, and beside it a manifest, a JSON file written last: the state's numbers, and a checksum of
every file of the directory. What has no manifest, or not those checksums, is torn.
"""

import contextlib
import functools
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import training
from dynamical_jax.active_learning import Experiment, State, Underway
from dynamical_jax.data.pool import Pool
from dynamical_jax.errors import UserError
from dynamical_jax.runs import records

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
        records.write(arrays.with_suffix(".json"), json.dumps(manifest))
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


class Checkpoints:
    """The newest states of one run, in a `Store`; arguments are those of one."""

    def __init__(self, directory: pathlib.Path, say: Callable[[str], None] = print):
        self._store = Store(directory, say)

    def save(self, state: State) -> None:
        """Writes a state."""
        underway = state.underway or Underway(0, None, 0.0, {})
        description = {
            "round_index": state.round_index,
            "epoch": underway.epoch,
            "best_test_accuracy": underway.best_test_accuracy,
            "seconds": underway.seconds,
        }
        # Sorts as states follow each other.
        name = f"round-{state.round_index:05d}-epoch-{underway.epoch:07d}"
        self._store.save(name, _tree(state), description)

    def restore(self, experiment: Experiment) -> State | None:
        """Returns the newest state that is whole, or None; removes those that are torn."""
        like = functools.cache(experiment.init)  # Not made where there is nothing to restore.
        return self._store.restore(
            lambda description, leaves: _state(experiment, like(), description, leaves)
        )

    def remove(self) -> None:
        """Removes all of them, and the directory above if it is then empty."""
        self._store.remove()


def _tree(state: State) -> Any:
    # The unlabeled set is left out: it is what is not labeled.
    optimizer_state = state.underway.optimizer_state if state.underway else None
    return state.pool.labeled, state.strategy_state, state.variables, optimizer_state


def _state(
    experiment: Experiment, like: State, description: dict[str, Any], leaves: list[np.ndarray]
) -> State:
    """Puts arrays back into the tree that the experiment's states have, such as `like`."""
    if description["epoch"]:
        progress = training.begin(like.variables, experiment.training_config)
        like = like._replace(underway=Underway(0, progress.optimizer_state, 0.0, {}))
    # Of the shapes all but the first's, the labeled set's, which grows.
    labeled, strategy_state, *rest = unflattened(_tree(like), leaves, growing=1)
    variables, optimizer_state = jax.tree.map(jnp.asarray, rest)
    underway = None
    if description["epoch"]:
        underway = Underway(
            description["epoch"],
            optimizer_state,
            description["best_test_accuracy"],
            description["seconds"],
        )
    unlabeled = np.setdiff1d(np.arange(len(experiment.dataset.pool.y)), labeled)
    pool = Pool(labeled, unlabeled)
    return State(description["round_index"], pool, variables, strategy_state, underway)


def unflattened(like: Any, leaves: list[np.ndarray], growing: int = 0) -> Any:
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
