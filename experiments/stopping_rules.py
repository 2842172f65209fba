"""When may training stop, so that a query by dynamicAL can be trusted?

Trains on the initial set far longer than any rule asks for. At epochs spaced evenly on a
logarithmic scale (ten to a decade) it computes what dynamicAL would query. For each rule by which
training could stop it then shows: after how many epochs training stops; the share of the inner
product with g_S in the chosen Δ; how many of the chosen are chosen again after ten times as many
epochs; and R of the query (Eq. 14).

  python -m experiments.stopping_rules --dataset=cifar10 --model=cnn --initial_size=500
      --batch_size=500 --candidates=5000 --max_epochs=1600 --num_seeds=3

Writes stopping_rules.json and .png to --output_dir. Partial results are saved as
stopping_rules.partial.json.

How much strategies gain by a rule is measured by experiments.active_learning, which has the rules
as flags (--target_accuracy, --target_loss, --target_total_loss, --min_epochs). Give each rule an
output directory below that of the setting. Then

  python -m experiments.stopping_rules results/convergence/*/

trains nothing, prints tables of all settings, and writes them to tables.md, and one picture of all
settings to stopping_rules.png, beside the directories.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary, options
from experiments import common

CANDIDATES = flags.DEFINE_integer(
    "candidates", None, "How many random examples of the pool to choose from; by default all."
)
for _name in (
    *("dataset", "image_size", "channels", "test_dir", "test_fraction", "unreadable"),
    *("data_dir", "download", "cache_dir", "output_dir", "num_seeds", "first_seed"),
    *("initial_size", "batch_size", "model", "stem", "feature_scale", "optimizer"),
    *("learning_rate", "schedule", "weight_decay", "train_batch_size", "max_epochs"),
    *("engine", "chunk_size"),
):
    flags.declare_key_flag(_name)

NAME = "stopping_rules"

Look = Mapping[str, Any]
"""What was measured at an epoch: see `inspect_query`."""

RULES: dict[str, Callable[[Look], bool]] = {
    "99 % of S right": lambda look: look["accuracy"] >= 0.99,
    "99 % right in 10 epochs": lambda look: look["epochs_at_99"] >= 10,
    "100 epochs": lambda look: look["epoch"] >= 100,
    "mean loss ≤ 0.1": lambda look: look["loss"] <= 0.1,
    "mean loss ≤ 0.01": lambda look: look["loss"] <= 0.01,
    "mean loss ≤ 0.001": lambda look: look["loss"] <= 0.001,
    "total loss ≤ 10": lambda look: look["loss"] * look["size"] <= 10,
    "total loss ≤ 1": lambda look: look["loss"] * look["size"] <= 1,
    "total loss ≤ 0.1": lambda look: look["loss"] * look["size"] <= 0.1,
    "G(S) ≤ median ‖g_u‖²": lambda look: look["dynamics"] <= look["median"],
    "G(S) ≤ mean ‖g_u‖²": lambda look: look["dynamics"] <= look["mean"],
    "R of random Q within 0.2 of 1": lambda look: abs(look["random_ratio"] - 1) <= 0.2,
}
"""Name → whether training may stop; the rules of the study in docs/convergence.md."""


def main(argv: list[str]) -> int | None:
    """Studies the rules; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Trains and measures, or reports on directories of records; returns no failures."""
    if directories := argv[1:]:
        if given := [name for name in binary.given() if name != "cache_dir"]:
            raise dj.UserError(f"--{given[0]} has no effect on a report")
        return report(directories)
    binary.check_command_line(argv, sys.modules[__name__])
    seeds, size = common.seeds(), options.BATCH_SIZE.value
    dataset, model = common.load()
    needed = common.INITIAL_SIZE.value + (CANDIDATES.value or size)
    if min(common.INITIAL_SIZE.value, size, CANDIDATES.value or size) < 1 or size > (
        CANDIDATES.value or size
    ):
        raise dj.UserError("initial_size and batch_size must be at least 1, candidates no smaller")
    if needed > len(dataset.pool.y):
        raise dj.UserError(
            f"{needed} examples are needed; the pool of {dataset.name} has {len(dataset.pool.y)}"
        )
    config = dataclasses.replace(
        options.training_config(),
        target_accuracy=None,
        target_loss=None,
        target_total_loss=None,
        look_every=1,
    )
    default = os.path.join("runs", f"{NAME}-{dataset.name}-{options.MODEL.value}")
    directory = common.make_directory(common.OUTPUT_DIR.value or default)
    results: dict[str, Any] = {"dataset": dataset.name, "model": options.MODEL.value, "seeds": {}}
    for number, seed in enumerate(seeds, start=1):
        results["seeds"][str(seed)] = collect_looks(dataset, model, config, seed)
        draw = functools.partial(draw_picture, [results])
        path = common.save(
            sys.modules[__name__], directory, NAME, results, draw, number == len(seeds)
        )
    print(table(results))
    print(f"{path}\n{path.with_suffix('.png')}")
    return []


def collect_looks(
    dataset: dj.Dataset, model: Any, config: dj.TrainingConfig, seed: int
) -> list[dict[str, Any]]:
    """Trains with one seed; returns what was measured at each of the epochs to look at."""
    pool = dj.pool.initial_pool(
        len(dataset.pool.y),
        common.INITIAL_SIZE.value,
        dj.streams.generator(seed, "initial_set"),
    )
    labeled = dj.Examples(dataset.pool.x[pool.labeled], dataset.pool.y[pool.labeled])
    unlabeled = pool.unlabeled
    if CANDIDATES.value:
        draw = dj.streams.generator(seed, "draws")
        unlabeled = np.sort(draw.choice(unlabeled, CANDIDATES.value, replace=False))
    candidates = dj.types.Rows(dataset.pool_images, unlabeled)
    at = set(epochs_to_look_at(config.max_epochs))
    looks: list[dict[str, Any]] = []
    epochs_at_99 = 0
    with tqdm.tqdm(desc=f"seed {seed}", total=config.max_epochs, disable=None, leave=False) as bar:

        def on_epoch(progress: dj.training.Progress, seen: dj.training.Evaluation) -> None:
            nonlocal epochs_at_99
            bar.update()
            epochs_at_99 += seen.accuracy >= 0.99
            if progress.epoch in at:
                look = inspect_query(model, progress.variables, labeled, candidates, progress.epoch)
                looks.append(
                    {
                        "epoch": progress.epoch,
                        "size": len(labeled.y),
                        "accuracy": seen.accuracy,
                        "loss": seen.loss,
                        "epochs_at_99": epochs_at_99,
                        **look,
                    }
                )

        variables = dj.models.init(model, dj.streams.key(seed, "weights"), dataset.pool.x)
        dj.training.fit(model, variables, labeled, config, seed, on_epoch=on_epoch)
    return looks


def epochs_to_look_at(last: int) -> list[int]:
    """Returns epochs spaced evenly on a logarithmic scale, ten to a decade.

    >>> epochs_to_look_at(13)
    [1, 2, 3, 4, 5, 6, 8, 10, 13]
    """
    exponents = range(1 + math.floor(10 * math.log10(last)))
    return sorted({round(10 ** (k / 10)) for k in exponents} | {last})


def inspect_query(
    model: Any, variables: Any, labeled: dj.Examples, candidates: Any, epoch: int
) -> dict[str, Any]:
    """Returns what dynamicAL would query now, and measures of that query.

    Returns:
      "query": positions in `candidates`; "share" and "ratio": of the query, as `Dynamical` reports
      them; "random_ratio": R of as many random candidates; "dynamics": G(S); "median" and "mean" of
      ‖g_u‖² over the candidates.
    """
    size = options.BATCH_SIZE.value
    grad_s = dj.gradients.set_gradient(model.apply, variables, labeled)
    terms = dj.gradients.norms_and_products(
        model.apply,
        variables,
        candidates,
        grad_s,
        engine=options.ENGINE.value,
        chunk_size=options.CHUNK_SIZE.value,
    )
    squared_norm, inner_product = (
        np.asarray(part, np.float64) for part in (terms.squared_norm, terms.inner_product)
    )
    change = squared_norm + 2 * inner_product

    def ratio(chosen: np.ndarray) -> float:
        query = dj.Examples(candidates[chosen], np.asarray(terms.label)[chosen])
        grad_q = dj.gradients.set_gradient(model.apply, variables, query)
        return float(dj.dynamics.approximation_ratio(change[chosen], grad_q, grad_s))

    query = np.asarray(dj.selection.top_b(change, size))
    drawn = dj.streams.generator(0, "draws", epoch).choice(len(change), size, replace=False)
    share = dj.dynamics.inner_product_share(squared_norm[query], inner_product[query])
    return {
        "query": query.tolist(),
        "share": float(share),
        "ratio": ratio(query),
        "random_ratio": ratio(drawn),
        "dynamics": float(dj.dynamics.training_dynamics(grad_s)),
        "median": float(np.median(squared_norm)),
        "mean": float(np.mean(squared_norm)),
    }


def apply_rule(rule: Callable[[Look], bool], looks: Sequence[Look]) -> dict[str, float] | None:
    """Returns epoch, share, ratio and overlap where a rule stops training; None if it never does.

    "overlap" is the share of the query that is queried again after ten times as many epochs; None
    if training ended before.
    """
    stop = next((look for look in looks if rule(look)), None)
    if stop is None:
        return None
    # Ten places further on the scale of `epochs_to_look_at`.
    exponent = round(10 * math.log10(stop["epoch"])) + 10
    later_look = next(
        (look for look in looks if look["epoch"] == round(10 ** (exponent / 10))), None
    )
    common_part = set(stop["query"]) & set(later_look["query"]) if later_look else ()
    overlap = len(common_part) / len(stop["query"]) if later_look else None
    return {"overlap": overlap, **{name: stop[name] for name in ("epoch", "share", "ratio")}}


def table(results: Mapping[str, Any]) -> str:
    """Returns a table of the rules for one setting, in Markdown: means over seeds."""
    lines = [
        f"{results['dataset']}, {results['model']}, |S| = {_size(results)}, "
        f"{dj.words.count(len(results['seeds']), 'seed')}:",
        "",
        "| first look at which | epochs | share of g_S in Δ | overlap with 10 × epochs | R |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rule in RULES.items():
        stops = [apply_rule(rule, looks) for looks in results["seeds"].values()]
        if None in stops:
            missing = sum(stop is None for stop in stops)
            lines.append(f"| {name} | not reached by {missing} of {len(stops)} seeds | | | |")
            continue
        overlaps = [stop["overlap"] for stop in stops if stop["overlap"] is not None]
        cells = [
            f"{np.mean([stop['epoch'] for stop in stops]):.0f}",
            _range([stop["share"] for stop in stops]),
            _range(overlaps) if len(overlaps) == len(stops) else "not trained so long",
            _range([stop["ratio"] for stop in stops]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_picture(settings: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws the share of g_S and the overlap with the last query over epochs, for each setting."""
    drawn = dj.plotting.figure(3.6 * len(settings), 3.6)
    for axes, results in zip(
        np.ravel(drawn.subplots(1, len(settings), sharey=True, squeeze=False)),
        settings,
        strict=True,
    ):
        seeds = list(results["seeds"].values())
        epochs = [look["epoch"] for look in seeds[0]]
        share = np.array([[look["share"] for look in looks] for looks in seeds])
        overlap = np.array(
            [
                [
                    len({*look["query"]} & {*looks[-1]["query"]}) / len(look["query"])
                    for look in looks
                ]
                for looks in seeds
            ]
        )
        for values, label in (
            (share, "share of g_S in Δ"),
            (overlap, "overlap with the last query"),
        ):
            (line,) = axes.plot(epochs, values.mean(axis=0), label=label)
            low, high = values.min(axis=0), values.max(axis=0)
            axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15)
        for name, style in (("99 % of S right", ":"), ("total loss ≤ 1", "--")):
            stops = [apply_rule(RULES[name], looks) for looks in seeds]
            if None not in stops:
                mean = np.mean([stop["epoch"] for stop in stops])
                axes.axvline(mean, color="black", linestyle=style, linewidth=1, label=name)
        axes.set_xscale("log")
        axes.set_xlabel("epochs on S")
        axes.set_title(
            f"{results['dataset']}, {results['model']}, |S| = {_size(results)}", fontsize=9
        )
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    dj.plotting.save(drawn, path, dpi=130)


