"""Models of a few lines, and the check that the factored engine gives the terms of `vmap(grad)`."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax.gradients import factored, per_example, shares

NUM_EXAMPLES = 5


def model_from(function):
    """Returns a model whose call is `function(module, x)`."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            outputs = function(self, x)
            outputs = outputs.reshape(outputs.shape[0], -1)
            return dj.Outputs(outputs, outputs)

    return Model()


def single_layer(layer):
    return model_from(lambda self, x: layer.clone(parent=self)(x))


def side_by_side(layers):
    """Returns a model of which each layer sees the input: one program tests all of them."""

    def function(self, x):
        called = [layer.clone(parent=self, name=f"layer{i}")(x) for i, layer in enumerate(layers)]
        return jnp.concatenate([outputs.reshape(len(x), -1) for outputs in called], axis=1)

    return model_from(function)


def params(table, quick):
    """Returns the values of a table; those whose names are not `quick` are slow tests."""
    return [
        pytest.param(value, id=name, marks=[] if name in quick else pytest.mark.slow)
        for name, value in table.items()
    ]


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.result_type(float))


def images(height=9, width=7, channels=4):
    return draw((NUM_EXAMPLES, height, width, channels))


def rows():
    return draw((NUM_EXAMPLES, 4))


def draw_like(tree, seed):
    """Returns a random tree of these shapes: kernels that keep the scale, positive variances."""
    generator = np.random.default_rng(seed)

    def leaf(path, shape):
        z = generator.normal(size=shape.shape) / np.sqrt(max(1, np.prod(shape.shape[:-1])))
        z = z**2 + 0.5 if "var" in jax.tree_util.keystr(path) else z
        return z.astype(jnp.result_type(float))  # Modules draw float32 in any case.

    return jax.tree_util.tree_map_with_path(leaf, tree)


def variables_and_direction(model, x):
    shapes = dict(jax.eval_shape(model.init, jax.random.key(0), x))
    shapes.pop("intermediates", None)
    variables = draw_like(shapes, seed=1)
    return variables, draw_like(variables["params"], seed=2)


def tolerance():
    return 1e-10 if jax.config.jax_enable_x64 else 1e-5


def with_form(formed):
    """Returns the factored engine that always, or never, forms the gradients of kernels."""

    def engine(*arguments):
        with mock.patch.object(shares, "forms_gradient", return_value=formed):
            return factored.gradient_terms(*arguments)

    return engine


BOTH_FORMS = (with_form(True), with_form(False))


def compute_terms(model, engines, *arguments):
    """Returns the terms by each engine, in one program: it compiles faster than several."""
    return jax.jit(lambda *a: [engine(model.apply, *a) for engine in engines])(*arguments)


def check_terms(model, x, labels=None, engines=(factored.gradient_terms,)):
    """Asserts that these engines give the terms that `vmap(grad)` gives."""
    variables, direction = variables_and_direction(model, x)
    engines = (*engines, per_example.gradient_terms)
    *several, expected = compute_terms(model, engines, variables, x, labels, direction)
    assert np.all(expected.squared_norm > 0)
    for terms in several:
        toy.assert_close(terms, expected, direction, tolerance())


def used_twice(self, x):
    y = nn.tanh(nn.Dense(4)(x))
    return y * y + nn.Dense(4)(y) + y
