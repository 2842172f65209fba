"""The state of a run on disk, so that a killed process can be continued bit for bit."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from dynamical_jax import files, store, training
from dynamical_jax.active_learning import Experiment, State, Underway
from dynamical_jax.data.pool import Pool


class Description(msgspec.Struct):
    """The values of a state beside its arrays.

    Attributes:
      round_index: of the round that is played next.
      epoch: that it is in; 0 before its training.
      best_test_accuracy: in this round so far.
      seconds: that its parts took so far.
    """

    round_index: files.Count
    epoch: files.Count
    best_test_accuracy: files.Share | None
    seconds: dict[str, float]


class Checkpoints:
    """The newest states of one run, in a `store.Store`; arguments are those of one."""

    def __init__(self, directory: pathlib.Path, say: Callable[[str], None] = print):
        self._store = store.Store(directory, say)

    def save(self, state: State) -> None:
        """Writes a state."""
        underway = state.underway or Underway(0, None, 0.0, {})
        description = Description(
            state.round_index, underway.epoch, underway.best_test_accuracy, underway.seconds
        )
        # Sorts as states follow each other.
        name = f"round-{state.round_index:05d}-epoch-{underway.epoch:07d}"
        self._store.save(name, _tree(state), msgspec.structs.asdict(description))

    def restore(self, experiment: Experiment) -> State | None:
        """Returns the newest state that is whole, or None; sets aside the others."""
        like = functools.cache(experiment.init)  # Not made where there is nothing to restore.
        return self._store.restore(
            Description,
            lambda description, leaves: _state(experiment, like(), description, leaves),
        )

    def remove(self) -> None:
        """Removes all of them, and the directory above if it is then empty."""
        self._store.remove()


def _tree(state: State) -> Any:
    # The unlabeled set is left out: it is what is not labeled.
    optimizer_state = state.underway.optimizer_state if state.underway else None
    return state.pool.labeled, state.strategy_state, state.variables, optimizer_state


def _state(
    experiment: Experiment, like: State, description: Description, leaves: list[np.ndarray]
) -> State:
    """Puts arrays back into the tree that the experiment's states have, such as `like`."""
    if description.epoch:
        progress = training.begin(like.variables, experiment.training_config)
        like = like._replace(underway=Underway(0, progress.optimizer_state, 0.0, {}))
    # Of the shapes all but the first's, the labeled set's, which grows.
    labeled, strategy_state, *rest = store.unflatten(_tree(like), leaves, growing=1)
    variables, optimizer_state = jax.tree.map(jnp.asarray, rest)
    underway = None
    if description.epoch:
        underway = Underway(
            description.epoch,
            optimizer_state,
            description.best_test_accuracy,
            description.seconds,
        )
    unlabeled = np.setdiff1d(np.arange(len(experiment.dataset.pool.y)), labeled)
    pool = Pool(labeled, unlabeled)
    return State(description.round_index, pool, variables, strategy_state, underway)
