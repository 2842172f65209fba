"""A disk that is full from the n-th thing on that is written below a folder."""

import contextlib
import errno
import os
import pathlib

from matplotlib.figure import Figure


def no_space(path=None):
    return OSError(errno.ENOSPC, "No space left on device", *([str(path)] if path else []))


class Disk:
    """Counts what is written, and refuses all from the n-th on.

    Attributes:
      written: how much was written, or refused.
    """

    def __init__(self, folder, full_at=None):
        self.folder, self.full_at, self.written = str(folder), full_at, 0

    def take(self, path, named=True):
        if not str(path).startswith(self.folder):
            return
        self.written += 1
        if self.full_at is not None and self.written >= self.full_at:
            raise no_space(path if named else None)

    @contextlib.contextmanager
    def patched(self, monkeypatch):
        """Within it, all that makes or fills a file goes through `take`."""

        def wrapped(owner, name, writes=lambda *arguments, **options: True, named=True):
            do = getattr(owner, name)

            def call(first, *arguments, **options):
                if writes(first, *arguments, **options):
                    self.take(path_of(first, arguments), named)
                return do(first, *arguments, **options)

            patch.setattr(owner, name, call)

        def path_of(first, arguments):
            if isinstance(first, int):
                return os.readlink(f"/proc/self/fd/{first}")
            return first if isinstance(first, str | os.PathLike) else arguments[0]

        modes = lambda path, mode="r", *_, **__: bool(set(mode) & set("wax+"))
        with monkeypatch.context() as patch:
            wrapped(pathlib.Path, "open", modes)
            wrapped(pathlib.Path, "replace")
            wrapped(pathlib.Path, "mkdir", lambda path, *_, **__: not path.is_dir())
            wrapped(os, "fsync", named=False)
            wrapped(Figure, "savefig")
            yield self
