"""What `apply` does around the model: it is compiled, changes variables or closes over them."""

import functools

import gradient_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax import gradients
from dynamical_jax.gradients import factored, per_example
from dynamical_jax.models import layers


class Compiled:
    """A model whose method is compiled, as one decorates it."""

    def __init__(self, model):
        self.model = model

    @functools.partial(jax.jit, static_argnames=("self", "scale"))
    def apply(self, variables, x, scale=1.0):
        return dj.Outputs(*(scale * part for part in self.model.apply(variables, x)))


JITTED = {
    "apply": lambda model: jax.jit(model.apply),
    "with donation": lambda model: jax.jit(model.apply, donate_argnums=1),
    "twice": lambda model: jax.jit(jax.jit(model.apply)),
    "lambda": lambda model: jax.jit(lambda variables, x: model.apply(variables, x)),
    "partial within": lambda model: jax.jit(functools.partial(model.apply, mutable=False)),
    "partial around": lambda model: functools.partial(
        jax.jit(model.apply, static_argnames="mutable"), mutable=False
    ),
    "method": lambda model: Compiled(model).apply,
    "static option": lambda model: functools.partial(Compiled(model).apply, scale=3.0),
}


@pytest.mark.filterwarnings("error")  # It is the factored engine that does it.
@pytest.mark.parametrize(
    "compiled", checks.params(JITTED, quick=("apply", "partial around", "static option"))
)
def test_a_compiled_model_is_taken_apart_all_the_same(compiled):
    model, x = checks.model_from(checks.used_twice), checks.rows().astype(np.float32)
    variables, direction = checks.variables_and_direction(model, x)
    apply = compiled(model)
    expected = gradients.norms_and_products(apply, variables, x, direction, engine="vmap")
    for _ in range(2):
        terms = gradients.norms_and_products(apply, variables, x, direction)
        toy.assert_close(terms, expected, direction, 1e-5)
        apply(variables, jnp.array(x))  # From now on it is not traced again.


def test_a_decorator_is_not_undone():
    model, x = checks.model_from(checks.used_twice), checks.rows().astype(np.float32)
    variables, direction = checks.variables_and_direction(model, x)

    @functools.wraps(jax.jit(model.apply))  # With all attributes of what it wraps.
    def tripled(variables, x):
        return dj.Outputs(*(3 * part for part in model.apply(variables, x)))

    terms, expected = (
        gradients.norms_and_products(tripled, variables, x, direction, engine=engine)
        for engine in gradients.ENGINES
    )
    toy.assert_close(terms, expected, direction, 1e-5)


def test_a_model_compiled_out_of_sight_is_refused_also_once_it_has_been_traced():
    model, x = checks.single_layer(nn.Dense(3)), jnp.asarray(checks.rows())
    variables, direction = checks.variables_and_direction(model, x)
    compiled = jax.jit(model.apply)
    apply = lambda *arguments: compiled(*arguments)
    for _ in range(2):
        with pytest.raises(gradients.UnsupportedError, match=r"own layer, in jax\.jit of apply"):
            factored.gradient_terms(apply, variables, x, None, direction)
        compiled(variables, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda params: {**params, "a": params["b"], "b": params["a"]},
        lambda params: {**params, "b": jax.tree.map(jnp.ones_like, params["b"])},
    ],
    ids=["swapped", "overridden"],
)
def test_variables_that_apply_changes_are_refused(change):
    model = checks.model_from(
        lambda self, x: nn.Dense(4, name="b")(nn.tanh(nn.Dense(4, name="a")(x)))
    )
    x = jnp.asarray(checks.rows())
    variables, direction = checks.variables_and_direction(model, x)
    apply = lambda variables, x: model.apply({"params": change(variables["params"])}, x)
    with pytest.raises(
        gradients.UnsupportedError, match=r"[ab]: it is applied with other variables"
    ):
        factored.gradient_terms(apply, variables, x, None, direction)


class Reads(nn.Module):
    """A layer, or none if it owns no parameters, that goes by a further value if there is one."""

    owns: bool = True
    inner: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        x = x if self.inner is None else self.inner(x)
        for collection in ("frozen", "params"):
            x = x * self.get_variable(collection, "gain", jnp.ones(4)).reshape(1, 4)
        return x @ self.param("kernel", nn.initializers.ones, (4, 4)) if self.owns else x


