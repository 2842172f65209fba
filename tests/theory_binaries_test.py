"""Each theory binary on digits, as a user runs it."""

import importlib
import json
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import dynamical_jax as dj

BINARIES = (
    "fig1_bound_and_mmd",
    "fig2_alignment",
    "theorem1_convergence",
    "theorem2_generalization",
)
MODULES = {name: importlib.import_module(f"theory.{name}") for name in BINARIES}
SMALL = {
    "widths": ["8", "8"],
    "num_labeled": 20,
    "num_seeds": 1,
    "epochs": 3,
    "query_sizes": ["5", "10"],
    "query_size": 10,
    "draws": 8,
    "steps": 30,
}


@pytest.fixture
def run(tmp_path, cache_dir, capsys):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])

    def run(name, **values):
        given = {**SMALL, "output_dir": str(tmp_path / "run"), "cache_dir": cache_dir}
        with flagsaver.flagsaver(**{**given, **values}):
            status = MODULES[name].main([name])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", BINARIES)
def test_json_picture_and_one_sentence(run, tmp_path, name):
    status, output, errors = run(name)
    assert (status, errors) == (None, "")
    results = json.loads((tmp_path / "run" / f"{name}.json").read_text())
    sentence, *files = output.splitlines()
    assert results["finding"] == sentence
    assert [file.rpartition("/")[2] for file in files] == [f"{name}.json", f"{name}.png"]
    assert results["flags"]["widths"] == ["8", "8"]
    assert results["versions"]["jax"]
    assert (tmp_path / "run" / f"{name}.png").stat().st_size > 10_000


def test_figure_1_has_both_scales(run, tmp_path):
    run("fig1_bound_and_mmd")
    rows = json.loads((tmp_path / "run" / "fig1_bound_and_mmd.json").read_text())["rows"]
    assert [(row["query_size"], row["scale"]) for row in rows] == [
        (size, scale) for size in (5, 10) for scale in ("as it is", "mean diagonal 1")
    ]
    for raw, unit in zip(rows[::2], rows[1::2], strict=True):
        # ℬ goes with Θ^(−1/2), MMD² with Θ.
        assert unit["bound"] == pytest.approx(raw["bound"] * raw["mean_diagonal"] ** 0.5, rel=1e-3)
        assert raw["squared_mmd"] == pytest.approx(unit["squared_mmd"] * raw["mean_diagonal"])


@pytest.mark.skipif(not dj.ntk.compatibility.is_installed(), reason="needs neural-tangents")
def test_figure_1_of_infinite_width(run, tmp_path):
    small = {"image_size": 4, "num_labeled": 12, "query_sizes": ["4"]}
    run("fig1_bound_and_mmd", infinite_width=True, **small)
    infinite = json.loads((tmp_path / "run" / "fig1_bound_and_mmd.json").read_text())
    assert infinite["flags"]["infinite_width"]
    errors = []
    for width in ("8", "512"):
        run("fig1_bound_and_mmd", widths=[width, width], **small)
        finite = json.loads((tmp_path / "run" / "fig1_bound_and_mmd.json").read_text())
        diagonals = [results["rows"][0]["mean_diagonal"] for results in (infinite, finite)]
        errors.append(abs(diagonals[1] / diagonals[0] - 1))
    assert errors[1] < min(errors[0], 0.1)


def test_a_seed_that_fails_does_not_stop_the_others(run, tmp_path, monkeypatch):
    original = MODULES["fig1_bound_and_mmd"].of_seed

    def of_seed(setting, seed, sizes):
        if seed == 0:
            raise dj.UserError("the kernel matrix is not positive definite")
        return original(setting, seed, sizes)

    monkeypatch.setattr(MODULES["fig1_bound_and_mmd"], "of_seed", of_seed)
    status, output, errors = run("fig1_bound_and_mmd", num_seeds=2)
    assert (status, errors) == (1, "error: seed 0: the kernel matrix is not positive definite\n")
    assert "MMD / ℬ" in output
    rows = json.loads((tmp_path / "run" / "fig1_bound_and_mmd.json").read_text())["rows"]
    assert {row["seed"] for row in rows} == {1}


def test_the_theorems_hold(run, tmp_path):
    _, output, _ = run("theorem1_convergence")
    assert "between the sides of Theorem 1 at 150 of 150 times" in output
    _, output, _ = run("theorem2_generalization")
    assert "by alignment in 6 of 6 cases" in output


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("fig1_bound_and_mmd", {"num_labeled": 1430}, "need 1440 images, digits has 1433"),
        ("fig1_bound_and_mmd", {"widths": ["wide"]}, "widths must be positive whole numbers"),
        ("fig1_bound_and_mmd", {"query_sizes": []}, "query_sizes must be positive whole numbers"),
        ("fig2_alignment", {"query_size": 1430}, "images, digits has 1433"),
        ("theorem1_convergence", {"num_labeled": 2000}, "cannot draw 2000 images from the 1433"),
        ("theorem2_generalization", {"num_seeds": 0}, "num_seeds must be at least 1, got 0"),
        ("theorem2_generalization", {"jitter": -1.0}, "jitter must not be negative"),
        ("theorem2_generalization", {"dataset": "mnist"}, "unknown dataset 'mnist'"),
        ("theorem2_generalization", {"widths": ["1"]}, "not positive definite: λ_min"),
    ],
)
def test_bad_flags_are_one_line(run, tmp_path, name, values, message):
    status, output, errors = run(name, **values)
    assert (status, output) == (1, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "run").exists()
