"""The state of a run on disk, so that a killed process can be continued bit for bit.

A checkpoint is a directory of arrays, written by Orbax under another name and renamed when it is
complete, and beside it a manifest, a JSON file written last: the state's numbers, and a checksum of
every file of the directory. What has no manifest, or not those checksums, is torn.
"""

import contextlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import records, training
from dynamical_jax.active_learning import Experiment, State, Underway
from dynamical_jax.pool import Pool

KEPT = 2
"""Checkpoints that stay: should the newest be damaged, there is one before it."""


class Checkpoints:
    """The newest states of one run.

    Args:
      directory: theirs alone; made when the first is saved.
      say: called with a line about a checkpoint that could not be used.
    """

    def __init__(self, directory: pathlib.Path, say: Callable[[str], None] = print):
        self._directory, self._say = directory, say

    def save(self, state: State) -> None:
        """Writes a state, and then removes all but the newest `KEPT`."""
        import orbax.checkpoint as ocp  # here, because it takes a while

        self._directory.mkdir(parents=True, exist_ok=True)
        underway = state.underway
        arrays = self._directory / _name(state)
        _remove(arrays)
        leaves = _leaves(state)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(arrays.resolve(), args=ocp.args.StandardSave(leaves))
        manifest = {
            "round_index": state.round_index,
            "epoch": underway.epoch if underway else 0,
            "best_test_accuracy": underway.best_test_accuracy if underway else 0.0,
            "seconds": underway.seconds if underway else {},
            "files": _checksums(arrays),
        }
        records.write(arrays.with_suffix(".json"), json.dumps(manifest))
        for old in self._manifests()[KEPT:]:
            _remove(old.with_suffix(""))

    def restore(self, experiment: Experiment) -> State | None:
        """Returns the newest state that is whole, or None; removes those that are torn."""
        if not self._directory.exists():
            return None
        import orbax.checkpoint as ocp

        for left in self._directory.iterdir():
            if left.is_dir() and not left.with_suffix(".json").exists():
                self._drop(left, "was not finished")
        if not (manifests := self._manifests()):
            return None
        like = experiment.init()
        for path in manifests:
            arrays = path.with_suffix("")
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                if manifest["files"] != _checksums(arrays):
                    raise ValueError("files are missing or not what was written")
                with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                    leaves = checkpointer.restore(arrays.resolve(), args=ocp.args.StandardRestore())
                return _state(experiment, like, manifest, leaves)
            except (ValueError, KeyError, OSError) as error:
                self._drop(arrays, f"is damaged ({str(error).splitlines()[0]})")
        return None

    def remove(self) -> None:
        """Removes all of them, and the directory above if it is then empty."""
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._directory.parent.rmdir()

    def _manifests(self) -> list[pathlib.Path]:
        return sorted(self._directory.glob("*.json"), reverse=True)

    def _drop(self, arrays: pathlib.Path, why: str) -> None:
        self._say(f"checkpoint {arrays} {why}: dropped")
        _remove(arrays)


def _leaves(state: State) -> dict[str, np.ndarray]:
    """The arrays of a state, with names that sort in the order of its tree."""
    return {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(_tree(state)))}


def _tree(state: State) -> Any:
    # The unlabeled set is left out: it is what is not labeled.
    optimizer_state = state.underway.optimizer_state if state.underway else None
    return state.pool.labeled, state.strategy_state, state.variables, optimizer_state


def _state(
    experiment: Experiment, like: State, manifest: dict[str, Any], leaves: dict[str, Any]
) -> State:
    """Puts arrays back into the tree that the experiment's states have, such as `like`."""
    if manifest["epoch"]:
        progress = training.begin(like.variables, experiment.training_config)
        like = like._replace(underway=Underway(0, progress.optimizer_state, 0.0, {}))
    structure = jax.tree.structure(_tree(like))
    if structure.num_leaves != len(leaves):
        raise ValueError("it is of another model or optimizer")
    in_order = [leaves[name] for name in sorted(leaves)]
    # All but the first, the labeled set, which grows.
    for saved, leaf in zip(in_order[1:], jax.tree.leaves(_tree(like))[1:], strict=True):
        if saved.shape != np.shape(leaf):
            raise ValueError("it is of a model of another size")
    labeled, strategy_state, *rest = jax.tree.unflatten(structure, in_order)
    variables, optimizer_state = jax.tree.map(jnp.asarray, rest)
    underway = None
    if manifest["epoch"]:
        underway = Underway(
            manifest["epoch"], optimizer_state, manifest["best_test_accuracy"], manifest["seconds"]
        )
    unlabeled = np.setdiff1d(np.arange(len(experiment.dataset.pool.y)), labeled)
    pool = Pool(labeled, unlabeled)
    return State(manifest["round_index"], pool, variables, strategy_state, underway)


def _name(state: State) -> str:
    """Sorts as states follow each other."""
    epoch = state.underway.epoch if state.underway else 0
    return f"round-{state.round_index:05d}-epoch-{epoch:07d}"


def _checksums(directory: pathlib.Path) -> dict[str, int]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): zlib.crc32(path.read_bytes()) for path in files}


def _remove(arrays: pathlib.Path) -> None:
    arrays.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(arrays, ignore_errors=True)
