"""NNX modules wherever a model goes: as exact, and as fast, as Linen's."""

import functools

import gradient_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn
from flax import nnx

import dynamical_jax as dj
from dynamical_jax import gradients
from dynamical_jax.gradients import factored, per_example

KEY = jax.random.key(0)


class Own(nnx.Module):
    """A layer of no known type."""

    def __init__(self, rngs):
        self.gain = nnx.Param(rngs.params.normal((4,)))

    def __call__(self, x):
        return jnp.sin(x * self.gain.reshape(1, 1, 1, 4))


class Everything(nnx.Module):
    """Every kind of layer that is known, one that is not, and some within lists."""

    def __init__(self, rngs):
        options = {"rngs": rngs}
        self.embed = nnx.Embed(7, 4, **options)
        self.convs = nnx.List(
            [
                nnx.Conv(4, 4, (3, 2), strides=2, feature_group_count=2, **options),
                nnx.ConvTranspose(4, 4, (2, 3), strides=2, **options),
            ]
        )
        self.norms = nnx.List(
            [
                nnx.BatchNorm(4, **options),
                nnx.LayerNorm(4, **options),
                nnx.RMSNorm(4, **options),
                nnx.GroupNorm(4, 2, **options),
                nnx.InstanceNorm(4, **options),
            ]
        )
        self.own = Own(rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, **options)
        self.dropout = nnx.Dropout(0.5, **options)
        self.einsum = nnx.Einsum("abc,cd->abd", (4, 4), (4,), **options)
        self.lora = nnx.LoRA(4, 2, 4, **options)
        self.last = nnx.Linear(4, 3, **options)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for conv in self.convs:
            x = nnx.tanh(conv(x))
        for norm in self.norms:
            x = norm(x)
        x = self.own(x).reshape(len(x), -1, 4)
        x = self.dropout(x + self.attention(x))
        return self.last(self.lora(jnp.sin(self.einsum(x))).mean(axis=1))


def compare(module, x, tolerance):
    model, variables = dj.models.from_nnx(module)
    variables = checks.draw_like(variables, seed=1)
    direction = checks.draw_like(variables["params"], seed=2)
    engines = (factored.gradient_terms, per_example.gradient_terms)
    terms, expected = checks.compute_terms(model, engines, variables, x, None, direction)
    toy.assert_close(terms, expected, direction, tolerance)


TOKENS = np.random.default_rng(0).integers(0, 7, (checks.NUM_EXAMPLES, 4, 3))


def test_every_layer_in_float64(float64):
    compare(Everything(nnx.Rngs(0)), TOKENS, 1e-10)


@pytest.mark.slow  # In float64: above.
def test_every_layer_in_float32():
    compare(Everything(nnx.Rngs(0)), TOKENS, 2e-5)


# --- What is refused ---


class Small(nnx.Module):
    """Two layers, used in some way."""

    def __init__(self, function, **more):
        rngs = nnx.Rngs(0)
        self.layer, self.last = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=rngs)
        self.function = function
        for name, value in more.items():
            setattr(self, name, value)

    def __call__(self, x):
        return self.last(self.function(self, x))


def tied():
    module = Small(
        lambda self, x: self.other(self.layer(x)), other=nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    )
    module.other.kernel = module.layer.kernel
    return module


def scanned(self, x):
    scan = nnx.scan(
        lambda x, layer: layer(x), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2
    )
    return scan(x, self.layer)


REFUSED = {
    "called twice": (
        Small(lambda self, x: self.layer(self.layer(x))),
        "layer: it is called more than once",
    ),
    "tied": (tied(), "other: it is applied with other variables than its own"),
    "not called": (Small(lambda self, x: x), "no layer that is called owns layer/bias"),
    "own parameter": (
        Small(lambda self, x: x * self.gain.reshape(1, 4), gain=nnx.Param(jnp.ones(4))),
        "Small: Small owns parameters beside further layers",
    ),
    "outside of its layer": (
        Small(lambda self, x: self.layer(x) @ self.layer.kernel),
        "the model: parameters are used outside their own layer",
    ),
    "statistics of the batch": (
        Small(lambda self, x: self.layer(self.norm(x, use_running_average=False))),
        "norm: the statistics of the batch mix its examples",
    ),
    "scan": (Small(scanned), "Linear: it is called inside a JAX transformation"),
    "jit": (
        Small(lambda self, x: nnx.jit(lambda layer, x: layer(x))(self.layer, x)),
        "Linear: it is called inside a JAX transformation",
    ),
}


