"""The binaries with other axes than strategies: γ, and how often to ask."""

import pytest

import dynamical_jax as dj
from experiments import gamma_variants, query_rounds

SMALL = {"initial_size": 10, "num_seeds": 1, "max_epochs": 2, "image_size": 4}


@pytest.fixture
def run(run_binary, tmp_path):
    small = {**SMALL, "output_dir": str(tmp_path / "run")}
    return lambda binary, **values: run_binary(binary, **{**small, **values})


def test_gammas_are_compared(run, tmp_path):
    status, output, _ = run(gamma_variants, gammas=["0", "2", "inf"], num_rounds=1, batch_size=5)
    assert status is None
    rounds = dj.records.read(tmp_path / "run" / "rounds.jsonl")
    first = {r["strategy"]: r for r in rounds if r["round"] == 0}
    assert list(first) == ["gamma=0", "gamma=2", "gamma=inf"]
    # Δ with γ = 2 at these examples: twice the inner product more than the norm alone.
    assert len({tuple(r["initial"]) for r in first.values()}) == 1
    assert len({tuple(r["query"]) for r in first.values()}) > 1
    assert "gamma=inf" in output


@pytest.mark.slow  # As the one above; flags are read below.
def test_one_budget_is_spent_in_several_ways(run, tmp_path):
    status, _, _ = run(query_rounds, budget=12, rounds=["3", "1"])
    assert status is None
    rounds = dj.records.read(tmp_path / "run" / "rounds.jsonl")
    labels = {}
    for record in rounds:
        labels.setdefault(record["strategy"], []).append(record["num_labeled"])
    assert labels == {"R=3 b=4": [10, 14, 18, 22], "R=1 b=12": [10, 22]}


@pytest.mark.parametrize(
    ("binary", "values", "message"),
    [
        (gamma_variants, {"gammas": ["two"]}, "gammas are numbers or inf, got 'two'"),
        (gamma_variants, {"gammas": ["-1"]}, "gamma must be at least 0"),
        (gamma_variants, {"gammas": ["2", "2.0"]}, "a gamma is given twice: 2,2.0"),
        (gamma_variants, {"gammas": []}, "no gamma given"),
        (gamma_variants, {"gamma": 1.0}, "--gamma has no effect here"),
        (gamma_variants, {"strategies": ["random"]}, "--strategies has no effect here"),
        (query_rounds, {"rounds": ["7"]}, "rounds must divide the budget of 120, got '7'"),
        (query_rounds, {"rounds": ["0"]}, "rounds must divide the budget of 120, got '0'"),
        (query_rounds, {"rounds": ["2", "2"]}, "a number of rounds is given twice"),
        (query_rounds, {"rounds": []}, "no number of rounds given"),
        (query_rounds, {"batch_size": 5}, "--batch_size follows here from --budget and --rounds"),
        (query_rounds, {"preset": "table2"}, "unknown preset 'table2'; choose from table1-cifar10"),
    ],
)
def test_bad_flags_are_one_line(run, binary, values, message):
    status, output, errors = run(binary, **values)
    assert (status, output) == (1, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
