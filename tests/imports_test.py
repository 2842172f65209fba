"""Imports point one way, and the core needs no TensorFlow."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "dynamical_jax"

# Each room (a folder, or a file at the top) may import those of earlier rows, and itself.
ROOMS = (
    # what everything stands on
    {"errors"},
    {"files", "types", "streams", "resources", "words"},
    {"contract", "convolution", "store", "parallel"},
    {"nnx_modules"},
    # the paper's arrays
    {"losses", "dynamics"},
    # a network, and what is made of it
    {"gradients"},
    {"data", "models", "strategies", "ntk"},
    # Algorithm 1, and what a pretrained network makes of images
    {"training", "embedding"},
    {"active_learning"},
    # many runs; a person in the loop, who needs none
    {"runs", "labeling"},
    # what is made of runs
    {"reports"},
    # command lines
    {"programs"},
)
# These take arrays, and nothing that has a network or a data set in it.
OF_ARRAYS = (
    "losses.py",
    "dynamics.py",
    "ntk/alignment.py",
    "ntk/generalization.py",
    "ntk/mmd.py",
    "reports/statistics.py",
    "strategies/selection.py",
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def name(path):
    """Returns what imports call a file: `runs.records`, and `runs` for `runs/__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name(path): path for path in MODULES}


def imported(path):
    """Yields the names of the files of the package that a file of it imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dynamical_jax"):
            source = node.module.split(".")[1:]
            for alias in node.names:
                module = ".".join([*source, alias.name])
                yield module if module in FILES else ".".join(source)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("dynamical_jax") for alias in node.names)


def room(module):
    return module.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if not name(path):
        return  # The package itself, which gathers names of all of them.
    own = room(name(path))
    (row,) = [i for i, rooms in enumerate(ROOMS) if own in rooms]
    assert {room(module) for module in imported(path)} <= set().union(*ROOMS[:row], {own})


def test_files_import_each_other_in_no_circle():
    # `from dynamical_jax.runs import records` inside of that room is an import of the file alone.
    graph = {module: set(imported(path)) for module, path in FILES.items() if module}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("file", OF_ARRAYS)
def test_mathematics_of_arrays_knows_no_network_and_no_data(file):
    others = {name(PACKAGE / other) for other in OF_ARRAYS}
    assert set(imported(PACKAGE / file)) <= {"errors", "types", "parallel", *others}


def test_nothing_heavy_is_imported_before_it_is_needed():
    # In one process: each module would take two seconds of its own to import JAX.
    program = (
        "import sys, dynamical_jax, experiments.active_learning\n"
        "import dynamical_jax.programs.select, dynamical_jax.programs.label\n"
        "import dynamical_jax.programs.embed\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'orbax', 'torch',"
        " 'starlette', 'uvicorn', 'ray', 'safetensors', 'dynamical_jax.runs.processes',"
        " 'scipy.stats'}\n"
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
