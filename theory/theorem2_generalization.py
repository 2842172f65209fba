"""Theorem 2: does alignment bound ℬ, and does ℬ rank networks as their test error does?

Computes, with more and more of the labels drawn at random, (n/2) ℬ² and its two bounds by
alignment, and compares ℬ with the test error of the network trained on these labels.

  python -m theory.theorem2_generalization --dataset=cifar10 --num_labeled=500 --num_seeds=2

Recorded, one seed, 51 minutes on one core: inside the bounds in 6 of 6 cases, which are 7 powers of
ten apart; τ of ℬ and the test error 0.87.
"""

import functools
import sys
from typing import Any

import numpy as np
from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary
from theory import common

for _name in (*common.KEY_FLAGS, "num_seeds", "num_labeled", "epochs", "training_rate", "jitter"):
    flags.declare_key_flag(_name)

NOISE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def main(argv: list[str]) -> int | None:
    """Tests the theorem; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Trains with each share of noise, and writes the points; returns the failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    setting = common.setting()
    return common.repeat_over_seeds(
        sys.modules[__name__], lambda seed: run_seed(setting, seed), summarize
    )


def summarize(rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Returns the numbers, the finding, and the function that draws them."""
    inside = sum(r["lower"] <= r["middle"] <= r["upper"] for r in rows)
    bounds, errors = [r["bound"] for r in rows], [r["test_error"] for r in rows]
    taus = common.tau_within_seeds(rows, bounds, errors)
    sentence = (
        f"(n/2) ℬ² lies between its bounds by alignment in {inside} of {len(rows)} cases; "
        f"Kendall's τ of ℬ and the test error over label noise from 0 to 100 % "
        f"{common.describe_taus(taus)}."
    )
    results = {"rows": rows, "tau_of_seeds": taus}
    return results, sentence, functools.partial(draw, rows)


def run_seed(setting: common.Setting, seed: int) -> list[dict[str, Any]]:
    """Returns a row for each share of noise."""
    data, model = setting.dataset, setting.model
    rows = setting.draw(seed, common.NUM_LABELED.value)
    variables = setting.variables(seed)
    theta = common.kernel(model.apply, variables, data.pool.x[rows])
    result = []
    for noise in common.progress(NOISE, f"seed {seed}, label noise"):
        labels = common.add_label_noise(data.pool.y[rows], noise, len(data.class_names), seed)
        targets = setting.targets(labels)
        bound = dj.generalization.generalization_bound(theta, targets, common.JITTER.value)
        lower, upper = dj.generalization.bounds_by_alignment(theta, targets, common.JITTER.value)
        examples = dj.Examples(data.pool.x[rows], labels.astype(data.pool.y.dtype))
        fit = common.fit(setting, variables, examples, seed)
        test = dj.training.evaluate(model.apply, fit.variables, data.test_examples)
        result.append(
            {
                "seed": seed,
                "noise": noise,
                "bound": bound,
                "lower": float(lower),
                "middle": len(rows) / 2 * bound**2,
                "upper": float(upper),
                "alignment": dj.alignment.alignment(theta, targets),
                "train_accuracy": fit.labeled.accuracy,
                "test_error": 1 - test.accuracy,
            }
        )
    return result


def draw(rows: list[dict[str, Any]], figure: Any) -> None:
    """Draws ℬ and its bounds over noise, and the test error over ℬ."""
    left, right = figure.subplots(1, 2)
    noise = 100 * np.array(NOISE)
    for name, label in (("upper", "upper"), ("middle", "(n/2) ℬ²"), ("lower", "lower")):
        values = [np.mean([r[name] for r in rows if r["noise"] == share]) for share in NOISE]
        left.semilogy(noise, values, marker="o", label=label)
    left.set_xlabel("label noise (%)")
    left.legend(frameon=False)
    points = right.scatter(
        [r["bound"] for r in rows],
        [100 * r["test_error"] for r in rows],
        c=[100 * r["noise"] for r in rows],
    )
    figure.colorbar(points, label="label noise (%)")
    right.set_xlabel("ℬ")
    right.set_ylabel("test error (%)")


if __name__ == "__main__":
    binary.launch(main)