class Statistics(nn.Module):
    """Owns a kernel, and holds a layer that has statistics and no parameters."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True, use_scale=False, use_bias=False, name="norm")(x)
        return x @ self.param("kernel", nn.initializers.ones, (4, 3))


GAIN = {"gain": np.arange(1, 5)}


def closes_over(*path, values=GAIN):
    """An `apply` that puts `values` at `path` of the variables."""

    def put(tree, path):
        return {**tree, path[0]: put(tree.get(path[0], {}), path[1:])} if path else values

    return lambda model: lambda variables, x: model.apply(put(variables, path), x)


def reads(**options):
    return lambda self, x: nn.Dense(3)(Reads(**options, name="layer")(x))


def also_frozen(self, x):
    self.variable("frozen", "other", lambda: jnp.ones(()))
    return reads()(self, x)


lacks = "layer: its scope holds what `variables` lacks: "
CLOSED_OVER = {
    "a collection": (reads(), closes_over("frozen", "layer"), lacks + "frozen/gain"),
    "a further value": (also_frozen, closes_over("frozen", "layer"), lacks + "frozen/gain"),
    "of an inner module": (
        reads(inner=Reads(owns=False)),
        closes_over("frozen", "layer", "inner"),
        lacks + "frozen/inner/gain",
    ),
    "a parameter": (
        reads(),
        closes_over("params", "layer", "gain", values=GAIN["gain"]),
        lacks + "params/gain",
    ),
    "statistics of an inner layer": (
        lambda self, x: Statistics(name="layer")(x),
        closes_over("batch_stats", "layer", "norm", values={"mean": np.ones(4), "var": np.ones(4)}),
        "layer: it is applied with other variables than its own",
    ),
}


@pytest.mark.parametrize(("function", "close_over", "why"), CLOSED_OVER.values(), ids=CLOSED_OVER)
def test_what_apply_closes_over_is_not_lost(function, close_over, why):
    model, x = checks.model_from(function), checks.rows().astype(np.float32)
    variables, direction = checks.variables_and_direction(model, x)
    apply = close_over(model)
    expected = per_example.gradient_terms(apply, variables, x, None, direction)
    without = per_example.gradient_terms(model.apply, variables, x, None, direction)
    assert not np.allclose(expected.squared_norm, without.squared_norm, rtol=0.1)
    with pytest.raises(gradients.UnsupportedError) as raised:
        factored.gradient_terms(apply, variables, jnp.asarray(x), None, direction)
    assert str(raised.value) == why
    with pytest.warns(UserWarning, match="no factored gradients .layer: .*; using vmap"):
        terms = gradients.norms_and_products(apply, variables, x, direction)
    toy.assert_close(terms, expected, direction, 1e-5)


def normalized(batch_norm):
    return lambda self, x: nn.Dense(3)(batch_norm(use_running_average=True)(nn.Dense(4)(x)))


EXACT = {
    "statistics": (normalized(nn.BatchNorm), ["params"], {}),
    "statistics of ours": (normalized(layers.BatchNorm), ["params"], {}),
    "other statistics": (normalized(nn.BatchNorm), ["params", "batch_stats"], {}),
    "a collection of a module without parameters": (
        lambda self, x: nn.Dense(3)(Reads(owns=False, name="layer")(x)),
        ["params"],
        {"frozen": {"layer": GAIN}},
    ),
    "parameters of a whole layer": (
        lambda self, x: nn.Dense(3)(nn.tanh(nn.Dense(4, name="idle")(x))),
        ["params"],
        {},
    ),
}


@pytest.mark.filterwarnings("error")  # It is the factored engine that does it.
@pytest.mark.parametrize(("function", "collections", "more"), EXACT.values(), ids=EXACT)
def test_constants_that_apply_closes_over_are_exact(function, collections, more):
    model, x = checks.model_from(function), checks.rows().astype(np.float32)
    whole = {**checks.variables_and_direction(model, x)[0], **more}
    apply = lambda v, x: model.apply({**whole, "params": {**whole["params"], **v["params"]}}, x)
    variables = {name: jax.tree.map(lambda leaf: leaf + 1, whole[name]) for name in collections}
    variables["params"].pop("idle", None)
    direction = checks.draw_like(variables["params"], seed=2)
    terms, expected = (
        gradients.norms_and_products(apply, variables, x, direction, engine=engine)
        for engine in gradients.ENGINES
    )
    toy.assert_close(terms, expected, direction, 1e-5)


@pytest.mark.parametrize("form", [lambda mean: mean, lambda mean: 2 * mean])
def test_statistics_made_of_parameters_are_no_constants(form):
    model, x = checks.model_from(normalized(nn.BatchNorm)), checks.rows().astype(np.float32)
    variables, direction = checks.variables_and_direction(model, x)

    def apply(variables, x):
        statistics = {"mean": form(variables["params"]["Dense_1"]["bias"]), "var": jnp.ones(4)}
        return model.apply({**variables, "batch_stats": {"BatchNorm_0": statistics}}, x)

    with pytest.raises(gradients.UnsupportedError, match="parameters are used outside their own"):
        factored.gradient_terms(apply, variables, jnp.asarray(x), None, direction)
