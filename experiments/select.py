"""Which of my images should be labeled next?

  python -m experiments.select --images=path/to/images --labels=labels.csv --batch_size=50
      --output=to_label.csv

Trains a model on the images that labels.csv labels (columns path, relative to --images, and label),
scores all others, and writes the 50 that the strategy wants most to to_label.csv, with a contact
sheet of them in to_label.png. Fill in the column label of to_label.csv and give the same command
again: the labels are added to labels.csv, the model is trained on from where it stood, and
to_label.csv holds the next 50. Rows that are left empty stay in the pool.

Without labels, or with those of one class only, there is nothing to train on, and images are drawn
at random: at such sizes that is hard to beat, and labels so drawn show what classes there are.

Beside to_label.csv and to_label.png there are to_label.jsonl, a line for each round, and
to_label.checkpoint, the model; remove it to train from the start. When you have had enough,
--predictions=rest.csv writes what the model takes all the others for.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np
from absl import app, flags, logging

import dynamical_jax as dj
from experiments import active_learning, binary, common

IMAGES = flags.DEFINE_string("images", None, "Folder of images; folders in it are searched too.")
LABELS = flags.DEFINE_string("labels", "labels.csv", "Table of labels: columns path and label.")
OUTPUT = flags.DEFINE_string("output", "to_label.csv", "Table of images to label next.")
PREDICTIONS = flags.DEFINE_string(
    "predictions", None, "Also write a table of what the model takes each unlabeled image for."
)
NAMES = [name for name, strategy in dj.STRATEGIES.items() if strategy().init() is None]
STRATEGY = flags.DEFINE_string("strategy", "dynamical", f"One of {', '.join(NAMES)}.")
SEED = flags.DEFINE_integer("seed", 0, "Of all randomness.", lower_bound=0)
for _name in (
    "batch_size",
    "cache_dir",
    "channels",
    "chunk_size",
    "engine",
    "gamma",
    "image_size",
    "learning_rate",
    "max_epochs",
    "model",
    "optimizer",
    "schedule",
    "stem",
    *("target_accuracy", "target_loss", "target_total_loss", "min_epochs", "look_every"),
    "train_batch_size",
    "unreadable",
    "weight_decay",
):
    flags.declare_key_flag(_name)

INTERRUPTED = "interrupted; nothing is lost, the same command begins this round again"
LARGEST_SHEET = 100


class Files(NamedTuple):
    """The images.

    Attributes:
      paths: of each, relative to the folder.
      x: `[n, h, w, c]`.
      labels: path → class name, in the order in which labels came.
      labeled: rows of `x` that have a label, in this order.
      unlabeled: rows to choose from: of copies only the first, and none of what is labeled.
      readable: rows that are images.
    """

    paths: list[str]
    x: dj.images.OnDisk
    labels: dict[str, str]
    labeled: np.ndarray
    unlabeled: np.ndarray
    readable: np.ndarray

    @property
    def labels_checksum(self) -> int:
        """Tells whether labels have changed."""
        return zlib.crc32(repr(list(self.labels.items())).encode())


class Learner(NamedTuple):
    """A model, its variables, and the classes of its outputs."""

    model: dj.models.Standardized
    variables: Any
    class_names: list[str]

    def targets(self, files: Files) -> np.ndarray:
        """Returns the labels as numbers."""
        return np.array([self.class_names.index(name) for name in files.labels.values()], np.int32)


def main(argv: list[str]) -> int | None:
    """Chooses what to label next; returns the exit status."""
    return binary.run_main(functools.partial(run, argv), INTERRUPTED)


def run(argv: list[str]) -> list[str]:
    """Takes up the new labels, trains, chooses, and writes; returns what failed: nothing."""
    binary.check_command_line(argv, sys.modules[__name__])
    strategy, config, output = checked()
    try:
        for table in filter(None, (OUTPUT.value, LABELS.value, PREDICTIONS.value)):
            pathlib.Path(table).parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(output.with_suffix(".lock"), timeout=0):
            files, agreement = read_files(output)
            if not len(files.unlabeled):
                dj.labeling.write_proposal(output, [])
                output.with_suffix(".png").unlink(missing_ok=True)
                print("all images are labeled")
                return []
            learner, fit = trained(files, config, output.with_suffix(".checkpoint"))
            proposed = choose(strategy, files, learner)
            write(files, proposed, output, {**agreement, **fit})
            if PREDICTIONS.value and learner is None:
                print(f"{PREDICTIONS.value} is not written: there is no model yet")
            elif PREDICTIONS.value:
                rest = predicted(files, learner, np.setdiff1d(files.readable, files.labeled))
                path = pathlib.Path(PREDICTIONS.value)
                dj.labeling.write_proposal(path, rest, pathlib.Path(LABELS.value))
                print(f"{PREDICTIONS.value}: what the model takes all others for")
    except filelock.Timeout as error:
        raise dj.UserError(f"{output} is in use by another process: wait for it") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise dj.UserError(f"cannot write {error.filename}: {error.strerror}") from error
    return []


def checked() -> tuple[dj.strategies.Strategy, dj.TrainingConfig, pathlib.Path]:
    """Returns what the flags name, all of which is looked at before any work."""
    if IMAGES.value is None or not pathlib.Path(IMAGES.value).is_dir():
        raise dj.UserError(f"--images must be a folder of images, got {IMAGES.value}")
    output = pathlib.Path(OUTPUT.value)
    tables = [pathlib.Path(table) for table in (output, LABELS.value, PREDICTIONS.value) if table]
    if len({table.resolve() for table in tables}) < len(tables):
        raise dj.UserError("--labels, --output and --predictions must be different files")
    if any(table.suffix != ".csv" for table in tables):
        raise dj.UserError(f"tables must be .csv files, got {', '.join(map(str, tables))}")
    if common.BATCH_SIZE.value < 1:
        raise dj.UserError(f"batch_size must be at least 1, got {common.BATCH_SIZE.value}")
    common.settle_model()
    strategy = active_learning.make_strategy(STRATEGY.value)
    if STRATEGY.value not in NAMES:
        raise dj.UserError(
            f"{STRATEGY.value} learns from how its last query was labeled, in whole and in order, "
            f"which a person need not do: choose from {', '.join(NAMES)}"
        )
    return strategy, common.training_config(), output


def read_files(output: pathlib.Path) -> tuple[Files, dict[str, Any]]:
    """Returns the images, and how well the model had predicted the labels that have come."""
    folder, table = IMAGES.value, pathlib.Path(LABELS.value)
    known = dj.labeling.read_labels(table, folder).of_path
    filled = dj.labeling.read_labels(output, folder)
    labels = dj.labeling.joined(known, filled.of_path, output)
    sheet = output.with_suffix(".png").resolve()  # It may lie among the images.
    found = [path for path in dj.images.find(folder) if pathlib.Path(path).resolve() != sheet]
    if not found:
        raise dj.UserError(f"there are no image files in {folder}")
    paths = [pathlib.Path(path).relative_to(folder).as_posix() for path in found]
    if missing := sorted(set(labels) - set(paths)):
        raise dj.UserError(
            f"{len(missing)} labeled images are not in {folder}: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}: put them back, or remove their rows"
        )
    if new := {path: label for path, label in labels.items() if path not in known}:
        dj.labeling.add_labels(table, new)
        print(f"{len(new)} labels of {output} added to {table}")
    if filled.num_predicted:
        print(f"the model had {filled.num_right} of {filled.num_predicted} of them right")
    decoded = dj.images.decode(
        found,
        common.prepared_cache_dir(),
        common.IMAGE_SIZE.value,
        common.CHANNELS.value,
        common.UNREADABLE.value,
    )
    files = split(paths, decoded, labels)
    agreement = {"num_right": filled.num_right, "num_predicted": filled.num_predicted}
    return files, agreement if filled.num_predicted else {}


def split(paths: list[str], decoded: dj.images.Decoded, labels: dict[str, str]) -> Files:
    """Returns what is labeled and what there is to choose from, and prints both.

    What cannot be read, is labeled, or is there twice, is not to be chosen.
    """
    row_of = {path: row for row, path in enumerate(paths)}
    readable = np.flatnonzero(decoded.readable)
    first = np.full(len(paths), -1)
    first[readable] = readable[dj.images.first_equal(dj.types.Rows(decoded.x, readable))]
    broken = [path for path in labels if not decoded.readable[row_of[path]]]
    if broken:
        print(f"{len(broken)} labels are of images that cannot be read: {', '.join(broken[:3])}")
    labels = {path: label for path, label in labels.items() if path not in broken}
    labeled = np.array([row_of[path] for path in labels], int)
    unique = np.unique(first[readable])
    unlabeled = np.setdiff1d(unique, first[labeled])
    by_image: dict[int, str] = {}
    for path, label in labels.items():
        other = by_image.setdefault(first[row_of[path]], label)
        if other != label:
            print(f"{path} is labeled {label!r}, but a copy of it {other!r}")
    classes = Counter(labels.values())
    counts = ", ".join(f"{count} {name}" for name, count in sorted(classes.items()))
    print(
        f"{len(paths)} images in {IMAGES.value}: {len(labeled)} labeled"
        f"{f' ({counts})' if counts else ''}, {len(unlabeled)} to choose from, "
        f"{len(paths) - len(readable)} cannot be read, "
        f"{len(readable) - len(unique)} are copies of others"
    )
    return Files(paths, decoded.x, labels, labeled, unlabeled, readable)


def trained(
    files: Files, config: dj.TrainingConfig, directory: pathlib.Path
) -> tuple[Learner | None, dict[str, Any]]:
    """Returns the learner, trained on all labels, and for the log how that went.

    It goes on from where the last round left it, and is kept for the next. None if there are not
    two classes to tell apart.
    """
    if len(set(files.labels.values())) < 2:
        return None, {}
    store = dj.store.Store(directory)
    learner, before, number = warm_start(files, store)
    if before.get("labels") == files.labels_checksum:
        print("no labels that the model was not trained on: it stays as it is")
        return learner, before["fit"]
    labeled = dj.Examples(dj.types.Rows(files.x, files.labeled), learner.targets(files))
    count = len(labeled.y)
    with dj.progress.Bar() as bar:
        target = config.largest_loss(count)
        bar.start("select", 1, config.max_epochs)
        bar.begin(1)
        fit = dj.training.fit(
            learner.model,
            learner.variables,
            labeled,
            config,
            SEED.value,
            count,
            capacity=1 << (count - 1).bit_length(),  # So that few programs are compiled.
            on_epoch=lambda progress, seen: bar.epoch(progress.epoch, seen, target),
        )
    print(f"trained for {fit.epochs} epochs: {fit.labeled.accuracy:.1%} of the labels right")
    learner = learner._replace(variables=fit.variables)
    facts = {"epochs": fit.epochs, "train_accuracy": fit.labeled.accuracy}
    description = {
        **kind(files),
        "class_names": learner.class_names,
        "mean": learner.model.mean,
        "std": learner.model.std,
        "labels": files.labels_checksum,
        "round": number,
        "fit": facts,
    }
    store.save(f"round-{number:05d}", fit.variables, description)
    return learner, facts


def warm_start(files: Files, store: dj.store.Store) -> tuple[Learner, dict[str, Any], int]:
    """Returns the learner to train, what is known of its training, and the round's number."""
    kept = store.restore(lambda description, leaves: (description, leaves))
    description, leaves = kept or ({"round": -1, **kind(files)}, None)
    number = description["round"] + 1
    names = sorted(set(files.labels.values()))
    if difference := dj.run_directory.differing(
        kind(files), {name: description.get(name) for name in kind(files)}
    ):
        print(f"the model is trained from the start: that of the last round had {difference}")
    if leaves is None or difference:
        mean, std = dj.datasets.channel_statistics(dj.types.Rows(files.x, files.readable))
        return learner_of(files, names, mean.tolist(), std.tolist()), {}, number
    mean, std, known = (description[name] for name in ("mean", "std", "class_names"))
    old = learner_of(files, known, mean, std)
    old = old._replace(variables=dj.store.unflattened(old.variables, leaves))
    new = [name for name in names if name not in known]
    if not new:
        return old, description, number
    print(f"new classes: {', '.join(new)}; the model grows to {len(known + new)} outputs")
    larger = learner_of(files, known + new, mean, std)
    grown = dj.models.grown(old.variables, larger.variables)
    return larger._replace(variables=grown), {}, number


