"""Makes pictures for the browser in the background, and keeps them while there is room."""

import pathlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from dynamical_jax.data import images

SIDES = {"thumb": 240, "large": 1600, "full": 6000}
"""size → the longest side in pixels. Images are made smaller, never larger."""

KEPT_BYTES = 2**27
"""Largest size in bytes of the pictures in memory."""


class Previews:
    """Pictures of image files, by path and size.

    Two threads make them; what is waited for comes before what is asked for ahead, in so far as a
    page asks ahead only for a few.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="previews")
        self._lock = threading.Lock()
        self._made: OrderedDict[tuple[pathlib.Path, str], Future] = OrderedDict()

    def get(self, path: pathlib.Path, size: str) -> tuple[bytes, str]:
        """Returns a picture and its media type.

        Args:
          path: of the image file.
          size: a key of `SIDES`.

        Raises:
          Exception: of any type, if the file is broken.
        """
        return self._future(path, size).result()

    def prepare(self, paths: Iterable[pathlib.Path], size: str) -> None:
        """Starts to make pictures that will be asked for soon."""
        for path in paths:
            self._future(path, size)

    def close(self) -> None:
        """Stops making pictures."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _future(self, path: pathlib.Path, size: str) -> Future:
        with self._lock:
            future = self._made.get((path, size))
            if future is None:
                future = self._threads.submit(images.preview, path, SIDES[size])
                self._made[path, size] = future
                self._make_room()
            self._made.move_to_end((path, size))
            return future

    def _make_room(self) -> None:
        sizes = {
            key: len(future.result()[0]) if not future.exception() else 0
            for key, future in self._made.items()
            if future.done()
        }
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total <= KEPT_BYTES:
                return
            del self._made[key]
            total -= size
