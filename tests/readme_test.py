"""The Python of the README and of the pages in docs/ runs as it stands."""

import dataclasses
import pathlib

import numpy as np
import pytest
import toy

import dynamical_jax as dj

DOCS = sorted((toy.ROOT / "docs").glob("*.md"))


@pytest.fixture
def run(monkeypatch):
    """Runs the blocks of a page one after the other; returns the names they leave."""
    # 200 images say as much as all, two rounds as much as seven, a few epochs as much as many.
    digits = dj.datasets.load("digits")
    few = dataclasses.replace(
        digits,
        pool=dj.Examples(digits.pool.x[:200], digits.pool.y[:200]),
        test=dj.Examples(digits.test.x[:50], digits.test.y[:50]),
        index=digits.index[:200],
    )
    monkeypatch.setattr(dj.datasets, "load", {"digits": few}.get)
    shorter = {
        "num_rounds=6),": "num_rounds=1), dj.TrainingConfig(max_epochs=10),",
        "max_epochs=200": "max_epochs=10",
    }

    def run(page: pathlib.Path) -> dict:
        names = {}
        for block in toy.python_blocks(page):
            for old, new in shorter.items():
                block = block.replace(old, new)
            exec(block, names)
        return names

    return run


def test_python_of_the_readme(run, capsys):
    assert len(toy.python_blocks(toy.ROOT / "README.md")) == 2
    names = run(toy.ROOT / "README.md")
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
    assert labels == ["50", "75"]
    assert names["query"].positions.shape == (25,)


@pytest.mark.parametrize(
    "page",
    [
        # 9 s: a program for each way to extend the package, all of which have tests of their own.
        pytest.param(page, id=page.name, marks=pytest.mark.slow if page.stem == "extend" else [])
        for page in DOCS
    ],
)
def test_python_of_the_docs(run, page):
    if page.name == "empirical_ntk.md" and not dj.ntk.compatibility.is_installed():
        pytest.skip("neural-tangents is not installed")
    names = run(page)
    if page.name == "extend.md":
        assert names["round_result"].num_labeled == 75
        assert np.isnan(names["y"][names["query_idx"]]).all()
