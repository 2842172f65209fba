"""Models that are not ours: whatever Flax module, and what it may return."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn
from flax import nnx

import dynamical_jax as dj
from dynamical_jax import contract, gradients, ntk, training
from dynamical_jax.gradients import per_example

KEY = jax.random.key(0)
NEED_EMBEDDING = (
    *("coreset", "badge", "albl", "bait"),
    *("typiclust", "probcover", "max_herding", "uncertainty_herding"),
    "dynamical_herding",
)


class MLP(nn.Module):
    """Logits alone, and no `train`."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x.reshape(len(x), -1)))
        return nn.Dense(toy.NUM_CLASSES)(x)


class ConvNet(nn.Module):
    """A pair."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.GroupNorm(2, name="norm")(x)).mean(axis=(1, 2))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(toy.NUM_CLASSES, name="last")(hidden), x


class Tokens(nn.Module):
    """A class token in front, and positions: a layer of its own, as it owns parameters."""

    @nn.compact
    def __call__(self, x):
        token = self.param("token", nn.initializers.normal(), (1, 1, x.shape[2]))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, x.shape[2])), x], axis=1)
        return x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))


class VisionTransformer(nn.Module):
    """`Outputs`."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (4, 4), strides=4)(x)
        x = Tokens()(x.reshape(len(x), -1, 4))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
        x = nn.LayerNorm()(x)[:, 0]
        return dj.Outputs(nn.Dense(toy.NUM_CLASSES)(x), x)


MODELS = {
    "mlp": toy.standardized(MLP()),
    "convnet": toy.standardized(ConvNet(dropout=0.5)),
    "transformer": toy.standardized(VisionTransformer()),
}


def make_view(model, **fields):
    given = {
        "apply": model.apply,
        "variables": toy.variables(model),
        "labeled": toy.examples(6, seed=50),
        "unlabeled": toy.images(20),
    }
    return dj.LearnerView(**{**given, **fields})


# Of each kind of question that strategies ask a model: gradients, products, logits, embeddings.
KINDS = ("dynamical", "dynamical_joint", "entropy", "coreset", "badge")


def queries(view):
    return {name: dj.STRATEGIES[name]().query(KEY, view, 5) for name in KINDS}


# Attention by itself is in gradients/layers_test.py; here it takes 6 s.
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=name, marks=pytest.mark.slow if name == "transformer" else [])
        for name, model in MODELS.items()
    ],
)
class TestAnyModel:
    def test_strategies(self, model):
        # strategies_test.py has each with one model: what a model may return is the same for all.
        view = make_view(model)
        for name, make in toy.STRATEGIES.items():
            if isinstance(model.model, MLP) and name in NEED_EMBEDDING:
                message = rf"{make.__name__} needs embeddings: let the model return \(logits, emb"
                with pytest.raises(dj.UserError, match=message):
                    make().query(KEY, view, 5)
            elif name in KINDS:
                query = make().query(KEY, view, 5)
                assert len(np.unique(query.positions)) == 5
                assert np.isfinite(query.scores).all()

    def test_engines_agree_without_a_warning(self, model):
        view = make_view(model)
        direction = gradients.set_gradient(view.apply, view.variables, view.labeled)
        score = functools.partial(
            gradients.norms_and_products, view.apply, view.variables, view.unlabeled, direction
        )
        toy.assert_close(*(score(engine=engine) for engine in gradients.ENGINES), direction, 1e-5)

    def test_rounds_of_an_experiment(self, model, dataset):
        config = dj.TrainingConfig(max_epochs=60, batch_size=32, learning_rate=0.01)
        budget = dj.Budget(17, 15, 1)
        strategy = dj.STRATEGIES["entropy"]()
        *_, last = dj.Experiment(dataset, model, strategy, budget, config).run()
        assert last.num_labeled == 32
        assert last.labeled.accuracy > 0.6  # Chance is a third.


# --- What a model may return ---

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
WEIGHTS = {"params": {"kernel": LOGITS.T}}


def linear(form):
    def apply(variables, x):
        return form(x @ variables["params"]["kernel"], x)

    return apply


FORMS = {
    "outputs": linear(dj.Outputs),
    "pair": linear(lambda logits, embedding: (logits, embedding)),
    "logits": linear(lambda logits, embedding: logits),
    "no embedding": linear(lambda logits, embedding: (logits, None)),
}


