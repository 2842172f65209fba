"""Records of rounds, as JSON lines with all that is needed to reproduce them.

One line for each round of each seed and strategy, in `<output_dir>/rounds.jsonl`, written as the
round ends. Tables and figures are made from these lines and nothing else.
"""

import decimal
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from dynamical_jax import files
from dynamical_jax.active_learning import Round
from dynamical_jax.errors import UserError

FILE_NAME = "rounds.jsonl"
PACKAGES = ("dynamical-jax", "jax", "jaxlib", "flax", "optax", "numpy")

Record = dict[str, Any]


class Form(msgspec.Struct):
    """The fields of a record that tables, pictures and continued runs read.

    `make` fills them. Records of earlier versions may lack those with a default.
    """

    strategy: str
    seed: files.Count
    round: files.Count
    num_labeled: files.Count
    test_accuracy: files.Share
    dataset: str = ""
    model: str = ""
    best_test_accuracy: files.Share = 0.0
    train_accuracy: files.Share = 0.0
    test_loss: files.Number = 0.0
    train_loss: files.Number = 0.0
    epochs: files.Count = 0
    converged: bool = True
    initial: list[files.Count] = []
    query: list[files.Count] = []
    query_score_mean: files.Number | None = None
    query_score_max: files.Number | None = None
    query_inner_product_share: files.Number | None = None
    query_approximation_ratio: files.Number | None = None
    query_mean_cosine: files.Number | None = None
    query_near_copies: files.Share | None = None
    flags: dict[str, Any] = {}
    seconds: dict[str, files.Number] = {}
    versions: dict[str, str | None] = {}
    device: str = ""
    git_commit: str | None = None


class Curve(NamedTuple):
    """Accuracy against labels over seeds, all `[rounds]`: mean and sample standard deviation."""

    num_labeled: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    num_seeds: int


def make(round_result: Round, identity: Mapping[str, Any]) -> Record:
    """Returns the record of a round.

    Args:
      round_result: the round.
      identity: other fields: dataset, model, strategy, seed, flags, …
    """
    scores = round_result.query_scores
    return {
        **identity,
        "round": round_result.round_index,
        "num_labeled": round_result.num_labeled,
        "test_accuracy": round_result.test.accuracy,
        "best_test_accuracy": round_result.best_test_accuracy,
        "test_loss": round_result.test.loss,
        "train_accuracy": round_result.labeled.accuracy,
        "train_loss": round_result.labeled.loss,
        "epochs": round_result.epochs,
        "converged": round_result.converged,
        "initial": round_result.initial.tolist(),
        "query": round_result.query.tolist(),
        "query_score_mean": float(np.mean(scores)) if len(scores) else None,
        "query_score_max": float(np.max(scores)) if len(scores) else None,
        **{f"query_{name}": fact for name, fact in round_result.query_facts.items()},
        "seconds": {part: round(spent, 3) for part, spent in round_result.seconds.items()},
        **environment(),
    }


@functools.cache
def environment() -> Mapping[str, Any]:
    """Returns versions of packages, the device and the commit of the code."""
    versions = {name: _version(name) for name in PACKAGES}
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{device.platform}: {device.device_kind}",
        "git_commit": _git_commit(),
    }


def read(path: pathlib.Path) -> list[Record]:
    """Returns the records of a file; a last line without an end is no record.

    Raises:
      UserError: if there is no such file, or a line of it is not a record; the message names the
        line and the field.
    """
    files.read_lines(path, Form)
    return files.read_lines(path, Record)


def json_round_trip(record: Record) -> Record:
    """Returns a record as `read` will return it."""
    return json.loads(json.dumps(files.finite(record)))


def repair(path: pathlib.Path, say: Callable[[str], None] = print) -> list[Record]:
    """Removes the last line if it is incomplete; returns the records."""
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        say(f"{path}: the last line was not finished: dropped")
        os.truncate(path, whole)
    return read(path)


def dataset_of(record: Record) -> str:
    """Returns the name of the data set, and what shares of its classes are left in the pool."""
    shares = record.get("flags", {}).get("pool_imbalance")
    return record["dataset"] + (f" (pool imbalance {','.join(shares)})" if shares else "")


