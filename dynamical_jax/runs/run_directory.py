"""The directory of a comparison: its lock, its flags, and the records so far."""

import contextlib
import json
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import filelock

from dynamical_jax import files
from dynamical_jax.errors import UserError
from dynamical_jax.runs import records

FLAGS_NAME = "flags.json"
CHECKPOINTS_NAME = "checkpoints"


class RunDirectory:
    """Records and checkpoints of a comparison.

    Made by `open_locked`, which holds the lock.

    Attributes:
      path: the directory.
      rounds: the path of the records.
      done: (strategy, seed) → the records of its rounds so far.
    """

    def __init__(self, path: pathlib.Path, done: Mapping[tuple[str, int], list[records.Record]]):
        self.path = path
        self.rounds = path / records.FILE_NAME
        self.done = done

    def append(self, record: records.Record) -> None:
        """Adds the record of a round."""
        files.append(self.rounds, record)
        self.done[record["strategy"], record["seed"]].append(record)

    def checkpoints(self, strategy: str, seed: int) -> pathlib.Path:
        """Returns the directory for the checkpoints of one run."""
        return self.path / CHECKPOINTS_NAME / f"{strategy}-seed-{seed}"


@contextlib.contextmanager
def open_locked(
    output_dir: str, flags: Mapping[str, Any], say: Callable[[str], None] = print
) -> Iterator[RunDirectory]:
    """Yields a new directory, or one that was made with the same flags, locked.

    If the last line of the records is incomplete, it is removed. If there are no records when the
    block ends, the flags are removed, so that the directory can be used with other flags.

    Args:
      output_dir: the directory.
      flags: name → value of the flags that decide the results; JSON values.
      say: called with a line about each repair.

    Raises:
      UserError: if it was made with other flags, is in use, or cannot be written to.
    """
    path = pathlib.Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"{output_dir} is in use by another process: wait for it, or give another --output_dir"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write to {output_dir}: {error.strerror}") from error
    rounds = path / records.FILE_NAME
    try:
        _check_flags(path, flags)
        done = defaultdict(list)
        for record in records.repair(rounds, say):
            done[record["strategy"], record["seed"]].append(record)
        for (strategy, seed), run_records in done.items():
            if [record["round"] for record in run_records] != list(range(len(run_records))):
                raise UserError(
                    f"{rounds} lacks a round of {strategy}, seed {seed}, or has one twice: remove "
                    "the lines of this run, which is then played again"
                )
        yield RunDirectory(path, done)
    finally:
        if not _holds_work(path):
            for name in (records.FILE_NAME, FLAGS_NAME):
                (path / name).unlink(missing_ok=True)
        lock.release()


def describe_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Returns the flags that differ, as in "--b=2 there and 3 here"; "" if none does."""
    names = sorted({*ours, *theirs})
    return ", ".join(
        (f"no --{name}" if theirs.get(name) is None else f"--{name}={_format_value(theirs[name])}")
        + f" there and {_format_value(ours.get(name))} here"
        for name in names
        if ours.get(name) != theirs.get(name)
    )


def _check_flags(path: pathlib.Path, flags: Mapping[str, Any]) -> None:
    """Checks the flags against those of the directory, or writes them to a new one."""
    ours = json.loads(json.dumps(files.finite(flags)))
    file = path / FLAGS_NAME
    if _holds_work(path):
        try:
            theirs = files.read_json(file, dict[str, Any])
        except UserError as error:
            raise UserError(
                f"{path} holds records, but no readable {FLAGS_NAME} that says how they were "
                "made: give another --output_dir"
            ) from error
        if difference := describe_difference(ours, theirs):
            raise UserError(
                f"{path} was made with other flags ({difference}): give these, or another "
                "--output_dir"
            )
    else:
        files.write(file, json.dumps(ours, indent=1))
    (path / records.FILE_NAME).touch()


def _holds_work(path: pathlib.Path) -> bool:
    rounds, checkpoints = path / records.FILE_NAME, path / CHECKPOINTS_NAME
    return (rounds.exists() and rounds.stat().st_size > 0) or any(checkpoints.glob("*/*.json"))


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
