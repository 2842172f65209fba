"""Draws figures from records."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynamical_jax import files
from dynamical_jax.runs import records
from dynamical_jax.strategies import STRATEGIES

MOST_BANDS = 4
MOST_INSIDE = 8
"""Above so many strategies the legend stands beside the curves."""

PALETTE = "tab20"


def accuracy(rounds: Iterable[records.Record], path: pathlib.Path) -> None:
    """Draws test accuracy against labels: mean over seeds ± one standard deviation.

    With more than `MOST_BANDS` strategies deviations are left out: they would hide each other.
    """
    rounds = list(rounds)
    curves = records.curves(rounds)
    legend_beside = len(curves) > MOST_INSIDE
    picture = figure(9.0, 5.0) if legend_beside else figure(6.0, 4.0)
    axes = picture.subplots()
    num_seeds = len({record["seed"] for record in rounds})
    bands = num_seeds > 1 and len(curves) <= MOST_BANDS
    color_of = colors(curves)
    for name, curve in curves.items():
        mean, std, color = 100 * curve.mean, 100 * curve.std, color_of[name]
        if curve.num_seeds < num_seeds:
            name = f"{name} ({curve.num_seeds} of {num_seeds} seeds)"
        axes.plot(curve.num_labeled, mean, marker="o", markersize=4, label=name, color=color)
        if bands and curve.num_seeds > 1:
            axes.fill_between(curve.num_labeled, mean - std, mean + std, color=color, alpha=0.15)
    what = f"mean of {num_seeds} seeds" if num_seeds > 1 else "1 seed"
    what += ", band: ± 1 standard deviation" if bands else ""
    axes.set_title(f"{records.dataset_of(rounds[0])}, {rounds[0]['model']} ({what})", fontsize=10)
    axes.set_xlabel("labels")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    if legend_beside:
        picture.legend(frameon=False, fontsize=8, loc="outside right upper")
    else:
        axes.legend(frameon=False)
    save(picture, path)


def colors(names: Iterable[str]) -> dict[str, Any]:
    """Returns name → colour: of a strategy the same in all pictures, of other names one left over.

    Above 25 names some colours come twice.
    """
    import matplotlib

    palette, dark = (matplotlib.colormaps[name].colors for name in (PALETTE, "tab20b"))
    # First the ten strong colours, then their light ones, then five dark ones.
    palette = [*palette[::2], *palette[1::2], *dark[::4]]
    names = list(names)
    known = {name: palette[i % len(palette)] for i, name in enumerate(STRATEGIES) if name in names}
    left = [color for color in palette if color not in known.values()] or palette
    others = [name for name in names if name not in known]
    return known | {name: left[i % len(left)] for i, name in enumerate(others)}


def approximation_ratio(points: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws R over the loss on S for each b: mean over draws ± one standard deviation.

    Args:
      points: for each epoch "train_loss", and "ratios": b → R of each draw; perhaps "own_ratios":
        b → R of the query that dynamicAL would make, dashed.
      path: path of the picture.
    """
    picture = figure(6.0, 4.0)
    axes = picture.subplots()
    losses = [point["train_loss"] for point in points]
    for size in points[0]["ratios"]:
        values = np.array([point["ratios"][size] for point in points])
        mean, std = values.mean(axis=1), values.std(axis=1, ddof=1)
        (line,) = axes.plot(losses, mean, marker="o", markersize=3, label=f"b = {size}")
        axes.fill_between(losses, mean - std, mean + std, color=line.get_color(), alpha=0.15)
        if "own_ratios" in points[0]:
            own = [point["own_ratios"][size] for point in points]
            axes.plot(losses, own, "--", color=line.get_color(), label=f"dynamicAL's, b = {size}")
    axes.axhline(1, color="gray", linewidth=0.8)
    # Before S is fitted the denominator of R changes sign, and R can be any number.
    axes.set_ylim(-1, 3)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("mean cross-entropy on S while training goes on")
    axes.set_ylabel("approximation ratio R(Q|S)")
    axes.legend(frameon=False)
    save(picture, path)


def save(picture: Any, path: pathlib.Path, dpi: int = 150) -> None:
    """Writes a figure as PNG, wholly or not at all."""
    with files.replacing(path) as partial:
        picture.savefig(partial, dpi=dpi, format="png")


def figure(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure to save, without pyplot and its backend."""
    from matplotlib.figure import Figure  # here, because drawing comes last and it takes a while

    return Figure(figsize=(width, height), layout="constrained")
