import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from dynamical_jax import convolution

FORMS = ("patch_form", "row_form", "lax_form")
SAME = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
SIZES = {  # images, channels, features, kernel
    "plain": ((8, 7), 5, 4, (3, 3)),
    "even kernel": ((6, 9), 3, 5, (4, 2)),
    "1x1 kernel": ((5, 6), 4, 3, (1, 1)),
    "1x1 map": ((1, 1), 6, 5, (3, 3)),
    "kernel larger than map": ((2, 3), 3, 4, (9, 7)),
}
WINDOWS = {  # strides, padding, dilation of the kernel
    "same": ((1, 1), "SAME", (1, 1)),
    "valid": ((1, 1), "VALID", (1, 1)),
    "same_lower, strides": ((2, 2), "SAME_LOWER", (1, 1)),
    "one-sided padding": ((1, 2), ((2, 0), (1, 3)), (1, 1)),
    "wide padding": ((3, 2), ((4, 5), (6, 4)), (1, 1)),
    "cropping": ((1, 1), ((-1, 5), (4, -1)), (1, 1)),
    "dilated": ((1, 1), "SAME", (2, 3)),
    "dilated, strides": ((2, 1), ((3, 2), (2, 4)), (2, 2)),
}
CASES = [
    *(("plain", window) for window in WINDOWS),
    ("even kernel", "same_lower, strides"),
    ("even kernel", "dilated, strides"),
    ("1x1 kernel", "wide padding"),
    ("1x1 map", "same"),
    ("1x1 map", "dilated, strides"),
    ("kernel larger than map", "same"),
    ("kernel larger than map", "wide padding"),
]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.result_type(float))


def assert_close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    tolerance = {"float32": 1e-5, "float64": 1e-12}[str(expected.dtype)]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def value_and_gradients(convolve):
    """As one program: convolution, and its gradients in images and kernel for a cotangent e."""

    def function(x, w, e):
        y, pullback = jax.vjp(convolve, x, w)
        return y, *pullback(e)

    return jax.jit(function)


def by(form, monkeypatch):
    """`conv_general_dilated`, by this form whatever the rule says."""
    monkeypatch.setattr(convolution, "choose_form", lambda *_: getattr(convolution, form))
    return convolution.conv_general_dilated


def compare(convolve, size, window):
    image_size, channels, features, kernel_size = SIZES[size]
    strides, padding, dilation = WINDOWS[window]
    options = {**SAME, "window_strides": strides, "padding": padding, "rhs_dilation": dilation}
    x, w = draw(2, *image_size, channels), draw(*kernel_size, channels, features, seed=1)
    reference = functools.partial(lax.conv_general_dilated, **options)
    e = draw(*jax.eval_shape(reference, x, w).shape, seed=2)
    actual = value_and_gradients(functools.partial(convolve, **options))(x, w, e)
    for one, other in zip(actual, value_and_gradients(reference)(x, w, e), strict=True):
        assert_close(one, other)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("size", "window"), CASES)
@pytest.mark.parametrize("form", [*FORMS[:2], pytest.param("lax_form", marks=pytest.mark.slow)])
def test_every_form_is_the_convolution_of_lax(form, size, window, monkeypatch):
    compare(by(form, monkeypatch), size, window)


@pytest.mark.parametrize(("size", "window"), [CASES[0], CASES[7]])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_float32(form, size, window, monkeypatch):
    compare(by(form, monkeypatch), size, window)


def test_rule_chooses_as_measured():
    def form(height, width, kernel, channels, features, stride=1):
        window = convolution.make_window((height, width), kernel, (stride, stride), "SAME")
        images, weights = (2, height, width, channels), (*kernel, channels, features)
        return convolution.choose_form(images, weights, window)

    assert form(2, 2, (3, 3), 512, 512) is convolution.patch_form
    assert form(8, 8, (3, 3), 512, 512, stride=2) is convolution.patch_form
    assert form(32, 32, (1, 1), 64, 64) is convolution.patch_form
    assert form(32, 32, (3, 3), 3, 64) is convolution.patch_form
    assert form(32, 32, (5, 5), 3, 6) is convolution.row_form
    assert form(32, 32, (7, 7), 3, 64, stride=2) is convolution.lax_form
    assert form(8, 8, (3, 3), 64, 64) is convolution.lax_form


