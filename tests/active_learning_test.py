import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax.runs import records

CONFIG = dj.TrainingConfig(max_epochs=3, batch_size=8)
BUDGET = dj.Budget(initial_size=6, batch_size=4, num_rounds=3)


def experiment(dataset, strategy="dynamical", seed=0, **options):
    model = toy.models()["cnn"]
    strategy = dj.STRATEGIES[strategy]()
    return dj.Experiment(dataset, model, strategy, BUDGET, CONFIG, seed, **options)


def as_records(rounds):
    kept = [records.make(round_result, {}) for round_result in rounds]
    for record in kept:
        record.pop("seconds")
    return kept


def test_budget_is_spent_on_distinct_examples(dataset):
    experiment_ = experiment(dataset)
    initial = experiment_.init().pool.labeled
    rounds = list(experiment_.run())
    assert [round_result.num_labeled for round_result in rounds] == [6, 10, 14, 18]
    assert [len(round_result.query) for round_result in rounds] == [4, 4, 4, 0]
    asked = np.concatenate(
        [dataset.index[initial], *(round_result.query for round_result in rounds)]
    )
    assert len(np.unique(asked)) == 18
    assert set(rounds[0].seconds) == {"train", "evaluate", "score", "select", "describe"}
    assert all(
        round_result.best_test_accuracy >= round_result.test.accuracy for round_result in rounds
    )


def test_a_repeated_run_is_identical(dataset):
    one, two = (as_records(experiment(dataset).run()) for _ in range(2))
    assert one == two


@pytest.mark.slow  # Blocks of each are tested where they are made.
def test_speed_options_change_no_record(dataset):
    slow = experiment(dataset, eval_batch_size=7)
    slow = dataclasses.replace(slow, strategy=dj.strategies.Dynamical(chunk_size=3))
    for one, two in zip(experiment(dataset).run(), slow.run(), strict=True):
        np.testing.assert_array_equal(one.query, two.query)
        assert one.test.accuracy == two.test.accuracy


@pytest.mark.slow  # 3 s; with a loss of one's own it is told below.
def test_redundancy_is_told_of_any_strategy(dataset):
    told = experiment(dataset, "random", redundancy=True)
    state, first = told.step(told.init())
    asked = np.flatnonzero(np.isin(dataset.index, first.query))
    exact = dj.gradients.gram(told.model.apply, state.variables, dataset.pool.x[asked])
    facts = first.query_facts
    # The mean of 12 cosines, each with a standard error of at most 1 / √512.
    assert facts["mean_cosine"] == pytest.approx(float(dj.dynamics.mean_cosine(exact)), abs=0.1)
    assert facts["near_copies"] == dj.dynamics.near_copies(exact)
    silent = experiment(dataset, "random")
    one, two = as_records([first, silent.step(silent.init())[1]])
    assert one | {"query_mean_cosine": None, "query_near_copies": None} == two | {
        "query_mean_cosine": None,
        "query_near_copies": None,
    }


def mostly_absent(logits, label):
    """Of each class by itself; residuals are nearly all positive, and gradients alike."""
    return jnp.sum(jax.nn.softplus(logits)) - 0.1 * logits[label]


def test_the_loss_of_training_is_that_of_all_that_is_told(dataset):
    loss = dj.Loss(mostly_absent)
    config = dataclasses.replace(CONFIG, max_epochs=1, loss=loss)
    model = toy.standardized(dj.models.Linear(3))
    told = dj.Experiment(
        dataset, model, dj.strategies.Random(), BUDGET, config, seed=0, redundancy=True
    )
    state, first = told.step(told.init())
    logits = model.apply(state.variables, dataset.test.x).logits
    expected = np.mean(loss(logits, dataset.test.y))
    assert first.test.loss == pytest.approx(float(expected), rel=1e-5)
    asked = dataset.pool.x[np.flatnonzero(np.isin(dataset.index, first.query))]
    cosine = lambda of: dj.dynamics.mean_cosine(
        dj.gradients.gram(model.apply, state.variables, asked, loss=of)
    )
    exact, other = float(cosine(loss)), float(cosine(dj.losses.CROSS_ENTROPY))
    assert abs(exact - other) > 0.2
    assert first.query_facts["mean_cosine"] == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("name", ["dynamical", "dynamical_sampled", "dynamical_herding", "albl"])
