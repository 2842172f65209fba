"""What the factored engine refuses, and why; `vmap(grad)` takes over, with a warning."""

import functools

import gradient_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn
from jax import lax

from dynamical_jax import gradients
from dynamical_jax.gradients import factored, per_example
from dynamical_jax.models import layers


def shared(self, x):
    layer = nn.Dense(4, name="layer")
    return layer(nn.tanh(layer(x)))


def tied(self, x):
    layer = nn.Dense(4)
    return layer(x) @ layer.variables["params"]["kernel"]


def raw(transformation):
    def function(self, x):
        layer = nn.Dense(4, name="layer")
        return layer(x) if self.is_initializing() else transformation(layer, x)

    return function


def scanned(self, x):
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            carry = nn.tanh(nn.Dense(4, name="layer")(carry + x))
            return carry, carry

    axes = {"in_axes": 1, "out_axes": 1}
    cell = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, **axes)
    return cell(name="cell")(jnp.zeros_like(x), jnp.stack([x, x], axis=1))[1]


def vmapped(self, x):
    axes = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
    return nn.vmap(nn.Dense, **axes)(3, name="layer")(x)


def applied_inside(self, x):
    inner = nn.Dense(3, parent=None)
    params = self.param("inner", lambda key: inner.init(key, x)["params"])
    return inner.apply({"params": params}, x)


class Gated(nn.Module):
    """Owns a parameter, and calls a layer that somebody else owns."""

    gate: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.gate(x) * self.param("scale", nn.initializers.ones, (3,)).reshape(1, 3)


class KnowsItsPlace(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (4, 3))
        return len(self.path) * (x @ kernel)


class WithOption(nn.Module):
    @nn.compact
    def __call__(self, x, scale=2.0):
        y = x @ self.param("kernel", nn.initializers.ones, (4, 3))
        return y if scale is None else scale * y


class Own(nn.Module):
    """A layer with a free form."""

    function: object
    shape: tuple = (4, 3)

    @nn.compact
    def __call__(self, x):
        return self.function(x, self.param("kernel", nn.initializers.ones, self.shape))


