"""Uncertainty Herding: covers what the model is unsure of (Bae et al., 2025)."""

import dataclasses

import jax

from dynamical_jax.errors import UserError
from dynamical_jax.strategies import selection
from dynamical_jax.strategies.coreset import Embeddings
from dynamical_jax.strategies.coverage import Covering
from dynamical_jax.strategies.margin import margin_score
from dynamical_jax.types import Array


@dataclasses.dataclass(frozen=True)
class UncertaintyHerding(Covering):
    """Chooses, one by one, the example that adds most to the coverage of uncertain examples.

    As `MaxHerding`, each example weighted by its uncertainty 1 − m, m being the margin of the
    softmax of the logits over a temperature; Bae et al., "Uncertainty Herding: One Active Learning
    Method for All Label Budgets" (2025, arXiv:2412.20644). The paper names several uncertainties
    and reports this one.

    `radius` is σ, by default the paper's: the smallest distance between labeled examples, copies
    aside, which falls as labels come in; 1 where there are none.

    Attributes:
      temperature: of the softmax. The paper fits it, to the calibration of a second model that is
        trained on a part of S; no second model is trained here.
    """

    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:  # False for NaN, too.
            raise UserError(f"temperature must be above 0, got {self.temperature}")

    def weights(self, logits: Array) -> Array:
        """Returns 1 − m of each example."""
        return jax.nn.sigmoid(margin_score(logits / self.temperature))

    def default_radius(self, key: Array, embeddings: Embeddings, num_classes: int) -> float:
        """Returns the smallest distance between labeled examples."""
        return selection.smallest_distance(embeddings.labeled) or 1.0