@pytest.mark.parametrize(("module", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_is_refused(module, why):
    model, variables = dj.models.from_nnx(module)
    x = jnp.asarray(checks.rows(), jnp.float32)
    with pytest.raises(gradients.UnsupportedError) as raised:
        factored.check_supported(model.apply, variables, x)
    assert why in str(raised.value)


# --- Twins ---


class Linen(nn.Module):
    """A network with BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x)).mean(axis=(1, 2))
        return nn.Dense(toy.NUM_CLASSES, name="last")(x), x


class Twin(nnx.Module):
    """`Linen` in NNX, with dropout that may be 0."""

    def __init__(self, *, dropout=0.0, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(4, toy.NUM_CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))
        return self.last(self.dropout(x)), x


LINEN, NNX = toy.standardized(Linen()), toy.standardized(Twin(rngs=nnx.Rngs(0)))


def test_queries_are_those_of_the_linen_twin(recwarn):
    variables = toy.variables(LINEN)
    own = {name: tree["model"] for name, tree in variables.items()}
    module = Twin(rngs=nnx.Rngs(1))
    dj.models.into_nnx(own, module)
    raw = toy.images(20).astype(np.float32)
    x = np.asarray(LINEN.standardize(raw))
    labeled = dj.Examples(x[:6], toy.labels(6))
    views = (
        dj.LearnerView(Linen().apply, own, labeled, x[6:]),
        dj.LearnerView.from_nnx(module, labeled, x[6:]),
    )
    for name in ("dynamical", "badge", "margin"):
        linen, of_nnx = (dj.STRATEGIES[name]().query(KEY, view, 5) for view in views)
        np.testing.assert_array_equal(of_nnx.positions, linen.positions)
        np.testing.assert_allclose(of_nnx.scores, linen.scores, rtol=1e-5)
    assert not recwarn.list  # No engine but the factored one was needed.


def test_training_is_that_of_the_linen_twin():
    # Five examples by four: the last rows of each step fill it up, also in BatchNorm.
    variables, labeled = toy.variables(LINEN), toy.examples(5)
    config = dj.TrainingConfig(max_epochs=4, batch_size=4, learning_rate=0.01, target_loss=1e-9)
    linen, of_nnx = (
        dj.training.fit(model, variables, labeled, config, seed=0) for model in (LINEN, NNX)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        of_nnx.variables,
        linen.variables,
    )
    moved = of_nnx.variables["batch_stats"]["model"]["norm"]["mean"]
    assert np.any(moved != variables["batch_stats"]["model"]["norm"]["mean"])


# --- Experiments ---


def test_an_experiment_starts_from_the_module_and_is_resumed_bit_for_bit(dataset):
    module = Twin(dropout=0.5, rngs=nnx.Rngs(3))
    config = dj.TrainingConfig(max_epochs=6, batch_size=8)
    experiment = dj.Experiment(
        dataset,
        toy.standardized(module),
        dj.STRATEGIES["dynamical"](),
        dj.Budget(10, 5, 1),
        config,
    )
    start = experiment.init()
    np.testing.assert_array_equal(
        start.variables["params"]["model"]["last"]["kernel"], module.last.kernel[...]
    )
    saved = []

    def save(state):
        if not saved:  # After the first epochs; later ones reuse the memory.
            copied = lambda tree: jax.tree.map(np.array, tree)
            underway = state.underway._replace(
                optimizer_state=copied(state.underway.optimizer_state)
            )
            saved.append(state._replace(variables=copied(state.variables), underway=underway))

    whole, round_result = experiment.step(start, save=save)
    (state,) = saved
    assert 0 < state.underway.epoch < 6
    again, same_round = experiment.step(state)
    jax.tree.map(np.testing.assert_array_equal, again.variables, whole.variables)
    np.testing.assert_array_equal(same_round.query, round_result.query)


def make_twin(rngs):
    return Twin(dropout=0.0, rngs=rngs)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_twin, id="function"),
        pytest.param(Twin, id="class", marks=pytest.mark.slow),
    ],
)
def test_each_seed_starts_from_weights_of_its_own(dataset, make, recwarn):
    budget, config = dj.Budget(10, 5, 1), dj.TrainingConfig(max_epochs=2, batch_size=8)

    def start(model, seed, strategy="dynamical"):
        strategy = dj.STRATEGIES[strategy]()
        experiment = dj.Experiment(
            dataset, toy.standardized(model), strategy, budget, config, seed=seed
        )
        return experiment, experiment.init()

    experiment, first = start(make, 0)
    again, other = start(make, 0, "margin")[1], start(make, 1)[1]
    jax.tree.map(np.testing.assert_array_equal, again.variables, first.variables)
    kernel = lambda state: state.variables["params"]["model"]["conv"]["kernel"]
    assert np.abs(kernel(other) - kernel(first)).min() > 0
    # Programs are shared among seeds.
    assert start(make, 1)[0].model.model is experiment.model.model

    # As its Linen twin: the same sets, weights from the same distribution, and from equal weights
    # the same round.
    linen, expected = start(Linen(), 0)
    np.testing.assert_array_equal(first.pool.labeled, expected.pool.labeled)
    same_shape = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
    assert jax.tree.all(jax.tree.map(same_shape, first.variables, expected.variables))
    np.testing.assert_allclose(np.std(kernel(first)), np.std(kernel(expected)), rtol=0.3)
    copied = jax.tree.map(np.array, expected.variables)
    _, of_linen = linen.step(expected)
    _, of_nnx = experiment.step(first._replace(variables=copied))
    np.testing.assert_array_equal(of_nnx.query, of_linen.query)
    messages = {str(warning.message) for warning in recwarn.list}
    assert all("fitted" in message for message in messages), messages  # Not of the engine.


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda seed: Twin(rngs=nnx.Rngs(seed)), "a function of rngs that makes an NNX module"),
        (lambda rngs: Linen(), "must make an NNX module, and made Linen"),
    ],
)
def test_other_functions_are_no_models(model, message):
    with pytest.raises(dj.UserError, match=message):
        dj.nnx_modules.as_model(model)


@pytest.mark.parametrize("layer", [lambda **rngs: nnx.Linear(10, 3, **rngs), Own])
def test_a_module_for_other_inputs(layer):
    x = toy.images(4)
    message = rf"fails with x of shape .*, which is . of shape \({x.shape[1]}"
    with pytest.raises(dj.UserError, match=message):
        dj.models.init(layer, KEY, x)
    view = dj.LearnerView.from_nnx(layer(rngs=nnx.Rngs(0)), (x[:2], np.zeros(2, int)), x)
    with pytest.raises(dj.UserError, match=message):
        dj.STRATEGIES["margin"]().query(KEY, view, 1)


def test_what_the_engine_cannot_do_is_done_by_vmap(monkeypatch):
    model, variables = dj.models.from_nnx(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    given = model.apply, variables, x, variables["params"]
    expected = dj.gradients.norms_and_products(*given, engine="vmap")

    def fail(*args, **options):
        raise ValueError("not foreseen")

    monkeypatch.setattr("dynamical_jax.gradients.kinds.kind_of", fail)
    with pytest.warns(UserWarning, match=r"no factored gradients \(not foreseen\); using vmap"):
        terms = dj.gradients.norms_and_products(*given)
    toy.assert_close(terms, expected, variables["params"], 1e-5)


def test_dropout_differs_from_step_to_step_and_is_off_in_evaluation():
    model, variables = dj.models.from_nnx(Twin(dropout=0.5, rngs=nnx.Rngs(0)))
    x = jnp.asarray(toy.images(4), jnp.float32) / 100
    logits = lambda seed: model.apply(
        variables, x, train=True, mutable="batch_stats", rngs={"dropout": jax.random.key(seed)}
    )[0][0]
    np.testing.assert_array_equal(logits(0), logits(0))
    assert np.any(logits(0) != logits(1))
    np.testing.assert_array_equal(model.apply(variables, x)[0], model.apply(variables, x)[0])


class Flagged(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x, deterministic=True):
        return self.dropout(x.reshape(len(x), -1)[:, :3], deterministic=deterministic)


def test_a_flag_that_would_undo_training_mode_is_not_overlooked():
    model, variables = dj.models.from_nnx(Flagged())
    model.apply(variables, toy.images(2))
    with pytest.raises(dj.UserError, match="Flagged takes deterministic, not train"):
        model.apply(variables, toy.images(2), train=True)


def test_equal_modules_share_their_compiled_programs():
    one, other = (dj.models.from_nnx(Twin(rngs=nnx.Rngs(seed)))[0] for seed in (0, 1))
    assert one is other
    starts = [dj.nnx_modules.as_model(Twin(rngs=nnx.Rngs(seed))) for seed in (0, 1)]
    assert starts[0] != starts[1]  # These are initialised to other weights.
