"""Your own labeled data: a folder of images for each class, or arrays in an .npz or .npy file.

If there is no test set, some examples of each class are held out. Which ones does not depend on the
seed of a run.
"""

import os
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax import resources, words
from dynamical_jax.data import divided, images
from dynamical_jax.errors import UserError, reason
from dynamical_jax.types import Examples, Rows

TEST_FRACTION = 0.2
# An .npz file holds one of these, images or vectors.
INPUT_NAMES = ("image", "embedding")


class OwnData(NamedTuple):
    """The fields of a `datasets.Dataset`, with its names."""

    pool: Examples
    test: Examples
    class_names: tuple[str, ...]
    version: str
    index: np.ndarray
    paths: tuple[str, ...] = ()


def read_folder(
    folder: str,
    test_dir: str | None,
    test_fraction: float | None,
    cache_dir: str | os.PathLike,
    image_size: int | None,
    channels: int | None,
    unreadable: str,
    interpolation: str = "bilinear",
) -> OwnData:
    """Returns the images of `<folder>/<class>/**`, and those of `test_dir` for testing.

    Raises:
      UserError: if folders are not like this, or as in `images.decode`.
    """
    images.check_options(image_size, channels, unreadable)
    _check_fraction(test_fraction, test_dir)
    class_names = _list_classes(folder)
    _check_two_classes(folder, class_names)
    _warn_of_images_beside(folder)
    paths, y = _find_labeled_files(folder, class_names, class_names)
    size = len(paths)
    if test_dir is not None:
        _check_outside(test_dir, folder)
        test_classes = _list_classes(test_dir)
        if foreign := [name for name in test_classes if name not in class_names]:
            raise UserError(f"{test_dir} has a class {foreign[0]!r}, which {folder} has not")
        more, labels = _find_labeled_files(test_dir, test_classes, class_names)
        paths, y = paths + more, np.append(y, labels)
    x, readable, checksum = divided.decode(
        paths, cache_dir, image_size, channels, unreadable, interpolation
    )
    rows = np.flatnonzero(readable)
    for_test = rows >= size
    if missing := set(range(len(class_names))) - set(np.unique(y[rows[~for_test]]).tolist()):
        raise UserError(f"{folder}: no image of class {class_names[min(missing)]!r} can be read")
    if test_dir is None:
        for_test = choose_held_out(y[rows], test_fraction, class_names)
    elif not for_test.any():
        raise UserError(f"{test_dir}: no image can be read")
    pool, test = rows[~for_test], rows[for_test]
    _warn_of_copies("images", Rows(x, pool), Rows(x, test))
    return OwnData(
        *(Examples(Rows(x, part), y[part]) for part in (pool, test)),
        class_names,
        _compute_version((y, pool, test), class_names, checksum),
        pool,
        tuple(paths),
    )


