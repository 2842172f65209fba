"""Works on a folder of images as one of two hosts, and prints what comes out as JSON.

python tests/hosts.py 127.0.0.1:5000 0 FOLDER CACHE WEIGHTS
"""

import json
import os
import pathlib
import sys

import jax
import numpy as np
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax import embedding, parallel, training
from dynamical_jax.data import images
from dynamical_jax.strategies import dropout, predictions

SAME = ("mean", "change", "label", "outputs", "dropout", "evaluation", "labeled", "embedded")
DONE: dict[str, list[int]] = {"read": [], "_vectors": []}
"""Name of a function → how many images each call of it was for."""


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        x = nn.Dense(4)(x)
        return dj.Outputs(nn.Dense(2)(x), x)


def note(module, name, num_images):
    function = getattr(module, name)

    def noted(*arguments):
        DONE[name].append(num_images(*arguments))
        return function(*arguments)

    setattr(module, name, noted)


def num_done(name):
    """Since it was asked last."""
    count = sum(DONE[name])
    DONE[name].clear()
    return count


def listed(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), tree)


def compute(data, mesh):
    """What a round is made of, from a set of images on some devices."""
    model = dj.models.Standardized(Network(), data.mean, data.std)
    variables = dj.models.init(model, jax.random.key(0), data.pool.x)
    rows = np.arange(len(data.pool.y))
    labeled, rest = (dj.types.Rows(data.pool.x, part) for part in (rows[2:7], rows[7:]))
    examples = dj.Examples(labeled, data.pool.y[2:7])
    view = dj.LearnerView(model.apply, variables, examples, rest, mesh=mesh)
    scored = dj.STRATEGIES["dynamical"](chunk_size=2).score(jax.random.key(0), view, None)
    keys = jax.random.split(jax.random.key(1), 2)
    log_p = dropout.log_probabilities(model.apply, variables, rest, keys, mesh=mesh)
    return {
        "mean": [data.mean, data.std],
        "change": listed(scored.change),
        "label": listed(scored.terms.label),
        "outputs": listed(predictions.predict(view, rest)),
        "dropout": listed(log_p),
        "evaluation": training.evaluate(model.apply, variables, data.test, 2, mesh),
        "labeled": listed(labeled[:]),
    }


def work(folder, cache, weights, mesh=None):
    """Loads the folder, computes, and loads it again where more or less of it is decoded."""
    load = lambda cache: dj.datasets.load(folder, cache_dir=cache, test_fraction=0.3)
    data = load(cache)
    found = {"decoded": num_done("read"), **compute(data, mesh), "others": num_done("read")}
    versions, counts = [data.version], []
    for state in ("all", "none on one host", "of one host"):
        if state == "none on one host" and jax.process_index() == 1:
            for path in pathlib.Path(cache).glob("images-*"):
                path.unlink()
        if state == "of one host":
            cache = f"{cache}/other"
            images.decode(data.paths, cache)
            num_done("read")
        versions.append(load(cache).version)
        counts.append(num_done("read"))
    found |= {"versions": versions, "again": counts}
    if weights:
        network = dj.models.weights.load(weights)
        vectors = [
            embedding.embed_dataset(network, data, where).pool.x[:][:, :4]
            for where in (f"{folder} embedded", cache)  # One cache for both, and one for each.
        ]
        found |= {"embedded": listed(vectors), "number embedded": num_done("_vectors")}
    return found


def refused(call):
    try:
        call()
    except dj.UserError as error:
        return str(error)


if __name__ == "__main__":
    compiled = os.path.join(os.environ["DYNAMICAL_JAX_TEST_CACHE"], "compiled")
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    note(images, "read", lambda *arguments: 1)
    note(embedding, "_vectors", lambda model, variables, x: len(x))
    address, process, folder, cache, *weights = sys.argv[1:]
    parallel.join(address, 2, int(process))
    found = work(folder, cache, weights[0] if weights else None, parallel.make_mesh())
    if jax.process_index() == 1:  # Another version of Pillow decodes otherwise.
        read_all = images.read_all
        images.read_all = lambda *arguments: (255 - read_all(*arguments)[0], None)
    found["refused"] = [
        refused(lambda: dj.datasets.load(folder, cache_dir=cache)),
        refused(lambda: parallel.make_mesh(2)),
    ]
    print(json.dumps(found))