def learner_of(files: Files, class_names: list[str], mean: Any, std: Any) -> Learner:
    """Returns a learner with fresh weights."""
    module = dj.models.MODELS[common.MODEL.value](len(class_names), **common.model_options())
    model = dj.models.Standardized(module, tuple(mean), tuple(std))
    variables = dj.models.init(model, dj.streams.key(SEED.value, "weights"), files.x)
    return Learner(model, variables, class_names)


def kind(files: Files) -> dict[str, Any]:
    """What must be the same for a model to be trained further, as flags name it."""
    shape = list(files.x.shape[1:])
    return {"model": common.MODEL.value, **common.model_options(), "image_size": shape}


def choose(
    strategy: dj.strategies.Strategy, files: Files, learner: Learner | None
) -> list[dj.labeling.Proposed]:
    """Returns the images to label next, the most wanted first."""
    size = min(common.BATCH_SIZE.value, len(files.unlabeled))
    if learner is None:
        print("fewer than two classes are labeled: drawn at random")
        generator = dj.streams.generator(SEED.value, "strategy", len(files.labels))
        drawn = generator.choice(files.unlabeled, size, replace=False)
        return [dj.labeling.Proposed(files.paths[row]) for row in drawn]
    view = view_of(files, learner, files.unlabeled)
    key = dj.streams.key(SEED.value, "strategy", len(files.labels))
    with scoring_bar() as on_progress:
        watched = dataclasses.replace(view, on_progress=on_progress)
        query = strategy.query(key, watched, size)
    predictions = predicted(files, learner, files.unlabeled[query.positions])
    return [
        proposed._replace(score=float(score))
        for proposed, score in zip(predictions, query.scores, strict=True)
    ]


