"""Kernels and predictions by neural-tangents (Novak et al., 2020)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamical_jax import contract, resources
from dynamical_jax.errors import UserError
from dynamical_jax.ntk.compatibility import neural_tangents
from dynamical_jax.types import AnyArray, ApplyFn, Params, Variables

PAIRS_HELD = 16
"""Arrays of h·w × h·w that neural-tangents holds at a time for each pair of images."""


def reference_ntk(
    apply: ApplyFn,
    variables: Variables,
    x1: Any,
    x2: Any = None,
    *,
    trace: bool = True,
    implementation: int = 1,
    batch_size: int = 0,
) -> Float[np.ndarray, "..."]:
    """Computes the same kernel as `empirical_ntk`, by neural-tangents.

    Args:
      apply: the model, `apply(variables, x)`, in evaluation mode.
      variables: its variables; statistics of BatchNorm are constants.
      x1: `[n, ...]` inputs.
      x2: `[m, ...]` inputs; by default x1.
      trace: whether to return Θ `[n, m]`, else 𝒦 `[n, m, K, K]`.
      implementation: 1, Jacobian contraction, or 2, NTK-vector products.
      batch_size: examples in a block, a divisor of n and m; 0 for all at once.

    Raises:
      UserError: if neural-tangents cannot be used here.
    """
    nt = neural_tangents()
    rest = {name: value for name, value in variables.items() if name != "params"}

    def logits(params: Params, x: Any) -> Array:
        return contract.as_outputs(apply({"params": params, **rest}, x), len(x)).logits

    # vmap_axes=0 requires that examples do not depend on each other, as in evaluation mode.
    kernel = nt.empirical_ntk_fn(
        logits, trace_axes=(-1,) if trace else (), vmap_axes=0, implementation=implementation
    )
    # As it comes, each of its operations is a program of its own.
    kernel = (
        nt.batch(kernel, batch_size=batch_size, device_count=0) if batch_size else jax.jit(kernel)
    )
    return np.asarray(kernel(jnp.asarray(x1), _to_device(x2), variables["params"]))


def infinite_width_ntk(
    x1: Float[AnyArray, "n h w c"],
    x2: Any = None,
    *,
    depth: int = 3,
    memory_bytes: int | None = None,
) -> Float[np.ndarray, "n m"]:
    """Returns Θ of `models.NTKCNN` as its widths go to infinity, in float64.

    Time grows with (h·w)² for each pair of images: global average pooling correlates all pixels
    with all.

    Args:
      x1: images as the network sees them, standardised.
      x2: likewise; by default x1.
      depth: number of convolutions.
      memory_bytes: for the pairs of images computed together; by default a quarter of the free
        memory; changes no result.

    Raises:
      UserError: if neural-tangents cannot be used here, or a single pair needs more memory.
    """
    nt = neural_tangents()
    layers = []
    for _ in range(depth):
        layers += [nt.stax.Conv(1, (3, 3), padding="SAME", W_std=math.sqrt(2)), nt.stax.Relu()]
    _, _, kernel = nt.stax.serial(*layers, nt.stax.GlobalAvgPool(), nt.stax.Dense(1))
    limit = resources.free_memory() // 4 if memory_bytes is None else memory_bytes
    height, width = np.shape(x1)[1:3]
    needed = PAIRS_HELD * 8 * (height * width) ** 2
    if needed > limit:
        raise UserError(
            f"the infinite-width kernel of two images of {height} × {width} pixels needs "
            f"{needed / 2**20:.0f} MiB, and {limit / 2**20:.0f} MiB are allowed: take smaller ones"
        )
    sides = [np.asarray(x) for x in (x1, x2) if x is not None]
    block = min(math.isqrt(limit // needed), max(map(len, sides)))
    with jax.enable_x64(True):
        # It takes whole blocks only: filled up with copies of the last image, which are cut off.
        filled = [jnp.asarray(_pad_to_blocks(x, block), jnp.float64) for x in sides]
        other = filled[1] if len(sides) == 2 else None
        ntk = nt.batch(kernel, batch_size=block, device_count=0)(filled[0], other, "ntk")
    return np.asarray(ntk)[: len(sides[0]), : len(sides[-1])]


def kernel_regression(
    ntk: Float[AnyArray, "n n"],
    targets: Float[AnyArray, "n k"],
    ntk_to_training: Float[AnyArray, "m n"],
    time: float = math.inf,
    learning_rate: float = 1.0,
) -> Float[np.ndarray, "m k"]:
    """Returns f(x; θ(t)) = Θ(x, X) Θ⁻¹ (I − e^{−ηΘt}) Y, the trained network's outputs, Eq. 3.

    Training starts from f = 0 at t = 0, with the loss ½‖f − Y‖² summed over examples and classes.
    The result is in float64.

    Args:
      ntk: Θ(X, X).
      targets: Y.
      ntk_to_training: Θ(x, X).
      time: t, of gradient flow; infinity for the end of training.
      learning_rate: η.

    Raises:
      UserError: if neural-tangents cannot be used here, or Θ(X, X) is singular.
    """
    nt = neural_tangents()
    with jax.enable_x64(True):
        ntk, targets, ntk_to_training = (
            jnp.asarray(part, jnp.float64) for part in (ntk, targets, ntk_to_training)
        )
        # Its loss is the mean over all entries of Y, so its learning rate counts for less.
        predict = nt.predict.gradient_descent_mse(
            ntk, targets, learning_rate=learning_rate * targets.size
        )
        start = jnp.zeros((len(ntk_to_training), targets.shape[1]))
        when = None if math.isinf(time) else time
        _, outputs = predict(when, jnp.zeros_like(targets), start, ntk_to_training)
    if not np.all(np.isfinite(outputs)):
        raise UserError("kernel regression is not finite: Θ of the training set is singular")
    return np.asarray(outputs)


def _pad_to_blocks(x: np.ndarray, block: int) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[-1:], -len(x) % block, axis=0)])


def _to_device(x: Any) -> Any:
    return None if x is None else jnp.asarray(x)
