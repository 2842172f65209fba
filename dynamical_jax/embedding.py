"""Embeds images by a pretrained network, once: the vectors are kept on disk."""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dynamical_jax import models
from dynamical_jax.data import images
from dynamical_jax.data.datasets import Dataset
from dynamical_jax.errors import UserError
from dynamical_jax.models.weights import Weights
from dynamical_jax.types import Array, Examples, Variables

BATCH_SIZE = 32
"""Images that go through the network at a time."""

# Raise it when a network or what comes before it changes, so that older files are not used.
FORMAT = 1

Read = Callable[[np.ndarray], tuple[Any, np.ndarray]]
"""Returns the images `[b, h, w, c]` at some positions, and which of them can be read."""


def embed(
    weights: Weights, x: Any, cache_dir: str | os.PathLike, image_size: int | None = None
) -> images.OnDisk:
    """Returns the embeddings of images, `[n, d]` float32.

    They are computed once for the same images and weights. If that is interrupted, the next call
    goes on.

    Args:
      weights: of the network.
      x: images `[n, h, w, c]` uint8, or rows of such.
      cache_dir: where the vectors are kept.
      image_size: height and width at which the network sees the images; by default that of the
        weights.

    Raises:
      UserError: if the network cannot take such images, or the cache cannot be written.
    """
    images.check_pixels(x)
    source = f"pixels {images.checksum(x):08x} {x.shape}"
    everything = np.ones(len(x), bool)
    read = lambda positions: (x[positions], everything[positions])
    return _embed(weights, len(x), read, source, cache_dir, image_size)


def embed_files(
    weights: Weights,
    paths: Sequence[str],
    cache_dir: str | os.PathLike,
    image_size: int | None = None,
) -> images.OnDisk:
    """Returns the embeddings of image files, `[n, d]`; a file that cannot be read has NaN.

    Args:
      weights: as in `embed`.
      paths: the files; they are the same while names, sizes and times of change are.
      cache_dir: as in `embed`.
      image_size: likewise.

    Raises:
      UserError: as in `embed`.
    """
    side = image_size or weights.preprocessing.size
    shape = images.ImageShape(side, side, 3)

    def read(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = [paths[position] for position in positions]
        return images.read_all(chosen, shape, weights.preprocessing.interpolation)

    return _embed(
        weights, len(paths), read, repr(images.list_files(paths)[1]), cache_dir, image_size
    )


def embed_dataset(
    weights: Weights, data: Dataset, cache_dir: str | os.PathLike, image_size: int | None = None
) -> Dataset:
    """Returns a data set of images as one of vectors, with the same labels and names.

    Args:
      weights: as in `embed`.
      data: holds images.
      cache_dir: as in `embed`.
      image_size: likewise.
    """
    pool, test = (
        Examples(embed(weights, part.x, cache_dir, image_size), part.y)
        for part in (data.pool, data.test)
    )
    version = f"{data.version}, {weights.model} {weights.checksum:08x}"
    return dataclasses.replace(data, pool=pool, test=test, version=version)


def _embed(
    weights: Weights,
    size: int,
    read: Read,
    source: str,
    cache_dir: str | os.PathLike,
    image_size: int | None,
) -> images.OnDisk:
    """Returns the embeddings of `size` images, of which `source` says what they are."""
    model = models.pretrained(weights, 1, image_size)
    example, _ = read(np.zeros(1, int))
    variables = _variables(model, example)
    width = jax.eval_shape(model.apply, variables, example).embedding.shape[1]
    facts = (weights.model, weights.checksum, model.size, model.mean, model.std, source, FORMAT)
    key = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    path = pathlib.Path(cache_dir) / f"embeddings-{key}.npy"
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _append_rows(partial, size, width, lambda p: _vectors(model, variables, *read(p)))
                os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {path}: {error}; give another --cache_dir"
        ) from error
    return images.OnDisk(path)


def _append_rows(
    path: pathlib.Path, size: int, width: int, rows: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Writes an .npy file `[size, width]` row by row, and goes on where it was interrupted."""
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (size, width)}
    np.lib.format.write_array_header_1_0(header, described)
    with path.open("a+b") as file:
        file.seek(0)
        if file.read(header.tell()) != header.getvalue():
            file.truncate(0)
            file.write(header.getvalue())
        done = (file.seek(0, os.SEEK_END) - header.tell()) // (4 * width)
        file.truncate(header.tell() + done * 4 * width)
        progress = tqdm.tqdm(
            desc="embedding images", total=size, initial=done, disable=None, leave=False
        )
        with progress:
            for start in range(done, size, BATCH_SIZE):
                positions = np.arange(start, min(start + BATCH_SIZE, size))
                file.write(rows(positions).astype("<f4").tobytes())
                file.flush()
                progress.update(len(positions))


def _vectors(
    model: models.Pretrained, variables: Variables, x: Any, readable: np.ndarray
) -> np.ndarray:
    """Returns the embeddings of at most `BATCH_SIZE` images; NaN for those that are not readable.

    Blocks are filled up, so that one program is compiled.
    """
    filled = np.zeros((BATCH_SIZE, *x.shape[1:]), x.dtype)
    filled[: len(x)] = x
    vectors = np.asarray(_embedding(model, variables, filled))[: len(x)]
    return np.where(readable[:, None], vectors, np.nan)


@functools.partial(jax.jit, static_argnames="model")
def _embedding(model: models.Pretrained, variables: Variables, x: Array) -> Array:
    return model.apply(variables, x).embedding


def _variables(model: models.Pretrained, x: Any) -> Variables:
    """The variables of a network whose last layer is not used; no random numbers are drawn."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return model.with_weights(zeros)
