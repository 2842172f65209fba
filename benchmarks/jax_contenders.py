"""Parts of this library to time, on uint8 images on the device, as in an experiment.

A contender is a function of a `task.Task` that returns a `task.Work`. It compiles nothing
before the first call, so that the memory of parameters and images can be told from the rest.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dynamical_jax as dj
from benchmarks.task import CHUNK_BYTES, MEAN, NUM_CLASSES, STD, STEPS, Task, Work
from dynamical_jax.gradients import scoring
from dynamical_jax.gradients.sketch import engines as sketches

MODELS = {
    "cnn": dj.models.CNN(NUM_CLASSES),
    "resnet18": dj.models.ResNet18(NUM_CLASSES),
    "resnet18-cifar": dj.models.ResNet18(NUM_CLASSES, stem="cifar"),
    "vgg11": dj.models.VGG11(NUM_CLASSES),
    "vit_s": dj.models.ViTS(NUM_CLASSES),
}


def factored(task: Task) -> Work:
    """‖g_u‖² and g_u·v of one batch by the factored engine."""
    return _scoring(task, "factored", task.batch_size)


def nnx(task: Task) -> Work:
    """The same, of the network's twin in Flax NNX."""
    from benchmarks import nnx_models

    if task.model not in nnx_models.MODELS:
        raise LookupError(f"{task.model} has no twin in NNX here")
    twin = nnx_models.MODELS[task.model]()
    return _scoring(task, "factored", task.batch_size, module=twin)


def sketch(task: Task) -> Work:
    """A sketch of 512 numbers of each gradient of one batch."""
    return _scoring(task, "factored", task.batch_size, sketches(512), jax.random.key(0))


def vmap(task: Task) -> Work:
    """The same by the obvious engine, with `CHUNK_BYTES` of gradients at a time."""
    leaves = jax.tree.leaves(_shapes(_model(task), task)["params"])
    gradient_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return _scoring(task, "vmap", max(1, min(task.batch_size, CHUNK_BYTES // gradient_bytes)))


def forward_backward(task: Task) -> Work:
    """The gradient of the loss summed over one batch, in evaluation mode."""
    model = _model(task)
    variables, images = _variables(model, task), _images(task.batch_size, task)
    labels = _labels(task.batch_size)

    @jax.jit
    def gradient(variables: Any, images: Any) -> Any:
        rest = {name: value for name, value in variables.items() if name != "params"}

        def loss(params: Any) -> Any:
            logits = model.apply({"params": params, **rest}, images).logits
            return jnp.sum(dj.losses.cross_entropy(logits, labels))

        return jax.grad(loss)(variables["params"])

    return _work(lambda: gradient(variables, images), 1)


def training_step(task: Task) -> Work:
    """The steps of an epoch as `training.fit` compiles and runs it, with Adam."""
    model, size = _model(task), STEPS * task.batch_size
    buffer = dj.Examples(_images(size, task), _labels(size))
    state = {"variables": _variables(model, task), "optimizer": None, "epoch": 0}
    optimizer = dj.training._optimizer(dj.TrainingConfig())

    def epoch() -> Any:
        if state["optimizer"] is None:
            state["optimizer"] = jax.jit(optimizer.init)(state["variables"]["params"])
        state["epoch"] += 1
        order = dj.streams.generator(0, "order", 0, state["epoch"]).permutation(size)
        state["variables"], state["optimizer"] = dj.training._epochs(
            model,
            optimizer,
            task.batch_size,
            state["variables"],
            state["optimizer"],
            buffer,
            order[None],
            np.array([1e-3]),
            state["epoch"],
            1,
            size,
            dj.streams.key(0, "dropout", 0),
        )
        return state

    return _work(epoch, 1 / STEPS)


def pool(task: Task) -> Work:
    """All of a pool through `gradients.norms_and_products`, a block of `batch_size` at a time."""
    model = _model(task)
    variables, direction = _variables(model, task), _variables(model, task, seed=1)["params"]
    images = _images(task.pool_size, task)

    def score(size: int) -> dj.types.GradientTerms:
        unlabeled = dj.types.Rows(images, np.arange(size))
        return dj.gradients.norms_and_products(
            model.apply, variables, unlabeled, direction, chunk_size=task.batch_size
        )

    one_block = min(task.pool_size, task.batch_size or scoring.largest_chunk_size())
    return _work(lambda: score(task.pool_size), 1, warm_up=lambda: score(one_block))


def _scoring(
    task: Task,
    engine: str,
    size: int,
    engines: Any = dj.gradients.ENGINES,
    given: Any = None,
    module: Any = None,
) -> Work:
    """`size` of the images in one call of the program that scores a block of a pool."""
    model = _model(task, module)
    variables = _variables(model, task)
    given = _variables(model, task, seed=1)["params"] if given is None else given
    block = dj.Examples(_images(size, task), None)  # No labels: pseudo-labels, as in dynamicAL.

    def call() -> Any:
        return scoring._score_block(model.apply, engines[engine], variables, block, given)

    return _work(call, task.batch_size / size)


def _work(call: Callable[[], Any], calls: float, warm_up: Callable[[], Any] | None = None) -> Work:
    waiting = lambda: jax.block_until_ready(call())
    on_host = jax.default_backend() == "cpu"
    return Work(waiting, calls, warm_up, None if on_host else _device_memory)


def _device_memory() -> tuple[int, int]:
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"], stats["peak_bytes_in_use"]


def _model(task: Task, module: Any = None) -> dj.models.Standardized:
    """The network of the task, or another in its place, for raw images."""
    if task.precision != "default":
        jax.config.update("jax_default_matmul_precision", task.precision)
    channels = task.image_shape[-1]
    module = MODELS[task.model] if module is None else module
    return dj.models.Standardized(module, (MEAN,) * channels, (STD,) * channels)


def _shapes(model: dj.models.Standardized, task: Task) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *task.image_shape), np.uint8))


def _variables(model: dj.models.Standardized, task: Task, seed: int = 0) -> Any:
    """Variables drawn on the host: kernels as He et al. (2015) do, no shift, no scale."""
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if path[-1].key != "kernel":
            return np.zeros(leaf.shape, np.float32)
        values = generator.standard_normal(leaf.shape, np.float32)
        values *= math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return values

    return _on_device(jax.tree_util.tree_map_with_path(draw, _shapes(model, task)))


def _images(size: int, task: Task) -> jax.Array:
    generator = np.random.default_rng(0)
    return _on_device(generator.integers(0, 256, (size, *task.image_shape), np.uint8))


def _labels(size: int) -> jax.Array:
    return _on_device(np.random.default_rng(1).integers(0, NUM_CLASSES, size).astype(np.int32))


def _on_device(arrays: Any) -> Any:
    return jax.block_until_ready(jax.device_put(arrays))  # Copies go on in the background.
