import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn
from jax import lax

import dynamical_jax as dj
from dynamical_jax import gradients
from dynamical_jax.gradients import factored, per_example, shares
from dynamical_jax.models import layers

NUM_EXAMPLES = 5


def model_of(function):
    """A model from the body of its call."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            outputs = function(self, x)
            outputs = outputs.reshape(outputs.shape[0], -1)
            return dj.Outputs(outputs, outputs)

    return Model()


def alone(layer):
    return model_of(lambda self, x: layer.clone(parent=self)(x))


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.result_type(float))


def images(height=9, width=7, channels=4):
    return draw((NUM_EXAMPLES, height, width, channels))


def rows():
    return draw((NUM_EXAMPLES, 4))


def drawn(tree, seed):
    """A tree of these shapes: kernels that keep the scale, positive variances."""
    generator = np.random.default_rng(seed)

    def leaf(path, shape):
        z = generator.normal(size=shape.shape) / np.sqrt(max(1, np.prod(shape.shape[:-1])))
        z = z**2 + 0.5 if "var" in jax.tree_util.keystr(path) else z
        return z.astype(jnp.result_type(float))  # Modules draw float32 in any case.

    return jax.tree_util.tree_map_with_path(leaf, tree)


def variables_and_direction(model, x):
    shapes = dict(jax.eval_shape(model.init, jax.random.key(0), x))
    variables = drawn({name: shapes[name] for name in shapes if name != "intermediates"}, seed=1)
    return variables, drawn(variables["params"], seed=2)


def tolerance():
    return 1e-10 if jax.config.jax_enable_x64 else 1e-5


def with_form(formed):
    """The factored engine, with the gradients of kernels formed or not whatever the rule says."""

    def engine(*arguments):
        with mock.patch.object(shares, "forms_gradient", return_value=formed):
            return factored.gradient_terms(*arguments)

    return engine


BOTH_FORMS = (with_form(True), with_form(False))


def terms_of(model, engines, *arguments):
    """The terms by each engine, as one program: that compiles faster than several."""
    return jax.jit(lambda *a: [engine(model.apply, *a) for engine in engines])(*arguments)


def check(model, x, labels=None, engines=(factored.gradient_terms,)):
    """Terms by these engines against those of `vmap(grad)`."""
    variables, direction = variables_and_direction(model, x)
    engines = (*engines, per_example.gradient_terms)
    *several, expected = terms_of(model, engines, variables, x, labels, direction)
    assert np.all(expected.squared_norm > 0)
    for terms in several:
        toy.assert_close(terms, expected, direction, tolerance())


# --- Layers, option by option ---

CONVOLUTIONS = {
    "3x3": {},
    "no bias": {"use_bias": False},
    "1x1, strides": {"kernel_size": (1, 1), "strides": 2},
    "valid": {"kernel_size": (3, 2), "padding": "VALID"},
    "lower case": {"padding": "same"},
    "same_lower": {"kernel_size": (4, 2), "padding": "SAME_LOWER"},
    "strides": {"strides": (2, 3)},
    "lists": {"kernel_size": [3, 2], "strides": [2, 1], "padding": [1, (0, 2)]},
    "one-sided": {"padding": ((0, 2), (3, 1)), "strides": 2},
    "dilation": {"kernel_size": (3, 2), "kernel_dilation": (2, 3)},
    "dilation, strides": {"kernel_dilation": 2, "strides": 2, "padding": 2},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4, "strides": 2},
    "ours": {"conv_general_dilated": dj.convolution.conv_general_dilated},
}
SMALL_MAPS = {
    "whole map": {"kernel_size": (3, 2), "padding": "VALID"},
    "larger than map": {"kernel_size": (7, 5), "strides": (2, 1)},
}
SEQUENCES = {
    "3": {"kernel_size": (3,)},
    "int": {"kernel_size": 4, "padding": "SAME_LOWER"},
    "dilation, strides": {"kernel_size": (3,), "strides": 2, "kernel_dilation": 2, "padding": 1},
}


def conv(**options):
    return nn.Conv(**{"features": 8, "kernel_size": (3, 3), **options})


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(options):
    check(alone(conv(**options)), images(), engines=BOTH_FORMS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", SMALL_MAPS.values(), ids=SMALL_MAPS)
def test_convolution_of_small_maps(options):
    check(alone(conv(**options)), images(3, 2), engines=BOTH_FORMS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", SEQUENCES.values(), ids=SEQUENCES)
def test_convolution_of_sequences(options):
    check(alone(conv(**options)), images()[:, :, 0], engines=BOTH_FORMS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (6, 4), (3, 2, 4)], ids=str)
def test_dense(shape, use_bias):
    layer = nn.Dense(6, use_bias=use_bias)
    check(alone(layer), draw((NUM_EXAMPLES, *shape)), engines=BOTH_FORMS)


@pytest.mark.parametrize("chunk_elements", [1, 2000, 2**30])
def test_how_many_are_formed_together_changes_nothing(chunk_elements, monkeypatch):
    monkeypatch.setattr(shares, "CHUNK_ELEMENTS", chunk_elements)
    check(model_of(lambda self, x: nn.PReLU()(conv(features=6)(x))), images(), engines=BOTH_FORMS)


NORMALIZATIONS = {
    "batch": nn.BatchNorm(use_running_average=True),
    "batch, no scale": nn.BatchNorm(use_running_average=True, use_scale=False),
    "batch, no bias": nn.BatchNorm(use_running_average=True, use_bias=False, axis=3),
    "ours": layers.BatchNorm(use_running_average=True),
    "layer": nn.LayerNorm(),
    "layer, no bias": nn.LayerNorm(use_bias=False, use_fast_variance=False),
    "layer, all axes": nn.LayerNorm(reduction_axes=(1, 2, 3)),
    "root mean square": nn.RMSNorm(),
    "group": nn.GroupNorm(2),
    "group, no scale": nn.GroupNorm(2, use_scale=False),
    "group of one": nn.GroupNorm(num_groups=None, group_size=1),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layer", NORMALIZATIONS.values(), ids=NORMALIZATIONS)
def test_normalization(layer):
    check(alone(layer), images(3, 2))


@pytest.mark.usefixtures("float64")
def test_embedding_of_repeated_tokens():
    tokens = np.random.default_rng(0).integers(-4, 4, (NUM_EXAMPLES, 3, 3))  # −1 is the last.
    check(alone(nn.Embed(4, 3)), tokens)
    check(alone(nn.Embed(300, 4)), np.abs(tokens).astype(np.uint8))


def masked(size, padding):
    """Embeds tokens, of which those that are `padding` count for nothing."""

    def function(self, x):
        y = nn.Embed(size, 3)(x)
        return jnp.where((x == padding)[..., None], 0, y).sum(axis=1)

    return model_of(function)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("padding", [4, 9, -5, 2**31 + 1, 2**40 + 1])
def test_padding_tokens_beyond_the_table(padding):
    tokens = np.random.default_rng(0).integers(-4, 4, (NUM_EXAMPLES, 6))
    tokens[:, 4:] = tokens[0, 2] = padding
    check(masked(4, padding), tokens)
    check(masked(1, 0), np.minimum(tokens, 3))  # A table of one row has it for every token.


@jax.custom_vjp
def straight_through(y):
    """Zeros in the place of NaN, but cotangents as if they were not."""
    return jnp.nan_to_num(y)


straight_through.defvjp(lambda y: (straight_through(y), None), lambda _, e: (e,))


@pytest.mark.usefixtures("float64")
def test_tokens_beyond_the_table_add_nothing_whatever_becomes_of_them():
    tokens = np.arange(NUM_EXAMPLES * 4).reshape(NUM_EXAMPLES, 4) % 7
    check(model_of(lambda self, x: straight_through(nn.Embed(4, 3)(x)).sum(axis=1)), tokens)


def test_tokens_beyond_the_table_that_are_not_masked_are_refused():
    model = model_of(lambda self, x: nn.Dense(3)(nn.Embed(4, 3)(x).mean(axis=1)))
    tokens = np.arange(12).reshape(4, 3) % 4
    variables, _ = variables_and_direction(model, tokens)
    beyond = np.where(tokens == 3, 4, tokens)
    view = dj.LearnerView(model.apply, variables, (tokens, np.zeros(4, int)), beyond)
    for name in ("dynamical", "entropy"):
        with pytest.raises(dj.UserError, match=r"3 of 4 .* are not finite"):
            dj.STRATEGIES[name]().query(jax.random.key(0), view, 1)


# --- Layers of other types, which are formed ---


class Scaled(nn.Module):
    """A layer of one's own, with parameters made in `setup`, one of them a list."""

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (4,))
        self.pair = self.param("pair", lambda key: [jnp.zeros((4,)), jnp.ones((4, 3))])

    def __call__(self, x):
        shape = (1,) * (x.ndim - 1) + (4,)
        return (x * self.scale.reshape(shape) + self.pair[0].reshape(shape)) @ self.pair[1]


