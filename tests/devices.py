"""Computes on simulated devices, in a process of its own, and prints what came out as JSON.

    python tests/devices.py float64 1,8

The number of devices cannot be changed in a process that uses JAX.
"""

import json
import os
import resource
import sys
import time

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import toy

import dynamical_jax as dj
from dynamical_jax import parallel, training
from dynamical_jax.gradients import scoring
from dynamical_jax.strategies import predictions, selection


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).tolist()


def compute(dtype, count):
    """Everything that a round is made of, on so many devices."""
    mesh = parallel.make_mesh(count)
    model, data = toy.models()["batch_norm"], toy.dataset()
    variables = toy.variables(model, dtype)
    # 13 of S in batches of 5, and 21 of U in blocks of 4: divided by no number of devices.
    labeled = dj.Examples(data.pool.x[:13], data.pool.y[:13])
    config = dj.TrainingConfig(batch_size=5, max_epochs=3, target_total_loss=None)
    fit = training.fit(model, variables, labeled, config, 0, mesh=mesh)
    tested = training.evaluate(model.apply, variables, data.test_examples, 8, mesh)
    strategy = dj.STRATEGIES["dynamical"](chunk_size=4)
    key = jax.random.key(0)
    view = dj.LearnerView(model.apply, variables, labeled, data.pool.x[13:34], mesh=mesh)
    scored = strategy.score(key, view, None)
    tiny = dj.LearnerView(model.apply, variables, labeled, data.pool.x[:3], mesh=mesh)
    compiled = scoring._score_block.lower(
        *(model.apply, scoring.ENGINES["factored"], parallel.replicate(variables, mesh)),
        dj.Examples(parallel.rows(data.pool.x, np.arange(8), mesh), None),
        scored.grad_s,
        mesh,
    ).compile()
    found = {
        "fit": flat(fit.variables),
        "evaluation": [*fit.labeled, *tested],
        "grad_s": flat(scored.grad_s),
        "change": flat(scored.change),
        "outputs": flat(predictions.predict(view, view.unlabeled)),
        "few": flat(strategy.score(key, tiny, None).change),
        "query": strategy.query(key, view, 5).positions.tolist(),
        "scoring": parallel.collectives(compiled),
    }
    if mesh is not None:
        stacked = jax.tree.map(lambda leaf: np.stack([leaf] * count), variables["params"])
        rows = jax.tree.map(lambda leaf: parallel.rows(leaf, np.arange(count), mesh), stacked)
        total = parallel._total.lower(rows, mesh).compile()
        found["total"] = parallel.collectives(total)
        step = jax.jit(
            lambda variables, batch, mask: parallel.together(
                training.batch_gradient(
                    model, variables, *parallel.divided((batch, mask), mesh), jax.random.key(0)
                ),
                mesh,
            )
        )
        batch = dj.Examples(data.pool.x[:8], data.pool.y[:8])
        arguments = parallel.replicate((variables, batch, np.arange(8) < 7), mesh)
        found["step"] = parallel.collectives(step.lower(*arguments).compile())
    found["parameters"] = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    return found


def points(dtype):
    """36 points around the origin, many of them at equal distances, some of them copies."""
    half = np.random.default_rng(0).integers(-2, 3, (18, 3))
    return np.concatenate([half, -half]).astype(dtype)


def choose(dtype, mesh):
    """What is chosen from points that each device has a share of."""
    x, key = points(dtype), jax.random.key(0)
    weights = np.arange(len(x)) % 5
    first = selection.farthest_first(x + 100, x[:0], 1, mesh)[0]  # Nearest the mean.
    found = {
        "distance from the mean": np.sum(x[first] ** 2).item(),
        "farthest": selection.farthest_first(x, x[:2], 36, mesh)[0].tolist(),
        "farthest of all": selection.farthest_first(x, x[:0], 36, mesh)[0].tolist(),
        "seeding": selection.k_means_plus_plus(key, x[:, :2], x, 36, mesh=mesh)[0].tolist(),
        "weighted": selection.k_means_plus_plus(key, x[:, :2], x, 9, weights, mesh)[0].tolist(),
    }
    if mesh is not None:
        divided = parallel.shares(x, mesh)
        found["shares"] = [shard.data.shape[0] for shard in divided.addressable_shards]
        nearest = parallel.shares(x[:, 0], mesh)
        program = selection._farthest_first.lower(divided, nearest, len(x), 30, mesh)
        found["per choice"] = parallel.collectives(program.compile())
    return found


def share_a_million():
    """Five choices from 1,000,000 × 512 features on eight devices, and by the obvious sums."""
    mesh, size = parallel.make_mesh(8), (1_000_000, 512)
    x = np.random.default_rng(0).standard_normal(size, np.float32)
    shards = parallel.shares(x, mesh).addressable_shards
    found = {"shares": [shard.data.nbytes for shard in shards], "all": x.nbytes}
    del shards
    start = time.perf_counter()
    chosen, _ = selection.farthest_first(x, x[:10], 5, mesh)
    found |= {"chosen": np.asarray(chosen).tolist(), "seconds": time.perf_counter() - start}
    found["peak"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    norms = np.einsum("nd,nd->n", x, x)
    distance = lambda i: norms + norms[i] - 2 * x @ x[i]
    nearest, found["expected"] = np.min([distance(i) for i in range(10)], axis=0), []
    for _ in range(5):
        found["expected"].append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, distance(found["expected"][-1]))
    return found


if __name__ == "__main__":
    if sys.argv[1] == "million":
        print(json.dumps(share_a_million()))
        sys.exit()
    jax.config.update("jax_enable_x64", sys.argv[1] == "float64")
    compiled = os.path.join(os.environ["DYNAMICAL_JAX_TEST_CACHE"], "compiled")
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    counts = [int(text) for text in sys.argv[2].split(",")]
    dtype = np.dtype(sys.argv[1])
    found = {count: compute(dtype, count) for count in counts}
    for count in counts:
        found[count]["chosen"] = choose(dtype, parallel.make_mesh(count))
    print(json.dumps(found))
