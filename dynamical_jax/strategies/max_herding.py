"""MaxHerding: covers the pool, smoothly (Bae et al., 2024)."""

import dataclasses

from dynamical_jax.strategies.coreset import Embeddings
from dynamical_jax.strategies.coverage import Covering
from dynamical_jax.types import Array


@dataclasses.dataclass(frozen=True)
class MaxHerding(Covering):
    """Chooses, one by one, the example that adds most to the smooth coverage of the pool.

    The coverage of an example v is max_c k(c, v) over all c that are labeled or chosen, with the
    Gaussian kernel k(c, v) = exp(−‖c − v‖² / σ²) of unit embeddings; Bae et al., "Generalized
    Coverage for More Robust Low-Budget Active Learning" (2024, arXiv:2407.12212). What the model
    predicts does not matter.

    `radius` is σ, by default 1 as in the paper.
    """

    def default_radius(self, key: Array, embeddings: Embeddings, num_classes: int) -> float:
        """Returns 1."""
        return 1.0
