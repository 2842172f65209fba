"""Alignment, and its bounds on how fast gradient descent converges (§4.1).

These are functions of a matrix Θ: an empirical NTK, an infinite-width one, or any positive
semidefinite matrix. They compute on the host in float64, since the condition numbers of NTKs are
too large for float32.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

from dynamical_jax.errors import UserError
from dynamical_jax.types import AnyArray

ASYMMETRY = 1e-3
"""Largest asymmetry that may be rounding, relative to the largest entry."""


class Spectrum(NamedTuple):
    """Eigenvalues λ `[n]`, ascending, and eigenvectors v_i, the columns of `[n, n]`."""

    eigenvalues: np.ndarray
    eigenvectors: np.ndarray


class Interval(NamedTuple):
    """A lower and an upper bound."""

    lower: np.ndarray
    upper: np.ndarray


def alignment(ntk: Float[AnyArray, "n n"], targets: Float[AnyArray, "n k"]) -> float:
    """Returns 𝒜(X, Y) = Tr[Yᵀ Θ Y] = Σ_k Σ_i λ_i (v_iᵀ Y^k)², Definition 1.

    >>> alignment(np.diag([1.0, 2.0]), np.array([[3.0], [1.0]]))
    11.0
    """
    ntk, targets = symmetric(ntk), np.asarray(targets, np.float64)
    return float(np.vdot(targets, ntk @ targets))


def spectrum(ntk: Float[AnyArray, "n n"]) -> Spectrum:
    """Returns eigenvalues and eigenvectors of Θ."""
    return Spectrum(*scipy.linalg.eigh(symmetric(ntk)))


def squared_convergence_term(
    ntk_spectrum: Spectrum,
    targets: Float[AnyArray, "n k"],
    learning_rate: float,
    steps: Float[AnyArray, "t"],
) -> Float[np.ndarray, "t"]:
    """Returns ℰ_t² = Σ_k Σ_i (1 − ηλ_i)^{2t} (v_iᵀ Y^k)² at each t, Eq. 16.

    This is ‖Y − f(X; θ(t))‖² of an infinitely wide network that starts from f = 0, after t steps of
    gradient descent on ½‖f − Y‖². η must be below 2/λ_max.

    Args:
      ntk_spectrum: spectrum of Θ.
      targets: Y.
      learning_rate: η.
      steps: the values of t, not negative.
    """
    projected = _squared_projections(ntk_spectrum, targets)
    factors = (1 - learning_rate * ntk_spectrum.eigenvalues)[None, :] ** (
        2 * np.asarray(steps)[:, None]
    )
    return factors @ projected


def convergence_bounds(
    ntk_spectrum: Spectrum,
    targets: Float[AnyArray, "n k"],
    learning_rate: float,
    steps: Float[AnyArray, "t"],
) -> Interval:
    """Returns Tr[YᵀY] − 2tη𝒜 and Tr[YᵀY] − η𝒜, between which ℰ_t² lies, Theorem 1.

    Args:
      ntk_spectrum: spectrum of Θ.
      targets: Y.
      learning_rate: η.
      steps: the values of t.

    Raises:
      UserError: unless 0 ≤ ηλ_i ≤ 1 for all i and t ≥ 1, which the theorem needs.
    """
    steps = np.asarray(steps, np.float64)
    least, most = ntk_spectrum.eigenvalues[[0, -1]]
    # By rounding, eigenvalues of a singular matrix are a little below zero.
    if least < -most * len(ntk_spectrum.eigenvalues) * np.finfo(np.float32).eps:
        raise UserError(f"Theorem 1 needs eigenvalues of at least 0; the smallest is {least:.3g}")
    if not 0 <= learning_rate * most <= 1 + 1e-12:
        raise UserError(
            f"Theorem 1 needs a learning rate of at most 1/λ_max = {1 / most:.3g}, got "
            f"{learning_rate:.3g}"
        )
    if np.any(steps < 1):
        raise UserError(f"Theorem 1 needs t of at least 1, got {steps.min():g}")
    projected = _squared_projections(ntk_spectrum, targets)
    aligned = float(ntk_spectrum.eigenvalues @ projected)
    total = float(np.sum(np.asarray(targets, np.float64) ** 2))
    lower = total - 2 * steps * learning_rate * aligned
    return Interval(lower, np.full_like(lower, total - learning_rate * aligned))


def normalized(ntk: Float[AnyArray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Returns Θ divided by the mean of its diagonal, so that its scale does not matter."""
    ntk = symmetric(ntk)
    return ntk / np.mean(np.diag(ntk))


def symmetric(ntk: Float[AnyArray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Returns Θ in float64, made exactly symmetric.

    Raises:
      UserError: if it is not finite, or its asymmetry is more than rounding.
    """
    ntk = np.asarray(ntk, np.float64)
    if not np.all(np.isfinite(ntk)):
        raise UserError("the kernel matrix has entries that are not finite")
    if np.max(np.abs(ntk - ntk.T), initial=0) > ASYMMETRY * np.max(np.abs(ntk), initial=0):
        raise UserError("the kernel matrix is not symmetric")
    return (ntk + ntk.T) / 2


def _squared_projections(
    ntk_spectrum: Spectrum, targets: Float[AnyArray, "n k"]
) -> Float[np.ndarray, "n"]:
    """Returns Σ_k (v_iᵀ Y^k)² of each i."""
    return np.sum((ntk_spectrum.eigenvectors.T @ np.asarray(targets, np.float64)) ** 2, axis=1)
