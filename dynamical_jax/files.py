"""Files that are whole whatever happens while they are written, and JSON without NaN."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives another path to write to, which in the end becomes `path`.

    If the block fails, `path` is what it was, and nothing else is left.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # There no more, unless something went wrong.


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is there wholly or not at all, and on disk."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def append(path: pathlib.Path, value: Any) -> None:
    """Adds a line of JSON and sees to it that it is on disk.

    JSON has no infinities: `gamma=inf` is written as the string "inf".
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


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
