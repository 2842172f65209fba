"""Flags that programs share in which a person labels, and what they name."""

import os
import pathlib
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from absl import flags

from dynamical_jax import files, labeling, strategies
from dynamical_jax.errors import UserError
from dynamical_jax.programs import options, strategy
from dynamical_jax.runs import records

LABELS = flags.DEFINE_string("labels", "labels.csv", "Table of labels: columns path and label.")
OUTPUT = flags.DEFINE_string("output", "to_label.csv", "Table of images to label next.")
NAMES = [name for name, kind in strategies.STRATEGIES.items() if kind().init() is None]
STRATEGY = flags.DEFINE_string("strategy", "dynamical", f"One of {', '.join(NAMES)}.")
OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Replace tables even where another program wrote them."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of all random numbers.", lower_bound=0)


class Round(msgspec.Struct):
    """Of a line of the log, what is read again: the folder of the images, if it says so."""

    folder: str = ""


def check_tables(images: str, others: Mapping[str, str | None]) -> pathlib.Path:
    """Returns the table of images to label next, once the tables are looked at.

    Args:
      images: the folder of images.
      others: flag → table, besides --labels and --output; None where there is none.

    Raises:
      UserError: if two of them are the same file, or one is no .csv file, or one that would be
        replaced was not written by this program, or for another folder.
    """
    tables = [OUTPUT.value, LABELS.value, *others.values()]
    tables = [pathlib.Path(table) for table in tables if table]
    if len({table.resolve() for table in tables}) < len(tables):
        *first, last = (f"--{name}" for name in ("labels", "output", *others))
        raise UserError(f"{', '.join(first)} and {last} must be different files")
    if any(table.suffix != ".csv" for table in tables):
        raise UserError(f"tables must be .csv files, got {', '.join(map(str, tables))}")
    for name in filter(None, (OUTPUT.value, *others.values())):
        if not OVERWRITE.value and not labeling.tables.is_replaceable(pathlib.Path(name)):
            raise UserError(
                f"{name} is there, and was not written by this program: give another name, or "
                "--overwrite to replace it"
            )
    output = pathlib.Path(OUTPUT.value)
    former = _former_folder(output)
    if former and not os.path.samefile(former, images):
        raise UserError(
            f"{output} asks for labels of the images in {former}: give another --output for those "
            f"in {images}"
        )
    return output


def _former_folder(output: pathlib.Path) -> str | None:
    """The folder that a table asks for labels of; None if that is not known, or gone."""
    log = output.with_suffix(".jsonl")
    lines = files.read_lines(log, Round) if output.exists() and log.exists() else []
    folder = lines[-1].folder if lines else ""
    return folder if os.path.isdir(folder) else None


def chosen() -> tuple[strategies.Strategy, labeling.Config]:
    """Returns the strategy and the learner that the flags name, looked at before any work.

    Raises:
      UserError: if they cannot be.
    """
    if options.BATCH_SIZE.value < 1:
        raise UserError(f"batch_size must be at least 1, got {options.BATCH_SIZE.value}")
    attributes = options.set_model_defaults()
    chosen = strategy.make(STRATEGY.value)
    if STRATEGY.value not in NAMES:
        raise UserError(
            f"{STRATEGY.value} learns from how its last query was labeled, in whole and in order, "
            f"which a person need not do: choose from {', '.join(NAMES)}"
        )
    training = options.training_config()
    return chosen, labeling.Config(options.MODEL.value, attributes, training, SEED.value)


def decoding() -> dict[str, Any]:
    """Returns the options of `images.decode` that the flags give."""
    return {
        "cache_dir": options.prepare_cache_dir(),
        "size": options.IMAGE_SIZE.value,
        "channels": options.CHANNELS.value,
        "unreadable": options.UNREADABLE.value,
    }


def record(
    program: types.ModuleType,
    images: str,
    folder: labeling.Folder,
    facts: Mapping[str, Any],
    query: Sequence[str],
) -> dict[str, Any]:
    """Returns a round's line of the log.

    Args:
      program: whose flags it holds.
      images: the folder of images.
      folder: what was labeled.
      facts: of the training and so on.
      query: paths of what is asked for.
    """
    return {
        "folder": os.path.abspath(images),
        "num_labeled": len(folder.labeled),
        "num_unlabeled": len(folder.unlabeled),
        "classes": dict(Counter(folder.labels.values())),
        **facts,
        "strategy": STRATEGY.value,
        "query": list(query),
        "flags": {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(program)},
        **records.environment(),
    }
