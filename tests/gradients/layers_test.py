"""Layers, option by option: the terms of each are those of `vmap(grad)`.

A program for each option takes 0.4 s to compile. By default only the most important options have
one, and the others of a layer share one; `-m slow` gives these theirs, too.
"""

import gradient_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax.gradients import shares
from dynamical_jax.models import layers

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
    "dilated input": {"input_dilation": (2, 3), "padding": 2, "strides": 2},
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


ALONE = ("3x3", "strides", "dilation", "groups")


def conv(**options):
    return nn.Conv(**{"features": 8, "kernel_size": (3, 3), **options})


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("table", "shape"), [(CONVOLUTIONS, (9, 7)), (SMALL_MAPS, (3, 2))], ids=["maps", "small maps"]
)
def test_other_convolutions(table, shape):
    rest = [options for name, options in table.items() if name not in ALONE]
    model = checks.side_by_side([conv(**options) for options in rest])
    checks.check_terms(model, checks.images(*shape), engines=checks.BOTH_FORMS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", checks.params(CONVOLUTIONS, quick=ALONE))
def test_convolution(options):
    checks.check_terms(
        checks.single_layer(conv(**options)), checks.images(), engines=checks.BOTH_FORMS
    )


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", SMALL_MAPS.values(), ids=SMALL_MAPS)
def test_convolution_of_small_maps(options):
    checks.check_terms(
        checks.single_layer(conv(**options)), checks.images(3, 2), engines=checks.BOTH_FORMS
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", SEQUENCES.values(), ids=SEQUENCES)
def test_convolution_of_sequences(options):
    checks.check_terms(
        checks.single_layer(conv(**options)), checks.images()[:, :, 0], engines=checks.BOTH_FORMS
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(4,), (6, 4), (3, 2, 4)], ids=str)
def test_dense(shape):
    checks.check_terms(
        checks.side_by_side([nn.Dense(6), nn.Dense(6, use_bias=False)]),
        checks.draw((checks.NUM_EXAMPLES, *shape)),
        engines=checks.BOTH_FORMS,
    )


@pytest.mark.parametrize("chunk_elements", [1, 2000, pytest.param(2**30, marks=pytest.mark.slow)])
def test_how_many_are_formed_together_changes_nothing(chunk_elements, monkeypatch):
    monkeypatch.setattr(shares, "CHUNK_ELEMENTS", chunk_elements)
    checks.check_terms(
        checks.model_from(lambda self, x: nn.PReLU()(conv(features=6)(x))),
        checks.images(),
        engines=checks.BOTH_FORMS,
    )


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
    "instance": nn.InstanceNorm(),
    "group of one": nn.GroupNorm(num_groups=None, group_size=1),
}


@pytest.mark.usefixtures("float64")
def test_all_normalizations():
    checks.check_terms(checks.side_by_side(NORMALIZATIONS.values()), checks.images(3, 2))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layer", checks.params(NORMALIZATIONS, quick=("batch", "layer")))
def test_normalization(layer):
    checks.check_terms(checks.single_layer(layer), checks.images(3, 2))


@pytest.mark.usefixtures("float64")
def test_embedding_of_repeated_tokens():
    shape = (checks.NUM_EXAMPLES, 3, 3)
    tokens = np.random.default_rng(0).integers(-4, 4, shape)  # −1 is the last.
    checks.check_terms(checks.single_layer(nn.Embed(4, 3)), tokens)
    checks.check_terms(checks.single_layer(nn.Embed(300, 4)), np.abs(tokens).astype(np.uint8))


def masked(size, padding):
    """Embeds tokens, of which those that are `padding` count for nothing."""

    def function(self, x):
        y = nn.Embed(size, 3)(x)
        return jnp.where((x == padding)[..., None], 0, y).sum(axis=1)

    return checks.model_from(function)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "padding",
    [4, -5, 2**40 + 1, *[pytest.param(size, marks=pytest.mark.slow) for size in (9, 2**31 + 1)]],
)
def test_padding_tokens_beyond_the_table(padding):
    tokens = np.random.default_rng(0).integers(-4, 4, (checks.NUM_EXAMPLES, 6))
    tokens[:, 4:] = tokens[0, 2] = padding
    checks.check_terms(masked(4, padding), tokens)
    # A table of one row has it for every token.
    checks.check_terms(masked(1, 0), np.minimum(tokens, 3))


@jax.custom_vjp
def straight_through(y):
    """Zeros in the place of NaN, but cotangents as if they were not."""
    return jnp.nan_to_num(y)


straight_through.defvjp(lambda y: (straight_through(y), None), lambda _, e: (e,))


@pytest.mark.usefixtures("float64")
def test_tokens_beyond_the_table_add_nothing_whatever_becomes_of_them():
    tokens = np.arange(checks.NUM_EXAMPLES * 4).reshape(checks.NUM_EXAMPLES, 4) % 7
    checks.check_terms(
        checks.model_from(lambda self, x: straight_through(nn.Embed(4, 3)(x)).sum(axis=1)), tokens
    )


