"""The generalization bound of ultra-wide networks, and bounds of it by alignment (§4.1)."""

import numpy as np
import scipy.linalg
from jaxtyping import Float

from dynamical_jax.errors import UserError
from dynamical_jax.ntk.alignment import Interval, alignment, symmetric
from dynamical_jax.types import AnyArray


def generalization_bound(
    ntk: Float[AnyArray, "n n"], targets: Float[AnyArray, "n k"], jitter: float = 0.0
) -> float:
    """Returns ℬ(X, Y) = √(2 Tr[Yᵀ Θ⁻¹ Y] / n), the dominant term of Eq. 18.

    Args:
      ntk: Θ.
      targets: Y.
      jitter: added to the diagonal of Θ, in units of its mean diagonal. Report it together with the
        bound, which is smaller with jitter than without.

    Raises:
      UserError: if Θ is not positive definite, naming its smallest eigenvalue.
    """
    regular = positive_definite(ntk, jitter)
    targets = np.asarray(targets, np.float64)
    factor = scipy.linalg.cholesky(regular, lower=True)
    # Yᵀ Θ⁻¹ Y = ‖L⁻¹ Y‖² with Θ = L Lᵀ.
    whitened = scipy.linalg.solve_triangular(factor, targets, lower=True)
    return float(np.sqrt(2 * np.sum(whitened**2) / len(targets)))


def bounds_by_alignment(
    ntk: Float[AnyArray, "n n"], targets: Float[AnyArray, "n k"], jitter: float = 0.0
) -> Interval:
    """Returns the bounds of (n/2) ℬ² by alignment, Theorem 2.

    Tr²[YᵀY] / 𝒜 ≤ (n/2) ℬ² ≤ (λ_max/λ_min) Tr²[YᵀY] / 𝒜.

    Args:
      ntk: Θ.
      targets: Y.
      jitter: as in `generalization_bound`.

    Raises:
      UserError: if Θ is not positive definite, naming its smallest eigenvalue; if Y is zero.
    """
    regular = positive_definite(ntk, jitter)
    eigenvalues = scipy.linalg.eigvalsh(regular)
    total = float(np.sum(np.asarray(targets, np.float64) ** 2))
    if total == 0:
        raise UserError("the targets are all zero: there is nothing to align with")
    lower = total**2 / alignment(regular, targets)
    return Interval(np.asarray(lower), np.asarray(lower * eigenvalues[-1] / eigenvalues[0]))


def positive_definite(ntk: Float[AnyArray, "n n"], jitter: float = 0.0) -> Float[np.ndarray, "n n"]:
    """Returns Θ, with jitter, in float64.

    Raises:
      UserError: if its smallest eigenvalue is not larger than the rounding error of the type in
        which Θ is given.
    """
    if not jitter >= 0:
        raise UserError(f"the jitter must not be negative, got {jitter}")
    rounding = np.finfo(np.asarray(ntk).dtype).eps
    regular = symmetric(ntk)
    regular = regular + jitter * np.mean(np.diag(regular)) * np.eye(len(regular))
    least, most = scipy.linalg.eigvalsh(regular)[[0, -1]]
    # The eigenvalues themselves are found to within n roundings of the largest, in float64.
    if least <= max(rounding, len(regular) * np.finfo(np.float64).eps) * abs(most):
        raise UserError(
            f"the kernel matrix is not positive definite: λ_min = {least:.3g} is not above the "
            f"rounding of λ_max = {most:.3g}; leave out examples that stand there twice, compute "
            "the kernel in float64, or add a jitter and report it"
        )
    return regular
