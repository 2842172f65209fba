"""Flags that the programs for labeling share, and the objects that they describe."""

import functools
import os
import pathlib
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from absl import flags

from dynamical_jax import embedding, files, labeling, models, strategies, streams, words
from dynamical_jax.data import near_copies
from dynamical_jax.errors import UserError
from dynamical_jax.programs import binary, options, pretrained, strategy
from dynamical_jax.runs import records

LABELS = flags.DEFINE_string("labels", "labels.csv", "Table of labels: columns path and label.")
FEATURES = flags.DEFINE_string(
    "features",
    None,
    "An .npz file with arrays embedding [n, d] and path [n], relative to the folder of images: "
    "dynamical-embed writes it (by default features.npz); elsewhere a model of vectors learns from "
    "it, and the images are only shown.",
)
CLASSES = flags.DEFINE_list(
    "classes",
    [],
    "Names of classes. dynamical-select then takes no other label; on the page of dynamical-label "
    "more can be added.",
)
NEAR_COPIES = flags.DEFINE_integer(
    "near_copies",
    3,
    "Images are near-copies, of which a batch has only one, if at most so many of the 64 bits of "
    "a hash differ; -1: only if all pixels are the same.",
    lower_bound=-1,
    upper_bound=near_copies.MOST_BITS,
)
binary.read_by(NEAR_COPIES, "dataset", (options.FOLDER,))
OUTPUT = flags.DEFINE_string("output", "to_label.csv", "Table of images to label next.")
STRATEGY_NAMES = [name for name, make in strategies.STRATEGIES.items() if make().init() is None]
RECOMMENDED = "dynamical_herding"


class _NameParser(flags.ArgumentParser[str]):
    """Reads "auto" as the name of the strategy that it stands for."""

    def parse(self, argument: str) -> str:
        return RECOMMENDED if argument == "auto" else argument


STRATEGY = flags.DEFINE(
    _NameParser(),
    "strategy",
    "auto",
    f"One of {', '.join(STRATEGY_NAMES)}; auto is {RECOMMENDED}.",
)
OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Replace tables even where another program wrote them."
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of all random numbers.", lower_bound=0, upper_bound=streams.LARGEST_SEED
)


class LoggedRound(msgspec.Struct):
    """The part of a line of the log that is read again.

    Attributes:
      folder: of the images; "" if it is not there.
      num_labeled: how many of them were labeled.
      flags: of the program.
    """

    folder: str = ""
    num_labeled: files.Count = 0
    flags: dict[str, Any] = {}


def check_tables(images: str, others: Mapping[str, str | None]) -> pathlib.Path:
    """Checks the tables; returns the path of the one of images to label next.

    Args:
      images: the folder of images.
      others: flag → table, besides --labels and --output; None where there is none.

    Raises:
      UserError: if two of them are the same file, or one is no .csv file, or one that would be
        replaced was not written by this program, or for another folder, or the labels of the
        earlier rounds are not there.
    """
    tables = [OUTPUT.value, LABELS.value, *others.values()]
    tables = [pathlib.Path(table) for table in tables if table]
    if len({os.path.realpath(table) for table in tables}) < len(tables):
        *first, last = (f"--{name}" for name in ("labels", "output", *others))
        raise UserError(f"{', '.join(first)} and {last} must be different files")
    if any(table.suffix != ".csv" for table in tables):
        raise UserError(f"tables must be .csv files, got {', '.join(map(str, tables))}")
    output = pathlib.Path(OUTPUT.value)
    rounds = _logged_rounds(output)
    for path in filter(None, (OUTPUT.value, *others.values())):
        path = pathlib.Path(path)
        is_ours = path == output and bool(rounds)
        if not OVERWRITE.value and not labeling.tables.is_replaceable(path, is_ours):
            taken = path == output and labeling.tables.holds_labels(path)
            first = f", after its labels are added to {LABELS.value}" if taken else ""
            raise UserError(
                f"{path} is there, and was not written by this program, so it stays as it is: give "
                f"another name, or --overwrite to replace it{first}"
            )
    last = rounds[-1] if rounds else LoggedRound()
    if last.num_labeled and not os.path.lexists(LABELS.value):
        raise UserError(
            f"there is no {LABELS.value}, and the last round had "
            f"{words.count(last.num_labeled, 'label')} in {last.flags.get('labels', 'a table')}: "
            "give that as --labels, or another --output to begin anew"
        )
    former_folder = last.folder
    if os.path.isdir(former_folder) and not os.path.samefile(former_folder, images):
        raise UserError(
            f"{output} asks for labels of the images in {former_folder}: give another --output for "
            f"those in {images}"
        )
    return output