def test_taps_on_padding_are_left_out():
    window = convolution.make_window((1, 2), (3, 5), padding="SAME")
    kernel, cropped = convolution.crop_kernel((1, 2), jnp.ones((3, 5, 1, 1)), window)
    assert kernel.shape[:2] == cropped.size == (1, 3)
    assert cropped.output_size((1, 2)) == window.output_size((1, 2)) == (1, 2)


OPTIONS = {
    "as by default": {},
    "1-D": {"kernel_size": (3,)},
    "3-D": {"kernel_size": (2, 2, 2)},
    "groups": {"feature_group_count": 2},
    "dilated input": {"input_dilation": 2, "padding": ((1, 1), (1, 1))},
    "circular": {"padding": "CIRCULAR"},
    "strides": {"strides": 2},
    "dilated": {"kernel_dilation": 2},
    "bfloat16": {"dtype": jnp.bfloat16},
    "precision": {"precision": "highest"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_as_flax_calls_it(options):
    layer = functools.partial(nn.Conv, **{"features": 4, "kernel_size": (3, 3), **options})
    ours = layer(conv_general_dilated=convolution.conv_general_dilated)
    x = draw(2, *[4] * len(ours.kernel_size), 4)
    shapes = jax.eval_shape(layer().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=1), shapes)
    actual, expected = (jax.jit(model.apply)(variables, x) for model in (ours, layer()))
    assert actual.dtype == expected.dtype
    tolerance = 1e-5 if options.get("dtype") is None else 5e-2
    np.testing.assert_allclose(
        *(np.asarray(y, np.float32) for y in (actual, expected)), atol=tolerance
    )


def test_no_examples_and_no_outputs():
    convolve = functools.partial(convolution.conv_general_dilated, **{**SAME, "padding": "VALID"})
    assert convolve(draw(0, 5, 5, 2), draw(3, 3, 2, 4)).shape == (0, 3, 3, 4)
    assert convolve(draw(2, 2, 5, 2), draw(3, 3, 2, 4)).shape == (2, 0, 3, 4)


# --- Transformations ---

x, w = draw(2, 4, 4, 2), draw(3, 3, 2, 3, seed=1)
tangents = draw(2, 4, 4, 2, seed=2), draw(3, 3, 2, 3, seed=3)
TRANSFORMED = {
    "vmap over images": lambda f: jax.vmap(f, (0, None))(np.stack([x, 2 * x, -x]), w),
    "vmap over kernels": lambda f: jax.vmap(f, (None, 0))(x, np.stack([w, 2 * w, -w])),
    "vmap over both": lambda f: jax.vmap(f)(np.stack([x, -x]), np.stack([w, 3 * w])),
    "jvp": lambda f: jax.jvp(f, (x, w), tangents),
    "jvp in images": lambda f: jax.jvp(lambda x: f(x, w), (x,), tangents[:1]),
    "jvp in the kernel": lambda f: jax.jvp(lambda w: f(x, w), (w,), tangents[1:]),
    "vmap of grad": lambda f: jax.vmap(
        jax.grad(lambda w, x: jnp.sum(f(x[None], w) ** 3)), (None, 0)
    )(w, x),
    "grad of a remat": lambda f: jax.grad(lambda w: jnp.sum(jax.checkpoint(f)(x, w) ** 3))(w),
    "hessian": lambda f: jax.hessian(lambda w: jnp.sum(f(x[:, :, :, :1], w) ** 3))(w[:, :1, :1]),
    "hessian in both": lambda f: jax.grad(
        lambda x: jnp.vdot(x, jax.grad(lambda x, w: jnp.sum(f(x, w) ** 3))(x, w + x[0, 0, 0, 0]))
    )(x),
    "no tangent": lambda f: jax.grad(lambda x: x.sum() * f(*lax.stop_gradient((x, w))).sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("form", FORMS)
def test_transformations(form, name, monkeypatch):
    transformed = TRANSFORMED[name]
    ours = functools.partial(by(form, monkeypatch), **SAME)
    actual, expected = (
        jax.jit(lambda convolve=convolve: transformed(convolve))()
        for convolve in (ours, functools.partial(lax.conv_general_dilated, **SAME))
    )
    jax.tree.map(assert_close, actual, expected)


# --- What is compiled ---


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_other_platforms_get_the_convolution_of_lax(platform):
    def lowered(platform):
        ours = functools.partial(convolution.conv_general_dilated, **SAME)
        return jax.jit(ours).trace(x, w).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.convolution" not in lowered("cpu")
    text = lowered(platform)
    assert "stablehlo.convolution" in text
    assert "dot_general" not in text


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators have kernels of their own")
@pytest.mark.parametrize(
    ("image_shape", "kernel_shape", "num_convolutions"),
    [
        ((2, 4, 4, 9), (3, 3, 9, 9), 0),
        ((2, 9, 9, 3), (5, 5, 3, 3), 0),
        ((2, 8, 8, 9), (3, 3, 9, 9), 1),  # The forward pass, which loses nothing in a loop.
    ],
    ids=FORMS,
)
def test_gradients_in_a_loop_are_matrix_products(image_shape, kernel_shape, num_convolutions):
    def count(convolve):
        def step(_, xw):
            gradient = jax.grad(lambda x, w: jnp.sum(convolve(x, w, **SAME) ** 3), (0, 1))(*xw)
            return jax.tree.map(lambda value, slope: value - 0.1 * slope, xw, gradient)

        loop = jax.jit(lambda x, w: lax.fori_loop(0, 3, step, (x, w)))
        text = loop.lower(draw(*image_shape), draw(*kernel_shape)).compile().as_text()
        assert " dot(" in text or convolve is lax.conv_general_dilated
        return text.count(" convolution(")

    assert count(convolution.conv_general_dilated) == num_convolutions
    assert count(lax.conv_general_dilated) == 3


# --- Pooling ---

POOLS = {  # window, strides, padding
    "2x2": ((2, 2), (2, 2), "VALID"),
    "3x3, padded": ((3, 3), (2, 2), ((1, 1), (1, 1))),
    "same": ((2, 3), (2, 2), "SAME"),
    "overlapping": ((3, 2), None, "SAME"),
    "strides over the edge": ((3, 3), (4, 5), "VALID"),
}


@pytest.mark.parametrize(("window", "strides", "padding"), POOLS.values(), ids=POOLS)
def test_max_pool_is_that_of_flax(window, strides, padding):
    images = draw(3, 7, 8, 2).round()  # Many ties, of zeros of both signs as well.
    assert np.signbit(images[images == 0]).any()
    parts = []
    for pool in (convolution.max_pool, nn.max_pool):
        pool = functools.partial(pool, window_shape=window, strides=strides, padding=padding)

        def function(x, e, pool=pool):
            y, pullback = jax.vjp(pool, x)
            return y, pullback(e)[0]

        e = draw(*jax.eval_shape(pool, images).shape, seed=1)
        parts.append(jax.jit(function)(images, e))
        unusual = images.copy()
        unusual[0, 3, 3], unusual[1, 2, 2], unusual[2] = np.nan, np.inf, -np.inf
        parts[-1] += (jax.jit(pool)(unusual),)
    (y, gradient, of_unusual), expected = parts
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_allclose(gradient, expected[1], atol=1e-6)
    np.testing.assert_array_equal(of_unusual, expected[2])


def test_ties_give_the_first_of_a_window_the_whole_cotangent():
    gradient = jax.grad(lambda x: convolution.max_pool(x, (2, 2), (2, 2)).sum())
    np.testing.assert_array_equal(
        jax.jit(gradient)(np.ones((1, 2, 4, 1), np.float32))[0, :, :, 0],
        [[1, 0, 1, 0], [0, 0, 0, 0]],
    )


def test_max_pool_has_no_scatter_on_cpu_and_is_that_of_lax_elsewhere():
    gradient = jax.jit(jax.grad(lambda x: convolution.max_pool(x, (2, 2), (2, 2)).sum()))
    for platform, selects in {"cpu": False, "cuda": True, "tpu": True}.items():
        text = gradient.trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.select_and_scatter" in text) == selects