def read_file(
    path: str,
    test_fraction: float | None,
    image_size: int | None,
    channels: int | None,
    unreadable: str = "skip",
) -> OwnData:
    """Returns the arrays of an .npz file: image or embedding, and label `[n]`.

    Images are numbers `[n, h, w]` or `[n, h, w, c]`, embeddings floats `[n, d]`, which become
    float32; labels are whole numbers or strings. There may be test_image or test_embedding and
    test_label; class_names, which labels that are numbers then count from 0; and path `[n]`, or
    index `[n]`, the whole numbers by which records name the examples, instead of their rows.
    test_index and test_path are ignored.

    An .npy file holds embeddings alone, which may be larger than memory; all else is then in an
    .npz file of the same name beside it.

    Raises:
      UserError: if arrays are missing, cannot be read, or do not fit.
    """
    images.check_options(image_size, channels, unreadable)
    arrays = _read_arrays(path)
    name = next(name for name in INPUT_NAMES if name in arrays)
    allowed = (name, "label", f"test_{name}", "test_label", "class_names", "index", "path")
    _check_names(path, arrays, (*allowed, "test_index", "test_path"))
    needed = allowed[: 4 if set(allowed[2:4]) & set(arrays) else 2]
    if missing := [name for name in needed if name not in arrays]:
        raise UserError(f"{path}: there is no array {missing[0]!r}")
    _check_fraction(test_fraction, f"test_{name}" if f"test_{name}" in arrays else None)
    values, class_names = _read_classes(path, arrays["label"], arrays.get("class_names"))
    _check_two_classes(path, class_names)

    def examples(prefix: str) -> tuple[Examples, np.ndarray]:
        """Returns inputs and labels, and which of them are finite."""
        what, x = f"{path}: {prefix}{name}", arrays[prefix + name]
        y = _read_labels(what, len(x), prefix, arrays[f"{prefix}label"], values)
        if name == "embedding":
            kind, x = "vectors", _read_vectors(what, x, image_size, channels)
        else:
            kind, x = "images", _read_images(what, x, image_size, channels)
        return Examples(x, y), _find_finite_rows(what, kind, x, unreadable)

    def taken(part: Examples, rows: np.ndarray) -> Examples:
        if len(rows) == len(part.y):
            return part
        x = part.x[rows] if isinstance(part.x, np.ndarray) else Rows(part.x, rows)
        return Examples(x, part.y[rows])

    everything, rows = examples("")
    index = _read_index(path, arrays.get("index"), len(everything.y))
    if f"test_{name}" in arrays:
        test = taken(*examples("test_"))
    else:
        for_test = choose_held_out(everything.y[rows], test_fraction, class_names)
        test, rows = taken(everything, rows[for_test]), rows[~for_test]
    pool, index = taken(everything, rows), index[rows]
    kind = "vectors" if name == "embedding" else "images"
    _warn_of_copies(kind, pool.x, test.x)
    paths: tuple[str, ...] = ()
    if "path" in arrays:
        if "index" in arrays:
            raise UserError(f"{path} holds both index and path, and one of them names the examples")
        paths = _read_paths(path, arrays["path"], len(everything.y))
    facts = (class_names, zlib.crc32(index)) if "index" in arrays else (class_names,)
    version = _compute_version((*pool, *test), *facts)
    return OwnData(pool, test, class_names, version, index, paths)


class Features(NamedTuple):
    """Vectors of image files.

    Attributes:
      x: `[n, d]` float32.
      paths: of the files.
      finite: rows that are.
      checksum: of all numbers.
    """

    x: Any
    paths: tuple[str, ...]
    finite: np.ndarray
    checksum: int


def read_features(path: str, unreadable: str = "skip") -> Features:
    """Returns the vectors of image files: arrays embedding and path `[n]`, read as in `read_file`.

    Other arrays are ignored.

    Raises:
      UserError: if there is no path or embedding, or they do not fit.
    """
    if not path.endswith((".npz", ".npy")):
        raise UserError(f"{path} is no .npz or .npy file")
    arrays = _read_arrays(path)
    if missing := [name for name in ("embedding", "path") if name not in arrays]:
        raise UserError(
            f"{path}: there is no array {missing[0]!r}; features need embedding [n, d] and path [n]"
        )
    what = f"{path}: embedding"
    x = _read_vectors(what, arrays["embedding"], None, None)
    paths = _read_paths(path, arrays["path"], len(x))
    return Features(
        x, paths, _find_finite_rows(what, "vectors", x, unreadable), images.compute_checksum(x)
    )


def choose_held_out(
    y: np.ndarray, fraction: float | None, class_names: Sequence[str]
) -> np.ndarray:
    """Returns a mask `[n]` of the examples for testing: a fraction of each class, at least one.

    Raises:
      UserError: if a class has one example only, which cannot be in pool and test set.
    """
    fraction = TEST_FRACTION if fraction is None else fraction
    generator = np.random.default_rng(101)
    result = np.zeros(len(y), bool)
    for label in np.unique(y):
        of_class = generator.permutation(np.flatnonzero(y == label))
        if len(of_class) == 1:
            raise UserError(
                f"class {class_names[label]!r} has one example; it needs two: one is held out for "
                "testing, or else give a test set"
            )
        size = round(fraction * len(of_class))
        result[of_class[: min(max(size, 1), len(of_class) - 1)]] = True
    return result


def check_finite(what: str, kind: str, x: Any) -> None:
    """Raises `UserError` if rows of x `[n, ...]` hold NaN or infinity, and names them."""
    _find_finite_rows(what, kind, x, "refuse")


