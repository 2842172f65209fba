"""What does not fit is refused with the numbers, before it is begun."""

import jax
import numpy as np
import pytest
import toy
from PIL import Image

import dynamical_jax as dj
from dynamical_jax import resources, store


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes of memory and of disk that seem to be free."""

    def make(memory=None, disk=None):
        if memory is not None:
            monkeypatch.setattr(resources, "free_memory", lambda: memory)
        if disk is not None:
            usage = type("usage", (), {"free": disk})
            monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: usage)

    return make


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "CONTROL_GROUP", tmp_path)
    of_machine = resources.free_memory()
    assert of_machine > 1000
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert resources.free_memory() == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.free_memory() > 1000


def test_what_is_just_free_is_enough(free, tmp_path):
    free(memory=2**30, disk=2**20)
    resources.check_memory(2**30, "a kernel", "take less")
    resources.check_disk(tmp_path / "not" / "there", 2**20, "a cache", "make place")
    with pytest.raises(
        dj.UserError, match=r"^a kernel needs 1.5 GiB of memory, and 1.0 GiB are fr"
    ):
        resources.check_memory(3 * 2**29, "a kernel", "take less")
    with pytest.raises(dj.UserError, match=rf"1.0 MiB on the disk of {tmp_path}, and 1.0 MiB are"):
        resources.check_disk(tmp_path / "not" / "there", 2**20 + 1, "a cache", "make place")


def test_images_that_fit_nowhere():
    with pytest.raises(
        dj.UserError, match=r"1797 images of 100000×100000 needs 32.7 TiB of memory"
    ):
        dj.datasets.load("digits", image_size=100_000)


def test_an_npz_file_that_unpacks_to_more_than_there_is(free, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", image=np.zeros((9, 99, 99)), label=np.arange(9))
    free(memory=2**16)
    with pytest.raises(dj.UserError, match=r"x.npz needs 690 KiB of memory, and 64 KiB are free"):
        dj.datasets.load(tmp_path / "x.npz")


def test_a_cache_of_decoded_images(free, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    free(disk=63)
    with pytest.raises(dj.UserError, match=r"1 decoded image of 8×8×1 needs 1 KiB on the disk"):
        dj.images.decode([str(tmp_path / "a.png")], tmp_path / "cache")
    free(disk=64)
    dj.images.decode([str(tmp_path / "a.png")], tmp_path / "cache")


def test_a_checkpoint(free, tmp_path):
    free(disk=39)
    with pytest.raises(dj.UserError, match=r"the checkpoint .*round-1 needs 1 KiB on the disk"):
        store.Store(tmp_path / "kept").save("round-1", [np.zeros(10, np.float32)], {})


def test_weights_training_and_products(free):
    model, labeled = toy.models()["cnn"], toy.examples(4)
    variables = toy.variables(model)
    size = resources.tree_bytes(variables)
    assert size == 4 * sum(leaf.size for leaf in jax.tree.leaves(variables))
    free(memory=size - 1)
    with pytest.raises(dj.UserError, match=r"a model of inputs of 8×8 needs .* take smaller input"):
        dj.models.init(model, jax.random.key(0), labeled.x)
    free(memory=4 * size)
    config = dj.TrainingConfig(max_epochs=1)
    with pytest.raises(dj.UserError, match="training on 1000 inputs of 8×8×2 needs"):
        dj.training.fit(model, variables, labeled, config, 0, capacity=1000)
    free(memory=3 * 4 * 4 * 4 - 1)
    with pytest.raises(dj.UserError, match=r"a matrix of 4 × 4 products needs .* take fewer"):
        dj.gradients.gram(model.apply, variables, *labeled)
