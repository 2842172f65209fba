"""What the theory's programs share: data, a network, its kernel, and the files they write."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.stats
import tqdm
from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary
from dynamical_jax.types import ApplyFn, Array, Variables
from experiments import common

WIDTHS = flags.DEFINE_list(
    "widths", ["64", "64", "64"], "Channels of each convolution of the network, ntk_cnn."
)
NUM_LOGITS = flags.DEFINE_integer(
    "num_logits",
    1,
    "How many logits the kernel is averaged over, 0 for all; in the limit of infinite width it is "
    "the same for each.",
    lower_bound=0,
)
NUM_LABELED = flags.DEFINE_integer(
    "num_labeled", 50, "Size of the labeled set, |S|.", lower_bound=2
)
EPOCHS = flags.DEFINE_integer(
    "epochs", 100, "Largest number of epochs of training on S.", lower_bound=1
)
TRAINING_RATE = flags.DEFINE_float(
    "training_rate",
    0.03,
    "Learning rate of Adam; in the NTK parameterisation weights are of size 1, and need a larger "
    "one than usual.",
)
JITTER = flags.DEFINE_float(
    "jitter",
    0.0,
    "Number added to the diagonal of Θ, in units of its mean; it is recorded.",
    lower_bound=0.0,
)

# Key flags of all these programs; each declares its others.
KEY_FLAGS = (
    *("dataset", "image_size", "channels", "test_dir", "test_fraction", "unreadable"),
    *("data_dir", "download", "cache_dir", "output_dir", "first_seed", "widths", "num_logits"),
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
        """Returns the rows of the initial set S that an experiment with this seed has."""
        generator = dj.streams.generator(seed, "initial_set")
        return dj.pool.initial_pool(len(self.dataset.pool.y), size, generator).labeled

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Returns one-hot labels Y `[n, K]`."""
        return np.eye(len(self.dataset.class_names))[labels]


def setting(query_size: int = 0) -> Setting:
    """Returns the data and the network of the flags; makes JAX keep compiled programs.

    Args:
      query_size: number of images needed beside S.

    Raises:
      UserError: if the pool is smaller, or a flag is wrong.
    """
    widths = tuple(binary.parse_positive("widths", WIDTHS.value))
    dataset = common.load_dataset()
    if dataset.kind != "images":
        raise dj.UserError(
            f"the network of the theory, ntk_cnn, takes images, and {dataset.name} holds vectors"
        )
    needed, available = NUM_LABELED.value + query_size, len(dataset.pool.y)
    if needed > available:
        beside = " and Q need" if query_size else " needs"
        raise dj.UserError(f"S{beside} {needed} images, the pool of {dataset.name} has {available}")
    return Setting(dataset, dj.models.create("ntk_cnn", dataset, widths=widths))


