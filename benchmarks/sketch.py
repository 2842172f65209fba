"""How far are products of sketches from g_u·g_v, and what does a sketch cost?

  python -m benchmarks.sketch --cases=cifar10:cnn,cifar10:resnet18,features.npz:linear

About 5 minutes on two cores. For each case, a data set and a model that is trained on 300 labels,
it prints the error of the cosine of two gradients, (s_u·s_v − g_u·g_v) / (‖g_u‖ ‖g_v‖), as its root
mean square over pairs u ≠ v and seeds, and likewise for ‖g_u‖², u = v, of each design and size:

- shipped: `gradients.sketch`, for each layer the cheaper of the next two;
- fold: aᵀe with random signs, every k-th element added up;
- project: r_mᵀ aᵀe q_m / √k for m = 1 … k (elementwise product of two projections);
- two-sided: all of r_iᵀ aᵀe q_j, √k on either side (as LoGra);
- dense: a matrix of random signs; for models of less than a million parameters.

Then, for each model of pictures among them, or each of --models, milliseconds of a batch of 32×32
images: sketches of 512 numbers beside scores, which take turns in processes of their own.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import dynamical_jax as dj
from benchmarks import harness
from benchmarks.task import Task
from dynamical_jax.gradients import factored, pairs, sketching
from dynamical_jax.programs import binary

CASES = flags.DEFINE_list(
    "cases", ["digits:cnn"], "Data sets and models; CIFAR-10 by TFDS, vectors as an .npz file."
)
SIZES = flags.DEFINE_list("sizes", ["64", "256", "1024"], "Numbers of a sketch.")
EPOCHS = flags.DEFINE_integer("epochs", 30, "Epochs of training at most.")
NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 32, "Unlabeled examples whose pairs count.")
NUM_SEEDS = flags.DEFINE_integer("num_seeds", 5, "Draws of the signs.")
flags.declare_key_flag("models")
flags.declare_key_flag("repetitions")
flags.declare_key_flag("json")

NUM_LABELED = 300
MOST_PARAMETERS_OF_DENSE = 1_000_000
CONTENDERS = {"factored": "jax_contenders.factored", "sketch": "jax_contenders.sketch"}
BATCH_SIZES = {"cnn": 512, "resnet18": 128}


def of_kernels(function: Callable[..., jax.Array], key: jax.Array, size: int, *call: Any) -> Any:
    """A layer's part of the sketches, its kernel by another function than the shipped."""
    layer, variables = call[:2]
    if pairs.FORMS.get(type(layer.kind)) is not pairs.of_kernel:
        return sketching.of_layer(key, size, *call)
    kernel = pairs.kernel_of(*call)
    sketch = function(key, size, kernel)
    if "bias" in variables["params"]:
        sketch += sketching.fold_formed(jax.random.fold_in(key, 1), size, kernel.bias_gradient)
    return sketch


