"""Writes files completely or not at all, and reads JSON with a check of its type."""

import contextlib
import json
import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec

from dynamical_jax.errors import UserError

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Number = float | Literal["inf", "-inf", "nan"]
"""Types of fields that are read back; a `Number` is what `finite` makes of a float."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path to write to, which is renamed to `path` after the block.

    If the block fails, `path` is unchanged, and the temporary file is removed.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path, partial):
            yield partial
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # There no more, unless something went wrong.


@contextlib.contextmanager
def naming(path: pathlib.Path, helper: str | os.PathLike | None = None) -> Iterator[None]:
    """Sees to it that an error of the system names a file that a person knows.

    A full disk names none; if the folder refuses, that is a file beside the one that was meant.

    Args:
      path: of the file that was meant.
      helper: of the file beside it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, helper and os.fspath(helper)):
            error.filename = os.path.abspath(path) if error.filename else str(path)
        raise


def check_writable(path: pathlib.Path) -> None:
    """Makes the folder of a file if there is none; for programs, before their work.

    Raises:
      UserError: if no file can be made there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write {path}: no file can be made in the folder "
            f"{os.path.abspath(path.parent)} ({error.strerror})"
        ) from error


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file completely or not at all; it is on disk when this returns."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def append(path: pathlib.Path, value: Any) -> None:
    """Adds a line of JSON; it is on disk when this returns.

    JSON has no infinities: `gamma=inf` is written as the string "inf".
    """
    add_text(path, json.dumps(finite(value), allow_nan=False) + "\n")


def add_text(path: pathlib.Path, text: str) -> None:
    """Adds lines to a file, all or none, and sees to it that they are on disk.

    What a killed process has left of a line goes first. If the lines cannot be written, the file is
    what it was.
    """
    with naming(path), path.open("ab+", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        left = memoryview(text.encode("utf-8"))
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _end_of_lines(file: Any) -> int:
    """Returns where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def finite(value: Any) -> Any:
    """Returns a value as JSON can hold it: infinities and NaN as strings.

    >>> finite({"gamma": math.inf, "sizes": (1, 2.5)})
    {'gamma': 'inf', 'sizes': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse(text: bytes | str, form: Any, source: str) -> Any:
    """Returns the value of a JSON text, checked against a type.

    Fields that the type does not name are left out, or kept where it is a `dict`.

    Args:
      text: in UTF-8.
      form: any type that msgspec knows, such as a `msgspec.Struct`.
      source: what the text is, for the message.

    Raises:
      UserError: if it is no JSON, or of another type; the message names the field.
    """
    try:
        return msgspec.json.decode(text, type=form)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UserError(f"{source} cannot be used: {error}") from error


def read_json(path: pathlib.Path, form: Any) -> Any:
    """Returns the value of a JSON file, checked against a type.

    Raises:
      UserError: if it cannot be read, is no JSON, or of another type.
    """
    return parse(_read(path), form, str(path))


def read_lines(path: pathlib.Path, form: Any) -> list[Any]:
    """Returns the values of a file of JSON lines; a last line without an end is none.

    Raises:
      UserError: if it cannot be read, or a line is no JSON or of another type; the message names
        the line and the field.
    """
    lines = _read(path).split(b"\n")[:-1]
    return [
        parse(line, form, f"line {number} of {path}") for number, line in enumerate(lines, start=1)
    ]


def set_aside(path: pathlib.Path, why: Any) -> None:
    """Renames a cache file that cannot be used, and warns; the caller makes it again.

    Raises:
      UserError: if it cannot be renamed.
    """
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
    except OSError as error:
        raise UserError(f"cannot rename {path}: {error.strerror}") from error
    warnings.warn(
        f"cache file {path} is damaged ({why}): set aside as {aside.name}, and made again",
        stacklevel=3,
    )


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