class Activation(nn.Module):
    def __call__(self, x):
        return nn.tanh(x)


class Pair(nn.Module):
    """Owns parameters, holds a layer without, and returns two arrays."""

    activation: nn.Module

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.ones, (4, 3))
        return self.activation(y), y**2


class Overridden(nn.Dense):
    def __call__(self, x):
        return super().__call__(x) * x[..., :1]


LAYERS = {
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(1, 3)), images),
    "Einsum": (nn.Einsum((4, 3), "...d,dp->...p"), rows),
    "ConvTranspose": (nn.ConvTranspose(3, (3, 2), strides=(2, 1)), images),
    "ConvLocal": (nn.ConvLocal(3, (3, 2)), images),
    "InstanceNorm": (nn.InstanceNorm(), images),
    "PReLU": (nn.PReLU(), rows),
    "of one's own": (Scaled(), images),
    "a subclass of a known one": (Overridden(3), images),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("layer", "inputs"), LAYERS.values(), ids=LAYERS)
def test_layers_of_other_types(layer, inputs):
    check(alone(layer), inputs())


class Linear(nn.Module):
    """A model that is one layer."""

    @nn.compact
    def __call__(self, x):
        return dj.Outputs(x @ self.param("kernel", nn.initializers.ones, (4, 3)), x)


