"""Image files of which each host of a run decodes a share."""

import math
import os
import tempfile
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dynamical_jax import parallel
from dynamical_jax.data import images
from dynamical_jax.errors import UserError


class Divided:
    """Images `[n, h, w, c]` uint8 of which this host has its own on disk.

    Others, as those that are labeled, it decodes when they are asked for, into a file without a
    name that ends with the process: no host waits for another.

    Args:
      own: this host's, decoded.
      owners: `[n]` the process to which each belongs.
      paths: of all files.
      pixels: checksums of all images, by their owners; None of those that cannot be read.
      interpolation: by which they are resized.
      cache_dir: where the file without a name is.
    """

    def __init__(
        self,
        own: images.OnDisk,
        owners: np.ndarray,
        paths: Sequence[str],
        pixels: Sequence[int | None],
        interpolation: str,
        cache_dir: str | os.PathLike,
    ):
        self.owners, self.shape, self.dtype = owners, (len(owners), *own.shape[1:]), own.dtype
        self.ndim = own.ndim
        self._own, self._is_own = own, owners == jax.process_index()
        self._row_of_own = np.cumsum(self._is_own) - 1
        self._paths, self._pixels, self._interpolation = paths, pixels, interpolation
        # Open as long as this is there.
        self._others = tempfile.TemporaryFile(dir=cache_dir)  # noqa: SIM115
        self._row_of_other: dict[int, int] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, positions: Any) -> np.ndarray:
        wanted = np.arange(len(self))[positions]
        each = wanted.reshape(-1)
        found = np.empty((len(each), *self.shape[1:]), self.dtype)
        is_own = self._is_own[each]
        found[is_own] = self._own[self._row_of_own[each[is_own]]]
        self._decode_others(each[~is_own])
        size = math.prod(self.shape[1:])
        for slot in np.flatnonzero(~is_own):
            self._others.seek(size * self._row_of_other[each[slot].item()])
            found[slot] = np.frombuffer(self._others.read(size), self.dtype).reshape(self.shape[1:])
        return found.reshape(*wanted.shape, *self.shape[1:])

    def _decode_others(self, positions: np.ndarray) -> None:
        """Decodes images of other hosts that were not decoded before."""
        new = [row for row in np.unique(positions).tolist() if row not in self._row_of_other]
        if not new:
            return
        shape = images.ImageShape(*self.shape[1:])
        found, _ = images.read_all([self._paths[row] for row in new], shape, self._interpolation)
        for row, image in zip(new, found, strict=True):
            if zlib.crc32(image) != self._pixels[row]:
                # No `UserError`, which all hosts would have to raise.
                raise RuntimeError(
                    f"{self._paths[row]} is not the image that process {self.owners[row]} has "
                    "decoded: all hosts need the same files and the same version of Pillow"
                )
            self._others.seek(0, os.SEEK_END)
            self._others.write(image)
            self._row_of_other[row] = len(self._row_of_other)


def decode(
    paths: Sequence[str],
    cache_dir: str | os.PathLike,
    size: int | None = None,
    channels: int | None = None,
    unreadable: str = "skip",
    interpolation: str = "bilinear",
) -> images.Decoded:
    """Returns what `images.decode` does, whose arguments these are; x is `Divided` among the hosts.

    All hosts see the same files under the same names, wherever their folder is. Shape, checksum
    and which files can be read are those of one host. A share is kept as all images are, and copied
    from these if they are there.

    Raises:
      UserError: as `images.decode`; if the hosts see other files, or decode them otherwise, as far
        as a few of them tell. Of any other image it is a `RuntimeError`, when it is asked for.
    """
    if jax.process_count() == 1 or len(paths) < jax.device_count():
        return images.decode(paths, cache_dir, size, channels, unreadable, interpolation)
    images.check_options(size, channels, unreadable)
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath(absolute)
    names = [path.removeprefix(common) for path in absolute]
    parallel.check_agreement("the names of the image files", names)
    owners = parallel.make_owners(len(paths))
    own = np.flatnonzero(owners == jax.process_index())
    cache = images.Cache(paths, cache_dir, size, channels, interpolation, own)
    found = cache.read()
    shapes = parallel.gather(found and found[0].shape[1:])
    if None in shapes or len(set(shapes)) > 1:
        # Each looks at its own; as for one host, all of them decide.
        seen = parallel.gather(images.read_shapes([paths[row] for row in own], size, channels))
        shape = images.choose_shape(set().union(*seen), size, channels)
        if found is None or found[0].shape[1:] != shape:
            found = cache.make(shape)
    x, report = found
    pixels = parallel.of_all_rows(report.pixels, owners)
    why = parallel.of_all_rows([report.unreadable.get(i) for i in range(len(own))], owners)
    broken = {row: text for row, text in enumerate(why) if text is not None}
    images.report_unreadable(broken, paths, unreadable)
    readable = ~np.isin(np.arange(len(paths)), list(broken))
    shared = Divided(x, owners, paths, pixels, interpolation, cache_dir)
    _try_others(shared, np.flatnonzero(readable & (owners != jax.process_index())))
    return images.Decoded(shared, readable, images.checksum_of(x.shape[1:], pixels))


def _try_others(x: Divided, others: np.ndarray) -> None:
    """Raises `UserError`, on all hosts, if one of them sees or decodes other images."""
    why = None
    try:
        x[others[[0, len(others) // 2, -1]] if len(others) else others]
    except RuntimeError as error:
        why = str(error)
    if told := [text for text in parallel.gather(why) if text is not None]:
        raise UserError(told[0])
