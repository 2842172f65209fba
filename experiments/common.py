"""What the binaries share: flags, and the way from them to a directory of records."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import options
from experiments import neutral_flags, paper

PRESET = flags.DEFINE_string(
    "preset",
    None,
    "Settings of one of the paper's tables; other flags given beside it prevail.",
)
DATASET = flags.DEFINE_string(
    "dataset",
    "digits",
    f"One of {', '.join(dj.datasets.DATASETS)}, a folder of your own that holds one of images for "
    "each class, or an .npz file of image, or of embedding (vectors), and label.",
)
INITIAL_SIZE = flags.DEFINE_integer("initial_size", 50, "Labels of the initial set.")
NUM_ROUNDS = flags.DEFINE_integer("num_rounds", 6, "How often labels are queried.")
NUM_SEEDS = flags.DEFINE_integer("num_seeds", 5, "Repetitions, with seeds from --first_seed on.")
FIRST_SEED = flags.DEFINE_integer(
    "first_seed", 0, "First seed; seeds can so be spread over machines.", lower_bound=0
)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where records and picture go; by default a directory below runs/."
)
CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every",
    20,
    "Epochs of training between checkpoints, from which the same command continues.",
    lower_bound=1,
)

TEST_DIR = flags.DEFINE_string(
    "test_dir", None, "Folder with test images, of the same classes as the folder --dataset."
)
TEST_FRACTION = flags.DEFINE_float(
    "test_fraction",
    None,
    "Share of each class to hold out if your own data have no test set; by default "
    f"{dj.folders.TEST_FRACTION}.",
)
FEATURE_SCALE = flags.DEFINE_enum(
    "feature_scale",
    "shared",
    dj.models.FEATURE_SCALES,
    "Vectors are divided by one deviation, which all features share, or each feature by its own.",
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps data; else TFDS_DATA_DIR.")
DOWNLOAD = flags.DEFINE_bool("download", False, "Let TFDS download and prepare missing data.")
EVALUATE_EVERY = flags.DEFINE_integer(
    "evaluate_every",
    0,
    "Epochs between looks at the test set, for best_test_accuracy in the records, as published "
    "tables have it; 0: look only after the last epoch.",
    lower_bound=0,
)
flags.adopt_module_key_flags(options)

INTERRUPTED = "interrupted; the same command continues from here"


def apply_preset(names: Iterable[str]) -> None:
    """Gives flags that were not given the values of the table that `--preset` names.

    Args:
      names: of the tables among which this binary can choose.
    """
    if PRESET.value is None:
        return
    names = list(names)
    if PRESET.value not in names:
        raise dj.UserError(f"unknown preset {PRESET.value!r}; choose from {', '.join(names)}")
    table = paper.tables()[PRESET.value]
    for name, value in table.flags.items():
        if flags.FLAGS[name].using_default_value:
            flags.FLAGS[name].value = value


def compare(
    arms: Mapping[str, tuple[dj.strategies.Strategy, dj.Budget]], module: Any, default_dir: str
) -> list[str]:
    """Plays every arm with every seed, and writes records, table and picture.

    Args:
      arms: by name, what is compared.
      module: the binary; its key flags are recorded.
      default_dir: name of the directory below runs/, in which {dataset} and {model} are replaced.

    Returns:
      A line for each run that failed.
    """
    all_seeds = seeds()
    dataset, model = load()
    training = options.training_config()
    used = {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(module)}
    identity = {
        "dataset": dataset.name,
        "dataset_version": dataset.version,
        "model": options.MODEL.value,
        "flags": used,
    }
    runs = [
        dj.comparison.Run(
            name,
            dj.Experiment(dataset, model, strategy, budget, training, seed, EVALUATE_EVERY.value),
            identity,
        )
        for seed in all_seeds
        for name, (strategy, budget) in arms.items()
    ]
    dj.records.environment()  # What cannot be recorded should fail now and not after a round.
    runs[0].experiment.init()  # The model may refuse images of this size.
    output_dir = OUTPUT_DIR.value or os.path.join(
        "runs", default_dir.format(dataset=dataset.name, model=options.MODEL.value)
    )
    deciding_flags = {"dataset_version": dataset.version, "pool_size": len(dataset.pool.y)}
    deciding_flags |= {
        name: value for name, value in used.items() if name not in neutral_flags.FLAGS
    }
    with dj.run_directory.open_locked(output_dir, deciding_flags) as directory:
        failures = dj.comparison.play(runs, directory, CHECKPOINT_EVERY.value)
        summarize(directory.rounds)
    if failures:
        failures.append(
            f"{len(failures)} of {len(runs)} runs failed; the same command tries these again"
        )
    return failures


def seeds() -> range:
    """Returns the seeds of the repetitions."""
    if NUM_SEEDS.value < 1:
        raise dj.UserError(f"num_seeds must be at least 1, got {NUM_SEEDS.value}")
    return range(FIRST_SEED.value, FIRST_SEED.value + NUM_SEEDS.value)


def load() -> tuple[dj.Dataset, Any]:
    """Returns the data set and the model that the flags name, and keeps compiled programs."""
    options.training_config()  # What is wrong should be said before the data are read.
    if options.MODEL.value is not None:
        options.set_model_defaults()
    dataset = load_dataset()
    attributes = options.set_model_defaults(dataset.kind)
    if dataset.kind == "vectors":
        attributes["feature_scale"] = FEATURE_SCALE.value
    elif not flags.FLAGS["feature_scale"].using_default_value:
        raise dj.UserError(f"--feature_scale has no effect on {dataset.name}, only on vectors")
    return dataset, dj.models.create(options.MODEL.value, dataset, **attributes)


def load_dataset() -> dj.Dataset:
    """Returns the data set that the flags name, and keeps compiled programs beside it."""
    cache_dir = options.prepare_cache_dir()
    return dj.datasets.load(
        DATASET.value,
        image_size=options.IMAGE_SIZE.value,
        data_dir=DATA_DIR.value,
        cache_dir=cache_dir,
        download=DOWNLOAD.value,
        test_dir=TEST_DIR.value,
        test_fraction=TEST_FRACTION.value,
        channels=options.CHANNELS.value,
        unreadable=options.UNREADABLE.value,
    )


def make_directory(directory: str) -> pathlib.Path:
    """Returns a directory for results, made if it is not there: before the work, not after it.

    Raises:
      UserError: if it cannot be.
    """
    path = pathlib.Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise dj.UserError(f"cannot write to {path}: {error.strerror}") from error


def save(
    module: Any,
    directory: pathlib.Path,
    name: str,
    results: dict[str, Any],
    draw: Callable[[pathlib.Path], None],
    finished: bool = True,
) -> pathlib.Path:
    """Writes `<name>.json` and `<name>.png`; returns the path of the former.

    What is not finished goes to `<name>.partial.json` and `.png`, so that it neither replaces nor
    passes for a whole result, and is removed when there is one.

    Args:
      module: the binary; its key flags are recorded.
      directory: is there.
      name: of both files.
      results: what was found, JSON values.
      draw: draws the picture to a path.
      finished: whether this is all.
    """
    used = {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(module)}
    record = dj.files.finite({**results, "flags": used, **dj.records.environment()})
    partial = directory / f"{name}.partial.json"
    path = directory / f"{name}.json" if finished else partial
    try:
        dj.files.write(path, json.dumps(record, indent=1) + "\n")
        draw(path.with_suffix(".png"))
        if finished:
            partial.unlink(missing_ok=True)
            partial.with_suffix(".png").unlink(missing_ok=True)
    except OSError as error:
        raise dj.UserError(f"cannot write to {directory}: {error.strerror}") from error
    return path


def print_finding(finding: str, path: pathlib.Path) -> None:
    """Prints what was found, and where `save` wrote it."""
    print(f"{finding}\n{path}\n{path.with_suffix('.png')}")


def summarize(path: pathlib.Path) -> None:
    """Prints the table of all records so far and draws their picture."""
    rounds = dj.records.read(path)
    if not rounds:
        return
    picture = path.with_name("accuracy.png")
    dj.plotting.accuracy(rounds, picture)
    table = dj.records.table(rounds)
    print(f"\ntest accuracy (%) on {rounds[0]['dataset']}\n{table}\n\n{path}\n{picture}")