def two_inputs(self, x):
    class Product(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return x @ self.param("kernel", nn.initializers.ones, (4, 4)) * y

    return Product(name="layer")(x, x)


def attends(self, x):
    embed = nn.Embed(4, 4, name="layer")
    return embed.attend(x) + (0 * embed(jnp.argmax(x, -1)) if self.is_initializing() else 0)


def merged(self, x):
    return nn.Dense(4, name="layer")(jnp.concatenate([x, x**2], 1).reshape(-1, 4))[: len(x)]


def across(self, x):  # As many positions as examples.
    return nn.Dense(4, name="layer")(jnp.stack([x * i for i in range(1, 6)])).sum(axis=0)


def transposing(self, x):
    tokens = jnp.stack([x * i for i in range(1, 6)], axis=1)
    turned = Own(lambda x, w: nn.tanh(x @ w).swapaxes(0, 1), name="layer")(tokens)
    return turned.swapaxes(0, 1)


def with_indices(self, x):
    y, index = Own(lambda x, w: (x @ w, jnp.argmax(x @ w, -1)), name="layer")(x)
    return y * (1 + index[:, None])


def positions(self, x):
    tokens = jnp.stack([x] * checks.NUM_EXAMPLES, axis=1)
    place = nn.Embed(checks.NUM_EXAMPLES, 4, name="layer")(jnp.arange(checks.NUM_EXAMPLES))
    return nn.tanh(tokens + place[None])


def not_called(self, x):
    return nn.Dense(3)(x) + (nn.Dense(1, name="idle")(x) if self.is_initializing() else 0)


def doubled(lhs, rhs, *arguments, **options):
    return 2 * lax.conv_general_dilated(lhs, rhs, *arguments, **options)


def twice_the_product(*arguments, **options):
    return 2 * lax.dot_general(*arguments, **options)


def conv_layer(**options):
    options = {"features": 3, "kernel_size": (3, 3), "name": "layer", **options}
    return lambda self, x: nn.Conv(**options)(x.reshape(-1, 2, 2, 1))


first_axis = "the examples on its first axis"
inside = "called inside a JAX transformation"
anything = "may do anything"
REFUSED = {
    "called twice": (shared, "layer: it is called more than once"),
    "tied": (tied, "the model: parameters are used outside their own layer"),
    "applied inside": (applied_inside, "the model: parameters are used outside their own layer"),
    "not called": (not_called, "the model: no layer that is called owns idle/bias, idle/kernel"),
    "other method": (attends, "layer: it is used through attend"),
    "own parameter": (
        lambda self, x: nn.Dense(3)(x) * self.param("gain", nn.initializers.ones, (1, 3)),
        "Model: Model owns parameters beside further layers",
    ),
    "layer from outside": (
        lambda self, x: Gated(nn.Dense(3), name="layer")(x),
        "layer: it cannot be applied by itself",
    ),
    "weight norm": (lambda self, x: nn.WeightNorm(nn.Dense(3))(x), "it cannot be applied by"),
    "lifted scan": (scanned, f"cell/layer: it is {inside}"),
    "lifted vmap": (vmapped, f"layer: it is {inside}"),
    "lifted jit": (lambda self, x: nn.jit(nn.Dense)(3, name="layer")(x), f"layer: it is {inside}"),
    "lifted remat": (lambda self, x: nn.remat(nn.Dense)(3, name="layer")(x), inside),
    "RNN": (lambda self, x: nn.RNN(nn.LSTMCell(4))(x[:, None]), inside),
    "raw scan": (
        raw(lambda layer, x: lax.scan(lambda c, _: (layer(c), None), x, None, length=3)[0]),
        f"layer: it is {inside}",
    ),
    "raw vmap": (raw(lambda layer, x: jax.vmap(layer)(x)), inside),
    "raw remat": (raw(lambda layer, x: jax.checkpoint(lambda x: layer(x))(x)), inside),
    "raw grad": (raw(lambda layer, x: jax.grad(lambda x: jnp.sum(layer(x) ** 2))(x)), inside),
    "input by name": (lambda self, x: nn.Dense(3)(inputs=x), "called with other than one input"),
    "two inputs": (two_inputs, "layer: it is called with other than one input"),
    "option": (lambda self, x: WithOption()(x, scale=3.0), "it is called with scale"),
    "option None": (lambda self, x: WithOption()(x, scale=None), "it is called with scale"),
    "masked norm": (
        lambda self, x: nn.LayerNorm()(x, mask=jnp.array([[True, True, False, True]])),
        "it is called with mask",
    ),
    "examples merged with another axis": (
        merged,
        f"layer: its input or output has not {first_axis}",
    ),
    "examples on the second axis": (across, first_axis),
    "layer that turns its axes": (transposing, first_axis),
    "layer with one output for all": (
        lambda self, x: nn.Dense(3)(x) * Own(lambda x, w: jnp.sum(w**2), name="layer")(x),
        first_axis,
    ),
    "input without examples": (positions, first_axis),
    "output of integers": (with_indices, "layer: its output is not floating point"),
    "norm over the batch": (
        lambda self, x: nn.LayerNorm(reduction_axes=(0, 1))(x),
        "its statistics mix examples",
    ),
    "norm of other features": (
        lambda self, x: nn.LayerNorm(feature_axes=(1, 2))(x.reshape(-1, 2, 2)),
        "its features are not the last axis",
    ),
    "batch norm of other features": (
        lambda self, x: nn.BatchNorm(True, axis=1)(x.reshape(-1, 2, 2)),
        "its features are not the last axis",
    ),
    "dot_general": (lambda self, x: nn.Dense(3, dot_general=twice_the_product)(x), anything),
    "promote_dtype": (lambda self, x: nn.Dense(3, promote_dtype=lambda *a, **_: a)(x), anything),
    "another convolution": (conv_layer(conv_general_dilated=doubled), anything),
    "masked kernel": (conv_layer(mask=jnp.ones((3, 3, 1, 3))), "layer: its kernel is masked"),
    "circular": (conv_layer(padding="CIRCULAR"), "layer: its padding is CIRCULAR"),
    "reflect": (conv_layer(padding="REFLECT"), "layer: its padding is REFLECT"),
    "two axes of examples": (conv_layer(kernel_size=(3,)), "layer: its input is not"),
    "kernel for each example": (
        lambda self, x: nn.DenseGeneral(3, batch_dims=0, name="layer")(x),
        "layer: its kernel has an axis of examples",
    ),
    "sum over an input": (
        lambda self, x: nn.Einsum((3, 3), "abc,de->abde", name="layer")(x.reshape(-1, 2, 2)),
        "layer: an axis is summed by itself",
    ),
    "diagonal": (
        lambda self, x: nn.Einsum((2, 3), "abb,bd->abd", name="layer")(x.reshape(-1, 2, 2)),
        "layer: an axis is met twice",
    ),
    "transposed, circular": (
        lambda self, x: nn.ConvTranspose(2, (2,), padding="CIRCULAR", name="layer")(x[..., None]),
        "layer: its padding is CIRCULAR",
    ),
    "knows its place": (
        lambda self, x: KnowsItsPlace(name="layer")(x),
        "layer: KnowsItsPlace may depend on its place",
    ),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_is_refused(function, message):
    model, x = checks.model_from(function), jnp.asarray(checks.rows())
    variables, direction = checks.variables_and_direction(model, x)
    with pytest.raises(gradients.UnsupportedError) as raised:
        factored.gradient_terms(model.apply, variables, x, None, direction)
    assert message in str(raised.value)
    assert str(raised.value) == f"{raised.value.module}: {raised.value.why}"


def test_the_statistics_of_the_batch_are_refused():
    for batch_norm in (nn.BatchNorm, layers.BatchNorm):
        model, x = (
            checks.single_layer(batch_norm(use_running_average=False, name="layer")),
            checks.rows(),
        )
        variables, direction = checks.variables_and_direction(model, x)
        apply = lambda *a, model=model: model.apply(*a, mutable=["batch_stats"])[0]
        with pytest.raises(gradients.UnsupportedError, match="layer: the statistics of the batch"):
            factored.gradient_terms(apply, variables, jnp.asarray(x), None, direction)


def doubling(call, args, kwargs, context):
    return (2 if isinstance(context.module, nn.Dense) else 1) * call(*args, **kwargs)


def test_other_interceptors_are_refused():
    def inside(self, x):
        with nn.intercept_methods(doubling):
            return nn.Dense(3, name="layer")(x)

    def around(variables, x):
        with nn.intercept_methods(doubling):
            return checks.single_layer(nn.Dense(3, name="layer")).apply(variables, x)

    for apply in (checks.model_from(inside).apply, around):
        model, x = checks.single_layer(nn.Dense(3, name="layer")), jnp.asarray(checks.rows())
        variables, direction = checks.variables_and_direction(model, x)
        with pytest.raises(gradients.UnsupportedError, match="layer: other method interceptors"):
            factored.gradient_terms(apply, variables, x, None, direction)


class DependsOnItsCall(nn.Module):
    """A layer that depends on what its call was given besides the input."""

    condition: object

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.ones, (4, 3))
        return 2 * y if self.condition(self) else y


@pytest.mark.parametrize(
    ("condition", "options"),
    [
        (lambda self: self.has_rng("dropout"), {"rngs": {"dropout": jax.random.key(0)}}),
        (lambda self: self.is_mutable_collection("stats"), {"mutable": ["stats"]}),
    ],
    ids=["rngs", "mutable"],
)
def test_layers_that_may_depend_on_their_call_are_refused(condition, options):
    model, x = (
        checks.single_layer(DependsOnItsCall(condition, name="layer")),
        jnp.asarray(checks.rows()),
    )
    variables, direction = checks.variables_and_direction(model, x)
    outputs = lambda returned: returned[0] if "mutable" in options else returned
    apply = lambda *a: outputs(model.apply(*a, **options))
    with pytest.raises(
        gradients.UnsupportedError, match="layer: DependsOnItsCall may depend on random"
    ):
        factored.gradient_terms(apply, variables, x, None, direction)


def test_a_layer_may_know_its_name():
    checks.check_terms(
        checks.single_layer(DependsOnItsCall(lambda self: self.name == "second", name="second")),
        checks.rows(),
    )


def test_complex_parameters_are_refused():
    layer = Own(lambda x, w: jnp.abs(x @ (w + 1j * w)), name="layer")
    # Complex numbers within are no matter.
    checks.check_terms(checks.single_layer(layer), checks.rows())
    model, x = checks.single_layer(layer), jnp.asarray(checks.rows())
    variables, direction = checks.variables_and_direction(model, x)
    variables = jax.tree.map(lambda leaf: leaf + 1j * leaf, variables)
    with pytest.raises(gradients.UnsupportedError, match="the model: its parameters are complex"):
        factored.gradient_terms(model.apply, variables, x, None, direction)


def test_batch_statistics_without_parameters_are_refused():
    free = {"use_scale": False, "use_bias": False, "name": "norm"}
    model = checks.model_from(lambda self, x: nn.Dense(3)(nn.BatchNorm(False, **free)(x)))
    variables, direction = checks.variables_and_direction(model, checks.rows())
    apply = lambda *a: model.apply(*a, mutable=["batch_stats"])[0]
    with pytest.raises(gradients.UnsupportedError, match="norm: the statistics of the batch"):
        factored.gradient_terms(apply, variables, jnp.asarray(checks.rows()), None, direction)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: (lambda h: Own(lambda x, w: h * (x @ w))(x))(nn.Dense(1)(x)),
        lambda self, x: Own(lambda x, w: (x @ w, object()))(x)[0],
    ],
    ids=["sees another array", "gives more than arrays"],
)
def test_models_that_cannot_be_taken_apart_are_done_by_vmap(function):
    model, x = checks.model_from(function), checks.rows().astype(np.float32)
    variables, direction = checks.variables_and_direction(model, x)
    with pytest.warns(UserWarning, match=r"no factored gradients \(.*\); using vmap"):
        terms = gradients.norms_and_products(model.apply, variables, x, direction)
    expected = per_example.gradient_terms(model.apply, variables, x, None, direction)
    toy.assert_close(terms, expected, direction, 1e-5)