def kernel(apply: ApplyFn, variables: Variables, x: Any) -> np.ndarray:
    """Returns Θ of images, averaged over --num_logits logits."""
    first_logits = _first_logits(apply, NUM_LOGITS.value or None)
    with tqdm.tqdm(desc="Θ", disable=None, leave=False) as bar:

        def update_bar(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return dj.ntk.empirical_ntk(first_logits, variables, jnp.asarray(x), on_progress=update_bar)


def combined_gradients(
    apply: ApplyFn, variables: Variables, x: Any, weights: np.ndarray
) -> np.ndarray:
    """Returns Σ w ∇f of --num_logits logits; its squared norm over them is Tr(Wᵀ Θ W)."""
    first_logits = _first_logits(apply, NUM_LOGITS.value or None)
    return dj.ntk.combined_gradients(first_logits, variables, jnp.asarray(x), weights)


def infinite_width_kernel(setting: Setting, x: Any) -> np.ndarray:
    """Returns Θ of images in the limit of infinite width."""
    network = setting.model
    return dj.ntk.infinite_width_ntk(network.standardize(x), depth=len(network.model.widths))


@functools.cache  # Programs are compiled for each function object, so return the same one again.
def _first_logits(apply: ApplyFn, count: int | None) -> ApplyFn:
    def first_logits(variables: Variables, x: Array) -> dj.Outputs:
        outputs = apply(variables, x)
        return dj.Outputs(outputs.logits[:, :count], outputs.embedding)

    return first_logits


def fit(setting: Setting, variables: Variables, labeled: dj.Examples, seed: int) -> Any:
    """Returns the network trained on these examples, a `training.Fit`."""
    config = dj.TrainingConfig(learning_rate=TRAINING_RATE.value, max_epochs=EPOCHS.value)
    return dj.training.fit(setting.model, variables, labeled, config, seed)


def add_label_noise(labels: np.ndarray, share: float, num_classes: int, seed: int) -> np.ndarray:
    """Replaces a share of the labels by uniformly random ones, as in Zhang et al. (2017)."""
    generator = dj.streams.generator(seed, "noise")
    order = generator.permutation(len(labels))
    drawn = generator.integers(0, num_classes, len(labels))
    changed = order[: round(share * len(labels))]
    noisy = np.array(labels)
    noisy[changed] = drawn[changed]
    return noisy


def tau_within_seeds(
    rows: list[dict[str, Any]], first: list[float], second: list[float]
) -> list[float]:
    """Returns Kendall's τ of two quantities of the rows for each seed.

    Rows of one seed share S, the network and the order in which noise comes, so they are no sample
    from which a p-value could be computed. Rows of several seeds differ in the scale of Θ.
    """
    result = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [i for i, row in enumerate(rows) if row["seed"] == seed]
        tau = scipy.stats.kendalltau([first[i] for i in own], [second[i] for i in own])
        result.append(float(tau.statistic))
    return result


def describe_taus(taus: list[float]) -> str:
    """Returns the end of a sentence on τ: its value, or mean and range over seeds."""
    if len(taus) == 1:
        return f"is {taus[0]:.2f}"
    return f"is {np.mean(taus):.2f} ({min(taus):.2f} to {max(taus):.2f} in {len(taus)} seeds)"


def progress(work: Iterable, what: str) -> Iterable:
    """Iterates over `work`, with a progress bar if there is a terminal."""
    return tqdm.tqdm(work, what, disable=None, leave=False)


def repeat_over_seeds(
    module: Any,
    run_seed: Callable[[int], list[dict[str, Any]]],
    summarize: Callable[[list[dict[str, Any]]], tuple[Any, ...]],
) -> list[str]:
    """Repeats an experiment with each seed and prints the finding; returns a line for each failure.

    A seed takes long, so partial results are written after each.

    Args:
      module: the program.
      run_seed: seed → its results; a seed that raises UserError does not stop the others.
      summarize: results of all seeds → the first arguments of `save`: numbers, sentence, draw.
    """
    seeds, rows_so_far, done, failures = common.seeds(), [], [], {}
    directory()
    for seed in seeds:
        try:
            rows_so_far += run_seed(seed)
            done.append(seed)
        except dj.UserError as error:
            failures[seed] = str(error)
        if not rows_so_far:
            continue
        results, sentence, draw = summarize(rows_so_far)
        if len(done) < len(seeds):
            sentence += f" ({len(done)} of {len(seeds)} seeds.)"
        results = {**results, "seeds": done, "failed_seeds": failures}
        path = save(module, results, sentence, draw, finished=seed == seeds[-1])
    if done:
        common.print_finding(sentence, path)
    return [f"seed {seed}: {why}" for seed, why in failures.items()]


def directory() -> pathlib.Path:
    """Returns the directory for results."""
    return common.make_directory(common.OUTPUT_DIR.value or os.path.join("runs", "theory"))


def save(
    module: Any,
    results: dict[str, Any],
    sentence: str,
    draw: Callable[[Any], None],
    finished: bool = True,
) -> pathlib.Path:
    """Writes `<name of the program>.json` and `.png`; returns the path of the former.

    Args:
      module: the program; its key flags are recorded.
      results: numbers, JSON values.
      sentence: the finding, with its numbers.
      draw: draws the picture into a matplotlib figure.
      finished: whether the results are complete; if not, the files are
        `<name of the program>.partial.json` and `.png`.
    """

    def picture(path: pathlib.Path) -> None:
        figure = dj.plotting.figure(9.0, 4.0)
        draw(figure)
        dj.plotting.save(figure, path)

    name = pathlib.Path(module.__file__).stem
    results = {"finding": sentence, **results}
    return common.save(module, directory(), name, results, picture, finished)
