"""The models that the package ships: exact, and without an array of batch × parameters."""

import functools

import gradient_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn
from jax import lax

import dynamical_jax as dj
from dynamical_jax import gradients
from dynamical_jax.gradients import factored
from dynamical_jax.models import resnet


class Residual(nn.Module):
    """The blocks of ResNet-18, with and without a convolution in the shortcut, on few channels."""

    @nn.compact
    def __call__(self, x, train=False):
        for stride in (2, 1):
            x = resnet.BasicBlock(8, stride)(x, train)
        x = x.mean(axis=(1, 2))
        return dj.Outputs(nn.Dense(10)(x), x)


MODELS = {
    "residual": (Residual(), (8, 8, 8, 3)),
    "cnn, 8x8": (dj.models.CNN(10), (8, 8, 8, 1)),
    "cnn, 32x32": (dj.models.CNN(10), (8, 32, 32, 3)),
    "resnet18": (dj.models.ResNet18(10), (3, 32, 32, 3)),
    "resnet18, cifar stem": (dj.models.ResNet18(10, stem="cifar"), (3, 16, 16, 3)),
    "vgg11": (dj.models.VGG11(10), (2, 32, 32, 3)),
}


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def trained(model, variables, x, y):
    """The variables after three steps of training, statistics of BatchNorm included."""
    mask, key = jnp.ones(len(y), bool), jax.random.key(0)

    def step(_, variables):
        gradient, _, statistics = dj.training.batch_gradient(
            model, variables, dj.Examples(x, y), mask, key
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
        return {**statistics, "params": params}

    return jax.jit(lambda variables: lax.fori_loop(0, 3, step, variables))(variables)


def initialized(shapes):
    """Normal kernels, scales and variances of one, all else zero."""

    def leaf(path, shape):
        if any(name in jax.tree_util.keystr(path) for name in ("scale", "var")):
            return np.ones(shape.shape, np.float32)
        fan_in = np.prod(shape.shape[:-1])
        return np.float32(np.sqrt(2 / fan_in) * (shape.ndim > 1)) * checks.draw(shape.shape)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def setting(name):
    """A model, its variables at initialisation, a batch, a direction, both engines in one."""
    module, shape = MODELS[name]
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, shape, dtype=np.uint8)
    y = generator.integers(0, 10, shape[0])
    model = dj.models.Standardized(module, (128.0,) * shape[3], (70.0,) * shape[3])
    variables = initialized(dict(jax.eval_shape(model.init, jax.random.key(0), x)))
    direction = checks.draw_like(variables["params"], seed=2)
    both = jax.jit(lambda *a: [engine(model.apply, *a) for engine in gradients.ENGINES.values()])
    return model, variables, x, y, direction, both


@pytest.mark.parametrize("name", [*list(MODELS)[:2], *map(slow, list(MODELS)[2:])])
def test_models_at_initialization_and_with_any_values(name):
    _, variables, x, y, direction, both = setting(name)
    for values in (variables, checks.draw_like(variables, seed=1)):
        toy.assert_close(*both(values, x, y, direction), direction, 1e-5)


@pytest.mark.parametrize(
    "name",
    ["residual", slow("cnn, 8x8"), slow("resnet18"), slow("resnet18, cifar stem"), slow("vgg11")],
)
def test_models_after_training(name):
    model, variables, x, y, direction, both = setting(name)
    toy.assert_close(*both(trained(model, variables, x, y), x, y, direction), direction, 1e-5)


@pytest.mark.parametrize(
    ("module", "n"),
    [
        pytest.param(dj.models.VGG11(10), 128, id="vgg11"),
        pytest.param(dj.models.ResNet18(10), 128, id="resnet18", marks=pytest.mark.slow),
    ],
)
def test_no_array_of_batch_times_parameters(module, n):
    """Of the program as compiled, which is not run: VGG-11 takes 99 GiB by `vmap(grad)`."""
    x = jax.ShapeDtypeStruct((n, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params = variables["params"]
    function = jax.jit(functools.partial(factored.gradient_terms, module.apply))
    compiled = function.lower(variables, x, labels, params).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2**30
    assert temporary < n * sum(leaf.size for leaf in jax.tree.leaves(params))  # A quarter of it.