# --- Uses of layers that are covered ---


class Encoder(nn.Module):
    def setup(self):
        self.layer = nn.Dense(3)

    def encode(self, x):
        return self.layer(x)


def used_twice(self, x):
    y = nn.tanh(nn.Dense(4)(x))
    return y * y + nn.Dense(4)(y) + y


def attention(self, x):
    tokens = jnp.stack([x, jnp.sin(x), x**2], axis=1)
    return nn.MultiHeadDotProductAttention(2)(tokens, jnp.cos(tokens), deterministic=True)


def shares_scope(self, x):
    """Low-rank adaptation as its authors write it in Flax."""

    class LowRank(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3)
            nn.share_scope(self, layer)
            a = self.param("a", nn.initializers.ones, (4, 2))
            return layer(x) + x @ a @ self.param("b", nn.initializers.ones, (2, 3))

    return LowRank()(x)


def partitioned(self, x):
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    return nn.Dense(3, kernel_init=init)(x)


COVERED = {
    "two outputs": lambda self, x: sum(Pair(Activation())(nn.Dense(4)(x))),
    "output used twice": used_twice,
    "output not used": lambda self, x: (nn.Dense(2, name="idle")(x), nn.Dense(3)(x))[1],
    "gradient stopped": lambda self, x: nn.Dense(3)(x) + lax.stop_gradient(nn.Dense(3)(x)),
    "constant input": lambda self, x: nn.Dense(4)(jnp.ones((len(x), 2))) * x,
    "dropout": lambda self, x: nn.Dense(3)(nn.Dropout(0.5, deterministic=True)(nn.Dense(4)(x))),
    "Sequential": lambda self, x: nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])(x),
    "method of a container": lambda self, x: Encoder().encode(x),
    "attention": attention,
    "recurrent cell": lambda self, x: nn.LSTMCell(4)((x, jnp.sin(x)), x)[1],
    "BatchNorm told when called": lambda self, x: nn.BatchNorm()(x, use_running_average=True),
    "no mask": lambda self, x: nn.LayerNorm()(x, mask=None),
    "shared scope": shares_scope,
    "partitioned": partitioned,
}


@pytest.mark.parametrize("function", COVERED.values(), ids=COVERED)
def test_uses_that_are_covered(function):
    check(model_of(function), rows())


@pytest.mark.parametrize("labels", [None, np.array([2, 1, 0, 0, 2])], ids=["pseudo", "given"])
def test_labels(labels):
    check(Linear(), rows(), labels)


def test_saturated_examples():
    model = alone(nn.Dense(4))
    x = rows() * np.float32([[0.1], [1], [10], [1e6], [1]])
    variables, direction = variables_and_direction(model, x)
    engines = (factored.gradient_terms, per_example.gradient_terms)
    terms, expected = terms_of(model, engines, variables, x, None, direction)
    assert terms.squared_norm[3] == terms.inner_product[3] == 0  # σ(f) is the label exactly.
    toy.assert_close(terms, expected, direction, 1e-5)


