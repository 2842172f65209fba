import errno
import io
import json
import os
import warnings

import numpy as np
import psutil
import pytest
from PIL import Image, features

import dynamical_jax as dj
from dynamical_jax.data import images
from dynamical_jax.data.images import ImageShape

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def pixels(height=6, width=4, channels=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, channels), np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array).save(path, **options)
    return str(path)


class TestRead:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
    def test_lossless_colour(self, tmp_path, suffix):
        options = {}
        if suffix == "webp":
            if not features.check("webp"):
                pytest.skip("Pillow has no WebP")
            options = {"lossless": True}
        path = save(tmp_path / f"a.{suffix}", pixels(), **options)
        np.testing.assert_array_equal(images.read(path, ImageShape(6, 4, 3)), pixels())

    @pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "pgm"])
    def test_grey_stays_grey(self, tmp_path, suffix):
        grey = pixels(channels=1)
        path = save(tmp_path / f"a.{suffix}", grey)
        np.testing.assert_array_equal(images.read(path, ImageShape(6, 4, 1)), grey)
        np.testing.assert_array_equal(
            images.read(path, ImageShape(6, 4, 3)), np.repeat(grey, 3, -1)
        )

    def test_colour_to_grey(self, tmp_path):
        path = save(tmp_path / "a.png", np.full((2, 2, 3), RED, np.uint8))
        assert set(images.read(path, ImageShape(2, 2, 1)).ravel()) == {round(255 * 0.299)}

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_16_bit_grey(self, tmp_path, suffix):
        deep = np.array([[0, 255, 256], [40_000, 65_279, 65_535]], np.uint16)
        path = save(tmp_path / f"a.{suffix}", deep)
        read = images.read(path, ImageShape(2, 3, 1))
        np.testing.assert_array_equal(read[..., 0], [[0, 0, 1], [156, 254, 255]])

    def test_floating_point(self, tmp_path):
        path = save(tmp_path / "a.tif", np.ones((2, 2), np.float32))
        with pytest.raises(ValueError, match="not known what is white"):
            images.read(path, ImageShape(2, 2, 1))

    def test_palette(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, *BLUE])
        image.putdata([0, 1])
        for suffix in ("png", "gif", "bmp"):
            image.save(tmp_path / f"a.{suffix}")
            read = images.read(tmp_path / f"a.{suffix}", ImageShape(1, 2, 3))
            np.testing.assert_array_equal(read, [[RED, BLUE]])
        image.save(tmp_path / "a.png", transparency=0)
        read = images.read(tmp_path / "a.png", ImageShape(1, 2, 3))
        np.testing.assert_array_equal(read, [[WHITE, BLUE]])

    @pytest.mark.parametrize("grey", [True, False])
    def test_transparency_over_white(self, tmp_path, grey):
        colour = (0,) if grey else RED
        rows = [[(*colour, 0), (*colour, 255), (*colour, 51)]]
        path = save(tmp_path / "a.png", np.array(rows, np.uint8))
        read = images.read(path, ImageShape(1, 3, 3))[0]
        red, other = (204, 204) if grey else (255, 204)
        expected = [WHITE, (0, 0, 0) if grey else RED, (red, other, other)]
        np.testing.assert_array_equal(read, expected)

    @pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
    @pytest.mark.parametrize(
        ("orientation", "turned"),
        [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
    )
    def test_orientation(self, tmp_path, suffix, orientation, turned):
        # Blocks of JPEG's size, so that what it loses is little.
        array = np.kron(pixels(2, 3), np.ones((16, 16, 1))).astype(np.uint8) // 2 + 60
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / f"a.{suffix}", array, exif=exif)
        expected = turned(array).astype(int)
        shape = ImageShape(*expected.shape)
        assert images.infer_shape([path]) == shape  # By the header.
        assert np.abs(images.read(path, shape) - expected).mean() < 8

    def test_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, BLUE)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        assert tuple(images.read(tmp_path / "a.gif", ImageShape(2, 2, 3))[0, 0]) == RED

    def test_other_size(self, tmp_path):
        path = save(tmp_path / "a.png", pixels(8, 8))
        half = images.read(path, ImageShape(4, 2, 3))
        assert half.shape == (4, 2, 3)
        assert abs(half.mean() - pixels(8, 8).mean()) < 10
        np.testing.assert_array_equal(half, images.resize(pixels(8, 8), 4, 2))


