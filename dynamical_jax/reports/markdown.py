"""Reports in Markdown: accuracies beside published ones, and tests of their differences."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax import words
from dynamical_jax.errors import UserError
from dynamical_jax.reports import statistics
from dynamical_jax.runs import records

MINUS = "\u2212"


class Published(NamedTuple):
    """Published accuracies of one setting, in percent.

    Attributes:
      source: where they are published.
      cells: (strategy, labels) → mean and standard deviation; NaN if none is published.
    """

    source: str
    cells: Mapping[tuple[str, int], tuple[float, float]]


class Scores(NamedTuple):
    """One value of the runs that can be compared, such as the test accuracy.

    Attributes:
      strategies: names.
      seeds: the seeds that all strategies have.
      num_labeled: `[rounds]` the numbers of labels that all runs have.
      values: `[strategies, seeds, rounds]` the value at these numbers.
      area: `[strategies, seeds]` the area under the curve; None if runs have different numbers of
        labels, so that their areas cannot be compared.
      left_out: a sentence about unfinished runs; "" if there are none.
    """

    strategies: list[str]
    seeds: list[int]
    num_labeled: np.ndarray
    values: np.ndarray
    area: np.ndarray | None
    left_out: str


def accuracy(rounds: Sequence[records.Record], published: Published | None = None) -> str:
    """Returns tables of test accuracy by strategy and labels, with published ones if given."""
    first, left_out = rounds[0], unfinished(rounds)
    seeds = sorted({record["seed"] for record in rounds})
    lines = [
        f"# Test accuracy (%) on {records.dataset_of(first)} with {first['model']}",
        "",
        "Mean ± sample standard deviation over seeds, after the last epoch of each round.",
        "",
        *_accuracy_table(records.curves(rounds, "test_accuracy"), len(seeds)),
    ]
    if _has_best(rounds):
        lines += [
            "",
            "The best over those epochs of each round at which the test set was looked at:",
            "",
            *_accuracy_table(records.curves(rounds, "best_test_accuracy"), len(seeds)),
        ]
    if left_out:
        lines += ["", left_out + " Means over different seeds are not to be compared."]
    if published is not None:
        lines += ["", *_published_section(rounds, published)]
    lines += ["", *_convergence_section(rounds)]
    lines += [
        f"Seeds: {', '.join(map(str, seeds))}. "
        f"Device: {_join_distinct(_device(record['device']) for record in rounds)}. "
        f"Commit: {_join_distinct(record['git_commit'] for record in rounds)}. "
        f"JAX: {_join_distinct(record['versions']['jax'] for record in rounds)}.",
    ]
    return "\n".join(lines) + "\n"


def significance(rounds: Sequence[records.Record], references: Iterable[str]) -> str:
    """Returns tests of the differences between strategies.

    Args:
      rounds: the records of one setting.
      references: strategies against which the others are tested; those not recorded are ignored.
    """
    scores = common_scores(rounds)
    # Only the seeds that all strategies have: means over other seeds are not comparable.
    curves = records.curves(record for record in rounds if record["seed"] in scores.seeds)
    setting = f"{records.dataset_of(rounds[0])}, {rounds[0]['model']}"
    lines = [f"# What the differences are worth: {setting}", ""]
    lines += _summary(curves, scores)
    if len(scores.seeds) < 2:
        return "\n".join([*lines, "", _too_few_seeds_note(len(scores.seeds))]) + "\n"
    if len(scores.strategies) > 1:
        sections = [
            _reference_section(name, scores) for name in references if name in scores.strategies
        ]
        num_tables = len(sections) * len(_compared_values(scores))
        if sections:
            lines += ["", _holm_note(len(scores.strategies) - 1, num_tables)]
        for section in sections:
            lines += ["", *section]
    if len(scores.strategies) > 1 and len(scores.num_labeled) > 1:
        lines += ["", *_penalty_section(scores)]
    return "\n".join(lines) + "\n"


def common_scores(rounds: Iterable[records.Record], value: str = "test_accuracy") -> Scores:
    """Returns `value` of the finished runs, for the seeds that all strategies have.

    Raises:
      UserError: if there are no such seeds.
    """
    rounds = list(rounds)
    found = _group_by_run(rounds, value)
    last = max(max(run) for seeds in found.values() for run in seeds.values())
    finished = {
        name: {seed: run for seed, run in seeds.items() if max(run) == last}
        for name, seeds in found.items()
    }
    strategies = [name for name, seeds in finished.items() if seeds]
    seeds = sorted(set.intersection(*(set(finished[name]) for name in strategies)))
    if not seeds:
        raise UserError("the strategies have no finished seed in common: nothing to compare")
    runs = {name: [finished[name][seed] for seed in seeds] for name in strategies}
    labels = sorted(set.intersection(*(set(run) for by_seed in runs.values() for run in by_seed)))
    same = all(set(run) == set(labels) for by_seed in runs.values() for run in by_seed)
    return Scores(
        strategies,
        seeds,
        np.array(labels, float),
        np.array([[[run[n] for n in labels] for run in by_seed] for by_seed in runs.values()]),
        np.array([[_area(run) for run in by_seed] for by_seed in runs.values()]) if same else None,
        unfinished(rounds),
    )


def unfinished(rounds: Iterable[records.Record]) -> str:
    """Returns a sentence about runs with fewer rounds than others; "" if there are none."""
    found = _group_by_run(rounds, "num_labeled")
    last = max(max(run) for seeds in found.values() for run in seeds.values())
    missing = [
        f"{name}, seed {seed}"
        for name, seeds in found.items()
        for seed, run in seeds.items()
        if max(run) < last
    ]
    return f"Not finished and left out of tests: {'; '.join(missing)}." if missing else ""


def _group_by_run(
    rounds: Iterable[records.Record], value: str
) -> dict[str, dict[int, dict[int, Any]]]:
    """Returns strategy → seed → labels → value."""
    found: dict[str, dict[int, dict[int, Any]]] = {}
    for record in rounds:
        seeds = found.setdefault(record["strategy"], {})
        seeds.setdefault(record["seed"], {})[record["num_labeled"]] = record[value]
    return found


def _area(run: Mapping[int, float]) -> float:
    labels = np.array(sorted(run))
    return statistics.area_under_curve(labels.astype(float), np.array([run[n] for n in labels]))


def _has_best(rounds: Sequence[records.Record]) -> bool:
    """Returns whether models were tested before the last epoch, too (--evaluate_every)."""
    return any(record["best_test_accuracy"] != record["test_accuracy"] for record in rounds)


def _accuracy_table(curves: Mapping[str, records.Curve], num_seeds: int) -> list[str]:
    labels = sorted({int(count) for curve in curves.values() for count in curve.num_labeled})
    rows = []
    for name, curve in curves.items():
        points = zip(curve.num_labeled, curve.mean, curve.std, strict=True)
        cells = {int(n): records.format_percent(mean, std) for n, mean, std in points}
        if curve.num_seeds < num_seeds:
            name = f"{name} ({words.count(curve.num_seeds, 'seed')})"
        rows.append([name, *(cells.get(n, "") for n in labels)])
    return _table_lines(["labels", *map(str, labels)], rows)


def _published_section(rounds: Sequence[records.Record], published: Published) -> list[str]:
    """Returns published numbers, and how many of ours are within their standard deviations."""
    lines = [f"## Beside {published.source}", ""]
    counts = []
    measures = {"test_accuracy": "after the last epoch"}
    if _has_best(rounds):
        measures["best_test_accuracy"] = "at the best epoch"
    for value, title in measures.items():
        curves = records.curves(rounds, value)
        means = {
            (name, int(n)): mean
            for name, curve in curves.items()
            for n, mean in zip(curve.num_labeled, curve.mean, strict=True)
        }
        shared = [cell for cell in published.cells if cell in means]
        labels = sorted({n for _, n in shared})
        rows = []
        for name in curves:
            row = [name]
            for n in labels:
                if (name, n) not in shared:
                    row.append("")
                    continue
                mean, std = published.cells[name, n]
                theirs = records.format_percent(mean / 100, std / 100)
                row.append(f"{records.format_percent(means[name, n])} ({theirs})")
            if any(row[1:]):
                rows.append(row)
        lines += [
            f"Ours {title} (theirs):",
            "",
            *_table_lines(["labels", *map(str, labels)], rows),
            "",
        ]
        within: dict[Any, list[bool]] = {}
        once = _same_by_construction(rounds, value)
        for cell in shared:
            mean, std = published.cells[cell]
            if not np.isnan(std):
                # Rounded, so that numbers at the very edge are within.
                inside = np.round(abs(100 * means[cell] - mean), 9) <= std
                within.setdefault(once.get(cell, cell), []).append(inside)
        if within:
            counts.append(f"{title} {sum(map(all, within.values()))} of {len(within)}")
    if counts:
        lines.append(
            f"Means within one of their standard deviations: {', '.join(counts)}. A mean that "
            "several strategies share, as they do before the first query, counts once, and is "
            "within if it is so for all of them."
        )
    return lines


def _convergence_section(rounds: Sequence[records.Record]) -> list[str]:
    """Returns tables of epochs and of facts about queries, as far as they are recorded."""
    lines = ["## Convergence"]
    for name, (title, cell) in FACTS.items():
        recorded = [record for record in rounds if record.get(name) is not None]
        if recorded:
            lines += ["", title, "", *_table_by_labels(recorded, name, cell)]
    return [*lines, ""] if len(lines) > 1 else []


def _table_by_labels(
    rounds: Sequence[records.Record],
    value: str,
    cell: Callable[[Sequence[Any], Sequence[records.Record]], str],
) -> list[str]:
    """Returns a table of `cell` of the values over seeds: strategies × labels."""
    found: dict[str, dict[int, list[records.Record]]] = {}
    for record in rounds:
        labels = found.setdefault(record["strategy"], {})
        labels.setdefault(record["num_labeled"], []).append(record)
    header = sorted({count for labels in found.values() for count in labels})
    rows = [
        [name]
        + [
            cell([record[value] for record in labels[count]], labels[count])
            if count in labels
            else ""
            for count in header
        ]
        for name, labels in found.items()
    ]
    return _table_lines(["labels", *map(str, header)], rows)


def _format_epochs(values: Sequence[int], rounds: Sequence[records.Record]) -> str:
    unmet = sum(not record.get("converged", True) for record in rounds)
    return f"{np.mean(values):.0f}" + (f" ({unmet})" if unmet else "")


def _format_mean_and_range(values: Sequence[float], rounds: Sequence[records.Record]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _same_by_construction(
    rounds: Iterable[records.Record], value: str
) -> dict[tuple[str, int], Any]:
    """Returns, for round 0, (strategy, labels) → the runs of which its mean is made.

    Before the first query the strategy does not matter: initial set and weights depend on the seed
    alone, so in round 0 the runs of all strategies with one seed are the same run. Their means over
    the same seeds are one number, not one for each strategy. Cells are the same by construction if
    their round 0 has the same seeds, with the same initial sets and values: strategies with other
    seeds, or trained on a device that rounds differently, have their own means.
    """
    runs: dict[tuple[str, int], list[Any]] = {}
    for record in rounds:
        if record["round"] == 0:
            run = record["seed"], tuple(record.get("initial", ())), record[value]
            runs.setdefault((record["strategy"], record["num_labeled"]), []).append(run)
    return {cell: tuple(sorted(parts)) for cell, parts in runs.items()}


FACTS = {
    "epochs": (
        "Epochs of training, mean over seeds; in brackets how many seeds ended at `--max_epochs` "
        "before they met their targets:",
        _format_epochs,
    ),
    "query_inner_product_share": (
        "The inner product's share of the chosen Δ, mean (least to greatest) over seeds: near 0 "
        "where S is fitted, near 1 where its gradient g_S decides:",
        _format_mean_and_range,
    ),
    "query_approximation_ratio": (
        "R of the query (Eq. 14), mean (least to greatest) over seeds: below 1 where its gradients "
        "agree, above where they cancel out:",
        _format_mean_and_range,
    ),
    "query_mean_cosine": (
        "Mean cosine of two gradients of a query, mean (least to greatest) over seeds: 1 where all "
        "are alike:",
        _format_mean_and_range,
    ),
    "query_near_copies": (
        "Share of a query whose gradient has a cosine of at least 0.9 with one before it, mean "
        "(least to greatest) over seeds:",
        _format_mean_and_range,
    ),
}


def _summary(curves: Mapping[str, records.Curve], scores: Scores) -> list[str]:
    header, text = ["strategy"], [f"{words.count(len(scores.seeds), 'seed')}."]
    random = curves["random"] if "random" in scores.strategies else None
    if scores.area is not None:
        header.append("area under the curve")
        text.append(
            "Area under the curve: the mean height (%) of test accuracy over the labels spent, "
            "mean ± sample standard deviation."
        )
    if random is not None:
        header += ["labels to random's last accuracy", "label efficiency"]
        text.append(
            "Label efficiency: random's labels over those after which the strategy's mean, "
            "interpolated between rounds, first reaches random's last mean; above 1 it saves "
            "labels."
        )
    rows = []
    for index, name in enumerate(scores.strategies):
        curve, row = curves[name], [name]
        if scores.area is not None:
            area = scores.area[index]
            spread = area.std(ddof=1) if len(area) > 1 else float("nan")
            row.append(records.format_percent(area.mean(), spread))
        if random is not None:
            needed = statistics.labels_to_reach(
                random.mean[-1], curve.num_labeled.astype(float), curve.mean
            )
            share = random.num_labeled[-1] / needed
            reached = records.format_number(needed, digits=0), records.format_number(share)
            row += ["never"] * 2 if np.isnan(needed) else reached
        rows.append(row)
    lines = [" ".join(text), *filter(None, [scores.left_out])]
    return [*lines, "", *_table_lines(header, rows)] if len(header) > 1 else lines


def _reference_section(reference: str, scores: Scores) -> list[str]:
    """Returns paired differences to one strategy: last accuracy, area under the curve."""
    position = scores.strategies.index(reference)
    others = [i for i in range(len(scores.strategies)) if i != position]
    lines = [f"## Against {reference}", ""]
    for title, values in _compared_values(scores).items():
        differences = [statistics.paired_difference(values[i], values[position]) for i in others]
        t_pvalues = statistics.holm(np.array([d.t_pvalue for d in differences]))
        ranked = statistics.holm(np.array([d.wilcoxon_pvalue for d in differences]))
        rows = [
            [
                scores.strategies[i],
                _format_points(d.mean),
                f"{_format_points(d.low)} to {_format_points(d.high)}",
                *(
                    records.format_number(pvalue, digits=4)
                    for pvalue in (d.t_pvalue, t_pvalue, d.wilcoxon_pvalue, rank)
                ),
            ]
            for i, d, t_pvalue, rank in zip(others, differences, t_pvalues, ranked, strict=True)
        ]
        header = [
            "strategy",
            "difference (points)",
            "95 % interval",
            "p, t-test",
            "Holm",
            "p, Wilcoxon",
            "Holm",
        ]
        found = [
            f"{scores.strategies[i]} is {'better' if d.mean > 0 else 'worse'}"
            for i, d, t_pvalue in zip(others, differences, t_pvalues, strict=True)
            if t_pvalue < 0.05
        ]
        verdict = "; ".join(found) or "no strategy can be told from it"
        lines += [
            f"{title}, paired by seed:",
            "",
            *_table_lines(header, rows),
            "",
            f"By the t-test with Holm's correction over this table, at 5 %: {verdict}.",
            "",
        ]
    return [*lines, _wilcoxon_note(len(scores.seeds), len(others))]


def _compared_values(scores: Scores) -> dict[str, np.ndarray]:
    """Returns the values by which strategies are compared: title → `[strategies, seeds]`."""
    tested = {f"Test accuracy at {scores.num_labeled[-1]:.0f} labels": scores.values[..., -1]}
    if scores.area is not None:
        tested["Area under the curve"] = scores.area
    return tested


def _holm_note(num_tests: int, num_tables: int) -> str:
    """Returns which tests Holm's correction covers, and which it does not."""
    comparisons = "comparison" if num_tests == 1 else f"{num_tests} comparisons"
    sentence = (
        f"Holm: p-values corrected for the {comparisons} of their own table, for each kind of test "
        "by itself."
    )
    if num_tables == 1:
        return sentence
    return (
        f"{sentence} The {num_tables} tables are {num_tables} families: that such a test finds "
        f"anything false in any of them has a probability of up to {num_tables} times 5 %. A "
        "result that is picked from all of them should have a corrected p below "
        f"{0.05 / num_tables:.4g}."
    )


