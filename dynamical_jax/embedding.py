"""Embeds images by a pretrained network, once: the vectors are kept on disk.

Those of a network are in one file, in the order in which they were computed, and beside it is a
file that says which images they are of. So images that were embedded before are not embedded again,
whatever others are new, and an interruption loses a batch at most. Files that were not used for
`images.DAYS_KEPT` days are removed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dynamical_jax import models, parallel
from dynamical_jax.data import images
from dynamical_jax.data.datasets import Dataset
from dynamical_jax.errors import UserError, reason
from dynamical_jax.models.weights import Weights
from dynamical_jax.types import Array, Examples, Rows, Variables

BATCH_SIZE = 32
"""Images that go through the network at a time."""

KEY_SIZE = 16
"""Bytes that tell images apart."""

EXCHANGED = 1024
"""Vectors that a host sends to the others at a time."""

# Raise it when a network or what comes before it changes, so that older files are not used.
FORMAT = 1

Read = Callable[[np.ndarray], tuple[Any, np.ndarray]]
"""Returns the images `[b, h, w, c]` at some positions, and which of them can be read."""


def embed(
    weights: Weights, x: Any, cache_dir: str | os.PathLike, image_size: int | None = None
) -> Rows:
    """Returns the embeddings of images, `[n, d]` float32.

    Where hosts share the images each embeds its own, and they send each other the vectors.

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
    read = lambda positions: (x[positions], np.ones(len(positions), bool))
    keys, owners = images.digest_rows(x), parallel.owners(x)
    vectors, _ = _embed(weights, keys, read, cache_dir, image_size, owners)
    return vectors


