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

--label_studio=tasks.json writes the images to label next as tasks for Label Studio, too, and
--annotations=export.json takes over what was annotated there; docs/use.md has the steps.
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

from dynamical_jax import files, labeling, strategies, words
from dynamical_jax.errors import UserError
from dynamical_jax.programs import binary, options, person, strategy
from dynamical_jax.runs import progress
from dynamical_jax.store import Store

IMAGES = flags.DEFINE_string("images", None, "Folder of images; folders in it are searched too.")
PREDICTIONS = flags.DEFINE_string(
    "predictions",
    None,
    "File for a table of the class that the model predicts for each unlabeled image.",
)
LABEL_STUDIO = flags.DEFINE_string(
    "label_studio",
    None,
    "A .json file for the images to label next as tasks for Label Studio, with the labeling "
    "configuration beside it, in a .xml file.",
)
ANNOTATIONS = flags.DEFINE_string(
    "annotations",
    None,
    "A file that Label Studio exported (JSON, JSON-MIN or CSV), whose annotations become labels.",
)
flags.adopt_module_key_flags(options)
flags.adopt_module_key_flags(person)
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
    table = pathlib.Path(person.LABELS.value)
    try:
        written = (person.OUTPUT, person.LABELS, PREDICTIONS, LABEL_STUDIO)
        for path in filter(None, (flag.value for flag in written)):
            files.check_writable(pathlib.Path(path))
        with filelock.FileLock(output.with_suffix(".lock"), timeout=0):
            folder, facts = read_folder(table, output)
            if not len(folder.unlabeled):
                labeling.write_proposal(output, [])
                output.with_suffix(".png").unlink(missing_ok=True)
                print("all images are labeled")
                return []
            learner = None
            if len(folder.class_names) < 2:
                facts["strategy"] = "random"
            else:
                learner, fit = train(folder, config, Store(output.with_suffix(".checkpoint")))
                facts |= fit
            proposed = choose(chosen, folder, learner)
            sheet = labeling.proposal.write(proposed, IMAGES.value, output, table)
            query = [image.path for image in proposed]
            line = person.record(sys.modules[__name__], IMAGES.value, folder, facts, query)
            files.append(output.with_suffix(".jsonl"), line)
            number = words.count(len(proposed), "image")
            print(f"{output}: {number} to label next{_why_few(proposed, folder)}")
            shown = min(len(proposed), labeling.proposal.LARGEST_SHEET)
            print(f"{sheet}: {'all' if shown == len(proposed) else f'the first {shown}'} of them")
            if LABEL_STUDIO.value:
                write_tasks(proposed, folder.class_names)
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


def _why_few(proposed: list[labeling.Proposed], folder: labeling.Folder) -> str:
    """Returns why there are fewer images than were asked for; "" if there are not."""
    if len(proposed) >= options.BATCH_SIZE.value:
        return ""
    near = ", near-copies apart" if len(proposed) < len(folder.unlabeled) else ""
    return f", and not {options.BATCH_SIZE.value}: no more are left{near}"


def check_flags() -> tuple[strategies.Strategy, labeling.Config, pathlib.Path]:
    """Checks the flags; returns the strategy, the learner's configuration and the output."""
    given = "as in --images=photos; none given" if IMAGES.value is None else f"got {IMAGES.value}"
    if IMAGES.value is None or not pathlib.Path(IMAGES.value).is_dir():
        raise UserError(f"--images must be a folder of images, {given}; --help explains more")
    output = person.check_tables(IMAGES.value, {"predictions": PREDICTIONS.value})
    for name in person.CLASSES.value:
        labeling.classes.check_name(name)
    if LABEL_STUDIO.value and pathlib.Path(LABEL_STUDIO.value).suffix != ".json":
        raise UserError(f"--label_studio must be a .json file, got {LABEL_STUDIO.value}")
    person.read_options()
    return *person.strategy_and_config(), output


def read_folder(
    table: pathlib.Path, output: pathlib.Path
) -> tuple[labeling.Folder, dict[str, Any]]:
    """Returns the images, and how many of the new labels the model had predicted."""
    paths = labeling.folder.find(IMAGES.value, output.with_suffix(".png"))
    annotated, classes = read_annotations(paths), person.CLASSES.value
    update = labeling.folder.take_over(table, output, IMAGES.value, paths, annotated, classes)
    if update.num_new:
        sources = " and ".join(map(str, [output, *annotated]))
        print(f"{words.count(update.num_new, 'label')} of {sources} added to {table}")
    if update.num_predicted:
        print(
            f"the model had {update.num_right} of {update.num_predicted} of them right (what a "
            "strategy asks for is harder than the rest)"
        )
    folder = labeling.folder.decode(
        IMAGES.value,
        paths,
        update.labels,
        **person.read_options(),
    )
    left_out = labeling.answers.broken(labeling.answers.Log(labeling.answers.beside(table)).answers)
    folder = labeling.folder.without(folder, left_out)
    if broken := folder.broken:
        number = words.count(len(broken), "label is of an image", "labels are of images")
        print(f"{number} that {_unusable(len(broken))}: {', '.join(broken[:3])}")
    for path, label, other in folder.conflicts:
        print(f"{path} is labeled {label!r}, but a copy of it {other!r}")
    classes = Counter(folder.labels.values())
    for one, other in labeling.classes.look_alikes(sorted(classes, key=lambda c: -classes[c])):
        print(
            f"{one!r} ({words.count(classes[one], 'label')}) and {other!r} ({classes[other]}) are "
            "nearly the same: if they are one class, correct the table; --classes takes no other "
            "names"
        )
    num_unusable = len(paths) - len(folder.readable)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(classes.items()))
    print(
        f"{words.count(len(paths), 'image')} in {IMAGES.value}: {len(folder.labeled)} labeled"
        f"{f' ({counts})' if counts else ''}, {len(folder.unlabeled)} to choose from, "
        f"{num_unusable} {_unusable(num_unusable)}, "
        f"{words.count(folder.num_copies, 'is a copy of another', 'are copies of others')}, "
        f"{folder.num_near} nearly so"
    )
    if copies := [f"{path} of {first}" for path, first in folder.copies]:
        more = f" and {len(copies) - 3} more" if len(copies) > 3 else ""
        print(f"copies, which are not asked for: {', '.join(copies[:3])}{more}")
    if not update.num_predicted:
        return folder, {}
    return folder, {"num_right": update.num_right, "num_predicted": update.num_predicted}


