import os
import sys
import types

import numpy as np
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax.data import datasets

FOUND = os.environ.get("TFDS_DATA_DIR", "")


def test_digits_are_real_and_split_by_class():
    digits = datasets.load("digits")
    assert digits.pool.x.shape == (1433, 8, 8, 1)
    assert digits.test.x.shape == (364, 8, 8, 1)
    assert digits.pool.x.dtype == np.uint8
    assert digits.pool.x.max() == 255
    assert np.bincount(digits.test.y).min() >= 35
    import sklearn.datasets

    original = sklearn.datasets.load_digits()
    np.testing.assert_array_equal(original.target[digits.index], digits.pool.y)
    np.testing.assert_allclose(
        digits.pool.x[..., 0] / 255 * 16, original.images[digits.index], atol=0.04
    )
    resized = datasets.load("digits", image_size=16)
    assert resized.pool.x.shape == (1433, 16, 16, 1)
    np.testing.assert_array_equal(resized.index, digits.index)


def test_statistics_are_those_of_the_pool(dataset):
    x = dataset.pool.x.astype(np.float64)
    np.testing.assert_allclose(dataset.mean, x.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(dataset.std, x.std(axis=(0, 1, 2)))


def test_unknown_dataset_lists_the_choices():
    with pytest.raises(dj.UserError, match="unknown dataset 'imagenet'; choose from digits, cifar"):
        datasets.load("imagenet")
    with pytest.raises(dj.UserError, match="image size must be at least 1"):
        datasets.load("digits", image_size=0)


def test_missing_extra_prints_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(dj.UserError, match=r"pip install -e '.\[tfds\]'"):
        datasets.load("cifar10")


def make(x=None, y=None, **fields):
    pool = dj.Examples(toy.images(6) if x is None else x, toy.labels(6) if y is None else y)
    return dj.Dataset(**{"name": "own", "pool": pool, "test": toy.examples(3), **fields})


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (toy.images(6)[..., 0], None, r"images must be \[n, height, width, channels\]"),
        (None, toy.labels(5), r"6 images but labels of shape \(5,\)"),
        (toy.images(0), toy.labels(0), "0 images"),
        (None, toy.labels(6) + 9, "labels must be integers from 0 to 2"),
        (None, toy.labels(6) - 9, "labels must be integers from 0 to 2"),
        (None, toy.labels(6) * 1.0, "labels must be integers"),
        (toy.images(6)[:, :4], None, "test images"),
        (toy.images(6) / np.float32(255), None, "test images"),
    ],
)
def test_arrays_that_do_not_fit(x, y, message):
    with pytest.raises(dj.UserError, match=message):
        make(x, y, class_names=("a", "b", "c"))


def test_index_must_fit():
    with pytest.raises(dj.UserError, match=r"6 images but an index of shape \(3,\)"):
        make(class_names=("a", "b", "c"), index=np.arange(3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite(value):
    x = toy.images(6).astype(np.float32)
    x[4, 1, 2, 0] = value
    with pytest.raises(dj.UserError, match="1 of 6 images are not finite: rows 4"):
        make(x, class_names=("a", "b", "c"))


class TestCache:
    ARRAYS = types.MappingProxyType({"x": np.arange(100), "y": np.eye(3)})

    def load(self, path, source="source", arrays=ARRAYS):
        return datasets.cached_arrays(path, source, lambda: dict(arrays))

    def test_second_time_from_disk(self, tmp_path):
        path = tmp_path / "new" / "cache.npz"
        self.load(path)
        again = self.load(path, arrays={})
        assert set(again) == {"x", "y"}
        np.testing.assert_array_equal(again["x"], np.arange(100))
        assert [file.name for file in path.parent.iterdir()] == ["cache.npz"]

    def test_a_damaged_file_is_set_aside_and_made_again(self, tmp_path):
        path = tmp_path / "cache.npz"
        self.load(path)
        whole = path.read_bytes()
        at = whole.index(np.arange(100).tobytes()) + 50
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        for content in (flipped, whole[:200], b"", b"not a cache"):
            path.write_bytes(content)
            with pytest.warns(UserWarning, match=r"cache file .* is damaged .* cache.npz.damaged"):
                again = self.load(path)
            np.testing.assert_array_equal(again["x"], np.arange(100))
            assert path.with_name("cache.npz.damaged").read_bytes() == content
            assert path.read_bytes() == whole

    def test_other_source(self, tmp_path):
        path = tmp_path / "cache.npz"
        self.load(path)
        with pytest.raises(dj.UserError, match=r"made from other data \(source\)"):
            self.load(path, source="another")

    def test_directory_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(dj.UserError, match="cannot write the cache"):
            self.load(tmp_path / "file" / "cache.npz")

    def test_interrupted_writing_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupted(file, **arrays):
            file.write(b"half of it")
            raise KeyboardInterrupt

        monkeypatch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.load(tmp_path / "cache.npz")
        assert list(tmp_path.iterdir()) == []


def test_caltech101_split():
    size = 400
    y = np.arange(size, dtype=np.int32) % 4
    x = np.zeros((size, 4, 4, 3), np.uint8)
    x[:, 0, 0, 0] = y
    names = ("ant", "background_google", "bass", "cup")
    halves = dj.Examples(x[:150], y[:150]), dj.Examples(x[150:], y[150:])
    split = datasets._split_caltech101(*halves, names, "1")
    assert split.class_names == ("ant", "bass", "cup")
    np.testing.assert_array_equal(np.bincount(split.test.y), [10, 10, 10])
    np.testing.assert_array_equal(np.bincount(split.pool.y), [90, 90, 90])
    # Labels are renumbered with their images, and the index leads back to the joined data.
    for examples in (split.pool, split.test):
        np.testing.assert_array_equal(np.array([0, 2, 3])[examples.y], examples.x[:, 0, 0, 0])
    np.testing.assert_array_equal(y[split.index], np.array([0, 2, 3])[split.pool.y])
    again = datasets._split_caltech101(*halves, names, "1")
    np.testing.assert_array_equal(again.index, split.index)


def test_data_that_are_not_prepared(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(dj.UserError, match=r"cifar10 is not prepared in .*TFDS_DATA_DIR"):
        datasets.load("cifar10", data_dir=str(tmp_path), cache_dir=str(tmp_path))


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(FOUND, "svhn_cropped")),
    reason="TFDS_DATA_DIR has no svhn_cropped",
)
def test_real_data_without_tensorflow(tmp_path):
    svhn = datasets.load("svhn_cropped", cache_dir=str(tmp_path))
    assert svhn.pool.x.shape[1:] == (32, 32, 3)
    assert "tensorflow" not in sys.modules
    again = datasets.load("svhn_cropped", cache_dir=str(tmp_path))
    np.testing.assert_array_equal(again.pool.x, svhn.pool.x)
    small = datasets.load("svhn_cropped", image_size=8, cache_dir=str(tmp_path))
    assert small.pool.x.shape[1:] == (8, 8, 3)