# --- Refusals ---


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
    tokens = jnp.stack([x] * NUM_EXAMPLES, axis=1)
    place = nn.Embed(NUM_EXAMPLES, 4, name="layer")(jnp.arange(NUM_EXAMPLES))
    return nn.tanh(tokens + place[None])


def not_called(self, x):
    return nn.Dense(3)(x) + (nn.Dense(1, name="idle")(x) if self.is_initializing() else 0)


def doubled(lhs, rhs, *arguments, **options):
    return 2 * lax.conv_general_dilated(lhs, rhs, *arguments, **options)


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
    "dot_general": (lambda self, x: nn.Dense(3, dot_general=lax.dot_general)(x), anything),
    "promote_dtype": (lambda self, x: nn.Dense(3, promote_dtype=lambda *a, **_: a)(x), anything),
    "another convolution": (conv_layer(conv_general_dilated=doubled), anything),
    "masked kernel": (conv_layer(mask=jnp.ones((3, 3, 1, 3))), "layer: its kernel is masked"),
    "circular": (conv_layer(padding="CIRCULAR"), "layer: its padding is CIRCULAR"),
    "reflect": (conv_layer(padding="REFLECT"), "layer: its padding is REFLECT"),
    "dilated input": (conv_layer(input_dilation=2, padding=2), "layer: its input is dilated"),
    "two axes of examples": (conv_layer(kernel_size=(3,)), "layer: its input is not"),
    "3-D": (
        lambda self, x: conv_layer(kernel_size=(2, 2, 2))(self, x.reshape(-1, 1, 2, 2, 1)),
        "layer: its input is not",
    ),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_is_refused(function, message):
    model, x = model_of(function), jnp.asarray(rows())
    variables, direction = variables_and_direction(model, x)
    with pytest.raises(gradients.UnsupportedError) as raised:
        factored.gradient_terms(model.apply, variables, x, None, direction)
    assert message in str(raised.value)
    assert str(raised.value) == f"{raised.value.module}: {raised.value.why}"


def test_the_statistics_of_the_batch_are_refused():
    for batch_norm in (nn.BatchNorm, layers.BatchNorm):
        model, x = alone(batch_norm(use_running_average=False, name="layer")), rows()
        variables, direction = variables_and_direction(model, x)
        apply = lambda *a, model=model: model.apply(*a, mutable=["batch_stats"])[0]
        with pytest.raises(gradients.UnsupportedError, match="layer: the statistics of the batch"):
            factored.gradient_terms(apply, variables, jnp.asarray(x), None, direction)


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
@pytest.mark.parametrize("compiled", JITTED.values(), ids=JITTED)
def test_a_compiled_model_is_taken_apart_all_the_same(compiled):
    model, x = model_of(used_twice), rows().astype(np.float32)
    variables, direction = variables_and_direction(model, x)
    apply = compiled(model)
    expected = gradients.norms_and_products(apply, variables, x, direction, engine="vmap")
    for _ in range(2):
        terms = gradients.norms_and_products(apply, variables, x, direction)
        toy.assert_close(terms, expected, direction, 1e-5)
        apply(variables, jnp.array(x))  # From now on it is not traced again.


def test_a_decorator_is_not_undone():
    model, x = model_of(used_twice), rows().astype(np.float32)
    variables, direction = variables_and_direction(model, x)

    @functools.wraps(jax.jit(model.apply))  # With all attributes of what it wraps.
    def tripled(variables, x):
        return dj.Outputs(*(3 * part for part in model.apply(variables, x)))

    terms, expected = (
        gradients.norms_and_products(tripled, variables, x, direction, engine=engine)
        for engine in gradients.ENGINES
    )
    toy.assert_close(terms, expected, direction, 1e-5)


def test_a_model_compiled_out_of_sight_is_refused_also_once_it_has_been_traced():
    model, x = alone(nn.Dense(3)), jnp.asarray(rows())
    variables, direction = variables_and_direction(model, x)
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
    model = model_of(lambda self, x: nn.Dense(4, name="b")(nn.tanh(nn.Dense(4, name="a")(x))))
    x = jnp.asarray(rows())
    variables, direction = variables_and_direction(model, x)
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


