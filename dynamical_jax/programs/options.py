"""Flags that `dynamical-select` and the experiments share, and the objects they describe.

They say how images are read, which model learns from them, how it is trained, and how images are
scored.
"""

from typing import Any

from absl import flags

from dynamical_jax import gradients, models, training
from dynamical_jax.data import datasets, images
from dynamical_jax.models import tensor_files
from dynamical_jax.programs import binary

MODEL = flags.DEFINE_string(
    "model",
    None,
    f"One of {', '.join(models.MODELS)}; by default {models.DEFAULTS['images']}, for vectors "
    f"{models.DEFAULTS['vectors']}. Vectors need {' or '.join(models.FOR_VECTORS)}.",
)
STEM = flags.DEFINE_enum(
    "stem",
    "imagenet",
    models.STEMS,
    "For resnet18: the first layers as in torchvision, or as usual for CIFAR.",
)
HIDDEN = flags.DEFINE_list("hidden", ["512"], "For mlp: the widths of its hidden layers.")
FEATURE_SCALE = flags.DEFINE_enum(
    "feature_scale",
    "shared",
    models.FEATURE_SCALES,
    "shared divides all features of vectors by one deviation, each divides each by its own.",
)
WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    f"File with the weights of a pretrained network ({', '.join(tensor_files.SUFFIXES)}): a "
    "ResNet-18, a VGG-11 or a vision transformer.",
)
TRAIN = flags.DEFINE_enum(
    "train",
    "head",
    ["head", "all"],
    "Beside --weights: head embeds all images once and trains --model (linear or mlp) on their "
    "embeddings; all trains the network further.",
)
BACKBONE_LEARNING_RATE = flags.DEFINE_float(
    "backbone_learning_rate",
    None,
    "For --train=all: learning rate of all layers but the last; by default a tenth of "
    "--learning_rate.",
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 25, "Labels per query.")
ENGINE = flags.DEFINE_enum(
    "engine", "factored", list(gradients.ENGINES), "For dynamical: how gradients are computed."
)
CHUNK_SIZE = flags.DEFINE_integer(
    "chunk_size",
    None,
    "For dynamical: how many images are scored at a time; by default as many as memory allows.",
)

IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    None,
    "Height and width to which images are resized. By default they keep their size, but caltech101 "
    "and image files that differ in size or are larger than 256 become 64×64; with --weights they "
    "get the size that these were made for.",
)
CHANNELS = flags.DEFINE_integer(
    "channels",
    None,
    "Channels of your own image files, 1 or 3; by default 1 if all are grey, else 3.",
)
UNREADABLE = flags.DEFINE_enum(
    "unreadable",
    "skip",
    images.UNREADABLE,
    "Whether your own image files that cannot be read, and vectors that are not finite, are "
    "skipped or stop the program.",
)
CACHE_DIR = flags.DEFINE_string(
    "cache_dir",
    None,
    "Where decoded data and compiled programs are kept between runs; by default "
    "~/.cache/dynamical_jax.",
)

OPTIMIZER = flags.DEFINE_enum(
    "optimizer",
    "adam",
    list(training.OPTIMIZERS),
    "The optimizer; its state starts anew in every round.",
)
LEARNING_RATE = flags.DEFINE_float(
    "learning_rate",
    None,
    f"Learning rate; by default {models.LEARNING_RATE:g}, "
    + ", ".join(f"for {name} {rate:g}" for name, rate in models.LEARNING_RATES.items())
    + ".",
)
SCHEDULE = flags.DEFINE_enum(
    "schedule", "constant", training.SCHEDULES, "Schedule of the learning rate over --max_epochs."
)
TRAIN_BATCH_SIZE = flags.DEFINE_integer("train_batch_size", 128, "Images per training step.")
WEIGHT_DECAY = flags.DEFINE_float(
    "weight_decay", 0.0, "Weight decay; decoupled for adam (AdamW), a term of the gradient for sgd."
)
TARGET_ACCURACY = flags.DEFINE_float(
    "target_accuracy",
    0.99,
    "Training does not stop before it classifies this share of the labeled set correctly.",
)
TARGET_LOSS = flags.DEFINE_float(
    "target_loss",
    None,
    "Training does not stop before the mean cross-entropy over the labeled set is at most this. By "
    "default the mean does not matter.",
)
TARGET_TOTAL_LOSS = flags.DEFINE_float(
    "target_total_loss",
    1.0,
    "Training does not stop before the cross-entropy summed over the labeled set is at most this; "
    "inf: the sum does not matter. docs/convergence.md says why the sum.",
)
MIN_EPOCHS = flags.DEFINE_integer(
    "min_epochs", 0, "Training does not stop before this many epochs."
)
MAX_EPOCHS = flags.DEFINE_integer(
    "max_epochs", 500, "Training stops after this many epochs, even if it has not met its targets."
)
LOOK_EVERY = flags.DEFINE_integer(
    "look_every",
    5,
    "How many epochs apart the model is evaluated on the labeled set, to see whether training may "
    "stop.",
)