def embed_files(
    weights: Weights,
    paths: Sequence[str],
    cache_dir: str | os.PathLike,
    image_size: int | None = None,
) -> tuple[Rows, np.ndarray]:
    """Returns the embeddings of image files that can be read, `[m, d]`, and the rows of these.

    Args:
      weights: as in `embed`.
      paths: the files; they are the same while places, sizes and times of change are.
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

    return _embed(weights, list(map(_key_of_file, paths)), read, cache_dir, image_size)


def _key_of_file(path: str) -> bytes:
    facts = ()  # It is gone since it was found; reading it will say so.
    with contextlib.suppress(OSError):
        found = os.stat(path)
        facts = (found.st_size, found.st_mtime_ns)
    described = repr((os.path.abspath(path), *facts)).encode()
    return hashlib.blake2b(described, digest_size=KEY_SIZE).digest()


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
    keys: Sequence[bytes],
    read: Read,
    cache_dir: str | os.PathLike,
    image_size: int | None,
    owners: np.ndarray | None = None,
) -> tuple[Rows, np.ndarray]:
    """Returns the embeddings of images that can be read, and the rows of these.

    Args:
      weights: of the network.
      keys: of the images: those that have the same are the same.
      read: reads them.
      cache_dir: as in `embed`.
      image_size: likewise.
      owners: the process that embeds each image, as of `parallel.owners`.
    """
    model = models.pretrained(weights, 1, image_size)
    example, _ = read(np.zeros(1, int))
    variables = _variables(model, example)
    width = jax.eval_shape(model.apply, variables, example).embedding.shape[1]
    anywhere = dataclasses.replace(weights, path="")
    facts = (anywhere, model.size, example.shape[1:], FORMAT, images.CACHE_VERSION)
    name = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    path = pathlib.Path(cache_dir) / f"embeddings-{name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_suffix(".lock"))
        # Who needs the same images waits for them; hosts with a cache in common do not.
        with contextlib.nullcontext() if owners is not None else lock:
            store = _Store(path, width, lock)
            first = {key: i for i, key in reversed(list(enumerate(keys)))}
            unique = np.array(sorted(first.values()), int)
            new = np.array([i for i in unique if keys[i] not in store.row_of], int)
            if owners is not None:
                new = new[owners[new] == jax.process_index()]
            progress = tqdm.tqdm(
                desc="embedding images",
                total=len(keys),
                initial=len(keys) - len(new),
                disable=None,
                leave=False,
            )
            with progress:
                for start in range(0, len(new), BATCH_SIZE):
                    positions = new[start : start + BATCH_SIZE]
                    x, readable = read(positions)
                    vectors = _vectors(model, variables, x)
                    store.add([keys[i] for i in positions[readable]], vectors[readable])
                    progress.update(len(positions))
            if owners is not None:
                _exchange(store, keys, unique, owners)
            with contextlib.suppress(OSError):  # Of another user, perhaps.
                os.utime(path.with_suffix(".vectors"))
        _remove_unused(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write the cache {path}: {reason(error)}; give another --cache_dir"
        ) from error
    rows = np.array([store.row_of.get(key, -1) for key in keys])
    return Rows(store, rows[rows >= 0]), np.flatnonzero(rows >= 0)


def _exchange(
    store: "_Store", keys: Sequence[bytes], unique: np.ndarray, owners: np.ndarray
) -> None:
    """Gets the vectors of images that other hosts have embedded.

    Args:
      store: has those of this one.
      keys: of all images.
      unique: the first image of each key.
      owners: as of `_embed`.
    """
    parallel.gather(None)  # All are done.
    store.read()
    lacking = {i for i in unique.tolist() if keys[i] not in store.row_of}
    wanted = np.array(sorted(set().union(*parallel.gather(lacking))), int)
    own = wanted[owners[wanted] == jax.process_index()]
    most = max(parallel.gather(len(own)))
    for start in range(0, most, EXCHANGED):
        ours = [keys[i] for i in own[start : start + EXCHANGED]]
        vectors = store[np.array([store.row_of[key] for key in ours], int)]
        for theirs, found in parallel.gather((ours, vectors)):
            store.add(theirs, found)


def _remove_unused(cache: pathlib.Path) -> None:
    """Removes embeddings that were not used for long."""
    for vectors in images.unused(cache.glob("embeddings-*.vectors")):
        lock = filelock.FileLock(vectors.with_suffix(".lock"), timeout=0)
        with contextlib.suppress(OSError, filelock.Timeout), lock:
            vectors.unlink()
            vectors.with_suffix(".keys").unlink()


class _Store:
    """Vectors in a file, mapped anew for each access, as `images.OnDisk` does, and their keys.

    Args:
      path: of the vectors, without suffix.
      width: numbers of each.
      lock: held where files change.
    """

    def __init__(self, path: pathlib.Path, width: int, lock: filelock.BaseFileLock):
        self._vectors, self._keys = path.with_suffix(".vectors"), path.with_suffix(".keys")
        self._width, self._lock, self.dtype = width, lock, np.dtype("<f4")
        self.row_of: dict[bytes, int] = {}
        self.read()

    def read(self) -> None:
        """Looks at what was added, perhaps by others."""
        known, size = len(self.row_of), 4 * self._width
        with self._lock:
            for file in (self._vectors, self._keys):
                file.touch()
            count = min(self._keys.stat().st_size // KEY_SIZE, self._vectors.stat().st_size // size)
            os.truncate(self._vectors, count * size)  # What was written last may not be whole.
            os.truncate(self._keys, count * KEY_SIZE)
            with self._keys.open("rb") as file:
                file.seek(known * KEY_SIZE)
                added = file.read()
        for i in range(count - known):
            self.row_of[added[KEY_SIZE * i : KEY_SIZE * (i + 1)]] = known + i

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of all vectors together."""
        return (len(self.row_of), self._width)

    def add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Adds vectors `[b, d]` with keys, each another, but for those that are there."""
        with self._lock:
            self.read()
            new = [i for i, key in enumerate(keys) if key not in self.row_of]
            # A vector is there when its key is.
            for file, content in (
                (self._vectors, vectors[new].astype(self.dtype).tobytes()),
                (self._keys, b"".join(keys[i] for i in new)),
            ):
                with file.open("ab") as opened:
                    opened.write(content)
        for i in new:
            self.row_of[keys[i]] = len(self.row_of)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if not self.row_of:  # An empty file cannot be mapped.
            return np.zeros(self.shape, self.dtype)[rows]
        return np.array(np.memmap(self._vectors, self.dtype, "r", shape=self.shape)[rows])


def _vectors(model: models.Pretrained, variables: Variables, x: Any) -> np.ndarray:
    """Returns the embeddings of at most `BATCH_SIZE` images.

    Blocks are filled up, so that one program is compiled.
    """
    filled = np.zeros((BATCH_SIZE, *x.shape[1:]), x.dtype)
    filled[: len(x)] = x
    return np.asarray(_embedding(model, variables, filled))[: len(x)]


@functools.partial(jax.jit, static_argnames="model")
def _embedding(model: models.Pretrained, variables: Variables, x: Array) -> Array:
    return model.apply(variables, x).embedding


def _variables(model: models.Pretrained, x: Any) -> Variables:
    """The variables of a network whose last layer is not used; no random numbers are drawn."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return model.with_weights(zeros)