def test_tokens_beyond_the_table_that_are_not_masked_are_refused():
    model = checks.model_from(lambda self, x: nn.Dense(3)(nn.Embed(4, 3)(x).mean(axis=1)))
    tokens = np.arange(12).reshape(4, 3) % 4
    variables, _ = checks.variables_and_direction(model, tokens)
    beyond = np.where(tokens == 3, 4, tokens)
    view = dj.LearnerView(model.apply, variables, (tokens, np.zeros(4, int)), beyond)
    for name in ("dynamical", "entropy"):
        with pytest.raises(dj.UserError, match=r"3 of 4 .* are not finite"):
            dj.STRATEGIES[name]().query(jax.random.key(0), view, 1)


VOLUMES = {
    "3x3x2": {"kernel_size": (3, 3, 2)},
    "strides, dilation, groups": {
        "kernel_size": (2, 3, 1),
        "strides": (1, 2, 1),
        "kernel_dilation": (1, 1, 2),
        "padding": "VALID",
        "feature_group_count": 2,
    },
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", VOLUMES.values(), ids=VOLUMES)
def test_convolution_of_volumes(options):
    volumes = checks.draw((checks.NUM_EXAMPLES, 3, 4, 2, 4))
    checks.check_terms(checks.single_layer(conv(**options)), volumes, engines=checks.BOTH_FORMS)


TRANSPOSED = {
    "strides": {"kernel_size": (3, 2), "strides": (2, 1)},
    "valid": {"kernel_size": (2, 3), "strides": (3, 2), "padding": "VALID", "use_bias": False},
    "turned": {"kernel_size": (3, 2), "strides": (2, 3), "transpose_kernel": True},
    "dilation, numbers": {"kernel_size": 3, "kernel_dilation": 2, "padding": 3, "strides": (2,)},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolution(options):
    x = checks.images(4, 3) if options["kernel_size"] != 3 else checks.images(4, 1)[:, :, 0]
    layer = nn.ConvTranspose(features=3, **options)
    checks.check_terms(checks.single_layer(layer), x, engines=checks.BOTH_FORMS)


CONTRACTIONS = {
    "to heads": nn.DenseGeneral((2, 3)),
    "from heads": nn.DenseGeneral(5, axis=(-2, -1), use_bias=False),
    "axes in another order": nn.DenseGeneral((2, 3), axis=(3, 1)),
    "einsum": nn.Einsum((4, 3), "...d,dp->...p"),
    "a kernel for each head": nn.Einsum((3, 4, 5), "abhc,hcp->abhp"),
    "turned": nn.Einsum((5, 3, 4), "abhc,phc->apbh"),
    "everything": nn.Einsum((2, 5, 3, 4), "abhc,qphc->ahqbp", use_bias=False),
}


@pytest.mark.usefixtures("float64")
def test_all_contractions():
    model = checks.side_by_side(CONTRACTIONS.values())
    checks.check_terms(model, checks.images(2, 3), engines=checks.BOTH_FORMS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layer", checks.params(CONTRACTIONS, quick=("to heads",)))
def test_contractions(layer):
    checks.check_terms(checks.single_layer(layer), checks.images(2, 3), engines=checks.BOTH_FORMS)


class Tokens(nn.Module):
    """A class token, positions and a scale, each one line."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal()
        x = jnp.concatenate([dj.models.Parameter((1, 4), normal, name="token")(x), x], axis=1)
        x = x + dj.models.Parameter(x.shape[1:], normal, name="positions")(x)
        return nn.tanh(x * dj.models.Parameter((1, 4), normal, name="scale")(x))


@pytest.mark.usefixtures("float64")
def test_parameters_by_themselves():
    model = checks.model_from(lambda self, x: nn.Dense(3)(Tokens()(x).mean(axis=1)))
    checks.check_terms(model, checks.draw((checks.NUM_EXAMPLES, 3, 4)))


@pytest.mark.usefixtures("float64")
def test_attention():
    def function(self, x):
        attention = nn.MultiHeadDotProductAttention(2, normalize_qk=True)
        return attention(x, jnp.sin(x), deterministic=True)

    model = checks.model_from(function)
    checks.check_terms(model, checks.draw((checks.NUM_EXAMPLES, 3, 4)), engines=checks.BOTH_FORMS)


class Scaled(nn.Module):
    """A custom layer with parameters made in `setup`, one of them a list."""

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (4,))
        self.pair = self.param("pair", lambda key: [jnp.zeros((4,)), jnp.ones((4, 3))])

    def __call__(self, x):
        shape = (1,) * (x.ndim - 1) + (4,)
        return (x * self.scale.reshape(shape) + self.pair[0].reshape(shape)) @ self.pair[1]


class Overridden(nn.Dense):
    def __call__(self, x):
        return super().__call__(x) * x[..., :1]


LAYERS = {
    "ConvLocal": (nn.ConvLocal(3, (3, 2)), checks.images),
    "PReLU": (nn.PReLU(), checks.rows),
    "of one's own": (Scaled(), checks.images),
    "a subclass of a known one": (Overridden(3), checks.images),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("layer", "inputs"), LAYERS.values(), ids=LAYERS)
def test_layers_of_other_types(layer, inputs):
    checks.check_terms(checks.single_layer(layer), inputs())