@pytest.mark.parametrize("name", list(FORMS)[1:])
def test_forms_that_mean_the_same(name):
    results = []
    for apply in (FORMS["outputs"], FORMS[name]):
        examples = dj.Examples(LOGITS, np.array([0, 1, 2, 3]))
        direction = gradients.set_gradient(apply, WEIGHTS, examples)
        each = gradients.per_example_gradients(apply, WEIGHTS, *examples)
        terms = gradients.norms_and_products(apply, WEIGHTS, LOGITS, direction, engine="vmap")
        kernel = ntk.empirical_ntk(apply, WEIGHTS, LOGITS, trace=False)
        evaluation = training.evaluate(apply, WEIGHTS, examples)
        results.append((direction, each, terms, kernel, evaluation))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize(
    ("form", "given"),
    [
        (lambda logits, x: {"logits": logits}, r"\{'logits': \(2, 4\)\}"),
        (lambda logits, x: (logits, x, x), r"\(\(2, 4\), \(2, 3\), \(2, 3\)\)"),
        (lambda logits, x: (logits, {}), r"\(\(2, 4\), \{\}\)"),
        (lambda logits, x: logits[:, 0], r"\(2,\)"),
        (lambda logits, x: logits.mean(axis=0, keepdims=True), r"\(1, 4\)"),
        (lambda logits, x: (logits, x[:, :, None]), r"\(\(2, 4\), \(2, 3, 1\)\)"),
        (lambda logits, x: None, "None"),
    ],
)
def test_other_answers_are_one_clear_line(form, given):
    view = dj.LearnerView(linear(form), WEIGHTS, (LOGITS, np.arange(4)), LOGITS)
    message = "for . examples a model returns logits .* or a pair .* this one returned "
    for name, shown in {"entropy": given, "coreset": "", "dynamical": ""}.items():
        with pytest.raises(dj.UserError, match=message + shown) as raised:
            dj.STRATEGIES[name]().query(KEY, view, 1)
        assert "\n" not in str(raised.value)


def test_an_embedding_is_asked_for_before_training(dataset):
    for name in NEED_EMBEDDING:
        strategy = dj.STRATEGIES[name]()
        experiment = dj.Experiment(dataset, MODELS["mlp"], strategy, dj.Budget(6, 4, 1))
        with pytest.raises(dj.UserError, match=f"{type(strategy).__name__} needs embeddings"):
            experiment.init()
    confident = {"confidence": dj.STRATEGIES["confidence"]()}
    assert not dj.strategies.ALBL(confident).needs_embedding


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (np.array([0, 3, 1]), "labels from 0 to 3"),
        (np.array([0, -1, 1]), "labels from -1 to 1"),
        (np.eye(3, dtype=np.int32), r"int32 of shape \(3, 3\)"),
        (np.array([0.0, 1.0, 2.0]), r"float64 of shape \(3,\)"),
    ],
)
def test_labels_that_are_no_classes(labels, got):
    model = MODELS["mlp"]
    labeled = dj.Examples(toy.images(3), labels)
    view = make_view(model, labeled=labeled)
    direction = view.variables["params"]
    message = rf"labels must be integers \[n\] from 0 to 2, as the model has classes, got {got}"
    for call in (
        lambda: dj.STRATEGIES["dynamical"]().query(KEY, view, 1),
        lambda: gradients.norms_and_products(
            model.apply, view.variables, labeled.x, direction, labels=labels
        ),
        lambda: training.fit(model, view.variables, labeled, dj.TrainingConfig(), 0),
    ):
        with pytest.raises(dj.UserError, match=message):
            call()


# --- How a model is told that it is trained ---


def module_of(call):
    """A module of which the signature alone matters."""
    return type("Named", (nn.Module,), {"__call__": call})()


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Dropout(0.5, deterministic=deterministic)(x.reshape(len(x), -1))
        return nn.Dense(toy.NUM_CLASSES)(x)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (MLP(), False),
        (ConvNet(), True),
        (nn.remat(ConvNet)(), True),
        (module_of(lambda self, x, *, train: x), True),
        (module_of(lambda self, *args, **kwargs: args[0]), True),
        (nn.Sequential([nn.Dense(4), ConvNet()]), False),
        (nn.Sequential([jnp.ravel, nn.Dense(4)]), False),
        (nn.Sequential([ConvNet()]), True),
        (Deterministic(), False),
    ],
)
def test_train_is_told_to_modules_that_take_it(module, told):
    assert contract.train_option(module, False) == ({"train": False} if told else {})
    if not isinstance(module, Deterministic):
        assert contract.train_option(module, True) == ({"train": True} if told else {})


def test_flags_by_other_names_are_not_overlooked():
    model = toy.standardized(Deterministic())
    dj.STRATEGIES["entropy"]().query(KEY, make_view(model), 3)  # Evaluation is its default.
    message = r"Deterministic takes deterministic, not train: wrap it in a module that takes \(x, t"
    for trained in (model, model.model):
        variables = dj.models.init(trained, KEY, toy.images(1))
        with pytest.raises(dj.UserError, match=message):
            training.fit(trained, variables, toy.examples(5), dj.TrainingConfig(), 0)


# --- NNX ---


