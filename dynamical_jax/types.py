"""Types shared by every module, and the contract of a model."""

import dataclasses
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax.errors import UserError

Array = jax.Array
AnyArray = jax.Array | np.ndarray
"""The arrays that functions take; they return `Array`."""
Params = Any
"""A pytree of trainable parameters θ."""
Variables = Mapping[str, Any]
"""Flax variables: `params` and the module's other collections, such as `batch_stats`."""
OnProgress = Callable[[int, int], None]
"""Called with (done, total) during long work."""


class Outputs(NamedTuple):
    """Logits `[n, K]` of n examples, and the input of the last layer, `[n, d]`, or None."""

    logits: Any
    embedding: Any


class Examples(NamedTuple):
    """Inputs x `[n, ...]` and their integer class labels y `[n]`."""

    x: Any
    y: Any


class GradientTerms(NamedTuple):
    """The terms of Δ for n examples, all `[n]`: ‖g_u‖², g_u·v, and the label used for u."""

    squared_norm: Any
    inner_product: Any
    label: Any


ApplyFn = Callable[..., Any]
"""`model.apply` of a Flax Linen module: a pure function of variables and inputs.

It returns logits `[n, K]`, `Outputs`, or a pair of logits and embedding. Called as
`apply(variables, x)` it must be in evaluation mode, where every row of the outputs is a function of
the same row of the inputs alone, and rows keep their places throughout. Training calls
`apply(variables, x, train=True, …)`, or without `train` where the module takes none.
"""


class Rows:
    """The rows `indices` of `data`, each gathered only when it is read.

    A pool of which some rows are already labeled needs no copy of the rest: `rows[positions]` is
    `data[indices[positions]]`, on the device or on the host, wherever `data` lives.
    """

    def __init__(self, data: Any, indices: np.ndarray):
        self.data = data
        self.indices = np.asarray(indices)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows together."""
        return (len(self.indices), *self.data.shape[1:])

    @property
    def dtype(self) -> Any:
        """The type of the data."""
        return self.data.dtype

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: Any) -> Any:
        return take_rows(self.data, self.indices[positions])


def take_rows(x: Any, positions: Any) -> Any:
    """Returns `x[positions]`, of a JAX array by one compiled program: indexing takes five of them.

    Args:
      x: `[n, ...]`, anything that gathers rows as `x[positions]`.
      positions: integers from 0 to n − 1.
    """
    if isinstance(x, jax.Array):
        return jnp.take(x, positions, axis=0, mode="clip")
    return x[positions]


def ignore_progress(done: int, total: int) -> None:
    """Does nothing: the default `OnProgress`."""


NUMBERS: Mapping[type, type] = {int: numbers.Integral, float: numbers.Real}
"""Type → what counts as one; scalars of NumPy and JAX, too."""


def check_fields(record: Any) -> None:
    """Raises `UserError` unless the fields of a dataclass are of the classes that it declares.

    What is declared otherwise, such as `tuple[int, ...]`, is not looked at.
    """
    for field in dataclasses.fields(record):
        value, declared = getattr(record, field.name), field.type
        union = isinstance(declared, types.UnionType)
        kinds = typing.get_args(declared) if union else (declared,)
        if Any in kinds or not all(isinstance(kind, type) for kind in kinds):
            continue
        scalar = value.item() if getattr(value, "shape", None) == () else value
        if not isinstance(scalar, tuple(NUMBERS.get(kind, kind) for kind in kinds)):
            names = " or ".join(kind.__name__.removesuffix("Type") for kind in kinds)
            call = ": call it" * (isinstance(value, type) and issubclass(value, kinds))
            raise UserError(
                f"{field.name} of {type(record).__name__} must be of type {names}, got "
                f"{value!r:.100}{call}"
            )
