"""What does the precision of matrix products do to Δ and to the query?

  python -m benchmarks.precision

Accelerators round the factors of a matrix product: TensorFloat-32 keeps 10 bits of the mantissa, of
which float32 has 23, and bfloat16 7; sums are in float32. A CPU does not, so here the factors of
every product and convolution are rounded before. A network is fitted to some labels of a data set
in float32; then the pool is scored in each precision, from the same weights. Prints, for each, the
error of ‖g_u‖², of 2 g_u·g_S and of Δ (median and 99th percentile over the pool, relative to the
median of Δ in float32), and how much of the query of float32 is in that of the other. Then the same
for each kind of layer: its share of Δ, and the error of what it adds to Δ, relative to the median
of that in float32.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax._src.interpreters import mlir
from jax._src.lib.mlir.dialects import hlo

import dynamical_jax as dj
from benchmarks import harness, setting
from dynamical_jax.gradients import factored, kinds, shares
from dynamical_jax.programs import binary

flags.declare_key_flag("json")

NUM_SCORED = flags.DEFINE_integer("num_scored", 4000, "How many of the pool are scored.")
flags.adopt_module_key_flags(setting)

MANTISSA_BITS = {"float32": 23, "tensorfloat32": 10, "bfloat16": 7}
NAMES = {
    kinds.Contraction: "dense",
    kinds.Convolution: "convolution",
    kinds.Normalization: "normalisation",
}
PRODUCTS = (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p)


def main(argv: list[str]) -> int | None:
    """Measures with the setting of the flags; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Fits the network, scores the pool in each precision, prints the table."""
    report = harness.Report("precision")
    data = dj.datasets.load(setting.DATA.value)
    model = dj.models.create(setting.NETWORK.value, data)
    order = dj.streams.generator(0, "initial_set").permutation(len(data.pool.y))
    labeled, pool = np.split(
        order[: setting.NUM_LABELS.value + NUM_SCORED.value], [setting.NUM_LABELS.value]
    )
    examples = dj.Examples(data.pool.x[labeled], data.pool.y[labeled])
    start = dj.models.init(model, dj.streams.key(0, "weights"), data.pool.x)
    fit = dj.training.fit(model, start, examples, dj.TrainingConfig(), seed=0)
    view = dj.LearnerView(model.apply, fit.variables, examples, data.pool.x[pool])
    scored, added = {}, {}
    for name, bits in MANTISSA_BITS.items():
        jax.clear_caches()
        with rounded_products(bits):
            scored[name] = dj.STRATEGIES["dynamical"]().score(jax.random.key(0), view, None)
            added[name] = added_by_kind(view, scored[name].grad_s)
    exact = scored["float32"]
    network = f"{setting.DATA.value}, {setting.NETWORK.value}, {setting.NUM_LABELS.value} labels"
    print(f"{network}, {len(pool)} scored")
    print(f"{'':16}{'‖g_u‖²':>20}{'2 g_u·g_S':>20}{'Δ':>20}{'same query':>12}")
    for name, other in scored.items():
        errors = {
            "squared_norm": other.terms.squared_norm - exact.terms.squared_norm,
            "inner_product": 2 * (other.terms.inner_product - exact.terms.inner_product),
            "change": other.change - exact.change,
        }
        scale = np.median(np.abs(exact.change))
        quantiles = {
            part: np.quantile(np.abs(error) / scale, (0.5, 0.99)).tolist()
            for part, error in errors.items()
        }
        chosen = [
            set(np.asarray(dj.selection.top_b(one.change, setting.NUM_QUERIED.value)).tolist())
            for one in (exact, other)
        ]
        overlap = len(chosen[0] & chosen[1]) / setting.NUM_QUERIED.value
        report.add(
            {
                **{
                    "dataset": setting.DATA.value,
                    "model": setting.NETWORK.value,
                    "labels": setting.NUM_LABELS.value,
                },
                **{
                    "pool_size": len(pool),
                    "query_size": setting.NUM_QUERIED.value,
                    "precision": name,
                },
                **{"errors": quantiles, "overlap": overlap},
            }
        )
        cells = "".join(
            f"{f'{median:.1e} ({tail:.1e})':>20}" for median, tail in quantiles.values()
        )
        print(f"{name:16}{cells}{overlap:12.1%}", flush=True)
    report_kinds(report, added)


def added_by_kind(view: dj.LearnerView, grad_s: Any) -> dict[str, np.ndarray]:
    """Returns kind of layer → what its layers add to Δ of each of the unlabeled, `[n]`."""

    @jax.jit
    def added(variables: Any, grad_s: Any, x: Any) -> dict[str, Any]:
        layers = functools.partial(factored.map_layers, apply=view.apply, x=x)
        objective = factored.total_loss(None)
        found = layers(lambda *layer: layer, variables=variables, objective=objective)
        # g_S, cut as the parameters are.
        pieces = layers(
            lambda layer, own, *_: own["params"],
            variables={**variables, "params": grad_s},
            objective=objective,
        )
        sums: dict[str, Any] = collections.defaultdict(float)
        for (layer, own, inputs, cotangent), piece in zip(found, pieces, strict=True):
            terms = shares.shares_of(layer, own, piece, inputs, cotangent)
            change = dj.dynamics.change_of_training_dynamics(*terms)
            sums[NAMES.get(type(layer.kind), "other")] += change
        return dict(sums)

    def block(positions: np.ndarray, count: int) -> dict[str, Any]:
        parts = added(view.variables, grad_s, view.unlabeled[positions])
        return {name: np.asarray(part)[:count] for name, part in parts.items()}

    blocks = dj.gradients.map_blocks(block, len(view.unlabeled), 128)
    return {name: np.concatenate([part[name] for part in blocks]) for name in blocks[0]}


def report_kinds(report: harness.Report, added: dict[str, dict[str, np.ndarray]]) -> None:
    """Reports the error of what each kind of layer adds to Δ."""
    exact = added["float32"]
    whole = np.median(np.abs(sum(exact.values())))
    print(f"{'':16}{'of Δ':>8}" + "".join(f"{name:>20}" for name in added))
    for kind, values in exact.items():
        scale = np.median(np.abs(values))
        errors = {
            name: np.quantile(np.abs(other[kind] - values) / scale, (0.5, 0.99)).tolist()
            for name, other in added.items()
        }
        report.add({"kind": kind, "share": float(scale / whole), "errors": errors})
        cells = "".join(f"{f'{median:.1e} ({tail:.1e})':>20}" for median, tail in errors.values())
        print(f"{kind:16}{scale / whole:8.1%}{cells}", flush=True)


@contextlib.contextmanager
def rounded_products(mantissa_bits: int) -> Iterator[None]:
    """Within the block programs round the factors of products, where they are compiled anew."""
    lowerings = mlir._platform_specific_lowerings["cpu"]
    usual = {product: lowerings[product] for product in PRODUCTS}

    def rounding(rule: Any, context: Any, *factors: Any, **parameters: Any) -> Any:
        bits = (mlir.i32_attr(8), mlir.i32_attr(mantissa_bits))
        factors = [
            hlo.reduce_precision(factor, *bits) if value.dtype == np.float32 else factor
            for factor, value in zip(factors, context.avals_in, strict=True)
        ]
        return rule(context, *factors, **parameters)

    try:
        for product, entry in usual.items():
            rule = functools.partial(rounding, entry.rule)
            lowerings[product] = dataclasses.replace(entry, rule=rule)
        yield
    finally:
        lowerings.update(usual)
        jax.clear_caches()


if __name__ == "__main__":
    binary.launch(main)
