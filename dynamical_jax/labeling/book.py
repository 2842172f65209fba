"""The files of a session: the table of labels, which other programs may change, and the log."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from dynamical_jax.errors import UserError
from dynamical_jax.labeling import answers, tables
from dynamical_jax.labeling.history import State


class Book:
    """The present labels and the log of answers, on disk and in memory.

    Args:
      table: of labels.
      images: the folder.
      paths: of the images, relative to it.
      labels: path → class name, as the table has them.
      classes: names that are there from the beginning.

    Attributes:
      log: of all answers.
      labels: path → class name; changed by `save` alone.
      broken: paths of images that are broken or of no class.
      classes: names, in the order in which they came.
    """

    def __init__(
        self,
        table: pathlib.Path,
        images: str,
        paths: Iterable[str],
        labels: Mapping[str, str],
        classes: Iterable[str],
    ):
        self._table, self._images, self._paths = table, images, frozenset(paths)
        self.log = answers.Log(answers.beside(table))
        self.labels = dict(labels)
        self._in_table = set(labels)
        self._stamp = self._read_stamp()
        self.broken = answers.broken(self.log.answers) - set(labels)
        self.classes = list(self.log.classes)
        self.add_classes([*classes, *labels.values()])

    def state(self, path: str) -> State:
        """Returns the state of an image, for undo."""
        return State(self.labels.get(path, ""), path in self.broken)

    def add_classes(self, names: Iterable[str]) -> None:
        """Adds new classes, also to the log, so that a class keeps its position, and its key."""
        if new := [name for name in dict.fromkeys(names) if name not in self.classes]:
            self.log.add(new)
            self.classes += new

    def save(self, changes: Mapping[str, str | None]) -> None:
        """Changes labels, on disk first; None takes one away.

        If the table is gone or empty, all labels are written again.

        Raises:
          UserError: if the table cannot be written; then nothing has changed.
        """
        if not changes:
            return
        try:
            with tables.locked(self._table):
                if self._is_gone():
                    changes = {**self.labels, **changes}
                # A table that is as this session left it need not be read row by row.
                unchanged = self._stamp == self._read_stamp()
                if not unchanged:  # It may no longer be a table; then it stays as it is.
                    tables.read_labels(self._table, self._images)
                if unchanged and all(changes.values()) and not self._in_table & set(changes):
                    tables.add_labels(self._table, changes)
                else:
                    tables.change_labels(self._table, changes, self._images)
                if unchanged:
                    self._stamp = self._read_stamp()
        except OSError as error:
            raise UserError(f"cannot write {self._table}: {error.strerror}") from error
        self._in_table |= set(changes)
        for path, label in changes.items():
            if label is None:
                self.labels.pop(path, None)
            else:
                self.labels[path] = label

    @contextlib.contextmanager
    def saved(self, changes: Mapping[str, str | None]) -> Iterator[None]:
        """Changes labels, as `save` does, unless the block raises `UserError`."""
        before = {path: self.labels.get(path) for path in changes}
        self.save(changes)
        try:
            yield
        except UserError:
            self.save(before)
            raise

    def reread(self) -> None:
        """Reads the table again if another program has changed it."""
        stamp = self._read_stamp()
        if stamp == self._stamp or self._is_gone():
            return
        labels = tables.read_labels(self._table, self._images).by_path
        self.labels = {path: label for path, label in labels.items() if path in self._paths}
        self._in_table |= set(labels)
        self._stamp = stamp
        self.broken -= set(self.labels)
        self.add_classes(self.labels.values())

    def _is_gone(self) -> bool:
        """Whether something has taken the table away: nobody who corrects labels empties it."""
        stamp = self._read_stamp()
        return stamp != self._stamp and (
            not self._table.exists() or (stamp is not None and stamp[1] == 0)
        )

    def _read_stamp(self) -> tuple[int, ...] | None:
        try:
            stat = self._table.stat()
        except OSError:  # There is none, or none that can be read, as reading it will say.
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
