"""Each theory binary on digits, as a user runs it."""

import importlib
import json
import sys

import jax
import numpy as np
import pytest
import scipy.stats
from absl import flags
from absl.testing import flagsaver

import dynamical_jax as dj
from theory import common as theory_common

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
def run(run_binary, tmp_path, monkeypatch):
    # Of 2,000 resamples each takes a millisecond.
    monkeypatch.setattr(MODULES["fig2_alignment"], "RESAMPLES", 50)

    def run(name, **values):
        read = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(MODULES[name])}
        small = {key: value for key, value in SMALL.items() if key in read}
        output_dir = str(tmp_path / "run")
        return run_binary(MODULES[name], **{**small, "output_dir": output_dir, **values})

    return run


RUNS = {}


@pytest.fixture
def small_run(run, tmp_path_factory, drawn_pictures):
    """Runs a binary with `SMALL`, once for all tests; returns status, output, errors, directory."""

    def small_run(name):
        if name not in RUNS:
            directory = tmp_path_factory.mktemp(name)
            RUNS[name] = (*run(name, output_dir=str(directory)), directory)
        return RUNS[name]

    return small_run


def read(name, directory):
    return json.loads((directory / f"{name}.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "theorem1_convergence" else [])
        for name in BINARIES  # The theorems are tested below.
    ],
)
def test_json_picture_and_one_sentence(small_run, name):
    status, output, errors, directory = small_run(name)
    assert (status, errors) == (None, "")
    results = read(name, directory)
    sentence, *files = output.splitlines()
    assert results["finding"] == sentence
    assert [file.rpartition("/")[2] for file in files] == [f"{name}.json", f"{name}.png"]
    assert results["flags"]["widths"] == ["8", "8"]
    assert results["versions"]["jax"]
    assert (directory / f"{name}.png").stat().st_size > 10_000


def test_figure_1_has_both_scales(small_run):
    rows = read("fig1_bound_and_mmd", small_run("fig1_bound_and_mmd")[-1])["rows"]
    assert [(row["query_size"], row["scale"]) for row in rows] == [
        (size, scale) for size in (5, 10) for scale in ("as it is", "mean diagonal 1")
    ]
    for raw, unit in zip(rows[::2], rows[1::2], strict=True):
        # ℬ goes with Θ^(−1/2), MMD² with Θ.
        assert unit["bound"] == pytest.approx(raw["bound"] * raw["mean_diagonal"] ** 0.5, rel=1e-3)
        assert raw["squared_mmd"] == pytest.approx(unit["squared_mmd"] * raw["mean_diagonal"])


@pytest.mark.slow  # 17 s; ntk_test.py compares the kernels themselves.
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


@pytest.mark.parametrize(
    ("name", "of", "finding"),
    [
        pytest.param("fig1_bound_and_mmd", "rows", "MMD / ℬ", marks=pytest.mark.slow),
        pytest.param("theorem1_convergence", "curves", "stays within", marks=pytest.mark.slow),
        ("theorem2_generalization", "rows", "in 6 of 6 cases"),
    ],
)
def test_a_seed_that_fails_does_not_stop_the_others(run, tmp_path, monkeypatch, name, of, finding):
    original = MODULES[name].run_seed

    def run_seed(setting, seed, *arguments):
        if seed == 0:
            raise dj.UserError("the kernel matrix is not positive definite")
        return original(setting, seed, *arguments)

    monkeypatch.setattr(MODULES[name], "run_seed", run_seed)
    status, output, errors = run(name, num_seeds=2)
    assert (status, errors) == (1, "error: seed 0: the kernel matrix is not positive definite\n")
    assert finding in output
    results = json.loads((tmp_path / "run" / f"{name}.json").read_text())
    assert {row["seed"] for row in results[of]} == {1} == set(results["seeds"])
    assert set(results["failed_seeds"]) == {"0"}
    assert results["finding"].endswith("(1 of 2 seeds.)")


