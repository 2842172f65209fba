"""The study of stopping rules: what it sees, when a rule stops, and what it writes."""

import json

import jax
import numpy as np
import pytest
import toy

import dynamical_jax as dj
from experiments import active_learning, stopping_rules

SMALL = {"initial_size": 10, "batch_size": 5, "image_size": 4, "num_seeds": 2, "max_epochs": 13}


@pytest.fixture
def run(run_binary, tmp_path):
    def run(*arguments, **values):
        given = {} if arguments else {**SMALL, "output_dir": str(tmp_path / "setting"), **values}
        return run_binary(stopping_rules, *arguments, **given)

    return run


@pytest.mark.slow  # 6 s; its parts are tested below.
@pytest.mark.usefixtures("drawn_pictures")
def test_from_training_to_the_report(run, run_binary, tmp_path):
    status, output, errors = run(candidates=100)
    assert (status, errors) == (None, "")
    results = json.loads((tmp_path / "setting" / "stopping_rules.json").read_text())
    assert set(results["seeds"]) == {"0", "1"}
    for looks in results["seeds"].values():
        assert [look["epoch"] for look in looks] == [1, 2, 3, 4, 5, 6, 8, 10, 13]
        assert all(len(set(look["query"])) == 5 for look in looks)
        assert all(max(look["query"]) < 100 and look["size"] == 10 for look in looks)
    assert output.count("\n| ") == 2 + len(stopping_rules.RULES)

    strategies = ["dynamical", "badge", "random"]
    rules = {"epochs-1": {"min_epochs": 1, "look_every": 1}, "epochs-4": {"min_epochs": 4}}
    for name, values in rules.items():
        values |= {"target_total_loss": np.inf, "target_accuracy": 0.0, "strategies": strategies}
        directory = str(tmp_path / "setting" / name)
        given = {**SMALL, "num_rounds": 1, "output_dir": directory, **values, "max_epochs": 4}
        run_binary(active_learning, **given)
    status, output, _ = run(str(tmp_path / "setting"))
    assert status is None
    rows = [line.split("|") for line in output.splitlines() if line.startswith("| epochs-")]
    assert [(row[1].strip(), int(row[-2])) for row in rows] == [("epochs-1", 2), ("epochs-4", 8)]
    assert (tmp_path / "tables.md").read_text() in output
    assert (tmp_path / "stopping_rules.png").stat().st_size > 10_000


def test_a_look_sees_what_dynamical_would_query(run_binary, dataset, monkeypatch):
    run_binary(stopping_rules, "nowhere")  # So that flags are parsed.
    model = toy.models()["cnn"]
    variables, labeled = toy.variables(model), toy.examples(7)
    unlabeled = toy.images(30, seed=4)
    look = stopping_rules.inspect_query(model, variables, labeled, unlabeled, epoch=1)
    view = dj.LearnerView(model.apply, variables, labeled, unlabeled)
    query = dj.STRATEGIES["dynamical"]().query(jax.random.key(0), view, len(look["query"]))
    np.testing.assert_array_equal(look["query"], query.positions)
    np.testing.assert_allclose(look["share"], query.facts["inner_product_share"], rtol=1e-4)
    np.testing.assert_allclose(look["ratio"], query.facts["approximation_ratio"], rtol=1e-4)


def test_a_rule_stops_at_its_first_look_and_is_judged_ten_times_later():
    looks = [
        {"epoch": epoch, "loss": 1 / epoch, "share": epoch, "ratio": -epoch, "query": query}
        for epoch, query in ((1, [1, 2]), (2, [3, 4]), (4, [5, 6]), (20, [4, 7]), (25, [3, 4]))
    ]
    stop = stopping_rules.apply_rule(lambda look: look["loss"] <= 0.6, looks)
    assert stop == {"epoch": 2, "share": 2, "ratio": -2, "overlap": 0.5}
    assert stopping_rules.apply_rule(lambda look: look["loss"] <= 0.1, looks)["overlap"] is None
    assert stopping_rules.apply_rule(lambda look: False, looks) is None


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        (["nowhere"], {}, "nowhere/stopping_rules.json is no record of this program"),
        ([], {"candidates": 4}, "candidates no smaller"),
        ([], {"candidates": 1430}, "1440 examples are needed; the pool of digits has 1433"),
        ([], {"target_total_loss": 3.0}, "--target_total_loss has no effect here"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, values, message):
    status, output, errors = run(*arguments, **values)
    assert (status, output) == (1, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "setting").exists()