def curves(records: Iterable[Record], value: str = "test_accuracy") -> dict[str, Curve]:
    """Returns the curve of `value` of each strategy, over seeds, in order of appearance.

    Rounds that some seed of the strategy has not reached are left out.

    Raises:
      UserError: if a round is recorded twice, or seeds differ in their numbers of labels: then the
        records are of different settings and have no common curve.
    """
    by_strategy: dict[str, dict[int, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    labels: dict[str, dict[int, int]] = defaultdict(dict)
    for record in records:
        strategy, seed, index = record["strategy"], record["seed"], record["round"]
        expected = labels[strategy].setdefault(index, record["num_labeled"])
        if index in by_strategy[strategy][seed] or expected != record["num_labeled"]:
            raise UserError(
                f"records of {strategy}, seed {seed}, round {index} are of more than one setting"
            )
        by_strategy[strategy][seed][index] = record[value]
    result = {}
    for strategy, seeds in by_strategy.items():
        rounds = sorted(set.intersection(*(set(values) for values in seeds.values())))
        values = np.array([[seed[index] for index in rounds] for seed in seeds.values()])
        spread = values.std(axis=0, ddof=1) if len(seeds) > 1 else np.full(len(rounds), np.nan)
        num_labeled = np.array([labels[strategy][index] for index in rounds])
        result[strategy] = Curve(num_labeled, values.mean(axis=0), spread, len(seeds))
    return result


def table(records: Iterable[Record], value: str = "test_accuracy") -> str:
    """Returns a table for the terminal: labels in rows, strategies in columns, percent."""
    columns = curves(records, value)
    labels = sorted({int(count) for curve in columns.values() for count in curve.num_labeled})
    widths = [max(16, len(name) + 2) for name in columns]

    def line(first: str, cells: Iterable[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return first.rjust(6) + "".join(padded)

    lines = [line("labels", columns)]
    for count in labels:
        cells = []
        for curve in columns.values():
            at = np.flatnonzero(curve.num_labeled == count)
            cells.append(format_percent(curve.mean[at[0]], curve.std[at[0]]) if len(at) else "")
        lines.append(line(str(count), cells))
    return "\n".join(lines)


def format_percent(mean: float, std: float = math.nan) -> str:
    """Returns a mean in percent, with its standard deviation unless that is NaN, as text.

    >>> format_percent(0.37125), format_percent(0.37125, 0.01)
    ('37.13', '37.13 ± 1.00')
    """
    return format_number(100 * mean) + ("" if math.isnan(std) else f" ± {format_number(100 * std)}")


def format_number(value: float, digits: int = 2, sign: str = "") -> str:
    """Returns a number as text for tables; halves are rounded away from zero.

    Accuracies and their means are fractions k/n, which binary numbers approximate: `f"{x:.2f}"`
    rounds a mean half-way between two decimals up or down depending on its last bit. So the number
    is first rounded to ten decimals, which restores the fraction.

    Args:
      value: the number.
      digits: decimals.
      sign: "+" to print the sign of positive numbers, too.

    >>> f"{37.115:.2f}, {37.125:.2f}, {37.135:.2f}"
    '37.12, 37.12, 37.13'
    >>> [format_number(value) for value in (37.115, 37.125, -37.135)]
    ['37.12', '37.13', '-37.14']
    >>> format_number(0.1, digits=0, sign="+")
    '+0'
    """
    if not math.isfinite(value):
        return str(value)
    last = decimal.Decimal(1).scaleb(-digits)
    exact = decimal.Decimal(f"{value:.10f}").quantize(last, decimal.ROUND_HALF_UP)
    return f"{exact + 0:{sign}f}"  # No minus before a zero.


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # The checkout is not installed.


def _git_commit() -> str | None:
    """Returns the commit of this file's checkout, marked "-dirty" if files differ from it."""
    checkout = pathlib.Path(__file__).parent.parent.parent

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != checkout.resolve():
            return None  # It is installed in a folder of another project's checkout.
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