def two_sided(key: jax.Array, size: int, kernel: pairs.Kernel) -> jax.Array:
    """√k projections of a, √k of e, all products of one with the other; groups are added up."""
    depth, groups, features = kernel.depth, kernel.groups, kernel.features
    right = min(features, math.isqrt(size))
    left = min(depth, size // right)
    key_a, key_e, key_order = jax.random.split(key, 3)
    project_a = jax.random.normal(key_a, (groups, depth, left)) / math.sqrt(left)
    project_e = jax.random.normal(key_e, (groups, features, right)) / math.sqrt(right)

    def projected(a: jax.Array, e: jax.Array) -> jax.Array:
        a, e = (jnp.einsum("tgd,gdk->tgk", *both) for both in ((a, project_a), (e, project_e)))
        return jnp.einsum("tgi,tgj->ij", a, e).reshape(-1)

    found = kernel.for_each(projected, kernel.positions * groups * (left + right) + size)
    found = jnp.pad(found, ((0, 0), (0, size - left * right)))
    return jax.random.permutation(key_order, found, axis=1, independent=False)


def dense(key: jax.Array, size: int, kernel: pairs.Kernel) -> jax.Array:
    """A product of the whole gradient with a matrix of signs."""
    gradient = kernel.for_each(pairs.form_gradient)
    matrix = sketching.signs(key, (gradient.shape[1], size), gradient.dtype)
    return gradient @ matrix / math.sqrt(size)


DESIGNS = {
    "shipped": sketching.of_layer,
    "fold": functools.partial(of_kernels, sketching.fold),
    "project": functools.partial(of_kernels, sketching.project),
    "two-sided": functools.partial(of_kernels, two_sided),
    "dense": functools.partial(of_kernels, dense),
}


def main(argv: list[str]) -> int | None:
    """Runs what the flags describe; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Checks the flags, then measures errors and times."""
    sizes = binary.parse_positive("sizes", SIZES.value)
    cases = [case.rpartition(":")[::2] for case in CASES.value]
    for dataset, model in cases:
        if not dataset or model not in dj.models.MODELS:
            raise dj.UserError(f"a case looks like cifar10:cnn, got {dataset}:{model}")
    models = harness.MODELS.value
    if models is None:
        models = list(dict.fromkeys(model for _, model in cases if model in BATCH_SIZES))
    if unknown := set(models) - set(BATCH_SIZES):
        raise dj.UserError(f"models to time are {', '.join(BATCH_SIZES)}; got {unknown.pop()!r}")
    report = harness.Report("sketch")
    print(report.head())
    for dataset, model in cases:
        case = measure(dataset, model, sizes)
        report.add(case)
        print("\n" + table(case), flush=True)
    with harness.worker_environment() as environment:
        for model in models:
            task = Task(model, BATCH_SIZES[model])
            case = harness.compare(task, CONTENDERS, harness.REPETITIONS.value, environment)
            report.add(case)
            print("\n" + harness.table(case, "factored"), flush=True)


def measure(dataset: str, model_name: str, sizes: list[int]) -> dict[str, Any]:
    """Returns the errors of all designs and sizes, of a model after training."""
    data = dj.datasets.load(dataset)
    model = dj.models.create(model_name, data)
    rows = np.random.default_rng(0).permutation(len(data.pool.y))
    labeled, unlabeled = rows[:NUM_LABELED], rows[NUM_LABELED:][: NUM_EXAMPLES.value]
    variables = dj.models.init(model, jax.random.key(0), data.pool.x)
    config = dj.TrainingConfig(max_epochs=EPOCHS.value)
    examples = dj.Examples(data.pool.x[labeled], data.pool.y[labeled])
    fit = dj.training.fit(model, variables, examples, config, 0)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(fit.variables["params"]))
    designs = [
        name for name in DESIGNS if name != "dense" or num_parameters < MOST_PARAMETERS_OF_DENSE
    ]
    exact, sketches = jax.device_get(
        _products(model.apply, fit.variables, data.pool.x[unlabeled], tuple(designs), tuple(sizes))
    )
    norm = np.sqrt(np.diagonal(exact))
    apart = ~np.eye(len(exact), dtype=bool)
    cosines = exact / np.outer(norm, norm)
    rows = []
    for name, size in itertools.product(designs, sizes):
        found = sketches[name, size]
        errors = np.einsum("suk,svk->suv", found, found) / np.outer(norm, norm) - cosines
        rows.append(
            {
                "design": name,
                "size": size,
                "error_of_cosine": float(np.sqrt(np.mean(errors[:, apart] ** 2))),
                "error_of_squared_norm": float(np.sqrt(np.mean(errors[:, ~apart] ** 2))),
            }
        )
    return {
        "dataset": data.name,
        "model": model_name,
        "train_accuracy": fit.labeled.accuracy,
        "num_parameters": num_parameters,
        "mean_cosine": float(cosines[apart].mean()),
        "errors": rows,
    }


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _products(
    apply: Any, variables: Any, x: Any, designs: tuple[str, ...], sizes: tuple[int, ...]
) -> Any:
    """Returns g_u·g_v, and the sketches `[seeds, n, k]` of each design and size, in one program."""
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS.value)
    number = iter(range(10_000))

    def of_layer(*call: Any) -> Any:
        layer_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, next(number))
        forms = pairs.forms_of(*call)
        sketch = lambda name, size: lambda key: DESIGNS[name](key, size, *call)
        sketches = {
            (name, size): jax.lax.map(sketch(name, size), layer_keys)
            for name in designs
            for size in sizes
        }
        return pairs.products(forms, forms), sketches

    parts = factored.map_layers(of_layer, apply, variables, x, factored.total_loss(None))
    return jax.tree.map(lambda *leaves: sum(leaves), *parts)


def table(case: dict[str, Any]) -> str:
    """Returns the table of a case: designs in rows, sizes in columns."""
    sizes = sorted({row["size"] for row in case["errors"]})
    lines = [
        f"{case['model']} on {case['dataset']}, {case['num_parameters']:,} parameters, "
        f"{case['train_accuracy']:.0%} of S right, mean cosine {case['mean_cosine']:.3f}",
        f"{'error of cosine (squared norm)':32}" + "".join(f"{size:>18}" for size in sizes),
        f"{'  1/√k (√(2/k))':32}"
        + "".join(f"{f'{size**-0.5:.3f} ({(2 / size) ** 0.5:.3f})':>18}" for size in sizes),
    ]
    for name in dict.fromkeys(row["design"] for row in case["errors"]):
        cells = [
            f"{row['error_of_cosine']:.3f} ({row['error_of_squared_norm']:.3f})"
            for row in case["errors"]
            if row["design"] == name
        ]
        lines.append(f"  {name:30}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    binary.launch(main)