FOLDER, ARRAYS = "a folder of images", "a file of arrays"
binary.read_by(CHANNELS, "dataset", (FOLDER,))
binary.read_by(UNREADABLE, "dataset", (FOLDER, ARRAYS))
binary.read_by(STEM, "model", ("resnet18",))
binary.read_by(HIDDEN, "model", ("mlp",))
binary.read_by(IMAGE_SIZE, "data", ("images",))
binary.read_by(FEATURE_SCALE, "data", ("vectors",))
binary.allow_infinity(TARGET_LOSS)
binary.allow_infinity(TARGET_TOTAL_LOSS)

OF_MODEL = (MODEL, STEM)
OF_TRAINING = (
    *(OPTIMIZER, LEARNING_RATE, SCHEDULE, TRAIN_BATCH_SIZE, WEIGHT_DECAY),
    *(TARGET_ACCURACY, TARGET_LOSS, TARGET_TOTAL_LOSS, MIN_EPOCHS, MAX_EPOCHS, LOOK_EVERY),
    BACKBONE_LEARNING_RATE,
)
"""Flags that only the model, and only its training, read."""


def training_config() -> training.TrainingConfig:
    """Returns the configuration of training that the flags describe.

    Call `set_model_defaults` first: the default learning rate depends on the model.
    """
    rate = models.LEARNING_RATE if LEARNING_RATE.value is None else LEARNING_RATE.value
    backbone_rate = BACKBONE_LEARNING_RATE.value
    if backbone_rate is None and WEIGHTS.value is not None and TRAIN.value == "all":
        backbone_rate = rate / 10
    return training.TrainingConfig(
        optimizer=OPTIMIZER.value,
        learning_rate=rate,
        schedule=SCHEDULE.value,
        batch_size=TRAIN_BATCH_SIZE.value,
        weight_decay=WEIGHT_DECAY.value,
        target_accuracy=TARGET_ACCURACY.value,
        target_loss=TARGET_LOSS.value,
        target_total_loss=TARGET_TOTAL_LOSS.value,
        min_epochs=MIN_EPOCHS.value,
        max_epochs=MAX_EPOCHS.value,
        look_every=LOOK_EVERY.value,
        backbone_learning_rate=backbone_rate,
    )


def set_model_defaults(kind: str = "images") -> dict[str, Any]:
    """Sets --model and --learning_rate where they are not given; returns the model's options.

    Args:
      kind: of the data, "images" or "vectors".

    Raises:
      UserError: if there is no such model, it does not take such data, or a flag is given that
        it does not read.
    """
    binary.check_read(data=kinds_read(kind))
    if MODEL.value is None:  # Set, so that records hold the model that was used.
        flags.FLAGS["model"].value = models.DEFAULTS[kind]
    models.check_name(MODEL.value, kind)
    if LEARNING_RATE.value is None:
        rate = models.LEARNING_RATES.get(MODEL.value, models.LEARNING_RATE)
        flags.FLAGS["learning_rate"].value = rate
    return model_options()


def kinds_read(kind: str) -> list[str]:
    """Returns the kinds of data that are read: of images that are embedded also their vectors."""
    embeds = WEIGHTS.value is not None and TRAIN.value == "head"
    return ["images", "vectors"] if embeds else [kind]


def model_options() -> dict[str, Any]:
    """Returns the options that the flags give the model.

    Raises:
      UserError: if one is given that the model does not have.
    """
    binary.check_read(model=[MODEL.value])
    if MODEL.value == "mlp":
        return {"hidden": tuple(binary.parse_positive("--hidden", HIDDEN.value))}
    return {"stem": STEM.value} if MODEL.value == "resnet18" else {}


def prepare_cache_dir() -> str:
    """Returns the folder for decoded data, and makes JAX keep compiled programs there, too."""
    cache_dir = CACHE_DIR.value or datasets.default_cache_dir()
    binary.keep_compiled_programs(cache_dir)
    return cache_dir
