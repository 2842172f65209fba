"""Imports point one way, and the core needs no TensorFlow."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "dynamical_jax"

# Each module may import those of earlier rows, and of its own row only within one package.
LAYERS = (
    {"errors", "types", "streams"},
    # mathematics of arrays
    {"losses", "dynamics", "selection", "convolution", "statistics", "alignment"},
    {"generalization", "mmd"},
    # mathematics of a network
    {"contract"},
    {"gradients"},
    {"ntk"},
    # parts of an experiment
    {"images"},
    {"own_data"},
    {"datasets", "models", "training", "pool", "strategies"},
    # the algorithm, and what is made of it
    {"active_learning"},
    {"records", "progress"},
    {"plotting", "reports", "checkpoints", "run_directory", "labeling"},
    {"comparison"},
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def top(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dynamical_jax"):
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("dynamical_jax") for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    if top(path) == "__init__":
        return
    (own,) = [i for i, layer in enumerate(LAYERS) if top(path) in layer]
    below = set().union(*LAYERS[:own], {top(path)})
    assert set(imported(path)) <= below


def test_parts_of_an_experiment_know_no_algorithm_and_mathematics_no_data():
    for layer in LAYERS[1:5]:
        for name in layer:
            for path in [PACKAGE / f"{name}.py", *(PACKAGE / name).glob("*.py")]:
                if path.exists():
                    assert not {"datasets", "models", "training"} & set(imported(path))


def test_no_tensorflow_at_import():
    program = (
        "import sys, experiments.active_learning\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout.strip() == "[]"
