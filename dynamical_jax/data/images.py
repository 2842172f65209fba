"""Decodes image files to an array on disk, once, and reads from there.

Memory does not grow with the number of images, neither while they are decoded nor afterwards.
"""

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import stat
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import msgspec
import numpy as np
import tqdm
from PIL import ExifTags, Image, ImageOps

from dynamical_jax import files, parallel, resources, words
from dynamical_jax.errors import UserError, reason

# Files that differ in size, or that are larger than the next number, are resized to this.
DEFAULT_SIZE = 64
LARGEST_OWN_SIDE = 256
UNREADABLE = ("skip", "refuse")
# Suffixes of files that often lie beside images: `find` leaves them out without a word.
UNREPORTED_SUFFIXES = (".csv", ".json", ".jsonl", ".lock", ".partial", ".txt", ".ini", ".db")
# Suffixes that Pillow reads only with another package, and the package.
READER_PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif"}
# The file cannot be opened now, but perhaps later: the cache does not keep this.
TEMPORARY_ERRORS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ESTALE)
# The machine has run out of something, so that other files would fail as well. With all other
# errors, such as EINVAL for a place before the beginning, the file is broken.
EXHAUSTION_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Raise it when decoding or resizing changes, so that older caches are not used.
CACHE_VERSION = 2

DRAFT_FACTOR = 2
"""Large JPEGs are decoded at a fraction of their size, at least so many times the size wanted."""

DAYS_KEPT = 30
"""After so many days without use files of the cache are removed."""


class OnDisk:
    """An array in a .npy file, whose parts are copied into memory when they are read.

    The file is mapped again for each access: pages read through a lasting memory map count as
    memory of the process, and in the end that would be the whole file.

    Args:
      path: of the file.
      dtype: of the parts that are read; by default that of the file.

    Raises:
      UserError: if the file is no array, or incomplete.
    """

    def __init__(self, path: str | os.PathLike, dtype: Any = None):
        self.path = pathlib.Path(path)
        try:
            mapped = self._map_file()
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no whole .npy file ({reason(error)})") from error
        self.shape, self.ndim = mapped.shape, mapped.ndim
        self.dtype = mapped.dtype if dtype is None else np.dtype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, positions: Any) -> np.ndarray:
        with np.errstate(over="ignore"):  # What is too large becomes infinite.
            return np.array(self._map_file()[positions], self.dtype)

    def _map_file(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)


class Decoded(NamedTuple):
    """Decoded image files.

    Attributes:
      x: `OnDisk` `[n, h, w, c]` uint8, a row for each file.
      readable: `[n]` bool; rows of files that cannot be read are black.
      checksum: of all pixels.
    """

    x: OnDisk
    readable: np.ndarray
    checksum: int


class ImageShape(NamedTuple):
    """Height, width and channels of images."""

    height: int
    width: int
    channels: int