def _find_finite_rows(what: str, kind: str, x: Any, unreadable: str) -> np.ndarray:
    """Returns the rows of x `[n, ...]` that hold neither NaN nor infinity; warns of the others."""
    if x.dtype.kind in "biu":
        return np.arange(len(x))
    rest = tuple(range(1, len(x.shape)))
    finite = np.concatenate(
        [np.isfinite(block).all(axis=rest) for block in images.iterate_blocks(x)]
    )
    rows = np.flatnonzero(~finite)
    if len(rows):
        listed = [*map(str, rows[:5]), *(["…"] if len(rows) > 5 else [])]
        message = f"{what}: {len(rows)} of {len(x)} {kind} are not finite: rows {', '.join(listed)}"
        if unreadable == "refuse" or len(rows) == len(x):
            raise UserError(message)
        warnings.warn(f"{message}; they are left out", stacklevel=3)
    return np.flatnonzero(finite)


def _warn_of_copies(kind: str, pool: Any, test: Any) -> None:
    if copies := images.count_copies(test, pool):
        warnings.warn(
            f"{copies} of {len(test)} test {kind} are copies of {kind} in the pool", stacklevel=3
        )


def _check_fraction(fraction: float | None, test_set: str | None) -> None:
    if fraction is not None and test_set is not None:
        raise UserError(f"there is a test set, {test_set}: a test fraction has no effect")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"the test fraction must be between 0 and 1, got {fraction}")


def _check_outside(test_dir: str, folder: str) -> None:
    inner, outer = os.path.realpath(test_dir), os.path.realpath(folder)
    if os.path.commonpath([inner, outer]) == outer:
        raise UserError(f"{test_dir} is part of {folder}: test images would be in the pool as well")


