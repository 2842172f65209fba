import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import linen as nn

import dynamical_jax as dj
from dynamical_jax import losses, training
from dynamical_jax.errors import DivergedError
from dynamical_jax.types import Rows

CONFIG = dj.TrainingConfig(batch_size=8, max_epochs=3, target_accuracy=1.0)


# One program; operation by operation each would be compiled by itself.
batch_gradient = jax.jit(training.batch_gradient, static_argnums=0)


def same(a, b, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), a, b)


def test_padding_changes_nothing():
    # The reference knows neither masks nor interception: it is given the unpadded batch.
    model = toy.models()["batch_norm"]
    variables = toy.variables(model)
    x, y = toy.examples(8)

    def loss_of(params):
        outputs, statistics = model.apply(
            {**variables, "params": params}, x[:5], train=True, mutable=["batch_stats"]
        )
        return losses.cross_entropy(outputs.logits, y[:5]).mean(), statistics

    reference = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, statistics), gradient = reference(variables["params"])
    step = functools.partial(batch_gradient, model, variables)
    x[5:] = 255  # Whatever is in the padding.
    padded = step(dj.Examples(x, y), jnp.arange(8) < 5, jax.random.key(0))
    same(padded, (gradient, loss, statistics), rtol=1e-5, atol=1e-6)
    unmasked = step(dj.Examples(x, y), jnp.arange(8) < 8, jax.random.key(0))
    assert abs(unmasked[1] - loss) > 1e-3


def test_masks_of_the_model_itself_are_kept():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            mask = (jnp.arange(len(x)) != 1).reshape(-1, 1)
            x = nn.BatchNorm(use_running_average=not train)(x=x.reshape(len(x), -1), mask=mask)
            return dj.Outputs(nn.Dense(3)(x), x)

    model = toy.standardized(Masked())
    variables = toy.variables(model)
    x, y = toy.examples(6)
    step = functools.partial(batch_gradient, model, variables)
    _, _, statistics = step(dj.Examples(x, y), jnp.arange(6) < 4, jax.random.key(0))
    mean = statistics["batch_stats"]["model"]["BatchNorm_0"]["mean"]
    standard = (x.reshape(6, -1, 2) - np.array(toy.MEAN)) / np.array(toy.STD)
    before = variables["batch_stats"]["model"]["BatchNorm_0"]["mean"]
    counted = standard.reshape(6, -1)[[0, 2, 3]].mean(axis=0)
    np.testing.assert_allclose(mean, 0.99 * before + 0.01 * counted, rtol=1e-4, atol=1e-5)


def test_evaluation_leaves_running_statistics():
    model = toy.models()["batch_norm"]
    variables = toy.variables(model)
    _, after = model.apply(variables, toy.images(3), mutable=["batch_stats"])
    same(after["batch_stats"], variables["batch_stats"])


