"""Classification data as NumPy arrays: a pool to query from and a test set.

`load(name)` returns one of `DATASETS`, `load(path)` the data of your own folder or file. Your
own arrays become a `Dataset` by its constructor. Inputs are images, uint8 `[n, h, w, c]`, or
vectors, floats `[n, d]`; they keep their type and scale until a model standardises them.
"""

import dataclasses
import functools
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dynamical_jax import files, parallel, resources, words
from dynamical_jax.data import folders, images
from dynamical_jax.errors import UserError
from dynamical_jax.types import Examples

# Caltech-101 has no test set: this many images of each class are held out.
TEST_IMAGES_PER_CLASS = 10
CALTECH101_IMAGE_SIZE = 64
# Raise it when decoding or resizing changes, so that older caches are not used.
CACHE_FORMAT = 1
# Images that are not in memory are copied to the device up to this size in bytes.
LARGEST_COPY = 2**28


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A pool, whose labels an oracle knows, and a test set.

    Attributes:
      name: its name in records.
      pool: x, images `[n, h, w, c]` or vectors `[n, d]` of floats, and labels y `[n]`, NumPy; x
        may be anything that has a shape and a dtype and whose rows are arrays, such as
        `images.OnDisk`, `types.Rows` or a memory map.
      test: the same for the test set.
      class_names: the K classes, in the order of the labels.
      version: of the data, for records.
      index: `[n]` position of each row of the pool in the data set that it comes from; by default
        the number of the row. Records name examples by it.
      paths: `paths[i]` is the file of the image with index i, or the vector's. May be empty.

    Raises:
      UserError: on construction, if shapes or labels do not fit, or an input is not finite.
    """

    name: str
    pool: Examples
    test: Examples
    class_names: tuple[str, ...]
    version: str = ""
    index: Any = None
    paths: tuple[str, ...] = ()

    def __post_init__(self):
        if self.index is None:
            object.__setattr__(self, "index", np.arange(len(self.pool.y)))
        for part, examples in (("pool", self.pool), ("test", self.test)):
            _check_examples(f"{self.name}: {part}", examples, len(self.class_names))
        kinds = [(part.x.shape[1:], part.x.dtype.name) for part in (self.pool, self.test)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"{self.name}: pool {self.kind} are {kinds[0]}, test {self.kind} {kinds[1]}"
            )
        if np.shape(self.index) != self.pool.y.shape:
            raise UserError(
                f"{self.name}: {len(self.pool.y)} {self.kind} but an index of shape "
                f"{np.shape(self.index)}"
            )

    @property
    def kind(self) -> str:
        """The kind of inputs, "images" or "vectors"."""
        return _input_kind(self.pool.x)

    @functools.cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return channel_statistics(self.pool.x)

    @functools.cached_property
    def pool_images(self) -> Any:
        """`pool.x`, copied to the default device once.

        Inputs that are not in memory and larger than `LARGEST_COPY` stay where they are.
        """
        return _to_device_unless_large(self.pool.x)

    @functools.cached_property
    def test_examples(self) -> Examples:
        """`test`, with its inputs copied likewise."""
        return Examples(_to_device_unless_large(self.test.x), self.test.y)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, or feature, over the pool, in the units of the inputs."""
        return tuple(self._statistics[0].tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, or feature, over the pool, likewise."""
        return tuple(self._statistics[1].tolist())


def load(
    name: str | os.PathLike,
    *,
    image_size: int | None = None,
    data_dir: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
    test_dir: str | os.PathLike | None = None,
    test_fraction: float | None = None,
    channels: int | None = None,
    unreadable: str = "skip",
    interpolation: str = "bilinear",
) -> Dataset:
    """Returns one of `DATASETS`, or your own data.

    Your own data are a folder with images in `<folder>/<class>/`, at any depth, or an .npz file of
    arrays: image `[n, h, w]` or `[n, h, w, c]`, or embedding `[n, d]`; label `[n]`, whole numbers
    or strings; and optionally test_image or test_embedding, test_label, class_names, and index or
    path. Embeddings that are larger than memory are in an .npy file, all else in an .npz file of
    the same name.

    Args:
      name: a name of `DATASETS`, or the path of a folder or .npz file.
      image_size: height and width to which images are resized. If None they keep their size, but
        Caltech-101, and image files that differ in size or are larger than 256, become 64×64.
      data_dir: where TFDS keeps its data; `TFDS_DATA_DIR` or TFDS's own default if None.
      cache_dir: where decoded arrays are kept between runs; `default_cache_dir()` if None.
      download: whether TFDS may download and prepare what is not in `data_dir`.
      test_dir: folder with images for testing, of the same classes.
      test_fraction: share of each class to hold out for testing if there is no test set; 0.2 if
        None.
      channels: of image files, 1 (grey) or 3 (RGB). If None, 1 if all are grey, else 3.
      unreadable: whether image files that cannot be read, and rows of arrays that are not finite,
        are left out ("skip"), with a warning, or refused ("refuse").
      interpolation: by which image files are resized, a key of `images.INTERPOLATIONS`.

    Raises:
      UserError: if the name is unknown, the `tfds` extra is missing, the data are not prepared or
        not as described here, an argument has no effect, or a cache file cannot be written.
    """
    cache_dir = pathlib.Path(cache_dir or default_cache_dir())
    if name not in DATASETS:
        path, test_dir = os.fspath(name), test_dir and os.fspath(test_dir)
        return _load_own(
            *(path, test_dir, test_fraction, cache_dir),
            *(image_size, channels, unreadable, interpolation),
        )
    images.check_options(image_size, channels, unreadable)
    own = {"test_dir": test_dir, "test_fraction": test_fraction, "channels": channels}
    if unused := [option for option, value in own.items() if value is not None]:
        raise UserError(f"{unused[0]} has no effect on {name}, only on data of your own")
    if name == "digits":
        return _load_digits(image_size)
    return _load_tfds(name, image_size, data_dir, cache_dir, download)


def default_cache_dir() -> str:
    """Returns `$XDG_CACHE_HOME/dynamical_jax`, by default `~/.cache/dynamical_jax`."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return str(pathlib.Path(root) / "dynamical_jax")


def channel_statistics(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the last axis of x: channels, or features.

    Guaranteed: if all values are equal, the deviation is 0.

    Args:
      x: images `[n, h, w, c]` or vectors `[n, d]`. Of what hosts share each sums its own rows.
    """
    # Summed over blocks, which needs no float copy of the pool, and counted from the first value:
    # else the deviation of a constant would be a rounding error, and noise would be divided by it.
    origin = np.asarray(x[:1], np.float64).reshape(-1, x.shape[-1])[:1]
    count, total, squares = 0, 0.0, 0.0
    for block in images.iterate_blocks(parallel.own_rows(x)):
        block = np.asarray(block, np.float64).reshape(-1, block.shape[-1]) - origin
        count, total = count + len(block), total + block.sum(axis=0)
        squares = squares + (block**2).sum(axis=0)
    if parallel.owners(x) is not None:
        sums = parallel.gather((count, total, squares))
        count, total, squares = (sum(part) for part in zip(*sums, strict=True))
    mean = total / count
    return origin[0] + mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _input_kind(x: Any) -> str:
    return "vectors" if len(x.shape) == 2 else "images"


def _check_examples(what: str, examples: Examples, num_classes: int) -> None:
    x, y = examples
    if len(x.shape) not in (2, 4):
        raise UserError(
            f"{what}: images must be [n, height, width, channels], vectors [n, d], got {x.shape}"
        )
    kind = _input_kind(x)
    if kind == "vectors" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{what}: vectors must be of floating-point numbers, got {x.dtype}")
    if len(x) == 0 or y.shape != (len(x),):
        raise UserError(f"{what}: {len(x)} {kind} but labels of shape {y.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= num_classes:
        raise UserError(f"{what}: labels must be integers from 0 to {num_classes - 1}")
    folders.check_finite(what, kind, x)


def _to_device_unless_large(x: Any) -> Any:
    """Returns the array on the device, unless it is large and not in memory."""
    in_memory = isinstance(x, np.ndarray | jax.Array) and not isinstance(x, np.memmap)
    size = math.prod(x.shape) * x.dtype.itemsize
    if not in_memory and size > LARGEST_COPY:
        return x
    resources.check_device_memory(
        size, f"{len(x)} inputs of {'×'.join(map(str, x.shape[1:]))}", "take smaller ones, or fewer"
    )
    return jnp.asarray(x[:])


def _load_own(
    path: str,
    test_dir: str | None,
    test_fraction: float | None,
    cache_dir: pathlib.Path,
    image_size: int | None,
    channels: int | None,
    unreadable: str,
    interpolation: str,
) -> Dataset:
    if os.path.isdir(path):
        own = folders.read_folder(
            *(path, test_dir, test_fraction, cache_dir),
            *(image_size, channels, unreadable, interpolation),
        )
        return Dataset(os.path.basename(os.path.abspath(path)), **own._asdict())
    if not path.endswith((".npz", ".npy")):
        own = "a folder that holds one of images for each class, or an .npz or .npy file"
        words.check_known("dataset", path, DATASETS, f", or give {own}")
    if test_dir is not None:
        raise UserError(f"test_dir has no effect on {path}, which can hold a test set itself")
    own = folders.read_file(path, test_fraction, image_size, channels, unreadable)
    return Dataset(pathlib.Path(path).stem, **own._asdict())


def _load_digits(image_size: int | None) -> Dataset:
    """scikit-learn's 8×8 digits (UCI, 1,797 images): every fifth of each class is for testing."""
    import sklearn.datasets  # here, because it takes longer to import than all else together

    digits = sklearn.datasets.load_digits()
    x = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    y = digits.target.astype(np.int32)
    if image_size is not None:
        x = images.resize_all(x, image_size)
    test = np.zeros(len(y), bool)
    for label in range(10):
        test[np.flatnonzero(y == label)[::5]] = True
    names = tuple(str(label) for label in range(10))
    pool, held_out = Examples(x[~test], y[~test]), Examples(x[test], y[test])
    return Dataset("digits", pool, held_out, names, "1.0", np.flatnonzero(~test))


def _load_tfds(
    name: str, image_size: int | None, data_dir: str | None, cache_dir: pathlib.Path, download: bool
) -> Dataset:
    builder = _prepared_builder(name, data_dir, download)
    if name == "caltech101":
        image_size = image_size or CALTECH101_IMAGE_SIZE
    key = f"{name}-{builder.info.version}-{image_size or 'original'}"
    # Two copies of a data set may have the same version: their sizes tell most apart.
    sizes = [(split.num_examples, split.num_bytes) for split in builder.info.splits.values()]
    source = f"{key} {sizes}, format {CACHE_FORMAT}"
    decode = functools.partial(_decode, builder, image_size)
    # Each source has its own file, so that several copies can be used.
    file_name = f"{key}-{zlib.crc32(source.encode()):08x}.npz"
    arrays = cached_arrays(cache_dir / file_name, source, decode)
    train = Examples(arrays["train_x"], arrays["train_y"])
    test = Examples(arrays["test_x"], arrays["test_y"])
    class_names = tuple(builder.info.features["label"].names)
    version = str(builder.info.version)
    if name == "caltech101":
        return _split_caltech101(train, test, class_names, version)
    return Dataset(name, train, test, class_names, version)


def _prepared_builder(name: str, data_dir: str | None, download: bool) -> Any:
    try:
        import absl.logging

        absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS advises on OpenCV at every import.
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"dataset {name!r} needs the tfds extra ({error.name} is missing): "
            "pip install -e '.[tfds]'"
        ) from error
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if download:
        builder.download_and_prepare()
    if not builder.is_prepared():
        raise UserError(
            f"{name} is not prepared in {builder.data_dir}: give the directory that has it as "
            "TFDS_DATA_DIR or --data_dir, or --download to fetch it there"
        )
    return builder


def _decode(builder: Any, image_size: int | None) -> dict[str, np.ndarray]:
    """Reads both splits without TensorFlow; decodes and resizes every image."""
    arrays = {}
    if image_size is not None:
        count = sum(builder.info.splits[split].num_examples for split in ("train", "test"))
        images.check_resized(count, image_size, 3)
    for split in ("train", "test"):
        source = builder.as_data_source(split=split)
        x, y = [], []
        progress = tqdm.tqdm(source, f"decoding {builder.name} {split}", disable=None, leave=False)
        for example in progress:
            image = example["image"]
            if image_size is not None:
                image = images.resize(image, image_size, image_size)
            x.append(image)
            y.append(example["label"])
        arrays[f"{split}_x"] = np.stack(x)
        arrays[f"{split}_y"] = np.asarray(y, np.int32)
    return arrays


def _split_caltech101(
    train: Examples, test: Examples, class_names: tuple[str, ...], version: str
) -> Dataset:
    """Joins TFDS's splits, drops the background, holds out 10 images of each class.

    The held-out images do not depend on the seed of a run.
    """
    x = np.concatenate([train.x, test.x])
    y = np.concatenate([train.y, test.y])
    kept = [i for i, name in enumerate(class_names) if name != "background_google"]
    generator = np.random.default_rng(101)
    held_out = np.concatenate(
        [
            generator.choice(np.flatnonzero(y == i), TEST_IMAGES_PER_CLASS, replace=False)
            for i in kept
        ]
    )
    held_out = np.sort(held_out)
    pool = np.setdiff1d(np.flatnonzero(np.isin(y, kept)), held_out)
    y = np.searchsorted(kept, y).astype(np.int32)
    names = tuple(class_names[i] for i in kept)
    return Dataset(
        "caltech101",
        Examples(x[pool], y[pool]),
        Examples(x[held_out], y[held_out]),
        names,
        version,
        pool,
    )


def cached_arrays(
    path: pathlib.Path, source: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the arrays stored at `path`, or makes and stores them.

    A file is written whole or not at all, carries a description of its source, and its checksums
    (those of the zip format) are checked on reading. One that is damaged is set aside.

    Raises:
      UserError: if the file was made from another source, or cannot be written.
    """
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
                arrays = dict(members.items())
            stored_source = str(arrays.pop("source"))
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
            files.set_aside(path, error)
        else:
            if stored_source != source:
                raise UserError(
                    f"cache file {path} was made from other data ({stored_source}): delete it or "
                    "give another --cache_dir"
                )
            return arrays
    arrays = make()
    with images.replacing_cache_file(path) as partial, partial.open("wb") as file:
        np.savez(file, source=np.array(source), **arrays)
    return arrays


DATASETS = ("digits", "cifar10", "svhn_cropped", "caltech101")
