"""Deep active learning: which images should be labeled next?

Trains a model on a few labels of a data set, lets each strategy query more, round by round, and
draws accuracy against labels. Without flags: scikit-learn's digits, embedded, a minute on two
cores.

  python -m experiments.active_learning

The paper's Table 3 (CIFAR-10, the small CNN, b = 500), here for two strategies; expect 31–32
percent at 500 labels and 37–39 percent at 2,500:

  python -m experiments.active_learning --dataset=cifar10 --model=cnn --strategies=dynamical,random
      --initial_size=500 --batch_size=500 --num_rounds=4 --num_seeds=5

Written to --output_dir: rounds.jsonl, a line for each round of each seed and strategy, and
accuracy.png.
"""

import os
import pathlib
import sys

import jax
from absl import app, flags, logging

import dynamical_jax as dj

DATASET = flags.DEFINE_string("dataset", "digits", f"One of {', '.join(dj.datasets.DATASETS)}.")
MODEL = flags.DEFINE_string("model", "cnn", f"One of {', '.join(dj.models.MODELS)}.")
STRATEGIES = flags.DEFINE_list(
    "strategies", ["dynamical", "random"], f"Some of {', '.join(dj.STRATEGIES)}."
)
INITIAL_SIZE = flags.DEFINE_integer("initial_size", 50, "Labels of the initial set.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 25, "Labels per query.")
NUM_ROUNDS = flags.DEFINE_integer("num_rounds", 6, "How often labels are queried.")
NUM_SEEDS = flags.DEFINE_integer("num_seeds", 5, "Repetitions, with seeds from --first_seed on.")
FIRST_SEED = flags.DEFINE_integer(
    "first_seed", 0, "First seed; seeds can so be spread over machines.", lower_bound=0
)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where records and picture go; by default runs/<dataset>-<model>."
)

GAMMA = flags.DEFINE_float("gamma", 2.0, "dynamical: weight of g_u·g_S; inf for it alone.")
ENGINE = flags.DEFINE_enum(
    "engine", "factored", list(dj.gradients.ENGINES), "dynamical: how gradients are computed."
)
CHUNK_SIZE = flags.DEFINE_integer(
    "chunk_size", None, "dynamical: images scored at a time; by default what memory allows."
)

IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Resize images to this side; by default their own (caltech101: 64)."
)
STEM = flags.DEFINE_enum(
    "stem", "imagenet", dj.models.STEMS, "resnet18: torchvision's stem or CIFAR's."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps data; else TFDS_DATA_DIR.")
DOWNLOAD = flags.DEFINE_bool("download", False, "Let TFDS download and prepare missing data.")
CACHE_DIR = flags.DEFINE_string(
    "cache_dir",
    None,
    "Where decoded data and compiled programs are kept between runs; by default "
    "~/.cache/dynamical_jax.",
)

OPTIMIZER = flags.DEFINE_enum(
    "optimizer", "adam", list(dj.training.OPTIMIZERS), "Made afresh in every round."
)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Learning rate.")
SCHEDULE = flags.DEFINE_enum(
    "schedule", "constant", dj.training.SCHEDULES, "Of the learning rate, over --max_epochs."
)
TRAIN_BATCH_SIZE = flags.DEFINE_integer("train_batch_size", 128, "Images per training step.")
WEIGHT_DECAY = flags.DEFINE_float(
    "weight_decay", 0.0, "Decoupled for adam (AdamW), in the gradient for sgd."
)
TARGET_ACCURACY = flags.DEFINE_float(
    "target_accuracy", 0.99, "Training stops at this accuracy on the labeled set."
)
MAX_EPOCHS = flags.DEFINE_integer(
    "max_epochs", 200, "Training stops after so many epochs in any case."
)
EVALUATE_EVERY = flags.DEFINE_integer(
    "evaluate_every",
    1,
    "Epochs between looks at the test set, for best_test_accuracy in the records; 0: look only "
    "after the last epoch, which saves time.",
    lower_bound=0,
)


def main(argv: list[str]) -> int | None:
    """Runs the experiment that the flags describe; returns the exit status."""
    try:
        run(argv)
    except dj.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the rounds that had ended are recorded", file=sys.stderr)
        return 130
    return None


def run(argv: list[str]) -> None:
    """Checks the flags, then plays every strategy with every seed."""
    if len(argv) > 1:
        raise dj.UserError(f"unexpected argument {argv[1]!r}; flags look like --dataset=cifar10")
    if NUM_SEEDS.value < 1:
        raise dj.UserError(f"num_seeds must be at least 1, got {NUM_SEEDS.value}")
    if not STRATEGIES.value:
        raise dj.UserError(f"no strategy given; choose from {', '.join(dj.STRATEGIES)}")
    if len(set(STRATEGIES.value)) < len(STRATEGIES.value):
        raise dj.UserError(f"a strategy is given twice: {','.join(STRATEGIES.value)}")
    strategies = {name: make_strategy(name) for name in STRATEGIES.value}
    budget = dj.Budget(INITIAL_SIZE.value, BATCH_SIZE.value, NUM_ROUNDS.value)
    training = dj.TrainingConfig(
        optimizer=OPTIMIZER.value,
        learning_rate=LEARNING_RATE.value,
        schedule=SCHEDULE.value,
        batch_size=TRAIN_BATCH_SIZE.value,
        weight_decay=WEIGHT_DECAY.value,
        target_accuracy=TARGET_ACCURACY.value,
        max_epochs=MAX_EPOCHS.value,
    )
    dj.models.check_name(MODEL.value)
    cache_dir = CACHE_DIR.value or dj.datasets.default_cache_dir()
    compiled = os.path.join(cache_dir, "compiled")
    try:
        os.makedirs(compiled, exist_ok=True)
    except OSError as error:
        raise dj.UserError(f"cannot write to {compiled}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    dataset = dj.datasets.load(
        DATASET.value,
        image_size=IMAGE_SIZE.value,
        data_dir=DATA_DIR.value,
        cache_dir=cache_dir,
        download=DOWNLOAD.value,
    )
    options = {"stem": STEM.value} if MODEL.value == "resnet18" else {}
    model = dj.models.create(MODEL.value, dataset, **options)
    experiments = [
        (
            name,
            dj.Experiment(dataset, model, strategy, budget, training, seed, EVALUATE_EVERY.value),
        )
        for seed in range(FIRST_SEED.value, FIRST_SEED.value + NUM_SEEDS.value)
        for name, strategy in strategies.items()
    ]
    dj.records.environment()  # What cannot be recorded should fail now and not after a round.
    experiments[0][1].init()  # The model may refuse images of this size.
    path = dj.records.create_directory(OUTPUT_DIR.value or f"runs/{dataset.name}-{MODEL.value}")
    try:
        play(experiments, path)
    finally:
        dj.records.remove_if_empty(path)  # So that it is not taken for a run.
    rounds = dj.records.read(path)
    picture = path.with_name("accuracy.png")
    dj.plotting.accuracy(rounds, picture)
    print(f"\ntest accuracy (%) on {dataset.name}\n{dj.records.table(rounds)}\n\n{path}\n{picture}")


def play(experiments: list[tuple[str, dj.Experiment]], path: pathlib.Path) -> None:
    """Runs experiments one after the other; records each round and prints a line about it."""
    main_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    for name, experiment in experiments:
        identity = {
            "dataset": experiment.dataset.name,
            "dataset_version": experiment.dataset.version,
            "model": MODEL.value,
            "strategy": name,
            "seed": experiment.seed,
            "flags": {flag.name: flag.value for flag in main_flags},
        }
        title = f"{name}, seed {experiment.seed}"
        num_rounds = experiment.budget.num_rounds
        with dj.progress.Bar(title, num_rounds, experiment.training_config.max_epochs) as bar:
            for happened in experiment.run(bar):
                dj.records.append(path, dj.records.make(happened, identity))
                bar.write(
                    f"{title}, round {happened.round_index}/{num_rounds}: "
                    f"{happened.num_labeled} labels, {happened.epochs} epochs, "
                    f"test accuracy {happened.test.accuracy:.2%}, "
                    f"{sum(happened.seconds.values()):.1f} s"
                )


def make_strategy(name: str) -> dj.strategies.Strategy:
    """Returns a strategy with the options that the flags give it."""
    options = {}
    if name == "dynamical":
        options = {"gamma": GAMMA.value, "engine": ENGINE.value, "chunk_size": CHUNK_SIZE.value}
    return dj.strategies.create(name, **options)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # JAX and matplotlib chat at INFO.
    app.run(main)
