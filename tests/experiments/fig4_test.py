"""Figure 4's binary: R against its definition, and what it writes."""

import json
import sys

import jax
import numpy as np
import pytest
import toy
from absl import flags

import dynamical_jax as dj
from experiments import fig4_approximation_ratio as fig4


@pytest.fixture
def run(run_binary, tmp_path):
    small = {
        "initial_size": 10,
        "image_size": 4,
        "max_epochs": 4,
        "ratio_sizes": ["6", "3"],
        "num_queries": 3,
        "every": 3,
        "output_dir": str(tmp_path),
    }
    return lambda **values: run_binary(fig4, **{**small, **values})


@pytest.mark.usefixtures("drawn_pictures")
def test_json_and_picture(run, tmp_path):
    status, output, errors = run()
    assert (status, errors) == (None, "")
    results = json.loads((tmp_path / "approximation_ratio.json").read_text())
    assert output.startswith(results["finding"])
    assert [point["epoch"] for point in results["points"]] == [0, 3, 4]
    for point in results["points"]:
        assert {size: len(found) for size, found in point["ratios"].items()} == {"3": 3, "6": 3}
        assert set(point["own_ratios"]) == {"3", "6"}
        assert all(np.isfinite(list(point["own_ratios"].values())))
    assert "Of dynamicAL's own query it is" in output
    assert (tmp_path / "approximation_ratio.png").stat().st_size > 10_000


@pytest.mark.slow
def test_all_epochs_past_the_target(run, tmp_path):
    epochs = []
    easy = {"target_accuracy": 0.0, "target_total_loss": 1e9, "look_every": 1}
    for values in (easy, {"all_epochs": True}):
        run(**values)
        results = json.loads((tmp_path / "approximation_ratio.json").read_text())
        epochs.append([point["epoch"] for point in results["points"]])
    assert epochs == [[0, 1], [0, 3, 4]]


def test_what_was_seen_is_kept(run, tmp_path, monkeypatch):
    def fit(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(dj.training, "fit", fit)
    run()
    results = json.loads((tmp_path / "approximation_ratio.partial.json").read_text())
    assert [point["epoch"] for point in results["points"]] == [0]
    assert results["points"][0]["train_accuracy"] is not None


def test_ratio_by_definition():
    # R = Σ_u (G(S ∪ u) − G(S)) / (G(S ∪ Q) − G(S)), with G = ‖g‖² of sets.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])
    model = toy.models()["cnn"]
    variables, query = toy.variables(model), toy.images(6, seed=3)
    labels = np.argmax(toy.outputs(model.apply, variables, query).logits, axis=1)

    def gradient(x, y):
        tree = dj.gradients.set_gradient(model.apply, variables, dj.Examples(x, y))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(float)

    grad_s = dj.gradients.set_gradient(model.apply, variables, toy.examples(5))
    flat_s = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grad_s)]).astype(float)
    each = [gradient(query[i : i + 1], labels[i : i + 1]) for i in range(6)]
    dynamics = lambda g: g @ g
    expected = [
        sum(dynamics(flat_s + g) - dynamics(flat_s) for g in each[:size])
        / (dynamics(flat_s + sum(each[:size])) - dynamics(flat_s))
        for size in (2, 6)
    ]
    actual, limit = zip(*fig4.query_ratios(model, variables, query, grad_s, [2, 6]), strict=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-3)
    # Without g_S: R = 1 / (1 + (b − 1) ρ), ρ the mean product of pairs over the mean square.
    for size, found in zip((2, 6), limit, strict=True):
        products = np.array([[u @ v for v in each[:size]] for u in each[:size]])
        pairs = products[~np.eye(size, dtype=bool)].mean() / np.diag(products).mean()
        np.testing.assert_allclose(found, 1 / (1 + (size - 1) * pairs), rtol=1e-3)


def test_own_query_is_that_of_dynamical(dataset):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])
    model = toy.models()["cnn"]
    variables = toy.variables(model)
    pool = dj.pool.initial_pool(len(dataset.pool.y), 10, np.random.default_rng(0))
    labeled = dj.Examples(dataset.pool.x[pool.labeled], dataset.pool.y[pool.labeled])
    grad_s = dj.gradients.set_gradient(model.apply, variables, labeled)
    own = fig4.own_query(model, variables, dataset, pool, grad_s, 5)
    view = dj.LearnerView(model.apply, variables, labeled, dataset.pool.x[pool.unlabeled])
    query = dj.strategies.Dynamical(gamma=2.0)
    expected = query.select(jax.random.key(0), query.score(jax.random.key(0), view, None), 5, None)
    np.testing.assert_array_equal(own, pool.unlabeled[expected.positions])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio_sizes": ["many"]}, "ratio_sizes must be positive whole numbers, got 'many'"),
        ({"initial_size": 1430}, "need 1436 images; the pool of digits has 1433"),
        ({"initial_size": 0}, "initial_size must be at least 1, got 0"),
        ({"num_seeds": 3}, "--num_seeds has no effect here"),
        ({"all_epochs": True, "target_loss": 1.0}, "--target_loss has no effect with --all_epochs"),
        ({"model": "alexnet"}, "unknown model 'alexnet'"),
    ],
)
def test_bad_flags_are_one_line(run, tmp_path, values, message):
    status, output, errors = run(**values)
    assert (status, output) == (1, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(tmp_path.iterdir())
