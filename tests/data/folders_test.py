"""A folder for each class and .npz files, through `datasets.load`."""

import shutil

import numpy as np
import pytest
from PIL import Image

import dynamical_jax as dj
from dynamical_jax.data import folders


def write_images(folder, counts, seed=0, size=4):
    """Images that are the brighter the later their class; some lie deeper."""
    generator = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            path = folder / name / ("deeper" if i % 2 else ".") / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 60, (size, size, 3), np.uint8) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path / "photos", {"cat": 10, "dog": 5, "eel": 2})
    return tmp_path / "photos"


@pytest.fixture
def load(tmp_path):
    return lambda path, **options: dj.datasets.load(
        str(path), **{"cache_dir": str(tmp_path / "cache"), **options}
    )


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


class TestFolder:
    def test_images_labels_and_names(self, photos, load):
        data = load(photos)
        assert (data.name, data.class_names) == ("photos", ("cat", "dog", "eel"))
        assert np.bincount(data.pool.y).tolist() == [8, 4, 1]
        assert np.bincount(data.test.y).tolist() == [2, 1, 1]
        assert data.pool.x.shape == (13, 4, 4, 3)
        for row, (index, label) in enumerate(zip(data.index, data.pool.y, strict=True)):
            path = data.paths[index]  # The way from a record to the file.
            assert f"/{data.class_names[label]}/" in path
            np.testing.assert_array_equal(data.pool.x[np.array([row])][0], pixels_of(path))
        in_test = [data.paths[i] for i in set(range(17)) - set(data.index.tolist())]
        expected = {pixels_of(path).tobytes() for path in in_test}
        assert {image.tobytes() for image in data.test.x[:]} == expected
        np.testing.assert_allclose(data.mean, data.pool.x[:].mean(axis=(0, 1, 2)))

    def test_images_of_no_class_are_said(self, photos, load):
        shutil.copy(photos / "cat" / "00.png", photos / "loose.PNG")
        with pytest.warns(UserWarning, match=r"1 image file lies in .*, such as loose.PNG: left"):
            assert len(load(photos).paths) == 17

    def test_copies_in_the_test_set_are_said(self, photos, load):
        for path in sorted((photos / "cat").glob("*.png")):
            shutil.copy(path, path.with_name(f"copy of {path.name}"))
        with pytest.warns(UserWarning, match=r"\d of \d test images are copies of images in the"):
            load(photos)

    def test_the_same_again_and_other_data(self, photos, load):
        first, again = load(photos), dj.datasets.load(photos, cache_dir=photos.parent / "cache")
        assert (again.version, again.name) == (first.version, "photos")
        np.testing.assert_array_equal(again.index, first.index)
        versions = {first.version}
        versions.add(load(photos, image_size=2).version)
        versions.add(load(photos, channels=1).version)
        versions.add(load(photos, test_fraction=0.5).version)
        (photos / "cat" / "00.png").rename(photos / "dog" / "99.png")
        versions.add(load(photos).version)
        assert len(versions) == 5

    def test_fraction(self, photos, load):
        assert np.bincount(load(photos, test_fraction=0.5).test.y).tolist() == [5, 2, 1]
        # At least one on both sides.
        assert np.bincount(load(photos, test_fraction=0.01).test.y).tolist() == [1, 1, 1]
        assert np.bincount(load(photos, test_fraction=0.99).pool.y).tolist() == [1, 1, 1]

    def test_test_dir(self, photos, load, tmp_path):
        write_images(tmp_path / "test", {"cat": 1, "eel": 3}, seed=1)
        data = load(photos, test_dir=str(tmp_path / "test"))
        assert np.bincount(data.pool.y).tolist() == [10, 5, 2]
        assert data.test.y.tolist() == [0, 2, 2, 2]
        np.testing.assert_array_equal(data.test.x[:][0], pixels_of(tmp_path / "test/cat/00.png"))
        assert data.index.tolist() == list(range(17))

    def test_unreadable(self, photos, load):
        (photos / "cat" / "00.png").write_text("")
        with pytest.warns(UserWarning, match="1 of 17 image files cannot be read"):
            data = load(photos)
        assert len(data.pool.y) + len(data.test.y) == 16
        assert not any(data.paths[i].endswith("cat/00.png") for i in data.index)
        with pytest.raises(dj.UserError, match="1 of 17"):
            load(photos, unreadable="refuse")

    def test_small_ones_are_copied_to_the_device_large_ones_not(self, photos, load, monkeypatch):
        data = load(photos)
        np.testing.assert_array_equal(np.asarray(data.pool_images), data.pool.x[:])
        monkeypatch.setattr(dj.datasets, "LARGEST_COPY", 10)
        large = load(photos)
        assert large.pool_images is large.pool.x
        assert large.test_examples.x is large.test.x

    @pytest.mark.slow  # 3 s; vectors_test.py has it of vectors.
    def test_where_images_are_changes_no_result(self, photos, load, monkeypatch):
        def rounds():
            data = load(photos)
            model = dj.models.Standardized(dj.models.CNN(3), data.mean, data.std)
            strategy = dj.STRATEGIES["margin"]()
            config = dj.TrainingConfig(max_epochs=1)
            experiment = dj.Experiment(data, model, strategy, dj.Budget(4, 3, 1), config)
            return [(r.query.tolist(), r.test, r.labeled) for r in experiment.run()]

        copied = rounds()
        monkeypatch.setattr(dj.datasets, "LARGEST_COPY", 10)
        assert rounds() == copied

    def test_no_class_folders(self, photos, load):
        with pytest.raises(dj.UserError, match=r"cat/deeper has one class|cat has one class only"):
            load(photos / "cat")
        with pytest.raises(dj.UserError, match="holds no folders; images go into a folder for"):
            load(photos / "cat" / "deeper")

    @pytest.mark.parametrize("size", [0, 1])
    def test_class_with_too_few_images(self, photos, load, size):
        write_images(photos, {"fox": size})
        (photos / "fox").mkdir(exist_ok=True)
        message = ("no image files of class 'fox'", "class 'fox' has one example; it needs two")[
            size
        ]
        with pytest.raises(dj.UserError, match=message):
            load(photos)

    def test_class_without_readable_images(self, photos, load):
        for path in photos.glob("eel/**/*.png"):
            path.write_text("")
        with (
            pytest.warns(UserWarning, match="2 of 17"),
            pytest.raises(dj.UserError, match="no image of class 'eel' can be read"),
        ):
            load(photos)

    def test_bad_test_dir(self, photos, load, tmp_path):
        test = tmp_path / "test"
        write_images(test, {"cat": 1, "fox": 1})
        with pytest.raises(dj.UserError, match=r"has a class 'fox', which .*photos has not"):
            load(photos, test_dir=str(test))
        shutil.rmtree(test / "fox")
        with pytest.raises(dj.UserError, match=r"test set, .*: a test fraction has no effect"):
            load(photos, test_dir=str(test), test_fraction=0.5)
        (test / "cat" / "00.png").write_text("")
        with (
            pytest.warns(UserWarning, match="1 of 18"),
            pytest.raises(dj.UserError, match="test: no image can be read"),
        ):
            load(photos, test_dir=str(test))
        with pytest.raises(dj.UserError, match="is part of"):
            load(photos, test_dir=str(photos / "cat"))
        with pytest.raises(dj.UserError, match=r"cannot read .*none: No such file"):
            load(photos, test_dir=str(tmp_path / "none"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"test_fraction": 1.0}, "test fraction must be between 0 and 1, got 1.0"),
            ({"test_fraction": 0.0}, "test fraction must be between 0 and 1, got 0.0"),
            ({"channels": 4}, "1 channel"),
            ({"image_size": 0}, "image size must be at least 1"),
            ({"unreadable": "fix"}, "one of skip, refuse"),
        ],
    )
    def test_bad_options(self, photos, load, options, message):
        with pytest.raises(dj.UserError, match=message):
            load(photos, **options)


