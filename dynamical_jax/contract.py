"""The contract of a model: how a Flax module is called, and what it returns."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax import linen as nn

from dynamical_jax import words
from dynamical_jax.errors import UserError
from dynamical_jax.types import ApplyFn, Outputs, Variables, take_rows

ROW_TOLERANCE = 0.05
"""Of the largest logit: far above rounding in half precision, far below what a batch mean does."""

REASONS: Mapping[type[Exception], str] = {
    errors.InvalidRngError: (
        "in evaluation mode, the model asks for random numbers: let each Dropout have "
        "deterministic=not train"
    ),
    errors.ModifyScopeVariableError: (
        "in evaluation mode, the model changes its statistics: let each BatchNorm have "
        "use_running_average=not train"
    ),
    errors.ScopeParamShapeError: (
        "the weights are of a model of inputs of another size than {shape}: resize the inputs, or "
        "make the weights anew by dj.models.init"
    ),
    errors.ScopeParamNotFoundError: "the variables are of another model, and lack a parameter",
    errors.ScopeCollectionNotFound: (
        "the variables lack a collection, such as batch_stats: give all that model.init returns"
    ),
}
"""Error of Flax → what to do about it."""

# Other names of the argument that is called `train` here.
OTHER_FLAGS = ("training", "is_training", "deterministic", "use_running_average")


def as_outputs(value: Any, size: int) -> Outputs:
    """Returns the value that a model returned for `size` examples as `Outputs`.

    Args:
      value: logits `[n, K]`, `Outputs`, or a pair of logits and embedding `[n, d]`, which may be
        None. Arrays without values, with shapes alone, will do.
      size: n.

    Raises:
      UserError: if the value has another form.
    """
    parts = value if isinstance(value, tuple) else (value, None)
    if len(parts) == 2:
        logits, embedding = parts
        if _has_rows(logits, size) and (embedding is None or _has_rows(embedding, size)):
            return Outputs(logits, embedding)
    shapes = jax.tree.map(lambda leaf: getattr(leaf, "shape", type(leaf).__name__), value)
    raise UserError(
        f"for {size} examples a model returns logits [{size}, K], or a pair (dj.Outputs or a "
        f"tuple) of logits and embedding [{size}, d]; this one returned {shapes}"
    )


def _has_rows(part: Any, size: int) -> bool:
    shape = getattr(part, "shape", ())
    return len(shape) == 2 and shape[0] == size


def output_shapes(apply: ApplyFn, variables: Variables, x: Any) -> Outputs:
    """Returns the outputs for two rows of x as shapes; nothing is computed.

    Raises:
      UserError: if a Flax module is in training mode, or its variables do not fit it and x; or as
        in `as_outputs`.
    """
    try:
        return as_outputs(jax.eval_shape(apply, variables, take_rows(x, np.zeros(2, int))), 2)
    except tuple(REASONS) as error:
        raise UserError(REASONS[type(error)].format(shape=x.shape[1:])) from error


def explain_not_finite(variables: Variables, x: Any) -> str:
    """Returns why outputs may not be finite, for the end of a message; "" if it is not known.

    `nn.Embed` gives NaN for a token beyond its table.

    Args:
      variables: of the model.
      x: its inputs, which are in memory or fit into it.
    """
    named = jax.tree_util.tree_leaves_with_path(variables)
    sizes = [len(leaf) for path, leaf in named if path[-1] == jax.tree_util.DictKey("embedding")]
    if not sizes or not np.issubdtype(x.dtype, np.integer):
        return ""
    values = np.asarray(x[:])
    if values.min() >= 0 and values.max() < min(sizes):
        return ""
    return (
        f"; tokens go from {values.min()} to {values.max()}, and a table of nn.Embed has "
        f"{words.count(min(sizes), 'row')}"
    )


def check_labels(
    apply: ApplyFn, variables: Variables, x: Any, labels: Any, of_classes: bool = True
) -> None:
    """Raises `UserError` unless labels are `[n]` integers that count the model's classes from 0.

    If they are not of classes, but targets of another kind, there must be as many as inputs.
    """
    labels = np.asarray(labels)
    if not of_classes and len(labels) == len(x):
        return
    if labels.size == 0:
        return
    num_classes = output_shapes(apply, variables, x).logits.shape[1]
    right = f"labels must be integers [n] from 0 to {num_classes - 1}, as the model has classes"
    if len(labels) != len(x):
        number = words.count(len(x), "input has", "inputs have")
        raise UserError(f"{number} {words.count(len(labels), 'label')}; each needs one")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{right}, got {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{right}, got labels from {labels.min()} to {labels.max()}")


def check_rows(apply: ApplyFn, variables: Variables, x: Any) -> None:
    """Raises `UserError` if a model's output for an example depends on the others in its batch.

    Each gradient g_u is of one example: scores of a model that subtracts the mean of a batch, or
    reorders it, would be wrong without a sign of it. Three examples are given to the model together
    and one by one. Where that fails the model is not judged: its error shows where it is used.

    Args:
      apply: the model, `apply(variables, x)`.
      variables: its variables.
      x: `[n, ...]` inputs; anything that gathers rows as `x[positions]`.
    """
    output_shapes(apply, variables, x)
    positions = np.unique([0, len(x) // 2, len(x) - 1])
    try:
        together, alone = map(
            np.asarray, _logits_together_and_alone(apply, variables, take_rows(x, positions))
        )
    except Exception:
        return
    error = np.max(np.abs(together - alone), initial=0)
    if error > ROW_TOLERANCE * np.max(np.abs(alone), initial=0):  # False for NaN.
        raise UserError(
            "the model's output for an example depends on the others in its batch, so examples "
            "cannot be scored one by one: it must treat each row of x by itself and keep their "
            "order; is a BatchNorm or Dropout in training mode?"
        )


@functools.partial(jax.jit, static_argnames="apply")
def _logits_together_and_alone(
    apply: ApplyFn, variables: Variables, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = lambda rows: as_outputs(apply(variables, rows), len(rows)).logits.astype(jnp.float32)
    return logits(x), jax.vmap(lambda row: logits(row[None])[0])(x)


def train_option(module: Any, train: bool) -> dict[str, bool]:
    """Returns the keyword arguments that tell a module whether it is in training.

    `{"train": train}`, or no arguments for a module that does not take `train`.

    Raises:
      UserError: in training, if the module takes the argument under another name: without it, it
        would silently be trained in evaluation mode.
    """
    parameters = inspect.signature(_call_target(module)).parameters.values()
    names = [parameter.name for parameter in parameters]
    if "train" in names or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return {"train": train}
    for flag in OTHER_FLAGS:
        if train and flag in names:
            raise UserError(
                f"{type(module).__name__} takes {flag}, not train: wrap it in a module that takes "
                "(x, train=False), as docs/extend.md shows"
            )
    return {}


def _call_target(module: Any) -> Any:
    """Returns the function that receives the arguments of a module's call."""
    if isinstance(module, nn.Sequential):
        return _call_target(module.layers[0])
    if is_nnx(module):
        return module.nnx_class.__call__
    return module


def is_nnx(module: Any) -> bool:
    """Whether a Linen module is an NNX one in its bridge, `nnx.bridge.ToLinen`."""
    return hasattr(module, "nnx_class")  # Importing NNX to ask for the type takes 0.2 s.
