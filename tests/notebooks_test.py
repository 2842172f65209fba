"""The notebooks run as they stand, and what is stored in them comes from such a run."""

import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cells):
    return [
        cell.id
        for cell in cells
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    # The kernel is a process of its own; programs that tests have compiled are there for it too.
    compiled = os.path.join(os.environ["DYNAMICAL_JAX_TEST_CACHE"], "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
    stored = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}  # where the kernel finds the package
    nbclient.NotebookClient(executed, timeout=300, resources=resources).execute()
    check_outputs(code_cells(executed))
    assert pictures(code_cells(executed)) == pictures(code_cells(stored))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    check_outputs(cells)
    assert len(pictures(cells)) >= 3
    assert path.stat().st_size < 200_000


def check_outputs(cells):
    """No errors, no warnings."""
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2
