"""What the theory's binaries share: data, a network, its kernel, and what they write."""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags

import dynamical_jax as dj
from dynamical_jax.types import ApplyFn, Array, OnProgress, Variables, ignore_progress
from experiments import binary, common

WIDTHS = flags.DEFINE_list(
    "widths", ["64", "64", "64"], "Channels of each convolution of the network, ntk_cnn."
)
NUM_LOGITS = flags.DEFINE_integer(
    "num_logits",
    1,
    "Logits over which the kernel is averaged, 0 for all; in the limit of infinite width it is the "
    "same for each.",
    lower_bound=0,
)
NUM_LABELED = flags.DEFINE_integer("num_labeled", 50, "|S|.", lower_bound=2)
EPOCHS = flags.DEFINE_integer("epochs", 100, "Epochs of training on S at most.", lower_bound=1)
TRAINING_RATE = flags.DEFINE_float(
    "training_rate",
    0.03,
    "Learning rate of Adam; in the NTK parameterisation weights are of size 1, and want more than "
    "elsewhere.",
)
JITTER = flags.DEFINE_float(
    "jitter", 0.0, "Added to the diagonal of Θ, in units of its mean; recorded."
)

# Of all binaries; others are for each to declare.
KEY_FLAGS = (
    *("dataset", "image_size", "channels", "test_dir", "test_fraction", "unreadable"),
    *("data_dir", "cache_dir", "output_dir", "first_seed", "widths", "num_logits"),
)


class Setting(NamedTuple):
    """A data set and a network for it.

    Attributes:
      dataset: pool and test set.
      model: `ntk_cnn`, of raw images.
    """

    dataset: dj.Dataset
    model: Any

    def variables(self, seed: int) -> Variables:
        """Returns initial weights."""
        return dj.models.init(self.model, dj.streams.key(seed, "weights"), self.dataset.pool.x)

    def draw(self, seed: int, size: int) -> np.ndarray:
        """Returns the rows of an initial set S, those that an experiment of this seed begins with.

        Raises:
          UserError: if the pool is smaller.
        """
        if not 1 <= size <= len(self.dataset.pool.y):
            raise dj.UserError(
                f"cannot draw {size} images from the {len(self.dataset.pool.y)} of "
                f"{self.dataset.name}"
            )
        generator = dj.streams.generator(seed, "initial_set")
        return dj.pool.initial_pool(len(self.dataset.pool.y), size, generator).labeled

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Returns one-hot labels Y `[n, K]`."""
        return np.eye(len(self.dataset.class_names))[labels]


def setting() -> Setting:
    """Returns the data and the network that the flags name, and keeps compiled programs."""
    widths = tuple(binary.positive("widths", WIDTHS.value))
    dataset = common.load_dataset()
    return Setting(dataset, dj.models.create("ntk_cnn", dataset, widths=widths))


def kernel(
    apply: ApplyFn, variables: Variables, x: Any, on_progress: OnProgress = ignore_progress
) -> np.ndarray:
    """Returns Θ of images, averaged over as many logits as the flag says."""
    fewer = _first_logits(apply, NUM_LOGITS.value or None)
    return dj.ntk.empirical_ntk(fewer, variables, jnp.asarray(x), on_progress=on_progress)


def infinite_width_kernel(setting: Setting, x: Any) -> np.ndarray:
    """Returns Θ of images in the limit of infinite width."""
    network = setting.model
    return dj.ntk.infinite_width_ntk(network.standardize(x), depth=len(network.model.widths))


@functools.cache  # Programs are compiled for each function: the same one for the same network.
def _first_logits(apply: ApplyFn, count: int | None) -> ApplyFn:
    def fewer(variables: Variables, x: Array) -> dj.Outputs:
        outputs = apply(variables, x)
        return dj.Outputs(outputs.logits[:, :count], outputs.embedding)

    return fewer


def fit(setting: Setting, variables: Variables, labeled: dj.Examples, seed: int) -> Any:
    """Returns the network trained on these examples, a `training.Fit`."""
    config = dj.TrainingConfig(learning_rate=TRAINING_RATE.value, max_epochs=EPOCHS.value)
    return dj.training.fit(setting.model, variables, labeled, config, seed)


def with_noise(labels: np.ndarray, share: float, num_classes: int, seed: int) -> np.ndarray:
    """Returns labels of which a share is drawn anew, uniformly, as in Zhang et al. (2017)."""
    generator = dj.streams.generator(seed, "noise")
    order = generator.permutation(len(labels))
    drawn = generator.integers(0, num_classes, len(labels))
    changed = order[: round(share * len(labels))]
    noisy = np.array(labels)
    noisy[changed] = drawn[changed]
    return noisy


def write(module: Any, results: dict[str, Any], sentence: str, draw: Callable[[Any], None]) -> None:
    """Does what `save` does, and prints the finding and where it is."""
    common.tell(sentence, save(module, results, sentence, draw))


def save(
    module: Any, results: dict[str, Any], sentence: str, draw: Callable[[Any], None]
) -> pathlib.Path:
    """Writes `<name of the binary>.json` and `.png`; returns the path of the former.

    Args:
      module: the binary; its key flags are recorded.
      results: numbers, JSON values.
      sentence: what was found, with its numbers.
      draw: draws the picture into a matplotlib figure.
    """

    def picture(path: pathlib.Path) -> None:
        figure = dj.plotting.figure(9.0, 4.0)
        draw(figure)
        figure.savefig(path, dpi=150)

    directory = pathlib.Path(common.OUTPUT_DIR.value or os.path.join("runs", "theory"))
    name = pathlib.Path(module.__file__).stem
    return common.save(module, directory, name, {"finding": sentence, **results}, picture)