def find(folder: str | os.PathLike) -> list[str]:
    """Returns the paths of all files below a folder with a suffix that Pillow reads, sorted.

    Left out is what is hidden, folders that are links, folders of checkpoints, what is no regular
    file, and files of other kinds; a warning counts them, but for those of `UNREPORTED_SUFFIXES`.
    """
    readable, found, left_out, broken = readable_suffixes(), [], Counter(), []

    def fail(error: OSError) -> None:
        broken.append(f"{error.filename} ({error.strerror})")

    for directory, folders, names in os.walk(folder, onerror=fail):
        links = {name for name in folders if os.path.islink(os.path.join(directory, name))}
        left_out["links to folders"] += len(links)
        left_out["hidden folders"] += sum(name.startswith(".") for name in folders)
        folders[:] = [
            name
            for name in folders
            if name not in links and not name.startswith(".") and not name.endswith(".checkpoint")
        ]
        for name in names:
            path, suffix = os.path.join(directory, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                left_out["hidden"] += suffix in readable
            elif suffix not in readable:
                left_out[suffix or "without a suffix"] += suffix not in UNREPORTED_SUFFIXES
            elif why := _explain_unusable(path):
                broken.append(f"{path} ({why})")
            else:
                found.append(path)
    _report_left_out(folder, left_out, broken)
    return sorted(found)


def readable_suffixes() -> set[str]:
    """Returns the suffixes of files that Pillow reads, with the packages that are installed."""
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def _explain_unusable(path: str) -> str:
    """Returns why a path is not that of a regular file; "" if it is."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return f"a link to nothing: {error.strerror}" if os.path.islink(path) else error.strerror
    return "" if stat.S_ISREG(mode) else "no regular file"


def _report_left_out(
    folder: str | os.PathLike, left_out: Mapping[str, int], broken: Sequence[str]
) -> None:
    """Warns of what `find` does not return."""
    kinds = [
        f"{count} {kind}"
        f"{f' (pip install {READER_PACKAGES[kind]})' if kind in READER_PACKAGES else ''}"
        for kind, count in sorted(left_out.items())
        if count
    ]
    if kinds:
        warnings.warn(f"left out of {folder}: {', '.join(kinds)}", stacklevel=3)
    if broken:
        named = [*broken[:3], *([f"and {len(broken) - 3} more"] if len(broken) > 3 else [])]
        warnings.warn(f"cannot be read, and are left out: {', '.join(named)}", stacklevel=3)


def read(path: str | os.PathLike, shape: ImageShape, interpolation: str = "bilinear") -> np.ndarray:
    """Returns an image file as uint8 `[h, w, c]`, resized as by `resize` if it has another size.

    It is rotated by its EXIF orientation; transparent pixels are put on white; of an animation the
    first frame is read, of 16-bit grey the upper 8 bits. Colour becomes grey as in ITU-R 601.

    A photograph is decoded at a fraction of its size, a half to an eighth, where it is a JPEG that
    stays `DRAFT_FACTOR` times as large as `shape`: in a fraction of the time and memory.

    Raises:
      Exception: of any type, if the file is broken, as Pillow's many decoders raise it.
    """
    with Image.open(path) as file:
        side = DRAFT_FACTOR * max(shape.height, shape.width)  # Whichever way it will be turned.
        file.draft(file.mode, (side, side))
        image = _make_opaque(ImageOps.exif_transpose(file), shape.channels)
    pixels = np.asarray(image).reshape(image.height, image.width, shape.channels)
    return resize(pixels, shape.height, shape.width, interpolation)


def read_all(
    paths: Sequence[str], shape: ImageShape, interpolation: str = "bilinear"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns image files as by `read`, `[n, h, w, c]`, and which can be read; others are black."""

    def read_one(path: str) -> np.ndarray | None:
        try:
            return read(path, shape, interpolation)
        except Exception:  # See `read`.
            return None

    with ThreadPool() as threads:
        found = threads.map(read_one, paths)
    readable = np.array([image is not None for image in found])
    black = np.zeros(shape, np.uint8)
    return np.stack([black if image is None else image for image in found]), readable


def check_pixels(x: Any) -> None:
    """Raises `UserError` unless x are images as pretrained networks take them: grey or RGB."""
    if len(x.shape) != 4 or x.dtype != np.uint8 or x.shape[3] not in (1, 3):
        raise UserError(
            "a pretrained network takes images [n, h, w, 1 or 3] of uint8, got "
            f"{x.dtype} of shape {tuple(x.shape)}"
        )


def compute_checksum(x: Any) -> int:
    """Returns the checksum of all numbers of an array, which need not be in memory."""
    total = 0
    for block in iterate_blocks(x):
        total = zlib.crc32(np.ascontiguousarray(block), total)
    return total


def resize(
    image: np.ndarray, height: int, width: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """Resizes uint8 `[h, w, c]`, with antialiasing, whatever the aspect ratio."""
    grey = image.shape[-1] == 1
    resized = Image.fromarray(image[..., 0] if grey else image).resize(
        (width, height), INTERPOLATIONS[interpolation]
    )
    return np.asarray(resized).reshape(height, width, image.shape[-1])


def resize_all(x: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 `[n, h, w, c]` to squares, as `resize` does.

    Raises:
      UserError: if the result does not fit into memory.
    """
    check_resized(len(x), size, x.shape[-1])
    return np.stack([resize(image, size, size) for image in x])


def check_resized(count: int, size: int, channels: int) -> None:
    """Raises `UserError` if images of a size, and a copy of them, do not fit into memory."""
    resources.check_memory(
        2 * count * size * size * channels,
        f"{words.count(count, 'image')} of {size}×{size}",
        "give a smaller --image_size",
    )


def thumbnail(path: str | os.PathLike, side: int = 160) -> np.ndarray:
    """Returns an image file for people to look at, uint8 `[side, side, 3]`, not distorted."""
    with Image.open(path) as file:
        image = _make_opaque(ImageOps.exif_transpose(file), 3)
        return np.asarray(ImageOps.pad(image, (side, side), color="white"))


def preview(path: str | os.PathLike, side: int) -> tuple[bytes, str]:
    """Returns an image file as a browser shows it, and the media type: PNG or JPEG.

    Turned as its EXIF orientation says, made smaller if a side is longer than `side`. A large JPEG
    is decoded at a fraction of its size, which takes a fraction of the time.

    Raises:
      Exception: as in `read`.
    """
    with Image.open(path) as file:
        file.draft(file.mode, (side, side))
        image = _make_opaque(ImageOps.exif_transpose(file), 3)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    if max(image.size) <= 256:  # Small ones are looked at pixel by pixel.
        image.save(written, "PNG")
        return written.getvalue(), "image/png"
    image.save(written, "JPEG", quality=88)
    return written.getvalue(), "image/jpeg"


def iterate_blocks(x: Any) -> Iterator[np.ndarray]:
    """Yields the rows of an array `[n, ...]`, a block at a time."""
    size = max(1, 2**22 // max(1, math.prod(x.shape[1:])))
    return (np.asarray(x[start : start + size]) for start in range(0, len(x), size))


def find_first_equal(x: Any) -> np.ndarray:
    """Returns for each row of `[n, ...]` the position of the first that equals it."""
    seen: dict[bytes, int] = {}
    return np.array(
        [seen.setdefault(d, position) for position, d in enumerate(digest_rows(x))], int
    )


def count_copies(x: Any, other: Any) -> int:
    """Returns how many rows of x `[n, ...]` are rows of `other` `[m, ...]`, too."""
    known = set(digest_rows(other))
    return sum(digest in known for digest in digest_rows(x))


def digest_rows(x: Any) -> list[bytes]:
    """Returns 16 bytes for each row of `[n, ...]`, which tell whether rows are equal."""
    blocks = iterate_blocks(parallel.own_rows(x))
    digest = lambda row: hashlib.blake2b(row, digest_size=16).digest()
    own = [digest(row) for block in blocks for row in np.ascontiguousarray(block)]
    return parallel.of_all_rows(own, parallel.owners(x))


def check_headers(paths: Sequence[str]) -> np.ndarray:
    """Returns `[n]` whether the headers of files are those of images."""
    with ThreadPool() as threads:
        headers = threads.imap(_read_shape, paths, chunksize=16)
        return np.array(
            [h is not None for h in _show_progress(headers, len(paths), "looking at images")]
        )


def infer_shape(
    paths: Sequence[str], size: int | None = None, channels: int | None = None
) -> ImageShape:
    """Returns the shape to which image files should be resized, from their headers alone.

    Args:
      paths: the files; those that cannot be read do not count.
      size: height and width of the images. By default their own size, if it is the same for all and
        no side exceeds `LARGEST_OWN_SIDE`, else `DEFAULT_SIZE`.
      channels: 1 or 3. By default 1 if all are grey, else 3.
    """
    return choose_shape(read_shapes(paths, size, channels), size, channels)


def read_shapes(
    paths: Sequence[str], size: int | None, channels: int | None
) -> set[ImageShape | None]:
    """Returns the shapes of image files, as far as `choose_shape` has to know them."""
    if size is not None and channels is not None:
        return set()
    with ThreadPool() as threads:
        headers = threads.imap_unordered(_read_shape, paths, chunksize=16)
        return set(_show_progress(headers, len(paths), "looking at images"))


def choose_shape(
    shapes: set[ImageShape | None], size: int | None, channels: int | None
) -> ImageShape:
    """Returns the shape that `infer_shape` does, of the shapes of all files."""
    shapes = shapes - {None}
    sides = {(shape.height, shape.width) for shape in shapes}
    height = width = size or DEFAULT_SIZE
    if size is None and len(sides) == 1 and max(min(sides)) <= LARGEST_OWN_SIDE:
        ((height, width),) = sides
    return ImageShape(
        height, width, channels or max((shape.channels for shape in shapes), default=3)
    )


def decode(
    paths: Sequence[str],
    cache_dir: str | os.PathLike,
    size: int | None = None,
    channels: int | None = None,
    unreadable: str = "skip",
    interpolation: str = "bilinear",
) -> Decoded:
    """Returns image files as an array on disk, which later calls use again.

    It is used again while files keep their names, sizes and times of change; they may be moved. If
    some have changed or are new, only these are decoded, and the others copied from the array that
    was made last of this folder.

    Args:
      paths: the files.
      cache_dir: where the array is kept.
      size: as in `infer_shape`.
      channels: as in `infer_shape`.
      unreadable: "skip" warns of files that cannot be read, "refuse" raises.
      interpolation: a key of `INTERPOLATIONS`, for files that are resized.

    Raises:
      UserError: if no file can be read, or one cannot and `unreadable` is "refuse"; if an argument
        is out of range; if the cache cannot be written. One that is damaged is set aside.
    """
    check_options(size, channels, unreadable)
    cache = Cache(paths, cache_dir, size, channels, interpolation)
    x, report = cache.read() or cache.make(infer_shape(paths, size, channels))
    report_unreadable(report.unreadable, paths, unreadable)
    return Decoded(x, ~np.isin(np.arange(len(x)), list(report.unreadable)), report.checksum)


class CacheReport(msgspec.Struct):
    """The report beside a decoded array.

    Attributes:
      checksum: of the pixels.
      unreadable: position → why it cannot be read.
      unopened: those of them that could not even be opened, which may change.
      pixels: checksums of the images; None of those that cannot be read.
      files: checksums of the names, sizes and times of change of the files.
    """

    checksum: files.Count
    unreadable: dict[files.Count, str]
    unopened: list[files.Count] = []
    pixels: list[files.Count | None] = []
    files: list[str] = []


class Cache:
    """Where the decoded array of some image files is kept, and the report beside it.

    Args:
      paths: the files.
      cache_dir: as of `decode`, like the next three.
      size: likewise.
      channels: likewise.
      interpolation: likewise.
      rows: those of the files that are in the array, where it is a share of them.
    """

    def __init__(
        self,
        paths: Sequence[str],
        cache_dir: str | os.PathLike,
        size: int | None,
        channels: int | None,
        interpolation: str,
        rows: np.ndarray | None = None,
    ):
        cache = pathlib.Path(cache_dir)
        folder, listing = fingerprint_files(paths)
        # The shape of a share depends on all files.
        of = listing if rows is None else (listing, rows.tolist())
        self._array = cache / f"{_cache_name(size, channels, interpolation, of)}.npy"
        self._report = self._array.with_suffix(".json")
        self._latest = cache / f"{_cache_name(size, channels, interpolation, folder)}-latest.json"
        self._is_share, self._interpolation = rows is not None, interpolation
        rows = np.arange(len(paths)) if rows is None else rows
        self._paths, self._listing = [paths[row] for row in rows], [listing[row] for row in rows]

    def read(self) -> tuple[OnDisk, CacheReport] | None:
        """Returns what is there; None if there is nothing that can be used."""
        found = None
        if self._array.exists() and self._report.exists():
            try:
                found = self._read()
                if any(os.access(self._paths[row], os.R_OK) for row in found[1].unopened):
                    return None
            except (OSError, ValueError) as error:
                files.set_aside(self._array, error)
                return None
            with contextlib.suppress(OSError):  # A cache may be read-only.
                os.utime(self._array)
        return found

    def make(self, shape: ImageShape) -> tuple[OnDisk, CacheReport]:
        """Decodes the files, and returns them as `read` does."""
        array, count = self._array, len(self._paths)
        # The report is renamed first: if there is an array, there is its report.
        with (
            replacing_cache_file(array) as partial,
            replacing_cache_file(self._report) as partial_report,
        ):
            resources.check_disk(
                array,
                count * math.prod(shape),
                f"{words.count(count, 'decoded image')} of {'×'.join(map(str, shape))}",
                "give another --cache_dir, or a smaller --image_size",
            )
            earlier = _EarlierArray(self._latest, shape, self._listing)
            made = _decode_into(
                partial, self._paths, shape, self._interpolation, earlier, self._listing
            )
            partial_report.write_bytes(msgspec.json.encode(made))
        if not self._is_share:
            with replacing_cache_file(self._latest) as partial:
                partial.write_bytes(msgspec.json.encode(array.name))
        for old in unused(array.parent.glob("images-*.npy")):
            with contextlib.suppress(OSError):
                old.unlink()
                old.with_suffix(".json").unlink()
        return self._read()

    def _read(self) -> tuple[OnDisk, CacheReport]:
        """Returns what is there; raises `ValueError` or `OSError` if it cannot be used."""
        x, found = OnDisk(self._array), files.read_json(self._report, CacheReport)
        count = len(self._paths)
        if x.ndim != 4 or len(x) != count:
            raise ValueError(f"it is of shape {x.shape}")
        if max([*found.unreadable, *found.unopened], default=0) >= count:
            raise ValueError(f"{self._report} counts more than {count} images")
        return x, found


def check_options(size: int | None, channels: int | None, unreadable: str = "skip") -> None:
    """Raises `UserError` if an argument of `decode` is out of range."""
    if size is not None and size < 1:
        raise UserError(f"the image size must be at least 1, got {size}")
    if channels not in (None, 1, 3):
        raise UserError(f"images have 1 channel (grey) or 3 (RGB), got {channels}")
    if unreadable not in UNREADABLE:
        raise UserError(f"unreadable must be one of {', '.join(UNREADABLE)}, got {unreadable!r}")


@contextlib.contextmanager
def replacing_cache_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path to write to, which becomes `path` after the block, in the cache.

    Raises:
      UserError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(
            f"cannot write the cache {path}: {reason(error)}; give another --cache_dir"
        ) from error


def _make_opaque(image: Image.Image, channels: int) -> Image.Image:
    """Returns an opaque image with 8 bits a channel."""
    if image.mode == "F":
        raise ValueError("of floating-point pixels it is not known what is white")
    if image.mode.startswith("I"):  # Pillow would turn all values above 255 into white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _read_shape(path: str) -> ImageShape | None:
    """Returns the shape of the image in a file; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Reading the orientation of a PNG without EXIF would decode it.
            exif = image.getexif() if "exif" in image.info else {}
            if exif.get(ExifTags.Base.Orientation, 1) >= 5:
                width, height = height, width
            grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
            return ImageShape(height, width, 1 if grey else 3)
    except Exception:  # See `read`.
        return None


def fingerprint_files(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the common folder of files, and a checksum of name, size and time of each."""
    common = os.path.commonpath([os.path.abspath(path) for path in paths])

    def checksum(path: str) -> str:
        facts = (-1, -1)  # It is gone since it was found; decoding it will say so.
        with contextlib.suppress(OSError):
            found = os.stat(path)
            facts = (found.st_size, found.st_mtime_ns)
        described = repr((os.path.relpath(path, common), *facts))
        return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()

    return common, [checksum(path) for path in paths]


def _cache_name(size: int | None, channels: int | None, interpolation: str, of: Any) -> str:
    """Returns the name of a file in the cache, without its suffix."""
    facts = repr((size, channels, interpolation, CACHE_VERSION, of))
    return f"images-{zlib.crc32(facts.encode()):08x}"


class _EarlierArray:
    """The images of an earlier array of the same folder that have not changed since.

    Args:
      latest: the file that names the array.
      shape: of the images that are wanted.
      listing: checksums of their files.
    """

    def __init__(self, latest: pathlib.Path, shape: ImageShape, listing: Sequence[str]):
        self._row_of: dict[int, int] = {}
        with contextlib.suppress(OSError, ValueError, UserError):  # Without it all are decoded.
            array = latest.with_name(files.read_json(latest, str))
            found = files.read_json(array.with_suffix(".json"), CacheReport)
            self._x = OnDisk(array)
            if self._x.shape == (len(found.files), *shape):
                rows = {name: row for row, name in enumerate(found.files)}
                self._row_of = {
                    position: rows[name]
                    for position, name in enumerate(listing)
                    if rows.get(name, -1) not in {-1, *found.unreadable}
                }

    def get(self, position: int) -> np.ndarray | None:
        """Returns an image, None if it is not among them."""
        row = self._row_of.get(position)
        return None if row is None else self._x[row]


def unused(paths: Iterable[pathlib.Path]) -> Iterator[pathlib.Path]:
    """Yields those of some files in the cache that were not used for `DAYS_KEPT` days."""
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    for path in paths:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                yield path


def _decode_into(
    partial: pathlib.Path,
    paths: Sequence[str],
    shape: ImageShape,
    interpolation: str,
    earlier: _EarlierArray,
    listing: Sequence[str],
) -> CacheReport:
    """Writes the array; returns its checksum, and the reasons why files cannot be read."""
    array = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(paths), *shape))
    offset, unopened = array.offset, []
    del (
        array
    )  # Pages written through a memory map count as memory, and a full disk kills the process.

    def store(position: int) -> int | str:
        try:
            image = earlier.get(position)
            image = read(paths[position], shape, interpolation) if image is None else image
        except Exception as error:  # See `read`.
            number = getattr(error, "errno", None)
            if number in TEMPORARY_ERRORS:
                unopened.append(position)
            elif number in EXHAUSTION_ERRORS:
                raise UserError(f"cannot read {paths[position]}: {error.strerror}") from error
            return _describe_error(paths[position], error)
        with partial.open("r+b") as file:
            file.seek(offset + position * image.nbytes)
            file.write(image.tobytes())
        return zlib.crc32(image.tobytes())

    with ThreadPool() as threads:  # Pillow decodes without holding the interpreter.
        jobs = threads.imap(store, range(len(paths)))
        done = list(_show_progress(jobs, len(paths), "decoding images"))
    broken = {position: why for position, why in enumerate(done) if isinstance(why, str)}
    # Without the reasons, which versions of Pillow word differently.
    pixels = [None if position in broken else part for position, part in enumerate(done)]
    checksum = checksum_of(shape, pixels)
    return CacheReport(checksum, broken, sorted(unopened), pixels, list(listing))


def checksum_of(shape: ImageShape, pixels: Sequence[int | None]) -> int:
    """Returns the checksum of images, from those of each; None of those that cannot be read."""
    return zlib.crc32(json.dumps([shape, pixels]).encode())


def _show_progress(work: Iterable, total: int, what: str) -> Iterable:
    return tqdm.tqdm(work, what, total, disable=None, leave=False)


def _describe_error(path: str, error: Exception) -> str:
    return reason(error).replace(f" {path!r}", "")


def report_unreadable(broken: Mapping[int, str], paths: Sequence[str], unreadable: str) -> None:
    """Warns of files that cannot be read, or raises `UserError`, as `decode` says.

    Args:
      broken: position → why it cannot be read.
      paths: all files.
      unreadable: as of `decode`.
    """
    if not broken:
        return
    named = [f"{paths[position]} ({why})" for position, why in list(broken.items())[:3]]
    named += [f"and {len(broken) - 3} more"] if len(broken) > 3 else []
    number = words.count(len(paths), "image file")
    message = f"{len(broken)} of {number} cannot be read: {', '.join(named)}"
    if unreadable == "refuse" or len(broken) == len(paths):
        raise UserError(message)
    warnings.warn(f"{message}; they are left out", stacklevel=3)
