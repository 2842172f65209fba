"""Figure 4: is the greedy choice of a query as good as that of the set as a whole?

Trains a model on |S| labels and computes, epoch by epoch, the approximation ratio R(Q|S) = Σ_u
Δ({u}|S) / Δ(Q|S) of random queries Q (Eq. 14). Draws its mean and standard deviation over Q against
the loss on S, with R of the query that dynamicAL would make then (a pass over the pool). Where R is
1, the sum of single changes, which dynamicAL makes as large as possible, equals the change by the
whole set.

  python -m experiments.fig4_approximation_ratio --dataset=cifar10 --initial_size=500
      --ratio_sizes=250,500,1000 --all_epochs --max_epochs=500 --every=20

The records also have the R that would follow if S were fitted: with g_S = 0 and ρ the mean of
g_u·g_u′ over pairs of Q, divided by the mean of ‖g_u‖², R = 1 / (1 + (b − 1) ρ).

Writes approximation_ratio.json and .png to --output_dir. Partial results are saved as
approximation_ratio.partial.json.
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary, options
from experiments import common

SIZES = flags.DEFINE_list("ratio_sizes", ["25", "50", "100"], "The values of b = |Q|.")
NUM_QUERIES = flags.DEFINE_integer(
    "num_queries", 20, "How many random Q are drawn at each epoch.", lower_bound=2
)
EVERY = flags.DEFINE_integer("every", 5, "How many epochs apart R is computed.", lower_bound=1)
ALL_EPOCHS = flags.DEFINE_bool(
    "all_epochs",
    False,
    "Train for --max_epochs, also after the targets are met. The paper says that R is 1 when the "
    "model has converged.",
)
for _name in (
    *("dataset", "image_size", "channels", "test_dir", "test_fraction", "unreadable"),
    *("data_dir", "download", "cache_dir", "output_dir", "first_seed", "initial_size"),
    *("model", "stem", "feature_scale", "optimizer", "learning_rate", "schedule"),
    *("weight_decay", "train_batch_size", "target_accuracy", "target_loss"),
    *("target_total_loss", "min_epochs", "max_epochs", "look_every", "engine", "chunk_size"),
):
    flags.declare_key_flag(_name)

FITTED, FOR_ALL_EPOCHS = "training that ends when S is fitted", "--all_epochs"
for _flag in (
    *(options.TARGET_ACCURACY, options.TARGET_LOSS, options.TARGET_TOTAL_LOSS),
    *(options.MIN_EPOCHS, options.LOOK_EVERY),
):
    binary.read_by(_flag, "end", (FITTED,))

NAME = "approximation_ratio"


def main(argv: list[str]) -> int | None:
    """Reproduces the figure; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Trains, and computes R meanwhile; returns no failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    binary.check_read(end=[FOR_ALL_EPOCHS if ALL_EPOCHS.value else FITTED])
    sizes = sorted(set(binary.parse_positive("ratio_sizes", SIZES.value)))
    if common.INITIAL_SIZE.value < 1:
        raise dj.UserError(f"initial_size must be at least 1, got {common.INITIAL_SIZE.value}")
    dataset, model = common.load()
    config = options.training_config()
    size, num_needed = common.INITIAL_SIZE.value, common.INITIAL_SIZE.value + sizes[-1]
    if num_needed > len(dataset.pool.y):
        raise dj.UserError(
            f"an initial set of {size} and queries of {sizes[-1]} need {num_needed} "
            f"{dataset.kind}; the pool of {dataset.name} has {len(dataset.pool.y)}"
        )
    if ALL_EPOCHS.value:
        config = dataclasses.replace(
            config, target_accuracy=None, target_loss=None, target_total_loss=None
        )
    default = os.path.join("runs", f"{NAME}-{dataset.name}-{options.MODEL.value}")
    directory = common.make_directory(common.OUTPUT_DIR.value or default)

    def save(points: list[dict[str, Any]], finished: bool = False) -> pathlib.Path:
        results = {"finding": describe_point(points[-1]), "points": points}
        draw = functools.partial(dj.plotting.approximation_ratio, points)
        return common.save(sys.modules[__name__], directory, NAME, results, draw, finished)

    points = ratios(dataset, model, config, sizes, common.FIRST_SEED.value, save)
    common.print_finding(describe_point(points[-1]), save(points, finished=True))
    return []


def describe_point(point: dict[str, Any]) -> str:
    """Returns a sentence about R at an epoch."""
    parts = [
        f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (b = {size})"
        for size, values in point["ratios"].items()
    ]
    own = [f"{ratio:.3f} (b = {size})" for size, ratio in point["own_ratios"].items()]
    return (
        f"After {dj.words.count(point['epoch'], 'epoch')}, at {point['train_accuracy']:.1%} of S "
        f"and a loss of {point['train_loss']:.2g}, R is on average over {NUM_QUERIES.value} "
        f"random Q {', '.join(parts)}. Of dynamicAL's own query it is {', '.join(own)}."
    )