def report(directories: Sequence[str]) -> list[str]:
    """Prints and writes the tables of recorded settings, and draws one picture of all."""
    settings, texts = [], []
    for directory in map(pathlib.Path, directories):
        file = directory / f"{NAME}.json"
        try:
            settings.append(json.loads(file.read_text(encoding="utf-8")))
            texts += [table(settings[-1]), gains(directory)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise dj.UserError(f"{file} is no record of this program ({error})") from error
    text = "\n".join(filter(None, texts))
    print(text)
    parent = common.make_directory(str(pathlib.Path(directories[0]).resolve().parent))
    dj.files.write(parent / "tables.md", text)
    draw_picture(settings, parent / f"{NAME}.png")
    print(f"{parent / 'tables.md'}\n{parent / NAME}.png")
    return []


def gains(directory: pathlib.Path) -> str:
    """Returns a table of what strategies gain over random under each rule, in Markdown.

    Args:
      directory: of a setting; its directories with records are named by their rules.
    """
    rows = []
    for path in sorted(directory.glob(f"*/{dj.records.FILE_NAME}")):
        rounds = dj.records.read(path)
        scores = dj.reports.markdown.common_scores(rounds)
        area = dict(zip(scores.strategies, scores.area, strict=True))
        cells = [path.parent.name, str(len(scores.seeds)), f"{100 * np.mean(area['random']):.1f}"]
        for name in ("dynamical", "badge"):
            gain = dj.statistics.paired_difference(area[name], area["random"])
            numbers = [f"{100 * value:+.1f}" for value in (gain.mean, gain.low, gain.high)]
            cells.append("{} ({} to {})".format(*numbers).replace("-", dj.reports.markdown.MINUS))
        shares = [record.get("query_inner_product_share") for record in rounds]
        recorded = [share for share in shares if isinstance(share, float)]
        cells.append(f"{max(recorded):.2f}" if recorded else "not recorded")
        cells.append(f"{sum(r['epochs'] for r in rounds) / len(area) / len(scores.seeds):.0f}")
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return ""
    lines = [
        "Area under the curve of test accuracy (%), paired by seed, with 95 % intervals:",
        "",
        "| rule | seeds | random | dynamical − random | badge − random | largest share of g_S | "
        "epochs a run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _size(results: Mapping[str, Any]) -> int:
    return next(iter(results["seeds"].values()))[0]["size"]


def _range(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    binary.launch(main)