@pytest.mark.parametrize(
    "name", [pytest.param("fig1_bound_and_mmd", marks=pytest.mark.slow), "theorem1_convergence"]
)
def test_what_earlier_seeds_gave_is_kept(run, tmp_path, monkeypatch, name):
    original = MODULES[name].run_seed

    def run_seed(setting, seed, *arguments):
        if seed == 1:
            raise KeyboardInterrupt
        return original(setting, seed, *arguments)

    monkeypatch.setattr(MODULES[name], "run_seed", run_seed)
    run(name, num_seeds=2)
    partial = tmp_path / "run" / f"{name}.partial.json"
    results = json.loads(partial.read_text())
    assert {row["seed"] for row in results.get("rows") or results["curves"]} == {0}
    assert results["finding"].endswith("(1 of 2 seeds.)")
    assert not (tmp_path / "run" / f"{name}.json").exists()
    monkeypatch.setattr(MODULES[name], "run_seed", original)
    run(name, num_seeds=2)
    assert not partial.exists()
    assert json.loads((tmp_path / "run" / f"{name}.json").read_text())["seeds"] == [0, 1]


def test_the_theorems_hold(run, small_run, tmp_path):
    _, output, _ = run("theorem1_convergence", widths=["64", "64"])
    assert "between the sides of Theorem 1 at 150 of 150 times" in output
    curves = json.loads((tmp_path / "run" / "theorem1_convergence.json").read_text())["curves"]
    for curve in curves:
        error, term = curve["error"], curve["convergence_term"]
        assert error[0] == pytest.approx(term[0], rel=1e-4)  # ‖Y‖², centred
        assert error[0] - error[-1] == pytest.approx(term[0] - term[-1], rel=0.5)
    _, output, _, directory = small_run("theorem2_generalization")
    assert "by alignment in 6 of 6 cases" in output
    rows = read("theorem2_generalization", directory)["rows"]
    for row in rows:
        assert row["middle"] == pytest.approx(10 * row["bound"] ** 2)  # n/2 with n = 20


