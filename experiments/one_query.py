"""What does each strategy ask for? Contact sheets of one query by each, of the same model.

Trains a model on |S| labels, and lets each strategy query b images of the pool: the variants of
dynamicAL, or --strategies.

  python -m experiments.one_query --dataset=cifar10 --model=cnn --initial_size=500 --batch_size=20
      --strategies=dynamical,dynamical_sampled,dynamical_joint,dynamical_diverse,dynamical_repelled
      --block_size=5

Writes <strategy>.png to --output_dir, each image with its class, and what the model takes it for
where that is another; and queries.json: the images, how many classes they are of, how many of them
the model takes for another class, and how alike their gradients are.
"""

import functools
import json
import os
import sys
from typing import Any

import numpy as np
from absl import flags

import dynamical_jax as dj
from dynamical_jax.labeling import proposal
from dynamical_jax.programs import binary, options, strategy
from experiments import active_learning, common

for _name in (
    "strategies",
    *("dataset", "image_size", "channels", "test_dir", "test_fraction", "unreadable"),
    *("data_dir", "download", "cache_dir", "output_dir", "first_seed", "initial_size"),
    *("model", "stem", "optimizer", "learning_rate", "schedule", "weight_decay", "batch_size"),
    *("train_batch_size", "target_accuracy", "target_loss", "target_total_loss", "min_epochs"),
    *("max_epochs", "look_every", *(flag.name for flag in strategy.OPTIONS)),
):
    flags.declare_key_flag(_name)


def main(argv: list[str]) -> int | None:
    """Draws the contact sheets that the flags describe; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Trains, lets all strategies query, and draws; returns no failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    names = active_learning.STRATEGIES.value
    if flags.FLAGS["strategies"].using_default_value:
        names = [name for name in dj.STRATEGIES if name.startswith("dynamical")]
    strategies = strategy.make(names)
    budget = dj.Budget(common.INITIAL_SIZE.value, options.BATCH_SIZE.value, 1)
    dataset, model = common.load()
    if dataset.kind != "images":
        raise dj.UserError(f"contact sheets are of images; {dataset.name} has {dataset.kind}")
    default = os.path.join("runs", f"one_query-{dataset.name}-{options.MODEL.value}")
    directory = common.make_directory(common.OUTPUT_DIR.value or default)
    seed = common.FIRST_SEED.value
    experiment = dj.Experiment(
        dataset, model, dj.strategies.Random(), budget, options.training_config(), seed
    )
    start = experiment.init()
    pool = start.pool
    state, trained = experiment.step(start)  # Its query is not used.
    view = dj.LearnerView(
        model.apply,
        state.variables,
        dj.Examples(dataset.pool.x[pool.labeled], dataset.pool.y[pool.labeled]),
        dj.types.Rows(dataset.pool_images, pool.unlabeled),
    )
    queries = {}
    for name, one in strategies.items():
        query = one.query(dj.streams.key(seed, "strategy", 0), view, options.BATCH_SIZE.value)
        rows = pool.unlabeled[query.positions]
        images, labels = dataset.pool.x[rows], dataset.pool.y[rows]
        predicted = np.argmax(model.apply(state.variables, images).logits, axis=1)
        captions = [
            dataset.class_names[label]
            + ("" if label == guess else f"\ntaken for {dataset.class_names[guess]}")
            for label, guess in zip(labels, predicted, strict=True)
        ]
        path = directory / f"{name}.png"
        proposal.contact_sheet(list(_as_colors(images)), captions, path)
        redundancy = dj.gradients.redundancy(model.apply, state.variables, images)
        queries[name] = {
            "query": dataset.index[rows].tolist(),
            "classes": len(set(labels.tolist())),
            "predicted_classes": len(set(predicted.tolist())),
            "taken_for_another": int(np.sum(labels != predicted)),
            **redundancy._asdict(),
        }
        print(f"{name}: {describe(queries[name])}\n{path}")
    results: dict[str, Any] = {"test_accuracy": trained.test.accuracy, "queries": queries}
    used = {
        flag.name: flag.value
        for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    }
    record = dj.files.finite({**results, "flags": used, **dj.records.environment()})
    dj.files.write(directory / "queries.json", json.dumps(record, indent=1) + "\n")
    return []


def describe(query: dict[str, Any]) -> str:
    """Returns a phrase about a query."""
    return (
        f"{dj.words.count(query['classes'], 'class', 'classes')}, {query['predicted_classes']} as "
        "predicted, "
        f"{query['taken_for_another']} of {len(query['query'])} taken for another class; gradients "
        f"with a mean cosine of {query['mean_cosine']:.2f}, {query['near_copies']:.0%} near-copies"
    )


def _as_colors(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


if __name__ == "__main__":
    binary.launch(main)