@pytest.mark.parametrize(("function", "closes", "why"), CLOSED_OVER.values(), ids=CLOSED_OVER)
def test_what_apply_closes_over_is_not_lost(function, closes, why):
    model, x = model_of(function), rows().astype(np.float32)
    variables, direction = variables_and_direction(model, x)
    apply = closes(model)
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
@pytest.mark.parametrize(("function", "given", "more"), EXACT.values(), ids=EXACT)
def test_constants_that_apply_closes_over_are_exact(function, given, more):
    model, x = model_of(function), rows().astype(np.float32)
    whole = {**variables_and_direction(model, x)[0], **more}
    apply = lambda v, x: model.apply({**whole, "params": {**whole["params"], **v["params"]}}, x)
    variables = {name: jax.tree.map(lambda leaf: leaf + 1, whole[name]) for name in given}
    variables["params"].pop("idle", None)
    direction = drawn(variables["params"], seed=2)
    terms, expected = (
        gradients.norms_and_products(apply, variables, x, direction, engine=engine)
        for engine in gradients.ENGINES
    )
    toy.assert_close(terms, expected, direction, 1e-5)


@pytest.mark.parametrize("form", [lambda mean: mean, lambda mean: 2 * mean])
def test_statistics_made_of_parameters_are_no_constants(form):
    model, x = model_of(normalized(nn.BatchNorm)), rows().astype(np.float32)
    variables, direction = variables_and_direction(model, x)

    def apply(variables, x):
        statistics = {"mean": form(variables["params"]["Dense_1"]["bias"]), "var": jnp.ones(4)}
        return model.apply({**variables, "batch_stats": {"BatchNorm_0": statistics}}, x)

    with pytest.raises(gradients.UnsupportedError, match="parameters are used outside their own"):
        factored.gradient_terms(apply, variables, jnp.asarray(x), None, direction)


def doubling(call, args, kwargs, context):
    return (2 if isinstance(context.module, nn.Dense) else 1) * call(*args, **kwargs)


def test_other_interceptors_are_refused():
    def inside(self, x):
        with nn.intercept_methods(doubling):
            return nn.Dense(3, name="layer")(x)

    def around(variables, x):
        with nn.intercept_methods(doubling):
            return alone(nn.Dense(3, name="layer")).apply(variables, x)

    for apply in (model_of(inside).apply, around):
        model, x = alone(nn.Dense(3, name="layer")), jnp.asarray(rows())
        variables, direction = variables_and_direction(model, x)
        with pytest.raises(gradients.UnsupportedError, match="layer: other method interceptors"):
            factored.gradient_terms(apply, variables, x, None, direction)


class OfItsCall(nn.Module):
    """A layer that depends on what its call was given besides the input."""

    asks: object

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.ones, (4, 3))
        return 2 * y if self.asks(self) else y


@pytest.mark.parametrize(
    ("asks", "options"),
    [
        (lambda self: self.has_rng("dropout"), {"rngs": {"dropout": jax.random.key(0)}}),
        (lambda self: self.is_mutable_collection("stats"), {"mutable": ["stats"]}),
    ],
    ids=["rngs", "mutable"],
)
def test_layers_that_may_depend_on_their_call_are_refused(asks, options):
    model, x = alone(OfItsCall(asks, name="layer")), jnp.asarray(rows())
    variables, direction = variables_and_direction(model, x)
    outputs = lambda given: given[0] if "mutable" in options else given
    apply = lambda *a: outputs(model.apply(*a, **options))
    with pytest.raises(gradients.UnsupportedError, match="layer: OfItsCall may depend on random"):
        factored.gradient_terms(apply, variables, x, None, direction)


def test_a_layer_may_know_its_name():
    check(alone(OfItsCall(lambda self: self.name == "second", name="second")), rows())


def test_complex_parameters_are_refused():
    layer = Own(lambda x, w: jnp.abs(x @ (w + 1j * w)), name="layer")
    check(alone(layer), rows())  # Complex numbers within are no matter.
    model, x = alone(layer), jnp.asarray(rows())
    variables, direction = variables_and_direction(model, x)
    variables = jax.tree.map(lambda leaf: leaf + 1j * leaf, variables)
    with pytest.raises(gradients.UnsupportedError, match="the model: its parameters are complex"):
        factored.gradient_terms(model.apply, variables, x, None, direction)


