"""Kernels and predictions by neural-tangents (Novak et al., 2020)."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamical_jax.ntk.compatibility import neural_tangents
from dynamical_jax.types import AnyArray, ApplyFn, Params, Variables


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
    """Returns what `empirical_ntk` returns, computed by neural-tangents.

    Args:
      apply: the model, `apply(variables, x) -> Outputs`, in evaluation mode.
      variables: its variables; statistics of BatchNorm are constants.
      x1: `[n, ...]` inputs.
      x2: `[m, ...]` inputs; by default x1.
      trace: whether to return Θ `[n, m]`, else 𝒦 `[n, m, K, K]`.
      implementation: 1, Jacobian contraction, or 2, NTK-vector products.
      batch_size: examples of a block, which divides n and m; 0 for all at once.

    Raises:
      UserError: if neural-tangents cannot be used here.
    """
    nt = neural_tangents()
    rest = {name: value for name, value in variables.items() if name != "params"}

    def logits(params: Params, x: Any) -> Array:
        return apply({"params": params, **rest}, x).logits

    # Evaluation mode: examples do not see each other, which vmap_axes=0 takes for granted.
    kernel = nt.empirical_ntk_fn(
        logits, trace_axes=(-1,) if trace else (), vmap_axes=0, implementation=implementation
    )
    if batch_size:
        kernel = nt.batch(kernel, batch_size=batch_size, device_count=0)
    return np.asarray(kernel(jnp.asarray(x1), _device(x2), variables["params"]))


def infinite_width_ntk(
    x1: Float[AnyArray, "n h w c"], x2: Any = None, *, depth: int = 3, batch_size: int = 0
) -> Float[np.ndarray, "n m"]:
    """Returns Θ of `models.NTKCNN` as its widths go to infinity, of standardised images.

    Memory and time grow with the square of the number of pixels, (h·w)² for each pair of images:
    global average pooling correlates all pixels with all.

    Args:
      x1: images as the network sees them, standardised.
      x2: likewise; by default x1.
      depth: number of convolutions.
      batch_size: images of a block, which divides n and m; 0 for all at once.

    Raises:
      UserError: if neural-tangents cannot be used here.
    """
    stax = neural_tangents().stax
    layers = []
    for _ in range(depth):
        layers += [stax.Conv(1, (3, 3), padding="SAME", W_std=math.sqrt(2)), stax.Relu()]
    _, _, kernel = stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1))
    if batch_size:
        kernel = neural_tangents().batch(kernel, batch_size=batch_size, device_count=0)
    return np.asarray(kernel(jnp.asarray(x1), _device(x2), "ntk"))


def kernel_regression(
    ntk: Float[AnyArray, "n n"],
    targets: Float[AnyArray, "n k"],
    ntk_to_training: Float[AnyArray, "m n"],
    time: float = math.inf,
    learning_rate: float = 1.0,
) -> Float[np.ndarray, "m k"]:
    """Returns f(x; θ(t)) = Θ(x, X) Θ⁻¹ (I − e^{−ηΘt}) Y, the trained network's outputs, Eq. 3.

    From f = 0 at t = 0, for the loss ½‖f − Y‖² summed over examples and classes.

    Args:
      ntk: Θ(X, X).
      targets: Y.
      ntk_to_training: Θ(x, X).
      time: t, of gradient flow; infinity for the end of training.
      learning_rate: η.

    Raises:
      UserError: if neural-tangents cannot be used here.
    """
    nt = neural_tangents()
    targets = jnp.asarray(targets)
    # Its loss is the mean over all entries of Y, so its time runs slower by their number.
    predict = nt.predict.gradient_descent_mse(
        jnp.asarray(ntk), targets, learning_rate=learning_rate * targets.size
    )
    start = jnp.zeros((len(ntk_to_training), targets.shape[1]), targets.dtype)
    _, outputs = predict(
        None if math.isinf(time) else time,
        jnp.zeros_like(targets),
        start,
        jnp.asarray(ntk_to_training),
    )
    return np.asarray(outputs)


def _device(x: Any) -> Any:
    return None if x is None else jnp.asarray(x)