def _check_two_classes(where: str, class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise UserError(f"{where} has one class only, {class_names[0]!r}; two or more are needed")


def _compute_version(arrays: Iterable[Any], *facts: Any) -> str:
    """Returns a checksum of arrays and of the text of other facts."""
    parts = [images.compute_checksum(array) for array in arrays]
    return f"{zlib.crc32(repr((parts, facts)).encode()):08x}"


def _list_classes(folder: str) -> tuple[str, ...]:
    """Returns the names of the folders in a folder, sorted."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error
    classes = tuple(name for name in names if not name.startswith("."))
    if not classes:
        raise UserError(f"{folder} holds no folders; images go into a folder for each class")
    return classes


def _warn_of_images_beside(folder: str) -> None:
    """Warns of images in a folder of classes that lie in none of these."""
    suffixes = images.readable_suffixes()
    beside = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file() and os.path.splitext(entry.name)[1].lower() in suffixes
    )
    if beside:
        found = words.count(len(beside), "image file lies", "image files lie")
        warnings.warn(
            f"{found} in {folder}, but in no folder of a class, such as {beside[0]}: left out",
            stacklevel=4,
        )


def _find_labeled_files(
    folder: str, names: Sequence[str], class_names: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Returns the image files of some classes, and their labels."""
    paths: list[str] = []
    labels: list[int] = []
    for name in names:
        found = images.find(os.path.join(folder, name))
        if not found:
            raise UserError(f"{folder}: there are no image files of class {name!r}")
        paths += found
        labels += [class_names.index(name)] * len(found)
    return paths, np.array(labels, np.int32)


def _read_arrays(path: str) -> dict[str, Any]:
    """Returns all arrays of an .npz file, or of an .npy file and the .npz file beside it."""
    if path.endswith(".npy"):
        beside = path.removesuffix("y") + "z"
        arrays = _read_npz(beside)
        if held := [name for name in INPUT_NAMES if name in arrays]:
            raise UserError(f"{path} holds the embeddings, and {beside} an array {held[0]}, too")
        return {"embedding": images.OnDisk(path), **arrays}
    arrays = _read_npz(path)
    inputs = [name for name in INPUT_NAMES if name in arrays]
    if len(inputs) != 1:
        holds = f"both {' and '.join(inputs)}" if inputs else ", ".join(arrays) or "nothing"
        raise UserError(f"{path} must hold an array image or an array embedding; it holds {holds}")
    return arrays


def _read_npz(path: str) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":  # NumPy would take it for a pickle.
                raise UserError(f"cannot read {path}: it is no .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as members:
                size = sum(member.file_size for member in members.zip.infolist())
                resources.check_memory(size, f"reading {path}", "make a smaller file")
                return dict(members.items())
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"cannot read {path} ({reason(error)})") from error


def _check_names(path: str, arrays: Iterable[str], allowed: Sequence[str]) -> None:
    if foreign := [other for other in arrays if other not in allowed]:
        raise UserError(
            f"{path}: unknown array {foreign[0]!r}; known beside {allowed[0]} are "
            f"{', '.join(allowed[1:])}"
        )


def _read_classes(
    path: str, labels: np.ndarray, names: np.ndarray | None
) -> tuple[list[Any], tuple[str, ...]]:
    """Returns the values of labels in the order of the classes, and the names of the classes."""
    if labels.dtype.kind not in "iuU" or labels.ndim != 1:
        raise UserError(
            f"{path}: labels must be whole numbers or strings [n], got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    if names is None:
        values = np.unique(labels).tolist()
        return values, tuple(map(str, values))
    if names.dtype.kind != "U" or names.ndim != 1 or len(np.unique(names)) < len(names):
        raise UserError(f"{path}: class_names must be strings [K], each another")
    class_names = tuple(names.tolist())
    return list(class_names if labels.dtype.kind == "U" else range(len(names))), class_names


def _read_labels(
    what: str, size: int, prefix: str, labels: np.ndarray, values: Sequence[Any]
) -> np.ndarray:
    """Returns the positions of labels in `values`."""
    if labels.shape != (size,):
        number = words.count(size, "row")
        raise UserError(f"{what} has {number}, but {prefix}label is of shape {labels.shape}")
    found, inverse = np.unique(labels, return_inverse=True)
    if foreign := [value for value in found.tolist() if value not in values]:
        raise UserError(f"{what}: {prefix}label {foreign[0]!r} is none of the classes")
    return np.array([values.index(value) for value in found.tolist()], np.int32)[inverse]


def _read_images(
    what: str, x: np.ndarray, image_size: int | None, channels: int | None
) -> np.ndarray:
    """Returns images `[n, h, w, c]`, resized to `image_size` unless that is None."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.dtype.kind not in "iuf" or 0 in x.shape:
        raise UserError(
            f"{what} must be numbers [n, h, w] or [n, h, w, c], got {x.dtype} of shape {x.shape}"
        )
    if channels not in (None, x.shape[-1]):
        number = words.count(x.shape[-1], "channel")
        raise UserError(f"{what} has {number}; others can be had of image files only")
    if image_size is None:
        return x
    if x.dtype != np.uint8 or x.shape[-1] not in (1, 3):
        raise UserError(f"{what} must be uint8, grey or RGB, to be resized; got {x.dtype}")
    return images.resize_all(x, image_size)


def _read_vectors(what: str, x: Any, image_size: int | None, channels: int | None) -> Any:
    """Returns vectors `[n, d]` as float32, since sums in half precision overflow."""
    if x.ndim != 2 or x.dtype.kind != "f" or 0 in x.shape:
        raise UserError(
            f"{what} must be floating-point numbers [n, d], got {x.dtype} of shape {x.shape}"
        )
    for option, value in (("image_size", image_size), ("channels", channels)):
        if value is not None:
            raise UserError(f"{option} has no effect on {what}: these are vectors, not images")
    if isinstance(x, images.OnDisk):
        return images.OnDisk(x.path, np.float32)
    with np.errstate(over="ignore"):  # Values that are too large become infinite.
        return x.astype(np.float32, copy=False)


def _read_index(path: str, index: np.ndarray | None, size: int) -> np.ndarray:
    """Returns the whole numbers that name the rows."""
    if index is None:
        return np.arange(size)
    if index.dtype.kind not in "iu" or index.shape != (size,) or len(np.unique(index)) < size:
        raise UserError(
            f"{path}: index must be whole numbers [{size}], each another, got {index.dtype} of "
            f"shape {index.shape}"
        )
    return index.astype(np.int64)


def _read_paths(path: str, paths: np.ndarray, size: int) -> tuple[str, ...]:
    """Returns the paths of the files that the rows are of."""
    if paths.dtype.kind != "U" or paths.shape != (size,) or len(np.unique(paths)) < size:
        raise UserError(
            f"{path}: path must be strings [{size}], each another, got {paths.dtype} of shape "
            f"{paths.shape}"
        )
    return tuple(paths.tolist())