def view_of(files: Files, learner: Learner, rows: np.ndarray) -> dj.LearnerView:
    """Returns what a strategy may see, with these rows for the unlabeled images."""
    labeled = dj.types.Rows(files.x, files.labeled)
    return dj.LearnerView(
        learner.model.apply,
        learner.variables,
        (labeled, learner.targets(files)),
        dj.types.Rows(files.x, rows),
    )


def predicted(files: Files, learner: Learner, rows: np.ndarray) -> list[dj.labeling.Proposed]:
    """Returns for images what the model takes them for."""
    view = view_of(files, learner, rows)
    with scoring_bar() as on_progress:
        outputs = dj.strategies.predictions.predict(view, view.unlabeled, on_progress)
    probabilities = np.asarray(jax.nn.softmax(outputs.logits))
    return [
        dj.labeling.Proposed(files.paths[row], learner.class_names[np.argmax(p)], float(np.max(p)))
        for row, p in zip(rows, probabilities, strict=True)
    ]


@contextlib.contextmanager
def scoring_bar() -> Iterator[dj.types.OnProgress]:
    """Gives a function that shows how much of the pool is done."""
    with dj.progress.Bar() as bar:
        bar.start("select", 1, 1)
        bar.begin(1)
        yield bar.scored


def write(
    files: Files, proposed: list[dj.labeling.Proposed], output: pathlib.Path, facts: dict[str, Any]
) -> None:
    """Writes the proposal, its contact sheet and a line of the log."""
    shown = proposed[:LARGEST_SHEET]
    captions = [
        f"{rank}. {image.predicted}{f' {image.confidence:.0%}' if image.predicted else ''}\n"
        f"{pathlib.PurePath(image.path).name[-22:]}"
        for rank, image in enumerate(shown, start=1)
    ]
    thumbnails = [dj.images.thumbnail(pathlib.Path(IMAGES.value) / i.path) for i in shown]
    dj.plotting.contact_sheet(thumbnails, captions, output.with_suffix(".png"))
    dj.labeling.write_proposal(output, proposed, pathlib.Path(LABELS.value))
    record = {
        "num_labeled": len(files.labeled),
        "num_unlabeled": len(files.unlabeled),
        "classes": dict(Counter(files.labels.values())),
        **facts,
        "strategy": STRATEGY.value,
        "query": [image.path for image in proposed],
        "flags": {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(__name__)},
        **dj.records.environment(),
    }
    dj.files.append(output.with_suffix(".jsonl"), record)
    print(f"{output}: {len(proposed)} images to label next\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # JAX and matplotlib chat at INFO.
    app.run(main)
