"""What the site shows is what the package does."""

import re

import numpy as np
import pytest
import toy

import dynamical_jax as dj
from docs import gallery

DOCS = toy.ROOT / "docs"
PACKAGE = toy.ROOT / "dynamical_jax"
# Their backgrounds take 4 s together.
SLOW = {"albl", "bait", "bald", "batch_bald", "dynamical_diverse", "dynamical_herding", "probcover"}


def test_the_reference_has_every_module_once():
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    described = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    files = [path.relative_to(toy.ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")]
    modules = [".".join(parts).removesuffix(".__init__") for parts in files]
    assert sorted(described) == sorted(modules)


@pytest.fixture(scope="module")
def task():
    return gallery.make_task()


class TestGallery:
    def test_has_a_section_and_a_picture_of_every_strategy(self):
        page = (DOCS / "gallery.md").read_text()
        for name in dj.STRATEGIES:
            assert f"\n## {name}\n" in page
            assert f"](gallery/{name}.png)" in page
            assert (DOCS / "gallery" / f"{name}.png").exists()

    # typiclust is the exception: it looks at clusters, and the picture at the whole pool.
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=pytest.mark.slow if name in SLOW else [])
            for name in sorted({*dj.STRATEGIES} - {"typiclust"})
        ],
    )
    def test_background_is_what_the_first_point_is_chosen_by(self, task, name):
        strategy, view = dj.STRATEGIES[name](), task.view()
        query = strategy.query(gallery.KEY, view, gallery.BATCH_SIZE)
        scores = gallery.background(strategy, task, view.unlabeled)
        assert scores[query.positions[0]] == np.max(scores)
        # Distances in coreset come from products, here from differences.
        np.testing.assert_allclose(scores[query.positions[0]], query.scores[0], rtol=1e-4)

    @pytest.mark.usefixtures("drawn_pictures")
    def test_picture(self, task, tmp_path, monkeypatch):
        monkeypatch.setattr(gallery, "GRID_SIZE", 6)
        path = tmp_path / "picture.png"
        gallery.draw(task, dj.STRATEGIES["margin"](), path)
        gallery.draw_task(task, tmp_path / "task.png")
        assert path.stat().st_size > 5000
        assert (tmp_path / "task.png").stat().st_size > 5000