def test_held_out_is_drawn_once_and_for_all():
    y = np.repeat([0, 1], [30, 10])
    first = folders.choose_held_out(y, None, ("a", "b"))
    assert np.bincount(y[first]).tolist() == [6, 2]
    np.testing.assert_array_equal(folders.choose_held_out(y, 0.2, ("a", "b")), first)
    assert not first[:6].all()


X = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
Y = np.repeat([3, 7], 5)


class TestNpz:
    @pytest.fixture
    def own(self, tmp_path, load):
        def own(options=None, **arrays):
            np.savez(tmp_path / "own.npz", **{"image": X, "label": Y, **arrays})
            return load(tmp_path / "own.npz", **(options or {}))

        return own

    def test_held_out(self, own):
        data = own()
        assert (data.name, data.class_names) == ("own", ("3", "7"))
        assert (np.bincount(data.pool.y).tolist(), data.test.y.tolist()) == ([4, 4], [0, 1])
        np.testing.assert_array_equal(data.pool.x, X[data.index])
        np.testing.assert_array_equal(data.pool.y, (Y[data.index] == 7).astype(int))
        held_out = np.setdiff1d(np.arange(10), data.index)
        np.testing.assert_array_equal(data.test.x, X[held_out])

    def test_test_set(self, own):
        data = own(test_image=255 - X[:2], test_label=np.array([7, 3]))
        assert (len(data.pool.y), data.test.y.tolist()) == (10, [1, 0])
        np.testing.assert_array_equal(data.test.x, 255 - X[:2])
        np.testing.assert_array_equal(data.index, np.arange(10))

    def test_grey_and_sizes(self, own):
        assert own(image=X[..., 0]).pool.x.shape == (8, 4, 4, 1)
        assert own({"image_size": 6}).test.x.shape == (2, 6, 6, 3)
        assert own(image=X / np.float32(255)).pool.x.dtype == np.float32

    def test_names(self, own):
        names = np.array(["rat", "ape", "emu"])
        strings = own(label=names[Y // 7], class_names=names)
        assert strings.class_names == ("rat", "ape", "emu")
        numbers = own(label=Y // 7, class_names=names)
        np.testing.assert_array_equal(strings.pool.y, numbers.pool.y)
        assert own(label=names[Y // 7]).class_names == ("ape", "rat")

    def test_version_is_of_the_contents(self, own):
        versions = {own().version, own().version}
        assert len(versions) == 1
        versions |= {own(image=X // 2).version, own(label=Y[::-1]).version}
        versions |= {own({"test_fraction": 0.4}).version, own(label=Y + 1).version}
        assert len(versions) == 5

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"label": Y[1:]}, r"image has 10 rows, but label is of shape \(9,\)"),
            (
                {"label": Y[:, None]},
                r"whole numbers or strings \[n\], got int64 of shape \(10, 1\)",
            ),
            ({"label": Y / 2}, r"whole numbers or strings \[n\], got float64"),
            ({"label": Y * 0}, "has one class only, '0'"),
            ({"label": np.arange(10)}, "class '0' has one example"),
            ({"image": X[0]}, None),
            ({"image": X[:, 0, 0]}, r"image must be numbers \[n, h, w\] or .* shape \(10, 3\)"),
            ({"image": X.astype(str)}, "image must be numbers"),
            ({"image": X[:, :0]}, "image must be numbers"),
            ({"images": X}, "unknown array 'images'; known beside image are label, test_image"),
            ({"test_image": X}, "there is no array 'test_label'"),
            ({"test_image": X, "test_label": Y + 1}, "test_label 4 is none of the classes"),
            ({"test_image": X[:, 1:], "test_label": Y}, "test images"),
            ({"class_names": np.array(["a", "b"])}, "label 3 is none of the classes"),
            ({"class_names": np.array(["a", "a"])}, "class_names must be strings"),
            ({"label": Y.astype(object)}, "cannot read .*Object arrays cannot be loaded"),
        ],
    )
    def test_bad_arrays(self, own, arrays, message):
        with pytest.raises(dj.UserError, match=message) as error:
            own(**arrays)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"channels": 1}, "has 3 channels; others can be had of image files only"),
            ({"test_dir": "photos"}, "test_dir has no effect on .*own.npz"),
            ({"test_fraction": 2.0}, "between 0 and 1"),
            ({"image_size": 0}, "image size must be at least 1"),
        ],
    )
    def test_bad_options(self, own, options, message):
        with pytest.raises(dj.UserError, match=message):
            own(options)

    def test_resizing_needs_pixels(self, own):
        with pytest.raises(dj.UserError, match="must be uint8, grey or RGB, to be resized"):
            own({"image_size": 8}, image=X / 255)

    def test_missing_arrays_and_files(self, tmp_path, load):
        path = tmp_path / "own.npz"
        with pytest.raises(dj.UserError, match=r"there is no file .*own\.npz"):
            load(path)
        path.mkdir()
        with pytest.raises(dj.UserError, match=r"^cannot read \S+/own\.npz \(Is a directory\)$"):
            dj.folders.read_features(str(path))
        path.rmdir()
        np.savez(path, image=X)
        with pytest.raises(dj.UserError, match="there is no array 'label'"):
            load(path)
        whole = path.read_bytes()
        for content in (b"", whole[:-30], b"text"):
            path.write_bytes(content)
            with pytest.raises(dj.UserError, match="cannot read"):
                load(path)
        with path.open("wb") as file:
            np.save(file, X)
        with pytest.raises(dj.UserError, match="cannot read"):
            load(path)


@pytest.mark.parametrize(
    ("option", "value"), [("test_dir", "x"), ("test_fraction", 0.1), ("channels", 1)]
)
def test_what_has_no_effect_is_refused(option, value):
    with pytest.raises(dj.UserError, match=f"{option} has no effect on digits"):
        dj.datasets.load("digits", **{option: value})
