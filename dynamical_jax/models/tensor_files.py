"""Reads files of tensors by name: .safetensors, .npz, and what PyTorch saves."""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dynamical_jax.errors import UserError, reason

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")


def read(path: str) -> dict[str, np.ndarray]:
    """Returns all tensors of a .safetensors, .npz or PyTorch file, by name, as float32.

    Raises:
      UserError: if it cannot be read, or a package that reads it is not installed.
    """
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"weights must be a file with one of {', '.join(SUFFIXES)}, got {path}")
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    try:
        open(path, "rb").close()  # Not all readers say why a file cannot be opened.
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    tensors = readers.get(suffix, _read_pytorch)(path)
    result = {}
    for name, value in tensors.items():
        try:
            result[name] = np.asarray(value, np.float32)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} holds no weights, since its array {name!r} is not of numbers; vectors of "
                "images go to --features"
            ) from error
    return result


def _read_safetensors(path: str) -> Mapping[str, Any]:
    try:
        import safetensors.flax  # not numpy, which has no bfloat16
    except ImportError as error:
        raise UserError(
            f"{path} needs the package safetensors: pip install 'dynamical-jax[weights]'"
        ) from error
    try:
        return safetensors.flax.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole safetensors file ({reason(error)})") from error


def _read_npz(path: str) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as members:
            return {name.removeprefix("params/"): value for name, value in members.items()}
    except (
        *(OSError, ValueError, EOFError, TypeError, AttributeError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise UserError(f"{path} is no whole .npz file ({reason(error)})") from error


def _read_pytorch(path: str) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch, which is not installed; where it is, "
            "safetensors.torch.save_file(torch.load(path), 'weights.safetensors') makes a file "
            "that needs none"
        ) from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Of any type, as bytes that are no such file lead to it.
        raise UserError(
            f"{path} holds other things than tensors, or is no whole PyTorch file ({reason(error)})"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not all(map(torch.is_tensor, held.values())):
        raise UserError(f"{path} must hold tensors by name, as model.state_dict() returns them")
    return {name: value.float().numpy() for name, value in held.items()}


def checksum(path: str) -> int:
    """Returns the checksum of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value