def test_gradients_of_another_loss_than_that_of_training_are_refused(dataset, name):
    def create(**options):
        if name == "albl":
            return dj.strategies.ALBL({"one": dj.strategies.Dynamical(**options)})
        return dj.STRATEGIES[name](**options)

    loss = dj.Loss(mostly_absent)
    config = dataclasses.replace(CONFIG, loss=loss)
    one = experiment(dataset)
    dataclasses.replace(one, strategy=create(loss=loss), training_config=config)
    for other in (
        {"strategy": create(loss=loss)},
        {"strategy": create(), "training_config": config},
    ):
        with pytest.raises(dj.UserError, match="another loss than the model is trained by"):
            dataclasses.replace(one, **other)


def test_strategies_of_one_seed_are_paired(dataset):
    states = [experiment(dataset, name, seed=1).init() for name in toy.STRATEGIES]
    for state in states[1:]:
        np.testing.assert_array_equal(state.pool.labeled, states[0].pool.labeled)
        jax.tree.map(np.testing.assert_array_equal, state.variables, states[0].variables)
    names = ("dynamical", "random", "badge")
    first = [next(experiment(dataset, name, seed=1).run()) for name in names]
    assert len({(round_result.test, round_result.epochs) for round_result in first}) == 1
    other = experiment(dataset, seed=2).init()
    assert set(other.pool.labeled) != set(states[0].pool.labeled)
    kernel = lambda state: state.variables["params"]["model"]["fc1"]["kernel"]
    assert not np.array_equal(kernel(other), kernel(states[0]))


def test_an_imbalanced_pool_is_all_that_is_drawn_from_and_queried(dataset):
    shares = (1, 0.2, 0.2)
    rows = dj.pool.imbalanced_rows(dataset.pool.y, shares, dj.streams.generator(3, "imbalance"))
    assert len(rows) < len(dataset.pool.y) / 2
    imbalanced = experiment(dataset, "entropy", seed=3, pool_shares=shares)
    pool = imbalanced.init().pool
    np.testing.assert_array_equal(np.union1d(pool.labeled, pool.unlabeled), rows)
    first = next(imbalanced.run())
    assert np.isin(first.query, dataset.index[rows]).all()
    # All of every class is the pool as it is.
    every, default = (experiment(dataset, **each).init() for each in ({"pool_shares": (1,)}, {}))
    np.testing.assert_array_equal(every.pool.labeled, default.pool.labeled)
    with pytest.raises(dj.UserError, match=r"need 18 images, but the pool of toy has 6"):
        experiment(dataset, pool_shares=(0.1,))


def test_the_images_that_a_strategy_chose_are_those_that_are_labeled(dataset):
    seen = []

    class Probe(dj.strategies.Random):
        def query(self, key, view, batch_size, state=None):
            chosen = super().query(key, view, batch_size, state)
            seen.append((view.labeled, view.unlabeled[chosen.positions], len(view.unlabeled)))
            return chosen

    rounds = list(dataclasses.replace(experiment(dataset), strategy=Probe()).run())
    asked = rounds[0].initial
    for round_result, (labeled, images, left) in zip(rounds, seen, strict=False):
        np.testing.assert_array_equal(labeled.x[np.arange(len(asked))], dataset.pool.x[asked])
        np.testing.assert_array_equal(labeled.y, dataset.pool.y[asked])
        np.testing.assert_array_equal(images, dataset.pool.x[round_result.query])
        assert len(asked) + left == len(dataset.pool.y)
        asked = np.append(asked, round_result.query)
    assert len(seen) == BUDGET.num_rounds


def test_weights_are_carried_over(dataset):
    experiment_ = experiment(dataset)
    state, _ = experiment_.step(experiment_.init())
    seen = []

    class Probe(dj.active_learning.Reporter):
        def epoch(self, epoch, labeled, target):
            seen.append(labeled)

    start = dj.training.evaluate(experiment_.model.apply, state.variables, dataset.pool)
    experiment_.step(state, Probe())
    fresh = dj.training.evaluate(
        experiment_.model.apply, experiment_.init().variables, dataset.pool
    )
    assert start.loss < fresh.loss
    assert len(seen) <= CONFIG.max_epochs


