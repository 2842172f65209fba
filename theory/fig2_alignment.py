"""Figure 2: does alignment grow with training dynamics?

S is fixed and Q drawn at random, again and again. G_MSE(S ∪ Q) against 𝒜(X ∪ X_Q, Y ∪ Y_Q), and
Kendall's τ; with f and Θ at initialisation, and after training on S. Beside it G(S ∪ Q) of the
cross-entropy, which is what dynamicAL really increases.

  python -m theory.fig2_alignment --dataset=cifar10 --num_labeled=500 --query_size=250
      --draws=150
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import app, flags, logging

import dynamical_jax as dj
from experiments import binary
from experiments import common as experiment
from theory import common

QUERY_SIZE = flags.DEFINE_integer("query_size", 25, "|Q|.", lower_bound=1)
DRAWS = flags.DEFINE_integer("draws", 150, "How many Q.", lower_bound=8)
for _name in (*common.KEY_FLAGS, "num_labeled", "epochs", "training_rate"):
    flags.declare_key_flag(_name)

RESAMPLES = 2000
TOGETHER = 8  # Queries for which S passes through the network once.


def main(argv: list[str]) -> int | None:
    """Reproduces the figure; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Draws every Q, then writes the correlations; returns what failed: nothing."""
    binary.check_no_arguments(argv)
    setting = common.setting(QUERY_SIZE.value)
    pool, seed = setting.dataset.pool, experiment.FIRST_SEED.value
    rows = setting.draw(seed, common.NUM_LABELED.value)
    start = setting.variables(seed)
    fit = common.fit(setting, start, dj.Examples(pool.x[rows], pool.y[rows]), seed)
    results = {}
    for when, variables in (("at initialisation", start), ("after training", fit.variables)):
        points = quantities(setting, variables, rows, seed, when)
        results[when] = {"points": points}
        for name in ("squared_error", "cross_entropy"):
            results[when][name] = correlation(points[name], points["alignment"])
    at = results["at initialisation"]["squared_error"]
    sentence = (
        f"Kendall's τ of G_MSE and alignment over {DRAWS.value} draws at initialisation: "
        f"{at['tau']:.2f} (95 % bootstrap interval {at['low']:.2f} to {at['high']:.2f}, "
        f"p = {at['pvalue']:.1g}); after training "
        f"{results['after training']['squared_error']['tau']:.2f}; of the cross-entropy's G "
        f"{results['at initialisation']['cross_entropy']['tau']:.2f} and "
        f"{results['after training']['cross_entropy']['tau']:.2f}."
    )
    draw_results = functools.partial(draw, results)
    experiment.tell(sentence, common.save(sys.modules[__name__], results, sentence, draw_results))
    return []


def quantities(
    setting: common.Setting,
    variables: dj.types.Variables,
    rows: np.ndarray,
    seed: int,
    when: str = "",
) -> dict[str, list[float]]:
    """Returns for each Q the alignment, G_MSE and the cross-entropy's G of S ∪ Q."""
    pool, model = setting.dataset.pool, setting.model
    unlabeled, size = np.setdiff1d(np.arange(len(pool.y)), rows), QUERY_SIZE.value
    apply = jax.jit(model.apply)
    grad_s = dj.gradients.set_gradient(
        model.apply, variables, dj.Examples(pool.x[rows], pool.y[rows])
    )
    points: dict[str, list[float]] = {"alignment": [], "squared_error": [], "cross_entropy": []}
    for start in common.progress(range(0, DRAWS.value, TOGETHER), f"Q {when}"):
        # Always as many, of one shape, though of the last not all may be asked for.
        queries = [
            dj.streams.generator(seed, "draws", start + i).choice(unlabeled, size, replace=False)
            for i in range(TOGETHER)
        ]
        all_rows = np.concatenate([rows, *queries])
        theta = common.kernel(model.apply, variables, pool.x[all_rows])
        targets = setting.targets(pool.y[all_rows])
        residual = np.asarray(apply(variables, pool.x[all_rows]).logits) - targets
        for i in range(min(TOGETHER, DRAWS.value - start)):
            first = len(rows) + i * size
            both = np.append(np.arange(len(rows)), np.arange(first, first + size))
            part = theta[np.ix_(both, both)]
            query = dj.Examples(pool.x[queries[i]], pool.y[queries[i]])
            grad_q = dj.gradients.set_gradient(model.apply, variables, query)
            grad = jax.tree.map(jnp.add, grad_s, grad_q)
            of_mse = dj.dynamics.squared_error_training_dynamics(part, residual[both])
            points["alignment"].append(dj.alignment.alignment(part, targets[both]))
            points["squared_error"].append(float(of_mse))
            points["cross_entropy"].append(float(dj.dynamics.training_dynamics(grad)))
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
    """A scatter of G_MSE against alignment for each state of the network."""
    for axes, (when, result) in zip(figure.subplots(1, 2), results.items(), strict=True):
        points = result["points"]
        axes.scatter(points["squared_error"], points["alignment"], s=12)
        axes.set_title(f"{when}: τ = {result['squared_error']['tau']:.2f}", fontsize=10)
        axes.set_xlabel(r"$G_{MSE}(S \cup Q)$")
        axes.set_ylabel(r"alignment $\mathcal{A}$")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # JAX and matplotlib chat at INFO.
    app.run(main)
