"""Small data and small models that the tests share."""

import functools
import os
import pathlib
import re
import signal
import warnings

import jax
import numpy as np
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax.models import layers

ROOT = pathlib.Path(__file__).parent.parent

NUM_CLASSES = 3

MEAN, STD = (127.5, 127.5), (60.0, 70.0)


def images(size: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (size, 8, 8, 2), dtype=np.uint8)


def labels(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 1).integers(0, NUM_CLASSES, size).astype(np.int32)


def examples(size: int, seed: int = 0) -> dj.Examples:
    return dj.Examples(images(size, seed), labels(size, seed))


def dataset(size: int = 90) -> dj.Dataset:
    """Classes that can be learned: each brightens a part of the image of its own."""
    x, y = examples(size)
    x = x // 2
    for label in range(NUM_CLASSES):
        x[y == label, 2 * label : 2 * label + 3] += 100
    third = size // 3
    names = ("one", "two", "three")
    pool = dj.Examples(x[third:], y[third:])
    return dj.Dataset("toy", pool, dj.Examples(x[:third], y[:third]), names)


class ConvBatchNorm(nn.Module):
    """Convolutions with BatchNorm and dropout: all that padding could spoil."""

    num_classes: int = NUM_CLASSES
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        for features in (4, 5):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(layers.BatchNorm(use_running_average=not train)(x))
        x = x.mean(axis=(1, 2))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dj.Outputs(nn.Dense(self.num_classes)(hidden), x)


def standardized(module) -> nn.Module:
    return dj.models.Standardized(module, MEAN, STD)


# Those that a model without dropout will do for.
STRATEGIES = {name: make for name, make in dj.STRATEGIES.items() if not make().needs_dropout}


@functools.cache  # Programs are compiled for each object: share them.
def models() -> dict[str, nn.Module]:
    return {
        "cnn": standardized(dj.models.CNN(NUM_CLASSES)),
        "batch_norm": standardized(ConvBatchNorm()),
    }


@functools.cache
def with_dropout() -> nn.Module:
    return standardized(ConvBatchNorm(dropout=0.5))


@functools.partial(jax.jit, static_argnums=0)
def outputs(apply, variables, x):
    """Of a model, in one program, which is traced once: `jax.jit(model.apply)` each time anew."""
    return apply(variables, x)


def variables(model: nn.Module, dtype=None, seed: int = 0) -> dict:
    """Variables as after some training: biases, scales and statistics not at 0 and 1."""
    drawn = dj.models.init(model, jax.random.key(seed), images(1))
    leaves, structure = jax.tree.flatten(drawn)
    generator = np.random.default_rng(seed)
    moved = [leaf + (leaf.ndim == 1) * generator.uniform(0, 0.3, leaf.shape) for leaf in leaves]
    return jax.tree.unflatten(structure, [leaf.astype(dtype or np.float32) for leaf in moved])


def assert_close(terms, expected, direction, tolerance):
    """‖g_u‖² relative to itself, g_u·v to ‖g_u‖‖v‖, its size without cancellation."""
    np.testing.assert_allclose(terms.squared_norm, expected.squared_norm, rtol=tolerance)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(direction)))
    error = np.abs(terms.inner_product - expected.inner_product)
    bound = tolerance * norm * np.sqrt(expected.squared_norm)
    assert np.all(error <= bound), error / bound
    np.testing.assert_array_equal(terms.label, expected.label)


def record(strategy, seed, round_index, accuracy):
    """Of a round, as far as tables and pictures need it."""
    return {
        "dataset": "toy",
        "model": "cnn",
        "strategy": strategy,
        "seed": seed,
        "round": round_index,
        "num_labeled": 10 + 5 * round_index,
        "test_accuracy": accuracy,
    }


RECORDS = [
    record("a", 0, 0, 0.1),
    record("a", 0, 1, 0.2),
    record("a", 1, 0, 0.3),
    record("a", 1, 1, 0.6),
    record("b", 0, 0, 0.5),
]


def python_blocks(page: pathlib.Path) -> list[str]:
    # What cannot run without files or names of the reader's is marked py.
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


class Lethal(dj.strategies.Strategy):
    """Ends its process, as the kernel does where memory runs out."""

    def score(self, key, view, state):
        os.kill(os.getpid(), signal.SIGKILL)


class Failing(dj.strategies.Strategy):
    def score(self, key, view, state):
        warnings.warn("about to fall", stacklevel=2)
        raise FloatingPointError("fell over\nbadly")