class NNXConvNet(nnx.Module):
    """`ConvNet` in NNX."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.GroupNorm(4, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, toy.NUM_CLASSES, rngs=rngs)

    def __call__(self, x, train=False):
        x = nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))
        return self.last(self.dropout(x, deterministic=not train)), x


BRIDGED = toy.standardized(nnx.bridge.to_linen(NNXConvNet))
FALLS_BACK = "no factored gradients .the model: parameters are used outside.*; using vmap"


@pytest.mark.filterwarnings("ignore:no factored gradients")
def test_nnx_scores_as_its_linen_twin():
    linen = MODELS["convnet"]
    variables = toy.variables(linen)
    expected = queries(make_view(linen))
    of_nnx = queries(make_view(BRIDGED, variables=variables))
    for name, query in of_nnx.items():
        np.testing.assert_array_equal(query.positions, expected[name].positions)
        np.testing.assert_allclose(query.scores, expected[name].scores, rtol=1e-5)


def of_split_module():
    """An NNX module as a function of its parameters."""
    net = NNXConvNet(rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    apply = lambda given, x: nnx.merge(graph, given["params"], rest)(jnp.asarray(x, jnp.float32))
    return apply, {"params": nnx.to_pure_dict(params)}


def test_nnx_gradients_are_those_of_vmap_with_a_warning():
    for apply, variables in (
        (BRIDGED.apply, toy.variables(BRIDGED)),
        of_split_module(),
    ):
        x, direction = toy.images(5), variables["params"]
        with pytest.warns(UserWarning, match=FALLS_BACK):
            terms = gradients.norms_and_products(apply, variables, x, direction)
        expected = jax.jit(functools.partial(per_example.gradient_terms, apply))(
            variables, x, None, direction
        )
        toy.assert_close(terms, expected, direction, 1e-5)


def test_a_layer_of_nnx_within_linen_is_exact():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(4)(x.reshape(len(x), -1)))
            return nnx.bridge.to_linen(nnx.Linear, 4, toy.NUM_CLASSES)(x)

    model = toy.standardized(Mixed())
    variables, x = toy.variables(model), toy.images(5)
    direction = variables["params"]
    terms, expected = (
        gradients.norms_and_products(model.apply, variables, x, direction, engine=engine)
        for engine in gradients.ENGINES
    )
    toy.assert_close(terms, expected, direction, 1e-5)


@pytest.mark.slow  # nnx_test.py has one with a module of NNX itself.
def test_an_experiment_with_nnx(dataset):
    config = dj.TrainingConfig(max_epochs=3, batch_size=8)
    strategy = dj.STRATEGIES["coreset"]()
    experiment = dj.Experiment(dataset, BRIDGED, strategy, dj.Budget(10, 5, 1), config)
    start = experiment.init().variables
    state, round_result = experiment.step(experiment.init())
    assert round_result.epochs == 3
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), start, state.variables)
    assert all(change > 0 for change in jax.tree.leaves(moved))


def test_batch_statistics_of_nnx_are_refused_in_training():
    class Net(nnx.Module):
        def __init__(self, *, rngs):
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.last = nnx.Linear(2, toy.NUM_CLASSES, rngs=rngs)

        def __call__(self, x, train=False):
            return self.last(self.norm(x.mean(axis=(1, 2)), use_running_average=not train))

    model = toy.standardized(nnx.bridge.to_linen(Net))
    variables = toy.variables(model)
    with pytest.raises(dj.UserError, match="to_linen would count the rows that fill up"):
        training.fit(model, variables, toy.examples(5), dj.TrainingConfig(), 0)


ROWS_MIXED = {
    "batch mean": lambda logits, x: logits - jnp.mean(logits, axis=0, keepdims=True),
    "reversed": lambda logits, x: logits[::-1],
    "sorted": lambda logits, x: logits[jnp.argsort(jnp.sum(x, axis=(1, 2, 3)))],
    "noise by place": lambda logits, x: (
        logits * jax.random.bernoulli(jax.random.key(0), 0.5, logits.shape)
    ),
}


@pytest.mark.parametrize("engine", dj.gradients.ENGINES)
@pytest.mark.parametrize(
    "mix",
    [
        pytest.param(mix, id=name, marks=pytest.mark.slow if name in ("reversed", "sorted") else [])
        for name, mix in ROWS_MIXED.items()
    ],
)
def test_a_model_that_mixes_the_rows_of_a_batch_is_refused(mix, engine):
    model = toy.models()["cnn"]
    variables, x = toy.variables(model), toy.images(12)

    def apply(variables, x):
        return mix(model.apply(variables, x).logits, x)

    direction = jax.tree.map(jnp.ones_like, variables["params"])
    with pytest.raises(dj.UserError, match="depends on the others in its batch"):
        dj.gradients.norms_and_products(apply, variables, x, direction, engine=engine)
