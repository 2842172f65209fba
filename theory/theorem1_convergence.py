"""Theorem 1: does a wide network converge as its alignment says?

Trains a wide network by full-batch gradient descent on ½‖f − Y‖², with its initial outputs
subtracted so that it starts from f = 0. Compares ‖Y − f_t‖² with ℰ_t² of its initial NTK (Lemma 1)
and with both sides of Theorem 1. Repeats this with more and more of the labels drawn at random:
does the error fall faster where the alignment is higher?

  python -m theory.theorem1_convergence --dataset=cifar10 --num_labeled=500 --steps=100
      --num_seeds=1

Recorded with this command, 44 minutes on one core: the network stays within 0.2 % of ℰ_t; ℰ_t² is
inside Theorem 1 at 500 of 500 times; τ of alignment and the share of the error left is −1.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary
from theory import common

STEPS = flags.DEFINE_integer("steps", 200, "Steps of gradient descent.", lower_bound=1)
for _name in (*common.KEY_FLAGS, "num_seeds", "num_labeled"):
    flags.declare_key_flag(_name)

NOISE = (0.0, 0.25, 0.5, 0.75, 1.0)
SHARE_OF_LARGEST_RATE = (
    0.9  # Below 1/λ_max, which Theorem 1 allows, because the network's Θ may grow.
)


def main(argv: list[str]) -> int | None:
    """Tests the theorem; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Trains with each share of noise, and writes the curves; returns the failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    setting = common.setting()
    return common.repeat_over_seeds(
        sys.modules[__name__], lambda seed: run_seed(setting, seed), summarize
    )


def summarize(curves: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Returns the numbers, the finding, and the function that draws them."""
    largest_difference = max(
        float(np.max(np.abs(np.sqrt(c["error"]) - np.sqrt(c["convergence_term"]))))
        / np.sqrt(c["error"][0])
        for c in curves
    )
    inside = sum(
        bool(low <= term * (1 + 1e-9) and term <= high * (1 + 1e-9))
        for c in curves
        for low, term, high in zip(c["lower"], c["convergence_term"][1:], c["upper"], strict=True)
    )
    total = sum(len(c["lower"]) for c in curves)
    predicted, left = error_reduction(curves)
    taus = common.tau_within_seeds(curves, predicted, left)
    sentence = (
        f"‖Y − f_t‖ of the network stays within {largest_difference:.1%} of ‖Y‖ of ℰ_t; ℰ_t² lies "
        f"between the sides of Theorem 1 at {inside} of {total} times; over label noise from 0 "
        f"to 100 % Kendall's τ of η𝒜 / ‖Y‖² and the share of ‖Y − f‖² left after "
        f"{dj.words.count(STEPS.value, 'step')} {common.describe_taus(taus)}."
    )
    results = {"curves": curves, "tau_of_seeds": taus}
    return results, sentence, functools.partial(draw, curves)


def error_reduction(curves: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Returns η𝒜 / ‖Y‖², which Theorem 1 promises, and the share of ‖Y − f‖² that is left."""
    predicted = [c["learning_rate"] * c["alignment"] / c["error"][0] for c in curves]
    return predicted, [c["error"][-1] / c["error"][0] for c in curves]


def run_seed(setting: common.Setting, seed: int) -> list[dict[str, Any]]:
    """Returns for each share of noise the errors of network and theory after each step."""
    pool, model = setting.dataset.pool, setting.model
    rows, variables = setting.draw(seed, common.NUM_LABELED.value), setting.variables(seed)
    x, num_classes = jnp.asarray(pool.x[rows]), len(setting.dataset.class_names)
    theta = common.kernel(model.apply, variables, x)
    spectrum = dj.alignment.spectrum(theta)
    rate = SHARE_OF_LARGEST_RATE / spectrum.eigenvalues[-1]
    steps, result = np.arange(STEPS.value + 1.0), []
    for noise in common.progress(NOISE, f"seed {seed}, label noise"):
        labels = common.add_label_noise(pool.y[rows], noise, num_classes, seed)
        if np.ptp(labels) == 0:
            raise dj.UserError(
                f"all labels of S are the same with {noise:.0%} noise, so that there is nothing to "
                "learn: take a larger --num_labeled"
            )
        # Centred, because the mean of all examples is learned at once, whatever the labels.
        targets = setting.targets(labels)
        targets = targets - np.mean(targets, axis=0)
        terms = dj.alignment.squared_convergence_term(spectrum, targets, rate, steps)
        lower, upper = dj.alignment.convergence_bounds(spectrum, targets, rate, steps[1:])
        error = descend(model.apply, variables, x, jnp.asarray(targets), rate)
        result.append(
            {
                "noise": noise,
                "seed": seed,
                "learning_rate": float(rate),
                "alignment": dj.alignment.alignment(theta, targets),
                "error": np.asarray(error).tolist(),
                "convergence_term": terms.tolist(),
                "lower": lower.tolist(),
                "upper": upper.tolist(),
            }
        )
    return result


def descend(
    apply: dj.types.ApplyFn, variables: dj.types.Variables, x: Any, targets: Any, rate: float
) -> dj.types.Array:
    """Returns ‖Y − f_t‖² before each step of gradient descent and after the last."""
    goal = apply(variables, x).logits + targets  # f is the change of the outputs.
    params, errors = variables["params"], []
    for _ in range(STEPS.value + 1):
        params, error = _step(apply, {**variables, "params": params}, x, goal, rate)
        errors.append(error)
    return jnp.stack(errors)


@functools.partial(jax.jit, static_argnames="apply")
def _step(
    apply: dj.types.ApplyFn, variables: dj.types.Variables, x: Any, goal: Any, rate: Any
) -> Any:
    """Returns the parameters after a step of gradient descent, and ‖f − Y‖² before it."""

    def loss(params: Any) -> Any:
        return jnp.sum((apply({**variables, "params": params}, x).logits - goal) ** 2) / 2

    params = variables["params"]
    value, gradient = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - rate * g, params, gradient), 2 * value


def draw(curves: list[dict[str, Any]], figure: Any) -> None:
    """Draws error, ℰ_t² and bounds over t, and the error that is left against the alignment."""
    left, right = figure.subplots(1, 2)
    without_noise = curves[0]
    steps = np.arange(len(without_noise["error"]))
    left.plot(steps, without_noise["error"], label=r"$\|Y - f_t\|^2$, network")
    left.plot(steps, without_noise["convergence_term"], "--", label=r"$\mathcal{E}_t^2$, NTK")
    left.plot(steps[1:], without_noise["upper"], ":", color="gray", label="Theorem 1")
    left.plot(steps[1:], np.maximum(without_noise["lower"], 0), ":", color="gray")
    left.set_xlabel("step t")
    left.set_title("true labels", fontsize=10)
    left.legend(frameon=False)
    points = right.scatter(*error_reduction(curves), c=[100 * c["noise"] for c in curves])
    figure.colorbar(points, label="label noise (%)")
    right.set_xlabel(r"$\eta\,\mathcal{A}\,/\,\|Y\|^2$")
    right.set_ylabel(f"share of the error left after {len(steps) - 1} steps")


if __name__ == "__main__":
    binary.launch(main)