def _unusable(count: int) -> str:
    """Returns what is wrong with images that are left out."""
    if person.FEATURES.value is None:
        return "cannot be read"
    return f"cannot be read or {'has' if count == 1 else 'have'} no vector"


def read_annotations(paths: list[str]) -> dict[pathlib.Path, dict[str, str]]:
    """Returns the labels of --annotations, path → class name, by its name; says what it holds."""
    if ANNOTATIONS.value is None:
        return {}
    file = pathlib.Path(ANNOTATIONS.value)
    found = labeling.label_studio.read(file, IMAGES.value, paths)
    number = words.count(len(found.labels), "image")
    print(f"{file}: {number} annotated, {found.num_skipped} skipped or empty")
    for path, names in found.differing.items():
        print(f"{path} is annotated {' and '.join(names)}: the latest counts, {found.labels[path]}")
    if found.foreign:
        number = words.count(len(found.foreign), "image is", "images are")
        print(f"{number} not in {IMAGES.value}: {found.foreign[0]}")
    return {file: found.labels}


def write_tasks(proposed: list[labeling.Proposed], class_names: list[str]) -> None:
    """Writes tasks for Label Studio, and its labeling configuration."""
    tasks = pathlib.Path(LABEL_STUDIO.value)
    files.write(tasks, labeling.label_studio.tasks(IMAGES.value, {}, proposed))
    names = person.CLASSES.value or class_names
    files.write(tasks.with_suffix(".xml"), labeling.label_studio.configuration(names))
    print(f"{tasks}: tasks for Label Studio; its configuration is {tasks.with_suffix('.xml')}")


def train(
    folder: labeling.Folder, config: labeling.Config, store: Store
) -> tuple[labeling.Learner, dict[str, Any]]:
    """Returns the learner, trained on all labels, and facts about its training for the log."""
    start = labeling.learner.warm_start(folder, config, store)
    if start.fit is not None:
        unused = binary.list_given(options.OF_TRAINING)
        print(
            "no labels that the model was not trained on: it stays as it is"
            f"{f', without {unused}' if unused else ''}"
        )
        return start.learner, start.fit
    if config.weights is not None and start.round_index == 0:
        print(config.weights.describe(len(start.learner.class_names)))
    if gone := [name for name in start.learner.class_names if name not in folder.class_names]:
        print(
            f"the model still knows {', '.join(gone)}, though no image has that label now: remove "
            "its .checkpoint to train without"
        )
    if start.new_classes:
        grown = f"the model grows to {len(start.learner.class_names)} outputs"
        print(f"new classes: {', '.join(start.new_classes)}; {grown}")
    target = config.training.largest_loss(len(folder.labeled))
    with working_bar(config.training.max_epochs) as bar:
        on_epoch = lambda progress, seen: bar.epoch(progress.epoch, seen, target)
        learner, fit = labeling.learner.train(start, folder, config, store, on_epoch)
    print(
        f"trained for {words.count(fit['epochs'], 'epoch')}: {fit['train_accuracy']:.1%} of the "
        "labels right"
        f"{'' if fit['converged'] else ' (not converged: --max_epochs)'}"
    )
    return learner, fit


def choose(
    chosen: strategies.Strategy, folder: labeling.Folder, learner: labeling.Learner | None
) -> list[labeling.Proposed]:
    """Returns the images to label next, the most wanted first."""
    size, seed = options.BATCH_SIZE.value, person.SEED.value
    if learner is None:
        unused = binary.list_given(
            (person.STRATEGY, *strategy.OPTIONS, *options.OF_MODEL, *options.OF_TRAINING)
        )
        print(
            "fewer than two classes are labeled: drawn at random"
            f"{f', without {unused}' if unused else ''}"
        )
        return labeling.proposal.draw(folder, size, seed)
    with working_bar() as bar:
        return labeling.proposal.choose(chosen, folder, learner, size, seed, bar.scored)


def write_predictions(folder: labeling.Folder, learner: labeling.Learner) -> None:
    """Writes the class that the model predicts for each image without a label."""
    with working_bar() as bar:
        rows = np.setdiff1d(folder.readable, folder.labeled)
        rest = labeling.proposal.predict(folder, learner, rows, bar.scored)
    labeling.write_proposal(
        pathlib.Path(PREDICTIONS.value), rest, pathlib.Path(person.LABELS.value)
    )
    number = words.count(len(rest), "image")
    print(f"{PREDICTIONS.value}: the model's predictions for {number} without a label")


@contextlib.contextmanager
def working_bar(max_epochs: int = 1) -> Iterator[progress.Bar]:
    """Yields a progress bar for the work of one round."""
    with progress.Bar() as bar:
        bar.start("select", 1, max_epochs)
        bar.begin(1)
        yield bar
