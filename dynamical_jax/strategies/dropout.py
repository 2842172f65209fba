"""Predictions under dropout: a draw of the network for each sample, the same for all examples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from dynamical_jax import contract, parallel
from dynamical_jax.gradients import bucketed, each_block
from dynamical_jax.types import (
    AnyArray,
    ApplyFn,
    Array,
    OnProgress,
    Outputs,
    Variables,
    ignore_progress,
)

CHUNK_SIZE = 256


def num_dropout_layers(apply: ApplyFn, variables: Variables, x: Any) -> int:
    """Returns how many times a model calls a Linen `Dropout` of a rate above 0."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    run = lambda variables, x: _with_dropout(apply, variables, x, jax.random.key(0), count)
    jax.eval_shape(run, variables, x[np.zeros(2, int)])
    return calls


def log_probabilities(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    keys: Array,
    on_progress: OnProgress = ignore_progress,
    mesh: Mesh | None = None,
) -> AnyArray:
    """Returns `[n, t, K]` log-probabilities of x `[n, ...]` by t networks that dropout draws.

    The model is in evaluation mode but for its Linen `Dropout` layers. Each key draws one mask for
    all examples: predictions of one network, whatever the blocks that examples come in. With a mesh
    each device takes a part of the examples, and the result is in NumPy.
    """

    def run(slots: np.ndarray, count: int) -> tuple[Any, Any, Array]:
        positions, counted = order.block(slots, count)
        block = parallel.rows(x, positions, mesh)
        return positions[counted], counted, _log_probabilities(apply, mesh, variables, block, keys)

    order, devices = parallel.Order(x, mesh), parallel.num_devices(mesh)
    variables, keys = parallel.replicate((variables, keys), mesh)
    block_size = bucketed(-(-order.size // devices), CHUNK_SIZE) * devices
    found = each_block(run, order.size, block_size, on_progress, devices)
    rows, counted, blocks = zip(*found, strict=True)
    xp, blocks = (jnp, blocks) if mesh is None else (np, parallel.fetch(blocks))
    parts = [block[index] for index, block in zip(counted, blocks, strict=True)]
    return order.restore(rows, xp.concatenate(parts))


@functools.partial(jax.jit, static_argnames=("apply", "mesh"))
def _log_probabilities(
    apply: ApplyFn, mesh: Mesh | None, variables: Variables, x: Any, keys: Array
) -> Array:
    def samples(variables: Variables, x: Any, keys: Array) -> Array:
        def sample(key: Array) -> Array:
            logits = _with_dropout(apply, variables, x, key).logits
            return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))

        return jnp.moveaxis(jax.lax.map(sample, keys), 0, 1)

    return parallel.on_each(samples, mesh, False, True, False)(variables, x, keys)


def _with_dropout(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    key: Array,
    on_call: Callable[[Any], None] = lambda _: None,
) -> Outputs:
    calls = 0

    def drop(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
        nonlocal calls
        module = context.module
        if not isinstance(module, nn.Dropout) or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        inputs = args[0] if args else kwargs["inputs"]
        if module.rate == 0:
            return inputs
        calls += 1
        on_call(module)
        shared = {0, *(dimension % inputs.ndim for dimension in module.broadcast_dims)}
        shape = [1 if i in shared else length for i, length in enumerate(inputs.shape)]
        keep = jax.random.bernoulli(jax.random.fold_in(key, calls), 1 - module.rate, shape)
        return jnp.where(keep, inputs / max(1 - module.rate, 1e-9), 0)

    with nn.intercept_methods(drop):
        return contract.as_outputs(apply(variables, x), len(x))