def ratios(
    dataset: dj.Dataset,
    model: Any,
    config: dj.TrainingConfig,
    sizes: list[int],
    seed: int,
    save: Callable[[list[dict[str, Any]]], Any],
) -> list[dict[str, Any]]:
    """Returns R of each b and draw, at every `EVERY`-th epoch and after the last.

    This takes long, so `keep` is called with the points so far after each of these epochs.
    """
    generator = dj.streams.generator(seed, "initial_set")
    pool = dj.pool.initial_pool(len(dataset.pool.y), common.INITIAL_SIZE.value, generator)
    labeled = dj.Examples(dataset.pool.x[pool.labeled], dataset.pool.y[pool.labeled])
    points: list[dict[str, Any]] = []

    def look(epoch: int, variables: Any, evaluation: dj.training.Evaluation) -> None:
        grad_s = dj.gradients.set_gradient(model.apply, variables, labeled)
        values: dict[str, list[float]] = {str(size): [] for size in sizes}
        values_without_g_s: dict[str, list[float]] = {str(size): [] for size in sizes}
        for index in range(NUM_QUERIES.value):
            draw = dj.streams.generator(seed, "draws", epoch, index)
            query = dataset.pool.x[draw.choice(pool.unlabeled, sizes[-1], replace=False)]
            ratios = query_ratios(model, variables, query, grad_s, sizes)
            for size, (ratio, limit) in zip(sizes, ratios, strict=True):
                values[str(size)].append(ratio)
                values_without_g_s[str(size)].append(limit)
        own = own_query(model, variables, dataset, pool, grad_s, sizes[-1])
        own_ratios = query_ratios(model, variables, dataset.pool.x[own], grad_s, sizes)
        points.append(
            {
                "epoch": epoch,
                "train_accuracy": evaluation.accuracy,
                "train_loss": evaluation.loss,
                "training_dynamics": float(dj.dynamics.training_dynamics(grad_s)),
                "ratios": values,
                "ratios_without_g_s": values_without_g_s,
                "own_ratios": {
                    str(size): ratio for size, (ratio, _) in zip(sizes, own_ratios, strict=True)
                },
            }
        )
        save(points)

    variables = dj.models.init(model, dj.streams.key(seed, "weights"), dataset.pool.x)
    look(0, variables, dj.training.evaluate(model.apply, variables, labeled))

    with tqdm.tqdm(desc="epochs", total=config.max_epochs, disable=None, leave=False) as bar:

        def on_epoch(progress: dj.training.Progress, seen: dj.training.Evaluation | None) -> None:
            if seen is not None:
                bar.set_postfix_str(f"loss {seen.loss:.2g}", refresh=False)
            bar.update(progress.epoch - bar.n)
            if progress.epoch % EVERY.value == 0:
                seen = seen or dj.training.evaluate(model.apply, progress.variables, labeled)
                look(progress.epoch, progress.variables, seen)

        fit = dj.training.fit(
            *(model, variables, labeled, config, seed), on_epoch=on_epoch, call_every=EVERY.value
        )
    if points[-1]["epoch"] != fit.epochs:
        look(fit.epochs, fit.variables, fit.labeled)
    return points


def own_query(
    model: Any, variables: Any, dataset: dj.Dataset, pool: Any, grad_s: Any, batch_size: int
) -> np.ndarray:
    """Returns the rows of the pool that dynamicAL would query, the largest Δ first."""
    terms = dj.gradients.norms_and_products(
        model.apply,
        variables,
        dj.types.Rows(dataset.pool_images, pool.unlabeled),
        grad_s,
        engine=options.ENGINE.value,
        chunk_size=options.CHUNK_SIZE.value,
    )
    changes = dj.dynamics.change_of_training_dynamics(terms.squared_norm, terms.inner_product)
    return pool.unlabeled[np.asarray(dj.strategies.selection.top_b(changes, batch_size))]


def query_ratios(
    model: Any, variables: Any, query: np.ndarray, grad_s: Any, sizes: list[int]
) -> list[tuple[float, float]]:
    """Returns R(Q|S) of the first b images of a query, for each b, at their pseudo-labels.

    The second number is R if g_S were 0: Σ‖g_u‖² / ‖g_Q‖² = 1 / (1 + (b − 1) ρ).
    """
    terms = dj.gradients.norms_and_products(
        model.apply,
        variables,
        query,
        grad_s,
        engine=options.ENGINE.value,
        chunk_size=options.CHUNK_SIZE.value,
    )
    changes = np.asarray(
        dj.dynamics.change_of_training_dynamics(terms.squared_norm, terms.inner_product)
    )
    result, grad_q, start = [], None, 0
    for size in sizes:
        part = dj.Examples(query[start:size], terms.label[start:size])
        more = dj.gradients.set_gradient(model.apply, variables, part)
        grad_q = more if grad_q is None else jax.tree.map(np.add, grad_q, more)
        ratio = dj.dynamics.approximation_ratio(changes[:size], grad_q, grad_s)
        squared_norm = float(np.sum(np.asarray(terms.squared_norm[:size], np.float64)))
        result.append((float(ratio), squared_norm / float(dj.dynamics.training_dynamics(grad_q))))
        start = size
    return result


if __name__ == "__main__":
    binary.launch(main)
