"""Figure 2: does alignment grow with training dynamics?

S is fixed, and Q is drawn at random many times. Plots G_MSE(S ∪ Q) against 𝒜(X ∪ X_Q, Y ∪ Y_Q) and
computes Kendall's τ, with f and Θ at initialisation and after training on S by the cross-entropy.
Also computes τ of

- G(S ∪ Q) of the cross-entropy, at the true labels, and 𝒜;
- as a control, G_MSE and 𝒜 with the labels permuted over all images. If f were 0, as the theory
  assumes at initialisation, G_MSE would equal 𝒜. Where f is large, G_MSE is mostly Tr(fᵀΘf), and
  the two may be correlated only because Θ is larger on some Q than on others, whatever the labels.

  python -m theory.fig2_alignment --dataset=cifar10 --num_labeled=500 --query_size=250
      --draws=150

Recorded so, 36 minutes on one core: τ at initialisation 0.67, with the labels permuted 0.68.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary
from experiments import common as experiment
from theory import common

QUERY_SIZE = flags.DEFINE_integer("query_size", 25, "Size of each query, |Q|.", lower_bound=1)
DRAWS = flags.DEFINE_integer("draws", 150, "How many Q are drawn.", lower_bound=8)
for _name in (*common.KEY_FLAGS, "num_labeled", "epochs", "training_rate"):
    flags.declare_key_flag(_name)

RESAMPLES = 2000
# Name of a correlation → the two quantities whose τ it is.
PAIRS = {
    "squared_error": ("squared_error", "alignment"),
    "cross_entropy": ("cross_entropy", "alignment"),
    "permuted": ("permuted_squared_error", "permuted_alignment"),
}


def main(argv: list[str]) -> int | None:
    """Reproduces the figure; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Draws every Q, then writes the correlations; returns no failures."""
    binary.check_command_line(argv, sys.modules[__name__])
    setting = common.setting(QUERY_SIZE.value)
    common.directory()
    pool, seed = setting.dataset.pool, experiment.FIRST_SEED.value
    rows = setting.draw(seed, common.NUM_LABELED.value)
    start = setting.variables(seed)
    labeled = dj.Examples(pool.x[rows], pool.y[rows])
    fit = common.fit(setting, start, labeled, seed)
    results: dict[str, Any] = {}
    draw_results = functools.partial(draw, results)
    states = {"at initialisation": start, "after training": fit.variables}
    for state_name, variables in states.items():
        points = quantities(setting, variables, rows, seed, state_name)
        taus = {name: correlation(points[x], points[y]) for name, (x, y) in PAIRS.items()}
        accuracy = dj.training.evaluate(setting.model.apply, variables, labeled).accuracy
        results[state_name] = {"points": points, "train_accuracy": accuracy, **taus}
        finished = len(results) == len(states)
        sentence = describe_correlations(results)
        path = common.save(sys.modules[__name__], results, sentence, draw_results, finished)
    experiment.print_finding(sentence, path)
    return []


def describe_correlations(results: dict[str, Any]) -> str:
    """Returns a sentence about the correlations."""
    parts = []
    for state_name, result in results.items():
        tau_mse, permuted, tau_entropy = (
            f"{result[name]['tau']:.2f} ({result[name]['low']:.2f} to {result[name]['high']:.2f})"
            for name in ("squared_error", "permuted", "cross_entropy")
        )
        parts.append(
            f"{state_name} {tau_mse}, p = {result['squared_error']['pvalue']:.1g}, with the labels "
            f"permuted {permuted}, of the cross-entropy's G and alignment {tau_entropy}"
        )
    return (
        f"Kendall's τ of G_MSE and alignment over {DRAWS.value} draws, with 95 % bootstrap "
        f"intervals: {'; '.join(parts)}."
    )


def quantities(
    setting: common.Setting,
    variables: dj.types.Variables,
    rows: np.ndarray,
    seed: int,
    state_name: str = "",
) -> dict[str, list[float]]:
    """Returns the quantities of S ∪ Q that are correlated, a value for each Q."""
    pool, model = setting.dataset.pool, setting.model
    unlabeled, size = np.setdiff1d(np.arange(len(pool.y)), rows), QUERY_SIZE.value
    permuted = pool.y[dj.streams.generator(seed, "noise").permutation(len(pool.y))]
    apply = jax.jit(model.apply)

    def combine(image_rows: np.ndarray) -> tuple[np.ndarray, Any]:
        """Returns Σ w ∇f for the columns of f, Y and permuted Y, and g of the cross-entropy."""
        logits = np.asarray(apply(variables, pool.x[image_rows]).logits)
        weights = [
            logits,
            setting.targets(pool.y[image_rows]),
            setting.targets(permuted[image_rows]),
        ]
        combined = common.combined_gradients(
            model.apply, variables, pool.x[image_rows], np.concatenate(weights, axis=1)
        )
        examples = dj.Examples(pool.x[image_rows], pool.y[image_rows])
        return combined, dj.gradients.set_gradient(model.apply, variables, examples)

    combined_s, grad_s = combine(rows)
    points: dict[str, list[float]] = {}
    for index in common.progress(range(DRAWS.value), f"Q {state_name}"):
        draw = dj.streams.generator(seed, "draws", index)
        combined_q, grad_q = combine(draw.choice(unlabeled, size, replace=False))
        f, y, other_y = np.split(combined_s + combined_q, 3, axis=1)
        quadratic_form = lambda combined: float(np.sum(combined**2)) / len(combined)
        point = {
            "alignment": quadratic_form(y),
            "squared_error": quadratic_form(f - y),
            "permuted_alignment": quadratic_form(other_y),
            "permuted_squared_error": quadratic_form(f - other_y),
            "outputs": quadratic_form(f),
            "cross_entropy": float(
                dj.dynamics.training_dynamics(jax.tree.map(jnp.add, grad_s, grad_q))
            ),
        }
        for name, value in point.items():
            points.setdefault(name, []).append(value)
    return points


def correlation(one: list[float], other: list[float]) -> dict[str, float]:
    """Returns Kendall's τ, its p-value, and a 95 % bootstrap interval over draws.

    Raises:
      UserError: if one of the two does not vary.
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        raise dj.UserError("one of the quantities is the same for every Q: τ is not defined")
    tau = scipy.stats.kendalltau(one, other)
    interval = scipy.stats.bootstrap(
        (np.array(one), np.array(other)),
        lambda a, b: scipy.stats.kendalltau(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {
        "tau": float(tau.statistic),
        "pvalue": float(tau.pvalue),
        "low": float(interval.low),
        "high": float(interval.high),
    }


def draw(results: dict[str, Any], figure: Any) -> None:
    """Draws alignment over G_MSE as points, for each state of the network."""
    panels = np.atleast_1d(figure.subplots(1, len(results)))
    for axes, (state_name, result) in zip(panels, results.items(), strict=True):
        points = result["points"]
        axes.scatter(points["squared_error"], points["alignment"], s=12)
        taus = [result[name]["tau"] for name in ("squared_error", "permuted")]
        axes.set_title(
            f"{state_name}: τ = {taus[0]:.2f} (labels permuted: {taus[1]:.2f})", fontsize=10
        )
        axes.set_xlabel(r"$G_{MSE}(S \cup Q)$")
        axes.set_ylabel(r"alignment $\mathcal{A}$")


if __name__ == "__main__":
    binary.launch(main)
