"""The binary, run as a user runs it, and the contenders themselves."""

import importlib
import importlib.util
import json

import numpy as np
import pytest

import dynamical_jax as dj
from benchmarks import harness, jax_contenders, scoring, task
from benchmarks.task import Task

TASK = Task("cnn", 3)


CASE = {
    "model": "cnn",
    "batch_size": 3,
    "contenders": {
        "factored": {"milliseconds": [3.0], "peak_mib": 5.0},
        "forward_backward": {"milliseconds": [2.0], "peak_mib": 4.0},
    },
    "others_share": 0.0,
    "left_out": {},
}


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_and_file(run_benchmark, tmp_path, monkeypatch, real):
    # Where it is real, four processes import JAX and compile, which takes 10 s.
    if not real:
        monkeypatch.setattr(harness, "compare", lambda *arguments: CASE)
    path = tmp_path / "results" / "scoring.json"
    contenders = ["factored", "forward_backward"]
    status, output, errors = run_benchmark(
        scoring, models=["cnn"], batch_sizes=["3"], contenders=contenders, json=str(path)
    )
    assert (status, errors) == (None, "")
    assert "cnn, 3 images" in output
    assert "factored / forward_backward: " in output
    assert real or "factored / forward_backward: 1.50 (1.50–1.50)" in output
    results = json.loads(path.read_text())
    assert results["command"].startswith("python -m benchmarks.scoring")
    assert set(results["machine"]) == {"cpu", "cores", "system"}
    assert set(results) >= {"versions", "device", "git_commit", "matmul_precision"}
    (case,) = results["cases"]
    assert list(case["contenders"]) == contenders
    for row in case["contenders"].values():
        assert len(row["milliseconds"]) == 1
        assert row["milliseconds"][0] > 0
        assert row["peak_mib"] > 0
    assert case["left_out"] == {}


def test_without_pytorch(run_benchmark, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, output, _ = run_benchmark(
        scoring, models=["cnn"], batch_sizes=["3"], contenders=["torch_vmap"]
    )
    assert status is None
    assert "torch_vmap: left out (ModuleNotFoundError: No module named 'torch')" in output


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": ["alexnet"]}, "unknown model 'alexnet'; choose from cnn, resnet18"),
        ({"models": []}, "no model given; choose from cnn"),
        ({"contenders": ["jax"]}, "unknown contender 'jax'; choose from factored, nnx, forward"),
        ({"batch_sizes": ["12", "x"]}, "batch_sizes must be positive whole numbers, got '12,x'"),
        ({"batch_sizes": ["0"]}, "batch_sizes must be positive whole numbers, got '0'"),
        ({"batch_sizes": []}, "batch_sizes must be positive whole numbers, got ''"),
        ({"repetitions": 0}, "repetitions must be at least 1, got 0"),
        ({"json": "/dev/null/results.json"}, "cannot write to /dev/null/results.json: "),
    ],
)
def test_bad_flags_are_one_line(run_benchmark, values, message):
    status, output, errors = run_benchmark(scoring, **values)
    assert (status, output) == (1, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_unexpected_argument(run_benchmark):
    status, _, errors = run_benchmark(scoring, "models=cnn")
    assert status == 1
    assert "unexpected argument 'models=cnn'" in errors


def test_a_worker_that_dies_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    left_out = {}
    contenders = {"torch_vmap": "torch_contenders.vmap"}
    assert harness.take_turns(TASK, contenders, 1, {}, left_out) == {}
    assert left_out == {"torch_vmap": "its process ended with status -9"}


def test_ratios_are_taken_turn_by_turn():
    ratio = harness.ratio({"milliseconds": [2.0, 9.0, 4.0]}, {"milliseconds": [1.0, 3.0, 2.0]})
    assert ratio == (2.0, 2.0, 3.0)
    assert str(ratio) == "2.00 (2.00–3.00)"


TINY = {"patch_size": 4, "width": 12, "depth": 2, "num_heads": 3}


@pytest.fixture
def transformer(monkeypatch):
    """A task with a vision transformer that is small."""
    monkeypatch.setitem(task.IMAGE_SHAPES, "vit_s", (8, 8, 3))
    monkeypatch.setitem(jax_contenders.MODELS, "vit_s", dj.models.ViT(10, **TINY))
    nnx_models = importlib.import_module("benchmarks.nnx_models")
    monkeypatch.setitem(nnx_models.MODELS, "vit_s", lambda: nnx_models.ViT(8, **TINY))
    return Task("vit_s", 3)


def assert_same_terms(actual, expected):
    np.testing.assert_allclose(actual.squared_norm, expected.squared_norm, rtol=1e-4)
    np.testing.assert_allclose(
        actual.inner_product,
        expected.inner_product,
        rtol=1e-4,
        atol=1e-4 * np.max(expected.squared_norm),
    )


def test_engines_agree():
    assert_same_terms(jax_contenders.factored(TASK).call(), jax_contenders.vmap(TASK).call())


@pytest.mark.slow  # 4 s; nnx_test.py compares twins, too.
def test_twins_in_nnx_agree(transformer):
    expected = jax_contenders.vmap(transformer).call()
    for make in (jax_contenders.factored, jax_contenders.nnx):
        assert_same_terms(make(transformer).call(), expected)
    with pytest.raises(LookupError, match="cnn has no twin"):
        jax_contenders.nnx(TASK)


def normalized():
    """A network in PyTorch with BatchNorm, whose statistics are those of other images."""
    nn = importlib.import_module("torch").nn
    layers = nn.Conv2d(3, 4, 5, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10)
    layers[1].running_mean += 0.3
    layers[1].running_var *= 2
    return nn.Sequential(*layers)


def is_installed(contender):
    package = {"backpack": "backpack", "opacus": "opacus", "dattri_llm": "dattri_llm"}
    return importlib.util.find_spec(package.get(contender, "torch")) is not None


@pytest.mark.parametrize("model", ["cnn", "vit_s", "normalized"])
def test_pytorch_contenders_agree_with_one_gradient_at_a_time(model, transformer, monkeypatch):
    torch = pytest.importorskip("torch", reason="its contenders run where PyTorch is installed")
    from benchmarks import torch_contenders, torch_models

    monkeypatch.setitem(torch_contenders.MODELS, "normalized", normalized)
    monkeypatch.setitem(torch_contenders.MODELS, "vit_s", lambda: torch_models.ViT(8, **TINY))
    given = Task(model, 3)
    network = torch_contenders._model(given).eval()
    direction = torch_contenders._direction(network)
    expected = []
    for image in torch_contenders._images(network, given, 3):
        logits = network(image[None])
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
        gradient = torch.autograd.grad(loss, list(network.parameters()))
        norm = sum(float(g.square().sum()) for g in gradient)
        product = sum(float((g * v).sum()) for g, v in zip(gradient, direction, strict=True))
        expected.append((norm, product))
    contenders = ["vmap", "loop", "opacus"]
    contenders += {"cnn": ["backpack", "dattri_llm"], "vit_s": ["dattri_llm"]}.get(model, [])
    for name in filter(is_installed, contenders):
        call = getattr(torch_contenders, name)(given).call
        call()
        terms = call()  # What the first one left behind must not be added.
        actual = np.stack([np.asarray(term.detach()) for term in terms], axis=1)
        # Opacus and dattri-llm return norms alone.
        known = np.array(expected)[:, : actual.shape[1]]
        np.testing.assert_allclose(actual, known, rtol=1e-3, atol=1e-5)
    if is_installed("dattri_llm") and model == "normalized":
        with pytest.raises(TypeError, match="BatchNorm"):
            torch_contenders.dattri_llm(given)
