"""Which of my images should be labeled next?

  dynamical-select --images=path/to/images --labels=labels.csv --batch_size=50
      --output=to_label.csv

Trains a model on the images that labels.csv labels (its columns are path, relative to --images, and
label), scores all other images, and writes the 50 that the strategy ranks highest to to_label.csv,
with a contact sheet of them in to_label.png. Fill in the column label of to_label.csv and give the
same command again: it adds the labels to labels.csv, trains the model further, and writes the next
50 to to_label.csv. Rows without a label stay in the pool.

Without labels, or with labels of one class only, there is nothing to train on. Then images are
drawn at random: with so few labels that is hard to beat, and it shows which classes there are.

Beside to_label.csv and to_label.png are to_label.jsonl, with a line for each round, and
to_label.checkpoint, the model; remove it to train from the start. To finish,
--predictions=rest.csv writes the class that the model predicts for each image without a label.
"""

import contextlib
import functools
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import filelock
import numpy as np
from absl import flags

from dynamical_jax import files, labeling, strategies
from dynamical_jax.errors import UserError
from dynamical_jax.programs import binary, options, strategy
from dynamical_jax.runs import progress, records, run_directory
from dynamical_jax.store import Store

IMAGES = flags.DEFINE_string("images", None, "Folder of images; folders in it are searched too.")
LABELS = flags.DEFINE_string("labels", "labels.csv", "Table of labels: columns path and label.")
OUTPUT = flags.DEFINE_string("output", "to_label.csv", "Table of images to label next.")
PREDICTIONS = flags.DEFINE_string(
    "predictions",
    None,
    "File for a table of the class that the model predicts for each unlabeled image.",
)
NAMES = [name for name, kind in strategies.STRATEGIES.items() if kind().init() is None]
STRATEGY = flags.DEFINE_string("strategy", "dynamical", f"One of {', '.join(NAMES)}.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all random numbers.", lower_bound=0)
flags.adopt_module_key_flags(options)
flags.adopt_module_key_flags(strategy)

INTERRUPTED = "interrupted; nothing is lost, the same command begins this round again"


def start() -> None:
    """Runs this program: the console script dynamical-select."""
    binary.start(sys.modules[__name__])


def main(argv: list[str]) -> int | None:
    """Chooses what to label next; returns the exit status."""
    return binary.run_main(functools.partial(run, argv), INTERRUPTED)


def run(argv: list[str]) -> list[str]:
    """Adds the new labels, trains, chooses images and writes them; returns no failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    chosen, config, output = check_flags()
    table = pathlib.Path(LABELS.value)
    try:
        for path in filter(None, (OUTPUT.value, LABELS.value, PREDICTIONS.value)):
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(output.with_suffix(".lock"), timeout=0):
            folder, facts = read_folder(table, output)
            if not len(folder.unlabeled):
                labeling.write_proposal(output, [])
                output.with_suffix(".png").unlink(missing_ok=True)
                print("all images are labeled")
                return []
            learner = None
            if len(folder.class_names) >= 2:
                learner, fit = train(folder, config, Store(output.with_suffix(".checkpoint")))
                facts |= fit
            proposed = choose(chosen, folder, learner)
            sheet = labeling.proposal.write(proposed, IMAGES.value, output, table)
            files.append(output.with_suffix(".jsonl"), record(folder, facts, proposed))
            print(f"{output}: {len(proposed)} images to label next\n{sheet}")
            if PREDICTIONS.value and learner is None:
                print(f"{PREDICTIONS.value} is not written: there is no model yet")
            elif PREDICTIONS.value:
                write_predictions(folder, learner)
    except filelock.Timeout as error:
        raise UserError(f"{output} is in use by another process: wait for it") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    return []


def check_flags() -> tuple[strategies.Strategy, labeling.Config, pathlib.Path]:
    """Checks the flags; returns the strategy, the learner's configuration and the output."""
    if IMAGES.value is None or not pathlib.Path(IMAGES.value).is_dir():
        raise UserError(f"--images must be a folder of images, got {IMAGES.value}")
    output = pathlib.Path(OUTPUT.value)
    tables = [pathlib.Path(table) for table in (output, LABELS.value, PREDICTIONS.value) if table]
    if len({table.resolve() for table in tables}) < len(tables):
        raise UserError("--labels, --output and --predictions must be different files")
    if any(table.suffix != ".csv" for table in tables):
        raise UserError(f"tables must be .csv files, got {', '.join(map(str, tables))}")
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
    config = labeling.Config(options.MODEL.value, attributes, training, SEED.value)
    return chosen, config, output


