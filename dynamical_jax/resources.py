"""Memory and disk: what there is, and what work will take, looked at before it begins."""

import contextlib
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import psutil

from dynamical_jax.errors import UserError

CONTROL_GROUP = pathlib.Path("/sys/fs/cgroup")
"""Where Linux keeps the limits of a container."""


def free_memory() -> int:
    """Returns the bytes of memory that are free on this machine, or in this container."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # "max" is no number.
        limit, used = (
            int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        free = min(free, max(0, limit - used))
    return free


def free_device_memory() -> int:
    """Returns the bytes that are free on the first device of this host; of a CPU, `free_memory`."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return free_memory()


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of the arrays of a tree, or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_device_memory(needed: int, what: str, advice: str) -> None:
    """Raises `UserError` if work needs more memory than is free on the first device.

    Args:
      needed: bytes, at least.
      what: needs them, as the beginning of a sentence.
      advice: what takes less.
    """
    _check(needed, free_device_memory(), what, "of memory", advice)


def check_memory(needed: int, what: str, advice: str) -> None:
    """Raises `UserError` if work needs more memory than is free on the host.

    Args:
      needed: bytes, at least.
      what: needs them, as the beginning of a sentence.
      advice: what takes less.
    """
    _check(needed, free_memory(), what, "of memory", advice)


def check_disk(path: str | os.PathLike, needed: int, what: str, advice: str) -> None:
    """Raises `UserError` if a file needs more space than is free where it is to lie.

    Args:
      path: of the file, or folder; need not be there.
      needed: bytes, at least.
      what: needs them, as the beginning of a sentence.
      advice: what takes less.
    """
    folder = pathlib.Path(path).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # What is wrong shows when it is written.
    _check(needed, free, what, f"on the disk of {folder}", advice)


def format_bytes(count: int) -> str:
    """Returns a number of bytes for people.

    >>> format_bytes(3 * 2**29), format_bytes(700)
    ('1.5 GiB', '1 KiB')
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{-(-count // 2**10)} KiB"


def _check(needed: int, free: int, what: str, where: str, advice: str) -> None:
    if needed > free:
        raise UserError(
            f"{what} needs {format_bytes(needed)} {where}, and {format_bytes(free)} are free: "
            f"{advice}"
        )