@pytest.fixture
def setting(cache_dir):
    """Setting and flags as the binaries have them, on twenty labels."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])
    with flagsaver.flagsaver(**{**SMALL, "cache_dir": cache_dir}):
        yield theory_common.setting()


def test_figure_1_by_definition(setting):
    module, pool = MODULES["fig1_bound_and_mmd"], setting.dataset.pool
    raw = module.run_seed(setting, 0, [5])[0]
    rows, variables = setting.draw(0, 20), setting.variables(0)
    fit = theory_common.fit(setting, variables, dj.Examples(pool.x[rows], pool.y[rows]), 0)
    others = np.setdiff1d(np.arange(len(pool.y)), rows)
    apply, labeled = setting.model.apply, dj.Examples(pool.x[rows], pool.y[rows])
    grad_s = dj.gradients.set_gradient(apply, fit.variables, labeled)
    terms = dj.gradients.norms_and_products(apply, fit.variables, pool.x[others], grad_s)
    best = np.argsort(-(terms.squared_norm + 2 * terms.inner_product), kind="stable")[:5]
    both = np.append(rows, others[best])
    theta = theory_common.kernel(apply, variables, pool.x[both])
    y = np.eye(10)[pool.y[both]]
    assert raw["bound"] == pytest.approx(
        np.sqrt(2 * np.trace(y.T @ np.linalg.inv(theta) @ y) / 25), rel=1e-4
    )
    pairs = [np.mean(block[~np.eye(len(block), dtype=bool)]) for block in (theta[:20, :20], theta)]
    across = np.sum(theta[:20]) - np.trace(theta[:20, :20])
    assert raw["squared_mmd"] == pytest.approx(sum(pairs) - 2 * across / (20 * 24), rel=1e-4)


def test_figure_2_by_definition(setting):
    module, pool = MODULES["fig2_alignment"], setting.dataset.pool
    rows, variables = setting.draw(0, 20), setting.variables(0)
    points = module.quantities(setting, variables, rows, 0)
    others = np.setdiff1d(np.arange(len(pool.y)), rows)
    query = dj.streams.generator(0, "draws", 3).choice(others, 10, replace=False)
    both = np.append(rows, query)
    theta = theory_common.kernel(setting.model.apply, variables, pool.x[both])
    y = np.eye(10)[pool.y[both]]
    residual = np.asarray(jax.jit(setting.model.apply)(variables, pool.x[both]).logits) - y
    assert points["alignment"][3] == pytest.approx(np.trace(y.T @ theta @ y), rel=1e-4)
    expected = np.trace(residual.T @ theta @ residual)
    assert points["squared_error"][3] == pytest.approx(expected, rel=1e-4)
    outputs = residual + y
    assert points["outputs"][3] == pytest.approx(np.trace(outputs.T @ theta @ outputs), rel=1e-4)
    order = dj.streams.generator(0, "noise").permutation(len(pool.y))
    other_y = np.eye(10)[pool.y[order][both]]
    residual = outputs - other_y
    expected = [np.trace(v.T @ theta @ v) for v in (other_y, residual)]
    found = [points[name][3] for name in ("permuted_alignment", "permuted_squared_error")]
    assert found == pytest.approx(expected, rel=1e-4)
    examples = dj.Examples(pool.x[both], pool.y[both])
    grad = dj.gradients.set_gradient(setting.model.apply, variables, examples)
    expected = float(dj.dynamics.training_dynamics(grad))
    assert points["cross_entropy"][3] == pytest.approx(expected, rel=1e-4)


def test_figure_2_correlates_what_it_says(small_run):
    results = read("fig2_alignment", small_run("fig2_alignment")[-1])
    for when in ("at initialisation", "after training"):
        points = results[when]["points"]
        for name in ("squared_error", "cross_entropy"):
            tau = scipy.stats.kendalltau(points[name], points["alignment"]).statistic
            assert results[when][name]["tau"] == pytest.approx(tau)
        permuted = [points["permuted_squared_error"], points["permuted_alignment"]]
        tau = scipy.stats.kendalltau(*permuted).statistic
        assert results[when]["permuted"]["tau"] == pytest.approx(tau)
    start, trained = (results[when]["points"] for when in ("at initialisation", "after training"))
    assert np.mean(trained["cross_entropy"]) != np.mean(start["cross_entropy"])
    paired = MODULES["fig2_alignment"].correlation([*range(12)], [*range(11), 9.5])
    assert paired["low"] > 0.5


def test_theorem_1_says_what_it_computed(small_run):
    _, output, _, directory = small_run("theorem1_convergence")
    results = read("theorem1_convergence", directory)
    curves = results["curves"]
    error, term = (np.array([c[name] for c in curves]) for name in ("error", "convergence_term"))
    apart = np.max(np.abs(error**0.5 - term**0.5) / error[:, :1] ** 0.5)
    assert f"within {apart:.1%} of" in output
    promised = [c["learning_rate"] * c["alignment"] / c["error"][0] for c in curves]
    left = error[:, -1] / error[:, 0]
    np.testing.assert_allclose(
        MODULES["theorem1_convergence"].error_reduction(curves), [promised, left]
    )
    tau = scipy.stats.kendalltau(promised, left).statistic
    assert results["tau_of_seeds"] == pytest.approx([tau])
    assert f"is {tau:.2f}." in output


def test_tau_is_within_seeds():
    # In each seed the two rise together, and fall from seed to seed.
    rows = [{"seed": seed} for seed in (1, 0, 1, 0, 1, 0)]
    one, other = [11, 1, 12, 2, 13, 3], [1, 11, 2, 12, 3, 13]
    taus = theory_common.tau_within_seeds(rows, one, other)
    assert taus == [1, 1]
    assert theory_common.describe_taus([0.5, 1.0]) == "is 0.75 (0.50 to 1.00 in 2 seeds)"


def test_noise_is_as_much_as_asked_for_and_nested():
    labels = np.arange(1000) % 10
    noisy = [theory_common.add_label_noise(labels, share, 10, 0) for share in (0.0, 0.5, 1.0)]
    changed = [np.mean(one != labels) for one in noisy]
    np.testing.assert_allclose(changed, [0, 0.45, 0.9], atol=0.04)
    assert np.all((noisy[1] == labels) | (noisy[1] == noisy[2]))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "fig1_bound_and_mmd",
            {"num_labeled": 1430},
            "S and Q need 1440 images",
        ),
        ("fig1_bound_and_mmd", {"widths": ["wide"]}, "widths must be positive whole numbers"),
        ("fig1_bound_and_mmd", {"query_sizes": []}, "query_sizes must be positive whole numbers"),
        ("fig2_alignment", {"query_size": 1430}, "images, the pool of digits has 1433"),
        (
            "theorem1_convergence",
            {"num_labeled": 2000},
            "S needs 2000 images, the pool of digits",
        ),
        ("theorem1_convergence", {"num_labeled": 2, "first_seed": 10}, "labels of S are the same"),
        ("theorem2_generalization", {"num_seeds": 0}, "num_seeds must be at least 1, got 0"),
        ("theorem2_generalization", {"steps": 5}, "--steps has no effect here"),
        ("theorem2_generalization", {"output_dir": "/proc/x"}, "cannot write to /proc/x"),
        ("fig2_alignment", {"num_seeds": 3}, "--num_seeds has no effect here"),
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
    assert not list((tmp_path / "run").glob("*"))