def test_running_variance_is_unbiased_as_in_pytorch():
    model = toy.models()["batch_norm"]
    variables = toy.variables(model)
    x, y = toy.examples(6)
    step = functools.partial(batch_gradient, model, variables)
    _, _, statistics = step(dj.Examples(x, y), jnp.ones(6, bool), jax.random.key(0))
    before = variables["batch_stats"]["model"]["BatchNorm_0"]["var"]
    after = statistics["batch_stats"]["model"]["BatchNorm_0"]["var"]
    _, captured = model.apply(
        variables, x, capture_intermediates=lambda module, _: module.name == "Conv_0"
    )
    values = captured["intermediates"]["model"]["Conv_0"]["__call__"][0].reshape(-1, 4)
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * values.var(axis=0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_fit_equals_a_plain_loop(optimizer):
    # The obvious version: unpadded minibatches, one optax update after another.
    model = toy.models()["batch_norm"]
    variables = toy.variables(model)
    labeled = toy.examples(21)
    config = dj.TrainingConfig(
        optimizer=optimizer, batch_size=8, max_epochs=2, target_accuracy=1.0, weight_decay=0.1
    )
    fit = training.fit(model, variables, labeled, config, seed=3, capacity=40)

    update = training.OPTIMIZERS[optimizer](config.learning_rate, config.weight_decay)
    state, step = jax.jit(update.init)(variables["params"]), jax.jit(update.update)
    for epoch in (1, 2):
        order = dj.streams.generator(3, "order", 0, epoch).permutation(21)
        for rows in (order[:7], order[7:14], order[14:]):
            batch = dj.Examples(labeled.x[rows], labeled.y[rows])
            gradient, _, statistics = batch_gradient(
                model, variables, batch, jnp.ones(7, bool), jax.random.key(0)
            )
            updates, state = step(gradient, state, variables["params"])
            variables = {
                **statistics,
                "params": jax.tree.map(jnp.add, variables["params"], updates),
            }
    same(fit.variables, variables, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    "name",
    ["cnn", *[pytest.param(name, marks=pytest.mark.slow) for name in ("batch_norm", "dropout")]],
)
def test_capacity_changes_nothing(name):
    models = {**toy.models(), "dropout": toy.standardized(toy.ConvBatchNorm(dropout=0.5))}
    model = models[name]
    variables = toy.variables(model)
    fits = [
        training.fit(model, variables, toy.examples(13), CONFIG, seed=0, capacity=capacity)
        for capacity in (None, 13, 50)
    ]
    for fit in fits[1:]:
        same(fit, fits[0], rtol=1e-5, atol=1e-6)


def test_growing_sets_do_not_recompile():
    model = toy.models()["batch_norm"]
    variables = toy.variables(model)
    training._epochs.clear_cache()
    for round_index, size in enumerate((5, 8, 17, 30)):
        variables = training.fit(
            model, variables, toy.examples(size), CONFIG, 0, round_index, capacity=30
        ).variables
    assert training._epochs._cache_size() == 1


def test_fit_leaves_its_input_and_stops_when_fitted(dataset):
    model = toy.models()["cnn"]
    variables = toy.variables(model)
    before = jax.tree.map(np.array, variables)
    epochs = []
    size = len(dataset.pool.y)
    config = dj.TrainingConfig(
        max_epochs=90,
        target_accuracy=0.9,
        target_total_loss=0.4 * size,
        batch_size=16,
        look_every=3,
    )
    fit = training.fit(
        model, variables, dataset.pool, config, 0, on_epoch=lambda *at: epochs.append(at)
    )
    same(variables, before)
    looks = {progress.epoch: seen for progress, seen in epochs if seen is not None}
    assert list(looks) == list(range(3, fit.epochs + 1, 3))
    met = [seen.accuracy >= 0.9 and size * seen.loss <= 0.4 * size for seen in looks.values()]
    assert met == [False] * (len(met) - 1) + [True]
    assert fit.converged
    assert fit.labeled == looks[fit.epochs]
    # Which is what the variables are worth that are returned.
    again = training.evaluate(model.apply, fit.variables, dataset.pool)
    np.testing.assert_allclose(again, fit.labeled, rtol=1e-6)


def test_each_target_is_waited_for():
    labeled = training.Evaluation(accuracy=0.9, loss=0.02)  # Of 50 examples: 1 in all.
    none = {"target_accuracy": None, "target_total_loss": None}
    for targets, fitted in (
        ({"target_accuracy": 0.9}, True),
        ({"target_accuracy": 0.91}, False),
        ({"target_loss": 0.02}, True),
        ({"target_loss": 0.019}, False),
        ({"target_total_loss": 1.0}, True),
        ({"target_total_loss": 0.99}, False),
        ({"target_accuracy": 0.9, "target_loss": 0.02, "target_total_loss": 0.99}, False),
        ({"target_accuracy": 0.9, "target_loss": 0.01, "target_total_loss": 1.0}, False),
        ({"target_accuracy": 0.91, "target_loss": 0.02, "target_total_loss": 1.0}, False),
    ):
        config = dj.TrainingConfig(**{**none, **targets})
        assert config.is_fitted(labeled, 50) == fitted
    assert dj.TrainingConfig(**none).largest_loss(50) is None
    assert dj.TrainingConfig(target_loss=0.01, target_total_loss=1.0).largest_loss(50) == 0.01
    assert dj.TrainingConfig(target_loss=0.01, target_total_loss=0.1).largest_loss(50) == 0.002


@pytest.mark.parametrize("targets", [{"min_epochs": 8}, {"target_total_loss": 1e-9}])
def test_epochs_at_least_and_at_most(targets):
    # Any accuracy and loss will do, were it not for `targets`.
    model = toy.models()["cnn"]
    config = dj.TrainingConfig(
        target_accuracy=0.0, look_every=4, max_epochs=10, **{"target_total_loss": 1e9, **targets}
    )
    fit = training.fit(model, toy.variables(model), toy.examples(9), config, seed=0)
    assert fit.epochs == (8 if "min_epochs" in targets else 10)
    assert fit.converged == ("min_epochs" in targets)


@pytest.mark.parametrize("stopped_at", [2, 4])
def test_continued_training_stops_where_it_would_have(stopped_at):
    # 4 is where it stops: interrupted just before, it must not go on.
    model = toy.models()["cnn"]
    labeled = toy.examples(9)
    config = dj.TrainingConfig(target_accuracy=0.0, target_total_loss=1e9, look_every=4)
    whole = training.fit(model, toy.variables(model), labeled, config, seed=0)
    assert whole.epochs == 4

    def keep(progress, seen):
        if progress.epoch == stopped_at:
            arrays = jax.tree.map(jnp.copy, progress[1:])  # Their memory is used again.
            kept.append(training.Progress(progress.epoch, *arrays))

    kept = []
    training.fit(model, toy.variables(model), labeled, config, seed=0, on_epoch=keep, call_every=1)
    continued = training.fit(model, kept[0], labeled, config, seed=0)
    assert continued.epochs == 4
    same(continued.variables, whole.variables, rtol=0)


@pytest.mark.parametrize(("seconds", "calls"), [(1e9, [1, 3, 5, 6]), (0.0, [1, 2, 3, 4, 5, 6])])
def test_epochs_in_one_call_change_nothing(monkeypatch, seconds, calls):
    # Epochs are run together where they are short, up to a look or a multiple of call_every.
    monkeypatch.setattr(training, "SHORT_CALL", seconds)
    model = toy.standardized(toy.ConvBatchNorm(dropout=0.5))
    config = dj.TrainingConfig(
        batch_size=8, schedule="cosine", max_epochs=6, target_accuracy=None, target_total_loss=None
    )
    seen, start = [], toy.variables(model)
    fit = training.fit(
        *(model, start, toy.examples(13), config, 3),
        on_epoch=lambda progress, labeled: seen.append((progress.epoch, labeled is not None)),
        call_every=3,
    )
    assert seen == [(epoch, epoch in (5, 6)) for epoch in calls]
    key = dj.streams.key(3, "dropout", 0)
    optimizer = training._optimizer(dj.TrainingConfig())
    variables, state = start, jax.jit(optimizer.init)(start["params"])
    one = jax.jit(training._epoch, static_argnums=(0, 1, 2))
    for epoch in range(1, 7):
        order = dj.streams.generator(3, "order", 0, epoch).permutation(13)
        rate = jnp.asarray(training._learning_rate(config, epoch))
        state = state._replace(hyperparams={"learning_rate": rate})
        variables, state = one(
            *(model, optimizer, 8, variables, state, dj.Examples(*toy.examples(13))),
            *(order, 13, jax.random.fold_in(key, epoch)),
        )
    same(fit.variables, variables, rtol=1e-5, atol=1e-6)


def test_evaluate_in_blocks():
    model = toy.models()["cnn"]
    variables = toy.variables(model)
    x, y = toy.examples(10)
    logits = toy.outputs(model.apply, variables, x).logits
    accuracy = np.mean(np.argmax(logits, axis=1) == y)
    loss = losses.cross_entropy(logits, jnp.asarray(y)).mean()
    for batch_size in (1, 4, 10, 512):
        evaluation = training.evaluate(model.apply, variables, dj.Examples(x, y), batch_size)
        np.testing.assert_allclose(evaluation, (accuracy, loss), rtol=1e-5)
        on_device = dj.Examples(jnp.asarray(x), y)
        again = training.evaluate(model.apply, variables, on_device, batch_size)
        np.testing.assert_allclose(again, evaluation, rtol=1e-6)
    rows = Rows(np.concatenate([x, x]), np.arange(10))
    again = training.evaluate(model.apply, variables, dj.Examples(rows, y), 4)
    np.testing.assert_allclose(again, (accuracy, loss), rtol=1e-5)


def test_a_look_is_one_transfer(monkeypatch):
    fetch, times = training.parallel.fetch, []
    monkeypatch.setattr(training.parallel, "fetch", lambda tree: times.append(1) or fetch(tree))
    model = toy.models()["cnn"]
    config = dj.TrainingConfig(batch_size=4, max_epochs=4, look_every=2, target_total_loss=None)
    fit = training.fit(model, toy.variables(model), toy.examples(13), config, 0, eval_batch_size=4)
    assert (fit.epochs, len(times)) == (4, 2)


def test_divergence_is_said():
    model = toy.models()["batch_norm"]
    config = dj.TrainingConfig(optimizer="sgd", learning_rate=1e30)
    with pytest.raises(
        DivergedError, match=r"diverged: after epoch 5 the loss is not finite; .* below"
    ):
        training.fit(model, toy.variables(model), toy.examples(9), config, 0)


def test_cosine_schedule():
    config = dj.TrainingConfig(schedule="cosine", learning_rate=0.1, max_epochs=4)
    rates = [training._learning_rate(config, epoch) for epoch in (1, 2, 3, 4)]
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(4) / 4))
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert training._learning_rate(dj.TrainingConfig(), 7) == 1e-3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; choose from adam, sgd"),
        ({"schedule": "step"}, "unknown schedule 'step'; choose from constant, cosine"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_epochs": -1}, "at least 1"),
        ({"learning_rate": 0.0}, "learning rate must be positive"),
        ({"learning_rate": float("nan")}, "learning rate must be positive"),
        ({"weight_decay": -1.0}, "weight decay not negative"),
        ({"target_accuracy": 99.0}, r"target accuracy must be in \[0, 1\]"),
        ({"target_loss": 0.0}, "target_loss must be above 0, got 0.0"),
        ({"target_total_loss": float("nan")}, "target_total_loss must be above 0, got nan"),
        ({"min_epochs": 501}, "min_epochs must be from 0 to max_epochs, got 501 and 500"),
        ({"look_every": 0}, "look_every of training must be at least 1, got 0"),
    ],
)
def test_bad_configurations(option, message):
    with pytest.raises(dj.UserError, match=message):
        dj.TrainingConfig(**option)