def _logged_rounds(output: pathlib.Path) -> list[LoggedRound]:
    """Returns the rounds in the log beside a table of images to label; none without a table."""
    log = output.with_suffix(".jsonl")
    return files.read_lines(log, LoggedRound) if output.exists() and log.exists() else []


def strategy_and_config() -> tuple[strategies.Strategy, labeling.Config]:
    """Returns the strategy and the learner's configuration that the flags describe.

    Raises:
      UserError: if a flag cannot be used.
    """
    if options.BATCH_SIZE.value < 1:
        raise UserError(f"batch_size must be at least 1, got {options.BATCH_SIZE.value}")
    weights = pretrained.load()
    vectors = FEATURES.value is not None or pretrained.embeds()
    if FEATURES.value is not None and weights is not None:
        raise UserError("--features are learned from, or what --weights make of images: give one")
    attributes = options.set_model_defaults("vectors" if vectors else "images")
    if STRATEGY.value in strategies.STRATEGIES and STRATEGY.value not in STRATEGY_NAMES:
        raise UserError(
            f"{STRATEGY.value} learns from how its last query was labeled, in whole and in order, "
            f"which a person need not do: choose from {', '.join(STRATEGY_NAMES)}"
        )
    words.check_known("strategy", STRATEGY.value, [*STRATEGY_NAMES, "auto"])
    (chosen,) = strategy.make([STRATEGY.value]).values()
    if chosen.needs_dropout and not getattr(models.MODELS[options.MODEL.value], "dropout", 0):
        raise UserError(f"{STRATEGY.value} needs a model with dropout: choose vgg11")
    training = options.training_config()
    scale = options.FEATURE_SCALE.value
    if weights is not None and vectors:
        print(weights.describe())
    features = FEATURES.value and os.path.abspath(FEATURES.value)
    config = labeling.Config(
        options.MODEL.value, attributes, training, SEED.value, scale, features=features
    )
    if weights is not None:
        network = labeling.learner.Network.of(weights, pretrained.image_size(weights))
        config = config._replace(network=network, weights=None if vectors else weights)
    return chosen, config


def read_options() -> dict[str, Any]:
    """Returns the options of `labeling.folder.read` that the flags give.

    Raises:
      UserError: if there is no such file of features, or a flag has no effect beside it.
    """
    binary.check_read(dataset=[options.FOLDER if FEATURES.value is None else options.ARRAYS])
    if FEATURES.value is not None and not os.path.isfile(FEATURES.value):
        raise UserError(f"there is no file {FEATURES.value}")
    cache_dir, weights, embed = options.prepare_cache_dir(), pretrained.load(), None
    if weights is not None and pretrained.embeds():
        embed = functools.partial(
            embedding.embed, weights, cache_dir=cache_dir, image_size=options.IMAGE_SIZE.value
        )
    return {
        "features": FEATURES.value,
        "near": None if NEAR_COPIES.value < 0 else NEAR_COPIES.value,
        "embed": embed,
        "cache_dir": cache_dir,
        "size": pretrained.image_size(weights),
        "interpolation": pretrained.interpolation(weights),
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
      program: the module whose key flags are recorded.
      images: the folder of images.
      folder: the images with their labels.
      facts: further fields, such as those of the training.
      query: paths of the images to label.
    """
    return {
        "folder": os.path.abspath(images),
        "num_labeled": len(folder.labeled),
        "num_unlabeled": len(folder.unlabeled),
        "classes": dict(Counter(folder.labels.values())),
        "strategy": STRATEGY.value,
        **facts,
        "query": list(query),
        "flags": {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(program)},
        **records.environment(),
    }
