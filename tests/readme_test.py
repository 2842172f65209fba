"""The Python of the README and of the pages in docs/ runs as it stands."""

import pathlib

import numpy as np
import pytest
import toy

import dynamical_jax as dj

DOCS = sorted((toy.ROOT / "docs").glob("*.md"))


def run(page: pathlib.Path) -> dict:
    """Runs the blocks of a page one after the other; returns the names they leave."""
    names = {}
    for block in toy.python_blocks(page):
        # Two rounds say as much as seven, and a few epochs as much as many.
        short = "num_rounds=1), dj.TrainingConfig(max_epochs=10),"
        exec(block.replace("num_rounds=6),", short), names)
    return names


def test_python_of_the_readme(capsys):
    assert len(toy.python_blocks(toy.ROOT / "README.md")) == 2
    names = run(toy.ROOT / "README.md")
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
    assert labels == ["50", "75"]
    assert names["query"].positions.shape == (25,)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_python_of_the_docs(page):
    if page.name == "empirical_ntk.md" and not dj.ntk.compatibility.is_installed():
        pytest.skip("neural-tangents is not installed")
    names = run(page)
    if page.name == "extend.md":
        assert names["round_result"].num_labeled == 75
        assert np.isnan(names["y"][names["query_idx"]]).all()
