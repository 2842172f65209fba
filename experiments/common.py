"""Flags that the programs share, and how a directory of records is made from them."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary, options, pretrained
from experiments import neutral_flags, paper

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")

PRESET = flags.DEFINE_string(
    "preset",
    None,
    "Take the settings of one of the paper's tables; flags given beside it have precedence.",
)
DATASET = flags.DEFINE_string(
    "dataset",
    "digits",
    f"One of {', '.join(dj.datasets.DATASETS)}; or a folder that holds a folder of images for each "
    "class; or an .npz file with arrays image, or embedding (vectors), and label.",
)
INITIAL_SIZE = flags.DEFINE_integer("initial_size", 50, "How many labels the initial set has.")
NUM_ROUNDS = flags.DEFINE_integer("num_rounds", 6, "How many times labels are queried.")
NUM_SEEDS = flags.DEFINE_integer(
    "num_seeds", 5, "Repetitions, with seeds from --first_seed on.", upper_bound=10_000
)
FIRST_SEED = flags.DEFINE_integer(
    "first_seed",
    0,
    "First seed; with it seeds can be spread over machines.",
    lower_bound=0,
    upper_bound=dj.streams.LARGEST_SEED,
)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Directory for records and picture; by default one below runs/."
)
CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every",
    20,
    "How many epochs apart checkpoints are saved, from which the same command continues.",
    lower_bound=1,
)
PRECISION = flags.DEFINE_enum(
    "precision",
    None,
    PRECISIONS,
    "Precision of matrix products on GPU and TPU; by default JAX's, which on recent GPUs is "
    "tensorfloat32. A CPU computes in float32 in any case.",
)
NUM_DEVICES = flags.DEFINE_integer(
    "num_devices",
    None,
    "Devices among which a run is divided; by default all, those of other hosts included.",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One run on several hosts, each started with the same command: Slurm, Open MPI, Kubernetes and "
    "Cloud TPU are recognised; elsewhere give the three flags that follow. Of a folder of images "
    "each decodes its share.",
)
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "With --distributed: host:port of process 0."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --distributed: how many.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --distributed: which one, from 0.")
WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "How many runs are played at a time, each in a process of its own with a share of the cores, "
    "or of the GPUs. By default they are played one by one.",
    lower_bound=1,
)
RAY_ADDRESS = flags.DEFINE_string(
    "ray_address",
    None,
    "Spreads the runs over this Ray cluster: auto, or host:port. Needs the extra 'cluster'.",
)
CPUS_PER_RUN = flags.DEFINE_float(
    "cpus_per_run", 1.0, "With --ray_address: cores of a run.", lower_bound=0.0
)
GPUS_PER_RUN = flags.DEFINE_float(
    "gpus_per_run", 0.0, "With --ray_address: GPUs of a run, such as 0.25.", lower_bound=0.0
)

TEST_DIR = flags.DEFINE_string(
    "test_dir", None, "Folder with test images, with the same classes as the folder --dataset."
)
TEST_FRACTION = flags.DEFINE_float(
    "test_fraction",
    None,
    "Share of each class that is held out for testing if your own data have no test set; by "
    f"default {dj.folders.TEST_FRACTION}.",
)
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory with the data of TFDS; by default TFDS_DATA_DIR."
)
DOWNLOAD = flags.DEFINE_bool("download", False, "Let TFDS download and prepare missing data.")
EVALUATE_EVERY = flags.DEFINE_integer(
    "evaluate_every",
    0,
    "How many epochs apart the model is evaluated on the test set, for best_test_accuracy in the "
    "records, which published tables report; 0: only after the last epoch.",
    lower_bound=0,
)
REDUNDANCY = flags.DEFINE_bool(
    "redundancy", False, "Record how alike the gradients of each query are, for any strategy."
)
flags.adopt_module_key_flags(options)

binary.read_by(TEST_DIR, "dataset", (options.FOLDER,))
for _flag in (DATA_DIR, DOWNLOAD):
    binary.read_by(_flag, "dataset", [name for name in dj.datasets.DATASETS if name != "digits"])
binary.read_by(TEST_FRACTION, "dataset", (options.FOLDER, options.ARRAYS))

INTERRUPTED = "interrupted; the same command continues from here"


def apply_preset(names: Iterable[str]) -> None:
    """Sets the flags that were not given to the values of the table that `--preset` names.

    Args:
      names: of the tables that this program can run.
    """
    if PRESET.value is None:
        return
    names = list(names)
    dj.words.check_known("preset", PRESET.value, names)
    table = paper.tables()[PRESET.value]
    for name, value in table.flags.items():
        if not binary.is_given(name):
            flags.FLAGS[name].value = value


def compare(
    arms: Mapping[str, tuple[dj.strategies.Strategy, dj.Budget]],
    module: Any,
    default_dir: str,
    pool_shares: tuple[float | int, ...] = (1.0,),
) -> list[str]:
    """Runs every arm with every seed, and writes records, table and picture.

    Args:
      arms: name → (strategy, budget), which are compared.
      module: the program; its key flags are recorded.
      default_dir: name of the directory below runs/, in which {dataset} and {model} are replaced.
      pool_shares: of the classes in the pool, as in `dj.Experiment`.

    Returns:
      A line for each run that failed.
    """
    all_seeds = seeds()
    executor = _executor(len(arms) * len(all_seeds))
    mesh = _join(executor)
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
            dj.Experiment(
                dataset,
                model,
                strategy,
                budget,
                training,
                seed,
                EVALUATE_EVERY.value,
                mesh=mesh,
                redundancy=REDUNDANCY.value,
                pool_shares=pool_shares,
            ),
            identity,
        )
        for seed in all_seeds
        for name, (strategy, budget) in arms.items()
    ]
    dj.records.environment()  # If this cannot be recorded, fail now and not after a round.
    runs[0].experiment.init()  # The model may refuse images of this size.
    output_dir = OUTPUT_DIR.value or os.path.join(
        "runs", default_dir.format(dataset=dataset.name, model=options.MODEL.value)
    )
    deciding_flags = {"dataset_version": dataset.version, "pool_size": len(dataset.pool.y)}
    deciding_flags |= {
        name: value for name, value in used.items() if name not in neutral_flags.FLAGS
    }
    if (weights := pretrained.load()) is not None:
        deciding_flags["weights_checksum"] = weights.checksum
    dj.parallel.check_agreement("flags, data and code", (deciding_flags, dj.records.environment()))
    if jax.process_index() > 0:
        dj.comparison.follow(runs)
        return []
    with dj.run_directory.open_locked(output_dir, deciding_flags) as directory:
        failures = dj.comparison.play(runs, directory, CHECKPOINT_EVERY.value, executor)
        summarize(directory.rounds)
    if failures:
        failures.append(
            f"{len(failures)} of {dj.words.count(len(runs), 'run')} failed; the same command tries "
            "these again"
        )
    return failures


def _join(executor: dj.comparison.Executor | None) -> jax.sharding.Mesh | None:
    """Returns the devices of a run, those of other hosts included if the flags say so."""
    if DISTRIBUTED.value:
        if executor is not None:
            raise dj.UserError("--distributed is one run at a time: leave out --workers and Ray")
        dj.parallel.join(COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    for name in ("coordinator_address", "num_processes", "process_id"):
        if not DISTRIBUTED.value and not flags.FLAGS[name].using_default_value:
            raise dj.UserError(f"--{name} has no effect without --distributed")
    if executor is None:
        return dj.parallel.make_mesh(NUM_DEVICES.value)
    if NUM_DEVICES.value is not None:
        raise dj.UserError("--num_devices is of one run at a time: leave out --workers and Ray")
    return None


def _executor(num_runs: int) -> dj.comparison.Executor | None:
    """Returns what plays the runs elsewhere than in this process, if the flags say so."""
    if RAY_ADDRESS.value is None:
        for name in ("cpus_per_run", "gpus_per_run"):
            if not flags.FLAGS[name].using_default_value:
                raise dj.UserError(f"--{name} has no effect without --ray_address")
        if WORKERS.value is None:
            return None
        if WORKERS.value > num_runs:
            number = dj.words.count(num_runs, "run")
            raise dj.UserError(f"--workers={WORKERS.value} is more than the {number}")
        from dynamical_jax.runs import processes

        executor = processes.Processes(WORKERS.value)
    elif WORKERS.value is not None:
        raise dj.UserError("give --workers, for this machine, or --ray_address, not both")
    else:
        from dynamical_jax.runs import cluster

        executor = cluster.Ray(RAY_ADDRESS.value, CPUS_PER_RUN.value, GPUS_PER_RUN.value)
    # This process only keeps the books: it leaves the GPU to those that train.
    jax.config.update("jax_platforms", "cpu")
    return executor


def seeds() -> range:
    """Returns the seeds of the repetitions."""
    if NUM_SEEDS.value < 1:
        raise dj.UserError(f"num_seeds must be at least 1, got {NUM_SEEDS.value}")
    found = range(FIRST_SEED.value, FIRST_SEED.value + NUM_SEEDS.value)
    if found[-1] > dj.streams.LARGEST_SEED:
        raise dj.UserError(
            f"seeds are at most {dj.streams.LARGEST_SEED}: {NUM_SEEDS.value} from "
            f"{FIRST_SEED.value} on are too many"
        )
    return found


def load() -> tuple[dj.Dataset, Any]:
    """Returns the data set and the model of the flags; makes JAX keep compiled programs."""
    options.training_config()  # Report wrong flags before the data are read.
    if options.MODEL.value is not None:
        dj.models.check_name(options.MODEL.value)
        options.model_options()
    weights = pretrained.load()
    dataset = load_dataset(weights)
    num_classes = len(dataset.class_names)
    if weights is not None:
        dj.images.check_pixels(dataset.pool.x)
    if weights is not None and pretrained.embeds():
        if dj.parallel.speaks():
            print(weights.describe())
        cache_dir, size = options.prepare_cache_dir(), options.IMAGE_SIZE.value
        dataset = dj.embedding.embed_dataset(weights, dataset, cache_dir, size)
        weights = None
    attributes = options.set_model_defaults(dataset.kind)
    if weights is not None:
        if dj.parallel.speaks():
            print(weights.describe(num_classes))
        return dataset, dj.models.pretrained(weights, num_classes, options.IMAGE_SIZE.value)
    attributes["feature_scale"] = options.FEATURE_SCALE.value
    return dataset, dj.models.create(options.MODEL.value, dataset, **attributes)


def load_dataset(weights: dj.models.Weights | None = None) -> dj.Dataset:
    """Returns the data set of the flags; makes JAX keep compiled programs.

    Args:
      weights: of a pretrained network, as whose images those of a folder are resized.
    """
    name = DATASET.value
    kind = name
    if name not in dj.datasets.DATASETS:
        kind = options.ARRAYS if name.endswith((".npz", ".npy")) else options.FOLDER
    binary.check_read(dataset=[kind])
    if PRECISION.value is not None:
        jax.config.update("jax_default_matmul_precision", PRECISION.value)
    cache_dir = options.prepare_cache_dir()
    dataset = dj.datasets.load(
        DATASET.value,
        image_size=pretrained.image_size(weights if kind == options.FOLDER else None),
        interpolation=pretrained.interpolation(weights),
        data_dir=DATA_DIR.value,
        cache_dir=cache_dir,
        download=DOWNLOAD.value,
        test_dir=TEST_DIR.value,
        test_fraction=TEST_FRACTION.value,
        channels=options.CHANNELS.value,
        unreadable=options.UNREADABLE.value,
    )
    binary.check_read(data=options.kinds_read(dataset.kind))
    return dataset


def make_directory(directory: str) -> pathlib.Path:
    """Makes a directory for results if there is none; returns its path.

    Called before the work, so that a wrong path is found before it and not after it.

    Raises:
      UserError: if the directory cannot be written to.
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

    Partial results are saved as `<name>.partial.json` and `.png`, so that they neither replace nor
    look like a whole result. They are removed when there is one.

    Args:
      module: the program; its key flags are recorded.
      directory: an existing directory.
      name: of both files.
      results: JSON values.
      draw: draws the picture to a path.
      finished: whether the results are complete.
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
    """Prints a finding, and the paths of the files that `save` wrote."""
    print(f"{finding}\n{path}\n{path.with_suffix('.png')}")


def summarize(path: pathlib.Path) -> None:
    """Prints the table of all records so far and draws their picture."""
    rounds = dj.records.read(path)
    if not rounds:
        return
    picture = path.with_name("accuracy.png")
    dj.plotting.accuracy(rounds, picture)
    table = dj.records.table(rounds)
    print(
        f"\ntest accuracy (%) on {dj.records.dataset_of(rounds[0])}\n{table}\n\n{path}\n{picture}"
    )