def read_folder(
    table: pathlib.Path, output: pathlib.Path
) -> tuple[labeling.Folder, dict[str, Any]]:
    """Returns the images, and how many of the new labels the model had predicted."""
    paths = labeling.folder.find(IMAGES.value, output.with_suffix(".png"))
    update = labeling.folder.take_over(table, output, IMAGES.value, paths)
    if update.num_new:
        print(f"{update.num_new} labels of {output} added to {table}")
    if update.num_predicted:
        print(f"the model had {update.num_right} of {update.num_predicted} of them right")
    folder = labeling.folder.decode(
        IMAGES.value,
        paths,
        update.labels,
        cache_dir=options.prepare_cache_dir(),
        size=options.IMAGE_SIZE.value,
        channels=options.CHANNELS.value,
        unreadable=options.UNREADABLE.value,
    )
    if broken := folder.broken:
        print(f"{len(broken)} labels are of images that cannot be read: {', '.join(broken[:3])}")
    for path, label, other in folder.conflicts:
        print(f"{path} is labeled {label!r}, but a copy of it {other!r}")
    classes = Counter(folder.labels.values())
    counts = ", ".join(f"{count} {name}" for name, count in sorted(classes.items()))
    print(
        f"{len(paths)} images in {IMAGES.value}: {len(folder.labeled)} labeled"
        f"{f' ({counts})' if counts else ''}, {len(folder.unlabeled)} to choose from, "
        f"{len(paths) - len(folder.readable)} cannot be read, "
        f"{folder.num_copies} are copies of others"
    )
    if not update.num_predicted:
        return folder, {}
    return folder, {"num_right": update.num_right, "num_predicted": update.num_predicted}


def train(
    folder: labeling.Folder, config: labeling.Config, store: Store
) -> tuple[labeling.Learner, dict[str, Any]]:
    """Returns the learner, trained on all labels, and facts about its training for the log."""
    start = labeling.learner.warm_start(folder, config, store)
    if start.fit is not None:
        print("no labels that the model was not trained on: it stays as it is")
        return start.learner, start.fit
    if start.former_description is not None:
        difference = run_directory.describe_difference(
            config.model_description(folder), start.former_description
        )
        print(f"the model is trained from the start: that of the last round had {difference}")
    if start.new_classes:
        grown = f"the model grows to {len(start.learner.class_names)} outputs"
        print(f"new classes: {', '.join(start.new_classes)}; {grown}")
    target = config.training.largest_loss(len(folder.labeled))
    with working_bar(config.training.max_epochs) as bar:
        on_epoch = lambda progress, seen: bar.epoch(progress.epoch, seen, target)
        learner, fit = labeling.learner.train(start, folder, config, store, on_epoch)
    print(f"trained for {fit['epochs']} epochs: {fit['train_accuracy']:.1%} of the labels right")
    return learner, fit


def choose(
    chosen: strategies.Strategy, folder: labeling.Folder, learner: labeling.Learner | None
) -> list[labeling.Proposed]:
    """Returns the images to label next, the most wanted first."""
    size, seed = options.BATCH_SIZE.value, SEED.value
    if learner is None:
        print("fewer than two classes are labeled: drawn at random")
        return labeling.proposal.draw(folder, size, seed)
    with working_bar() as bar:
        return labeling.proposal.choose(chosen, folder, learner, size, seed, bar.scored)


def write_predictions(folder: labeling.Folder, learner: labeling.Learner) -> None:
    """Writes the class that the model predicts for each image without a label."""
    with working_bar() as bar:
        rows = np.setdiff1d(folder.readable, folder.labeled)
        rest = labeling.proposal.predict(folder, learner, rows, bar.scored)
    labeling.write_proposal(pathlib.Path(PREDICTIONS.value), rest, pathlib.Path(LABELS.value))
    print(f"{PREDICTIONS.value}: what the model takes all others for")


def record(
    folder: labeling.Folder, facts: dict[str, Any], proposed: list[labeling.Proposed]
) -> dict[str, Any]:
    """Returns the round's line of the log."""
    return {
        "num_labeled": len(folder.labeled),
        "num_unlabeled": len(folder.unlabeled),
        "classes": dict(Counter(folder.labels.values())),
        **facts,
        "strategy": STRATEGY.value,
        "query": [image.path for image in proposed],
        "flags": {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(__name__)},
        **records.environment(),
    }


@contextlib.contextmanager
def working_bar(max_epochs: int = 1) -> Iterator[progress.Bar]:
    """Yields a progress bar for the work of one round."""
    with progress.Bar() as bar:
        bar.start("select", 1, max_epochs)
        bar.begin(1)
        yield bar