def test_find(tmp_path, monkeypatch):
    names = ["b/2.PNG", "a.jpeg", "b/c/1.gif", "b/notes.txt", ".d/3.png", "b/._2.png", "b/.lock"]
    names += ["b/4.HEIC", "5.heic", "6.cr2", "7", "to_label.checkpoint/d/8", "e/9.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "f").symlink_to(tmp_path / "e")
    monkeypatch.setattr(images, "readable_suffixes", lambda: {".png", ".jpeg", ".gif"})
    with pytest.warns(UserWarning, match="^left out of ") as warned:
        found = [os.path.relpath(path, tmp_path) for path in images.find(tmp_path)]
    assert found == ["a.jpeg", "b/2.PNG", "b/c/1.gif", "e/9.png"]
    assert str(warned[0].message).partition(": ")[2] == (
        "1 .cr2, 2 .heic (pip install pillow-heif), 1 hidden, 1 hidden folders, "
        "1 links to folders, 1 without a suffix"
    )


def test_what_is_no_file_is_named_and_left_out(tmp_path):
    save(tmp_path / "good.png", pixels())
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    os.mkfifo(tmp_path / "pipe.png")  # To open it would wait for ever.
    (tmp_path / "linked.png").symlink_to(tmp_path / "good.png")
    with pytest.warns(UserWarning, match="cannot be read, and are left out") as warned:
        found = images.find(tmp_path)
    assert found == [str(tmp_path / "good.png"), str(tmp_path / "linked.png")]
    for name, why in (
        ("circle.png", "a link to nothing: Too many levels"),
        ("dangling.png", "a link to nothing: No such file"),
        ("pipe.png", "no regular file"),
    ):
        assert f"{tmp_path / name} ({why}" in str(warned[0].message)


def test_files_are_broken_or_the_machine_is_at_its_end(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{i}.png", pixels()) for i in range(2)]
    read, number = (
        images.read,
        errno.EINVAL,
    )  # A damaged TIFF asks for a place before its beginning.

    def fail(path, *options):
        if path == paths[1]:
            raise OSError(number, os.strerror(number))
        return read(path, *options)

    monkeypatch.setattr(images, "read", fail)
    with pytest.warns(UserWarning, match=r"1 of 2 image files .*1\.png \(Invalid argument\)"):
        images.decode(paths, tmp_path / "cache")
    number = errno.EMFILE
    with pytest.raises(dj.UserError, match=r"cannot read .*1\.png: Too many open files"):
        images.decode(paths, tmp_path / "other cache")


def test_files_that_vanish_are_named_and_read_when_they_are_back(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{i}.png", pixels(seed=i)) for i in range(3)]
    read = images.read

    def vanish(path, *options):
        if path == paths[1]:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return read(path, *options)

    monkeypatch.setattr(images, "read", vanish)
    with pytest.warns(UserWarning, match=r"1 of 3 image files .*1\.png \(Permission denied\)"):
        decoded = images.decode(paths, tmp_path / "cache", 4)
    assert decoded.readable.tolist() == [True, False, True]
    monkeypatch.setattr(images, "read", read)
    assert images.decode(paths, tmp_path / "cache", 4).readable.all()  # Not remembered.
    os.unlink(paths[1])
    with pytest.warns(UserWarning, match=r"1\.png \(No such file or directory\)"):
        assert images.decode(paths, tmp_path / "cache", 4).readable.tolist() == [True, False, True]


def test_infer(tmp_path):
    grey, same = (save(tmp_path / f"{i}.png", pixels(channels=1)) for i in range(2))
    colour = save(tmp_path / "colour.png", pixels())
    other = save(tmp_path / "other.png", pixels(4, 6, 1))
    large = save(tmp_path / "large.png", pixels(300, 4, 1))
    (tmp_path / "broken.png").write_text("")
    assert images.infer_shape([grey, same, str(tmp_path / "broken.png")]) == (6, 4, 1)
    assert images.infer_shape([grey, colour]) == (6, 4, 3)
    assert images.infer_shape([grey, other]) == (64, 64, 1)
    assert images.infer_shape([large]) == (64, 64, 1)
    assert images.infer_shape([grey, colour], size=5) == (5, 5, 3)
    assert images.infer_shape([grey, colour], channels=1) == (6, 4, 1)
    assert images.infer_shape([colour], 9, 1) == (9, 9, 1)


@pytest.fixture
def paths(tmp_path):
    arrays = [pixels(seed=seed) for seed in range(5)]
    return [save(tmp_path / "photos" / f"{i}.png", array) for i, array in enumerate(arrays)]


class TestDecode:
    def test_all_of_it(self, paths, tmp_path):
        decoded = images.decode(paths, tmp_path / "cache")
        x = decoded.x
        assert (x.shape, x.dtype, x.ndim, len(x)) == ((5, 6, 4, 3), np.uint8, 4, 5)
        expected = np.stack([pixels(seed=seed) for seed in range(5)])
        for positions in (np.array([3, 1, 1]), slice(1, 3), slice(None), 2):
            np.testing.assert_array_equal(x[positions], expected[positions])
            assert type(x[positions]) is np.ndarray
            assert x[positions].base is None  # A copy.
        assert decoded.readable.all()
        names = {path.suffix for path in (tmp_path / "cache").iterdir()}
        assert names == {".npy", ".json"}

    def test_second_time_from_disk(self, paths, tmp_path, monkeypatch):
        first = images.decode(paths, tmp_path / "cache")
        monkeypatch.setattr(Image, "open", None)
        again = images.decode(paths, tmp_path / "cache")
        np.testing.assert_array_equal(again.x[:], first.x[:])
        assert again.checksum == first.checksum
        (tmp_path / "photos").rename(tmp_path / "moved")
        moved = [path.replace("photos", "moved") for path in paths]
        assert images.decode(moved, tmp_path / "cache").x.path == first.x.path

    def test_another_time_if_anything_changed(self, paths, tmp_path):
        def decoded(**options):
            return images.decode(paths, tmp_path / "cache", **options)

        before = decoded()
        others = [decoded(size=6), decoded(channels=1)]
        save(tmp_path / "photos" / "2.png", pixels(seed=2))
        os.utime(paths[2], ns=(0, 0))  # The same content.
        touched = decoded()
        assert touched.checksum == before.checksum
        save(tmp_path / "photos" / "2.png", pixels(seed=7))
        changed = decoded()
        assert changed.checksum != before.checksum
        assert images.decode(paths[1:], tmp_path / "cache").x.shape[0] == 4
        files = {one.x.path for one in (before, *others, touched, changed)}
        assert len(files) == 5

    def test_only_what_is_new_or_changed_is_decoded(self, paths, tmp_path, monkeypatch):
        with open(paths[4], "wb") as file:
            file.write(b"no image")
        with pytest.warns(UserWarning, match="1 of 5"):
            images.decode(paths, tmp_path / "cache", 6, 3)
        save(tmp_path / "photos" / "1.png", pixels(seed=9))
        new = save(tmp_path / "photos" / "new" / "0.png", pixels(seed=8))
        os.unlink(paths[3])
        paths = [*paths[:3], paths[4], new]
        decoded, read = [], images.read
        monkeypatch.setattr(images, "read", lambda *args: decoded.append(args[0]) or read(*args))
        with pytest.warns(UserWarning, match="1 of 5"):
            again = images.decode(paths, tmp_path / "cache", 6, 3)
        assert sorted(decoded) == sorted([paths[1], paths[3], new])
        assert again.readable.tolist() == [True, True, True, False, True]
        with pytest.warns(UserWarning, match="1 of 5"):
            afresh = images.decode(paths, tmp_path / "other", 6, 3)
        np.testing.assert_array_equal(again.x[:], afresh.x[:])
        assert again.checksum == afresh.checksum

    def test_what_was_not_used_for_a_month_is_removed(self, paths, tmp_path):
        old, kept = (images.decode(paths, tmp_path / "cache", size).x.path for size in (5, 6))
        for path in (old, kept):
            os.utime(path, (0, 0))
        images.decode(paths, tmp_path / "cache", 6)  # It is used again.
        images.decode(paths, tmp_path / "cache", 7)
        left = {path.name for path in (tmp_path / "cache").glob("*-????????.*")}
        assert len(left) == 4
        assert {kept.name, kept.with_suffix(".json").name} < left
        assert images.decode(paths, tmp_path / "cache", 5).x.path == old

    def test_broken_files(self, paths, tmp_path):
        with open(paths[1], "r+b") as file:
            file.truncate(60)
        for path, content in ((paths[3], b""), (paths[4], b"<html>not found</html>")):
            with open(path, "wb") as file:
                file.write(content)
        message = (
            r"3 of 5 image files cannot be read: .*1\.png \(.*truncated.*\), .*3\.png \(cannot"
        )
        for _ in range(2):  # The second time from the cache.
            with pytest.warns(UserWarning, match=f"{message}.*left out"):
                decoded = images.decode(paths, tmp_path / "cache")
            assert decoded.readable.tolist() == [True, False, True, False, False]
            np.testing.assert_array_equal(decoded.x[2], pixels(seed=2))
            assert not decoded.x[1].any()
            with pytest.raises(dj.UserError, match=message):
                images.decode(paths, tmp_path / "cache", unreadable="refuse")
        with pytest.raises(dj.UserError, match="2 of 2 image files cannot be read"):
            images.decode(paths[3:], tmp_path / "cache")

    def test_many_broken_files_are_counted(self, paths, tmp_path):
        broken = [str(tmp_path / f"{i}.jpg") for i in range(5)]
        for path in broken:
            open(path, "w").close()
        with pytest.warns(UserWarning, match=r"5 of 10 .*0\.jpg .*2\.jpg \(.*\), and 2 more; they"):
            images.decode(paths + broken, tmp_path / "cache")

    def test_a_damaged_cache_is_set_aside_and_made_again(self, paths, tmp_path):
        first = images.decode(paths, tmp_path / "cache")
        report = first.x.path.with_suffix(".json")
        far = json.dumps({**json.loads(report.read_text()), "unreadable": {"5": "?"}}).encode()
        for file in (first.x.path, report):
            whole = file.read_bytes()
            for content in (whole[: len(whole) // 2], b"", b'{"checksum": -1}', far):
                file.write_bytes(content)
                with pytest.warns(
                    UserWarning, match=r"cache file .* is damaged .*, and made again"
                ):
                    again = images.decode(paths, tmp_path / "cache")
                assert again.checksum == first.checksum
                np.testing.assert_array_equal(again.x[:], first.x[:])
            assert json.loads(report.read_bytes())["checksum"] == first.checksum

    def test_interrupted_leaves_nothing(self, paths, tmp_path, monkeypatch):
        def interrupted(work, total, what):
            yield next(iter(work))
            raise KeyboardInterrupt

        monkeypatch.setattr(images, "_show_progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            images.decode(paths, tmp_path / "cache", 6, 3)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_cache_that_cannot_be_written(self, paths):
        with pytest.raises(dj.UserError, match="cannot write the cache"):
            images.decode(paths, os.path.join(paths[0], "cache"))

    def test_a_file_that_is_gone(self, paths, tmp_path):
        os.unlink(paths[1])
        with pytest.raises(dj.UserError, match=r"1 of 5 .*1\.png \(No such file or directory\)"):
            images.decode(paths, tmp_path / "cache", unreadable="refuse")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 0}, "image size must be at least 1"),
            ({"channels": 2}, r"1 channel \(grey\) or 3 \(RGB\), got 2"),
            ({"unreadable": "fix"}, "one of skip, refuse, got 'fix'"),
        ],
    )
    def test_bad_options(self, tmp_path, options, message):
        with pytest.raises(dj.UserError, match=message):
            images.decode(["a.png"], tmp_path, **options)


class TestOnDisk:
    def test_memory_does_not_grow_with_what_was_read(self, tmp_path):
        shape = (2**16, 1024)
        np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, shape)
        x, process, total = images.OnDisk(tmp_path / "x.npy"), psutil.Process(), 0
        x[:1024]
        before = process.memory_info().rss
        for start in range(0, len(x), 1024):
            total += x[start : start + 1024].sum(dtype=int)
        assert total == 0
        assert process.memory_info().rss - before < 2**24  # Of 2**26 bytes read.

    @pytest.mark.parametrize("content", [b"", b"no array", None])
    def test_no_array(self, tmp_path, content):
        if content is not None:
            (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(dj.UserError, match=r"x\.npy is no whole \.npy file"):
            images.OnDisk(tmp_path / "x.npy")

    def test_objects(self, tmp_path):
        np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
        with pytest.raises(dj.UserError, match="is no whole"):
            images.OnDisk(tmp_path / "x.npy")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    message = r"^cannot write the cache \S+/file/x: (File exists|Not a directory); give another"
    with (
        pytest.raises(dj.UserError, match=message),
        images.replacing_cache_file(tmp_path / "file" / "x"),
    ):
        pass


def test_no_warning_of_pillow(tmp_path):
    image = Image.new("P", (2, 2))
    image.putpalette([*RED, *BLUE])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuple(images.read(tmp_path / "a.png", ImageShape(2, 2, 3))[0, 0]) == WHITE


def test_first_equal_and_thumbnail(tmp_path):
    x = np.zeros((7, 2, 2, 1), np.uint8)
    x[[1, 4]] = 5
    x[2, 0, 0] = 1
    np.testing.assert_array_equal(images.find_first_equal(x), [0, 1, 2, 0, 1, 0, 0])
    Image.new("RGB", (40, 20), "red").save(tmp_path / "wide.png")
    thumbnail = images.thumbnail(tmp_path / "wide.png", 16)
    assert thumbnail.shape == (16, 16, 3)
    np.testing.assert_array_equal(thumbnail[8, 8], [255, 0, 0])  # the picture
    np.testing.assert_array_equal(thumbnail[0, 8], [255, 255, 255])  # and above it


def test_preview_of_a_large_photograph(tmp_path):
    """Decoded at a fraction of its size, it is what the whole one would have become."""
    y, x = np.mgrid[:1200, :1600]
    smooth = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 70), (x + y) / 12], -1)
    photograph = Image.fromarray(smooth.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn by 90 degrees.
    photograph.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    content, kind = images.preview(tmp_path / "photo.jpg", 200)
    with Image.open(io.BytesIO(content)) as small:
        assert (kind, small.size) == ("image/png", (150, 200))
        shown = np.asarray(small).astype(int)
    whole = np.asarray(photograph.rotate(-90, expand=True).resize((150, 200)), int)
    assert np.abs(shown - whole).mean() < 3
    content, kind = images.preview(tmp_path / "photo.jpg", 800)
    with Image.open(io.BytesIO(content)) as larger:
        assert (kind, larger.size) == ("image/jpeg", (600, 800))


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    """Nearly what the whole one becomes; so memory is bounded for photographs of any size."""
    y, x = np.mgrid[:1200, :1600]
    smooth = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 70), (x + y) / 12], -1)
    path = save(tmp_path / "photo.jpg", smooth.astype(np.uint8), quality=95)
    sizes, resize = [], images.resize
    monkeypatch.setattr(images, "resize", lambda x, *to: sizes.append(x.shape) or resize(x, *to))
    small = images.read(path, ImageShape(64, 64, 3)).astype(int)
    monkeypatch.setattr(images, "DRAFT_FACTOR", 10**6)
    whole = images.read(path, ImageShape(64, 64, 3))
    assert sizes == [(150, 200, 3), (1200, 1600, 3)]
    assert np.abs(small - whole).mean() < 1
    # What is not much larger than is wanted stays whole.
    monkeypatch.setattr(images, "DRAFT_FACTOR", 2)
    images.read(path, ImageShape(700, 700, 1))
    assert sizes[-1] == (1200, 1600, 1)


def test_cmyk(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red = images.read(tmp_path / "a.jpg", ImageShape(2, 2, 3))[0, 0]
    assert np.abs(red.astype(int) - RED).max() < 10


def test_preview_of_a_small_picture_has_its_pixels(tmp_path):
    array = pixels(8, 8, 1)
    save(tmp_path / "small.png", array)
    content, _ = images.preview(tmp_path / "small.png", 1600)
    with Image.open(io.BytesIO(content)) as small:
        np.testing.assert_array_equal(np.asarray(small)[..., :1], array)