def test_errors_of_the_model_are_its_own():
    model = checks.single_layer(nn.Dense(3))
    variables, direction = checks.variables_and_direction(model, checks.rows())
    with pytest.raises(Exception, match="kernel"):
        factored.gradient_terms(model.apply, variables, checks.draw((5, 9)), None, direction)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("called twice", "layer: it is called more than once"),
        ("own parameter", "Model: Model owns parameters beside further layers"),
        ("lifted scan", "cell/layer: it is called inside a JAX transformation"),
    ],
)
def test_what_is_refused_is_done_by_vmap_with_a_warning(name, why):
    model, x = checks.model_from(REFUSED[name][0]), checks.rows()
    variables, direction = checks.variables_and_direction(model, x)
    seen = []
    with pytest.warns(UserWarning, match=f"no factored gradients .{why}.; using vmap") as record:
        terms = gradients.norms_and_products(
            model.apply,
            variables,
            x,
            direction,
            chunk_size=2,
            on_progress=lambda *at: seen.append(at),
        )
    assert len(record) == 1
    assert seen == [(2, 5), (4, 5), (5, 5)]
    expected = jax.jit(functools.partial(per_example.gradient_terms, model.apply))(
        variables, x, None, direction
    )
    toy.assert_close(terms, expected, direction, 1e-5)
