"""Uncertainty Herding: covers what the model is unsure of (Bae et al., 2025)."""

import dataclasses

import jax

from dynamical_jax.errors import UserError
from dynamical_jax.strategies.base import LearnerView
from dynamical_jax.strategies.coverage import NarrowingCovering
from dynamical_jax.strategies.margin import margin_score
from dynamical_jax.types import Array


@dataclasses.dataclass(frozen=True)
class UncertaintyHerding(NarrowingCovering):
    """Chooses, one by one, the example that adds most to the coverage of uncertain examples.

    As `MaxHerding`, each example weighted by its uncertainty 1 − m, m being the margin of the
    softmax of the logits over a temperature; Bae et al., "Uncertainty Herding: One Active Learning
    Method for All Label Budgets" (2025, arXiv:2412.20644). The paper names several uncertainties
    and reports this one.

    `radius` is σ, by default the paper's, that of `NarrowingCovering`.

    Attributes:
      temperature: of the softmax. The paper fits it, to the calibration of a second model that is
        trained on a part of S; no second model is trained here.
    """

    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:  # False for NaN, too.
            raise UserError(f"temperature must be above 0, got {self.temperature}")

    def weights(self, view: LearnerView, logits: Array) -> Array:
        """Returns 1 − m of each example."""
        return jax.nn.sigmoid(margin_score(logits / self.temperature))
