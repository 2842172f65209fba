"""Covers what would change the training dynamics: herding weighted by Δ."""

import dataclasses

import jax
import numpy as np

from dynamical_jax import losses
from dynamical_jax.errors import UserError
from dynamical_jax.strategies.base import LearnerView, check_finite
from dynamical_jax.strategies.coverage import NarrowingCovering
from dynamical_jax.strategies.dynamical import Dynamical
from dynamical_jax.types import Array


@dataclasses.dataclass(frozen=True)
class DynamicalHerding(NarrowingCovering):
    """Chooses, one by one, the example that adds most to the coverage of examples of large Δ.

    As `UncertaintyHerding`, each example weighted by a power of Δ({u}|S) in the place of its
    uncertainty. Where Δ is not above 0 the weight is 0. Nothing changes if all Δ are multiplied by
    a number; scores are gains in coverage where the largest weight is 1.

    Attributes:
      gamma: as of `Dynamical`, like the next two.
      engine: likewise.
      chunk_size: likewise.
      power: of Δ. Δ has the degree of a squared gradient: with 1/2 the weight has that of 1 − m.
      loss: as of `Dynamical`.
    """

    gamma: float = 2.0
    engine: str = "factored"
    chunk_size: int | None = None
    power: float = 0.5
    loss: losses.Loss = losses.CROSS_ENTROPY

    def __post_init__(self):
        super().__post_init__()
        self._dynamical()  # Checks its own.
        if not 0 < self.power < np.inf:
            raise UserError(f"power must be above 0 and finite, got {self.power}")

    @property
    def needs_losses(self) -> tuple[losses.Loss, ...]:
        """The loss whose gradients are taken."""
        return (self.loss,)

    def weights(self, view: LearnerView, logits: Array) -> np.ndarray:
        """Returns the power of Δ of each example, over the largest."""
        # Nothing is drawn: any key does.
        change = self._dynamical().score(jax.random.key(0), view, None).change
        check_finite(change)
        change = np.maximum(change, 0)
        return (change / max(change.max(), np.finfo(change.dtype).tiny)) ** self.power

    def _dynamical(self) -> Dynamical:
        return Dynamical(self.gamma, self.engine, self.chunk_size, self.loss)