def test_looking_at_the_test_set_decides_nothing(dataset):
    every, never = (list(experiment(dataset, evaluate_every=every).run()) for every in (1, 0))
    for one, two in zip(every, never, strict=True):
        np.testing.assert_array_equal(one.query, two.query)
        assert (one.test, one.epochs) == (two.test, two.epochs)
        assert two.best_test_accuracy == two.test.accuracy


def test_queries_are_indices_of_the_data_set(dataset):
    shuffled = np.random.default_rng(0).permutation(1000)[: len(dataset.pool.y)]
    renamed = dataclasses.replace(dataset, index=shuffled)
    for one, two in zip(experiment(dataset).run(), experiment(renamed).run(), strict=True):
        np.testing.assert_array_equal(shuffled[one.query], two.query)


@pytest.mark.parametrize("field", ["initial_size", "batch_size", "num_rounds"])
@pytest.mark.parametrize("size", [0, -5])
def test_sizes_must_be_positive(field, size):
    with pytest.raises(dj.UserError, match=f"{field} must be at least 1, got {size}"):
        dj.Budget(**{"initial_size": 1, "batch_size": 1, "num_rounds": 1, field: size})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": -1}, "seed must be between 0"),
        ({"seed": 2**32}, "seed must be between 0"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 0"),
        ({"eval_batch_size": 0}, "eval_batch_size at least 1"),
        ({"model": "cnn"}, r"^a model is .*, got 'cnn'; dj.models.create\('cnn', data\) makes it"),
        ({"model": None}, "^a model is a Flax module or a function of rngs .*, got None$"),
    ],
)
def test_other_options_out_of_range(dataset, option, message):
    given = {"dataset": dataset, "model": toy.models()["cnn"], "budget": BUDGET}
    with pytest.raises(dj.UserError, match=message):
        dj.Experiment(**{"strategy": dj.strategies.Random(), **given, **option})


def test_fields_of_other_types():
    """In a process of its own, since type checks of the tests would see them first."""
    program = """
import jax.numpy as jnp
import numpy as np
import dynamical_jax as dj
examples = dj.Examples(np.eye(9, dtype=np.float32), np.arange(9) % 2)
data = dj.Dataset("x", examples, examples, ("a", "b"))
given = dict(dataset=data, model=dj.models.create("linear", data), strategy=dj.strategies.Random(),
             budget=dj.Budget(np.int64(2), 1, 1), seed=np.int64(3))
for scalar in (np.float32(1), jnp.float32(1), np.array(1)):
    dj.Experiment(
        **given, training_config=dj.TrainingConfig(learning_rate=scalar), redundancy=np.bool_(True)
    )
for make in (
    lambda: dj.Experiment(**{**given, "seed": "1"}),
    lambda: dj.Experiment(**given, mesh=2),
    lambda: dj.Experiment(**{**given, "dataset": "digits"}),
    lambda: dj.Experiment(**{**given, "strategy": dj.strategies.Random}),
    lambda: dj.Budget(2.5, 1, 1),
    lambda: dj.TrainingConfig(learning_rate="0.1"),
    lambda: dj.parallel.make_mesh("x"),
):
    try:
        make()
    except dj.UserError as error:
        print(error)
"""
    command = [sys.executable, "-c", program]
    # Other tests simulate several devices by this variable.
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == [
        "seed of Experiment must be of type int, got '1'",
        "mesh of Experiment must be of type Mesh or None, got 2",
        "dataset of Experiment must be of type Dataset, got 'digits'",
        "strategy of Experiment must be of type Strategy, got "
        "<class 'dynamical_jax.strategies.random.Random'>: call it",
        "initial_size of Budget must be of type int, got 2.5",
        "learning_rate of TrainingConfig must be of type float, got '0.1'",
        f"the number of devices must be from 1 to {len(jax.devices())}, as many as there are, got "
        "'x'",
    ]


def test_outputs_must_be_as_many_as_classes(dataset):
    other = toy.standardized(dj.models.CNN(7))
    with pytest.raises(dj.UserError, match="the model has 7 outputs, but toy has 3 classes"):
        dataclasses.replace(experiment(dataset), model=other).init()


def test_budget_must_fit_the_pool(dataset):
    budget = dj.Budget(20, 20, 3)
    with pytest.raises(dj.UserError, match="need 80 images, but the pool of toy has 60"):
        dj.Experiment(dataset, toy.models()["cnn"], dj.STRATEGIES["random"](), budget)