def test_batch_statistics_without_parameters_are_refused():
    free = {"use_scale": False, "use_bias": False, "name": "norm"}
    model = model_of(lambda self, x: nn.Dense(3)(nn.BatchNorm(False, **free)(x)))
    variables, direction = variables_and_direction(model, rows())
    apply = lambda *a: model.apply(*a, mutable=["batch_stats"])[0]
    with pytest.raises(gradients.UnsupportedError, match="norm: the statistics of the batch"):
        factored.gradient_terms(apply, variables, jnp.asarray(rows()), None, direction)


HALF = {
    "dense": lambda **types: nn.Dense(6, **types),
    "dense on positions, Gram": lambda **types: Positions(nn.Dense(40, **types)),
    "layer norm": lambda **types: nn.LayerNorm(**types),
    "group norm": lambda **types: nn.GroupNorm(num_groups=2, **types),
}


class Positions(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(jnp.stack([x, -x], axis=1))


@pytest.mark.parametrize("layer", HALF.values(), ids=HALF)
@pytest.mark.parametrize("formed", [True, False])
def test_half_precision_is_summed_in_single(layer, formed):
    # Gradients that are small or a direction that is large for float16, in which layers compute.
    model, x = alone(layer(dtype=jnp.float16)), jnp.asarray(rows(), jnp.float32)
    variables, direction = variables_and_direction(model, x)
    direction = jax.tree.map(lambda leaf: 1e6 * leaf, direction)
    engines = (with_form(formed), per_example.gradient_terms)
    terms, expected = terms_of(model, engines, variables, x, None, direction)
    toy.assert_close(terms, expected, direction, 1e-2)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: (lambda h: Own(lambda x, w: h * (x @ w))(x))(nn.Dense(1)(x)),
        lambda self, x: Own(lambda x, w: (x @ w, object()))(x)[0],
    ],
    ids=["sees another array", "gives more than arrays"],
)
def test_models_that_cannot_be_taken_apart_are_done_by_vmap(function):
    model, x = model_of(function), rows().astype(np.float32)
    variables, direction = variables_and_direction(model, x)
    with pytest.warns(UserWarning, match=r"no factored gradients \(.*\); using vmap"):
        terms = gradients.norms_and_products(model.apply, variables, x, direction)
    expected = per_example.gradient_terms(model.apply, variables, x, None, direction)
    toy.assert_close(terms, expected, direction, 1e-5)


def test_errors_of_the_model_are_its_own():
    model = alone(nn.Dense(3))
    variables, direction = variables_and_direction(model, rows())
    with pytest.raises(Exception, match="kernel"):
        factored.gradient_terms(model.apply, variables, draw((5, 9)), None, direction)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("called twice", "layer: it is called more than once"),
        ("own parameter", "Model: Model owns parameters beside further layers"),
        ("lifted scan", "cell/layer: it is called inside a JAX transformation"),
    ],
)
def test_what_is_refused_is_done_by_vmap_with_a_warning(name, why):
    model, x = model_of(REFUSED[name][0]), rows()
    variables, direction = variables_and_direction(model, x)
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


# --- Whole models ---

MODELS = {
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
        return np.float32(np.sqrt(2 / fan_in) * (shape.ndim > 1)) * draw(shape.shape)

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
    direction = drawn(variables["params"], seed=2)
    both = jax.jit(lambda *a: [engine(model.apply, *a) for engine in gradients.ENGINES.values()])
    return model, variables, x, y, direction, both


@pytest.mark.parametrize("name", [*list(MODELS)[:-1], slow("vgg11")])
def test_models_at_initialization_and_with_any_values(name):
    _, variables, x, y, direction, both = setting(name)
    for values in (variables, drawn(variables, seed=1)):
        toy.assert_close(*both(values, x, y, direction), direction, 1e-5)


@pytest.mark.parametrize(
    "name",
    ["cnn, 8x8", "resnet18", slow("resnet18, cifar stem"), slow("vgg11")],
)
def test_models_after_training(name):
    model, variables, x, y, direction, both = setting(name)
    toy.assert_close(*both(trained(model, variables, x, y), x, y, direction), direction, 1e-5)


# --- Memory ---


@pytest.mark.parametrize(
    ("module", "n"),
    [(dj.models.VGG11(10), 128), (dj.models.ResNet18(10), 128)],
    ids=["vgg11", "resnet18"],
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