def _wilcoxon_note(num_seeds: int, num_tests: int) -> str:
    smallest = statistics.smallest_wilcoxon_pvalue(num_seeds)
    corrected = min(1.0, num_tests * smallest)
    sentence = (
        f"With {words.count(num_seeds, 'seed')} a two-sided Wilcoxon test cannot go below p = "
        f"{smallest:.4g}, {corrected:.4g} after the correction for "
        f"{words.count(num_tests, 'comparison')}"
    )
    if corrected >= 0.05:
        needed = int(np.ceil(1 - np.log2(0.05 / num_tests)))
        return (
            f"{sentence}: by that test this number of seeds cannot support any claim at 5 %; "
            f"{needed} seeds could. The t-test can do with fewer, because it takes the differences "
            "to be normally distributed."
        )
    return f"{sentence}."


def _too_few_seeds_note(num_seeds: int) -> str:
    return (
        f"{words.count(num_seeds, 'seed')} in common: no difference between strategies can be told "
        "from chance. Repeat with more seeds (--num_seeds)."
    )


def _penalty_section(scores: Scores) -> list[str]:
    matrix = statistics.penalty_matrix(scores.values[..., 1:])
    num_rounds = words.count(len(scores.num_labeled) - 1, "round")
    rows = [
        [name, *map(records.format_number, row), records.format_number(row.sum())]
        for name, row in zip(scores.strategies, matrix, strict=True)
    ]
    rows.append(["beaten", *map(records.format_number, matrix.sum(axis=0)), ""])
    return [
        "## Penalty matrix",
        "",
        f"In which share of the {num_rounds} after the first the strategy of the row beats that of "
        "the column (two-sided paired t-test at 5 %, uncorrected, as in Ash et al., 2020). Good: a "
        "large sum in the last column, a small one in the last row.",
        "",
        *_table_lines(["beats", *scores.strategies, "sum"], rows),
    ]


def _table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _format_points(difference: float) -> str:
    return records.format_number(100 * difference, sign="+").replace("-", MINUS)


def _device(recorded: str) -> str:
    """Returns the platform and the kind of a device; once if they are the same."""
    return ": ".join(dict.fromkeys(recorded.split(": ")))


def _join_distinct(values: Iterable[str | None]) -> str:
    return ", ".join(sorted({str(value) for value in values}))
