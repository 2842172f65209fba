"""Figure 1: is MMD(S, S ∪ Q) small beside the generalization bound ℬ(S ∪ Q)?

dynamicAL queries b images after training on |S| labels. Θ is the NTK at initialisation, or its
limit of infinite width, whose cost grows with the square of the number of pixels.

  python -m theory.fig1_bound_and_mmd --dataset=cifar10 --num_labeled=500
      --query_sizes=250,500,1000 --num_logits=10 --num_seeds=3
  python -m theory.fig1_bound_and_mmd --dataset=cifar10 --image_size=8 --num_labeled=500
      --query_sizes=250,500,1000 --infinite_width --num_seeds=3

Recorded with the first command, 47 minutes a seed on one core: MMD is 0.1 to 0.3 % of ℬ.

ℬ is proportional to Θ^(−1/2) and MMD to Θ^(1/2), so that the answer depends on the scale of Θ. Both
are shown for Θ as the NTK parameterisation gives it, and for Θ divided by its mean diagonal.
"""

import functools
import sys
from typing import Any

import numpy as np
from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary
from theory import common

QUERY_SIZES = flags.DEFINE_list("query_sizes", ["25", "50", "100"], "Sizes b of the queries.")
INFINITE_WIDTH = flags.DEFINE_bool(
    "infinite_width",
    False,
    "Take Θ of the network as its widths go to infinity, by neural-tangents.",
)
for _name in (*common.KEY_FLAGS, "num_seeds", "num_labeled", "epochs", "training_rate", "jitter"):
    flags.declare_key_flag(_name)

SCALES = ("as it is", "mean diagonal 1")


def main(argv: list[str]) -> int | None:
    """Reproduces the figure; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Computes ℬ and MMD for each seed and b, then writes them; returns the failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    sizes = sorted(set(binary.parse_positive("query_sizes", QUERY_SIZES.value)))
    if INFINITE_WIDTH.value:
        dj.ntk.neural_tangents()  # Say now, and not after training, if it is not installed.
    setting = common.setting(query_size=max(sizes))
    return common.repeat_over_seeds(
        sys.modules[__name__],
        lambda seed: run_seed(setting, seed, sizes),
        lambda rows: summarize(rows, sizes),
    )


def summarize(rows: list[dict[str, Any]], sizes: list[int]) -> tuple[Any, ...]:
    """Returns the numbers, the finding, and the function that draws them."""
    shares = {
        scale: [row["mmd"] / row["bound"] for row in rows if row["scale"] == scale]
        for scale in SCALES
    }
    parts = [f"{min(s):.2g} to {max(s):.2g} for Θ {scale}" for scale, s in shares.items()]
    sentence = f"MMD / ℬ over b = {', '.join(map(str, sizes))}: {'; '.join(parts)}."
    results = {"rows": rows, "jitter": common.JITTER.value, "num_labeled": common.NUM_LABELED.value}
    return results, sentence, functools.partial(draw, rows, sizes)


def run_seed(setting: common.Setting, seed: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Returns a row for each b and scale of Θ."""
    pool, model = setting.dataset.pool, setting.model
    rows = setting.draw(seed, common.NUM_LABELED.value)
    variables = setting.variables(seed)
    labeled = dj.Examples(pool.x[rows], pool.y[rows])
    fit = common.fit(setting, variables, labeled, seed)
    unlabeled = np.setdiff1d(np.arange(len(pool.y)), rows)
    view = dj.LearnerView(model.apply, fit.variables, labeled, dj.types.Rows(pool.x, unlabeled))
    # The query of a smaller b is the beginning of that of a larger one.
    query = dj.strategies.Dynamical().query(dj.streams.key(seed, "strategy"), view, max(sizes))
    union = np.append(rows, unlabeled[query.positions])
    if INFINITE_WIDTH.value:
        theta = common.infinite_width_kernel(setting, pool.x[union])
    else:
        theta = common.kernel(model.apply, variables, pool.x[union])
    bound, result = dj.generalization.generalization_bound, []
    for size in sizes:
        count = common.NUM_LABELED.value + size
        part, targets = theta[:count, :count], setting.targets(pool.y[union[:count]])
        for scale, kernel in zip(SCALES, (part, dj.alignment.normalized(part)), strict=True):
            result.append(
                {
                    "seed": seed,
                    "query_size": size,
                    "scale": scale,
                    "bound": bound(kernel, targets, common.JITTER.value),
                    "mmd": dj.mmd.mmd(kernel, common.NUM_LABELED.value),
                    "squared_mmd": dj.mmd.squared_mmd(kernel, common.NUM_LABELED.value),
                    "mean_diagonal": float(np.mean(np.diag(part))),
                    "train_accuracy": fit.labeled.accuracy,
                }
            )
    return result


def draw(rows: list[dict[str, Any]], sizes: list[int], figure: Any) -> None:
    """Draws bars of ℬ and MMD for each b and scale of Θ, with standard deviations over seeds."""
    for axes, scale in zip(figure.subplots(1, 2), SCALES, strict=True):
        for shift, value, name in ((-0.2, "bound", "ℬ(S ∪ Q)"), (0.2, "mmd", "MMD(S, S ∪ Q)")):
            values = np.array(
                [
                    [r[value] for r in rows if r["scale"] == scale and r["query_size"] == size]
                    for size in sizes
                ]
            )
            positions = np.arange(len(sizes)) + shift
            spread = values.std(axis=1, ddof=1) if values.shape[1] > 1 else None
            bars = axes.bar(positions, values.mean(axis=1), 0.4, yerr=spread, label=name)
            axes.bar_label(bars, fmt="%.2g", padding=2)
        axes.margins(y=0.25)
        axes.set_xticks(range(len(sizes)), [f"b = {size}" for size in sizes])
        axes.set_title(f"Θ {scale}", fontsize=10)
        axes.legend(frameon=False)


if __name__ == "__main__":
    binary.launch(main)
