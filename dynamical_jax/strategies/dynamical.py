"""dynamicAL: queries the examples that increase the training dynamics most (§3.2)."""

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynamical_jax import dynamics, gradients, losses, words
from dynamical_jax.errors import UserError
from dynamical_jax.strategies.base import LearnerView, Query, Strategy
from dynamical_jax.types import Array, Examples


@dataclasses.dataclass(frozen=True)
class Dynamical(Strategy):
    """Chooses the b examples of largest Δ({u}|S) at their pseudo-labels, Eq. 10–12.

    Attributes:
      gamma: weight of g_u·g_S in Δ (Figure 5): 2 is the paper's method, 0 the gradient norm alone,
        `math.inf` the inner product alone.
      engine: how gradients are computed, a key of `gradients.ENGINES`; changes no score.
      chunk_size: examples at a time; by default what memory allows; changes no score.
      loss: that the model is trained by, whose gradients make the dynamics; an `Experiment` refuses
        another than that of its `TrainingConfig`.
    """

    gamma: float = 2.0
    engine: str = "factored"
    chunk_size: int | None = None
    loss: losses.Loss = losses.CROSS_ENTROPY

    def __post_init__(self):
        if math.isnan(self.gamma) or self.gamma < 0:
            raise UserError(f"gamma must be at least 0 (inf is allowed), got {self.gamma}")
        words.check_known("engine", self.engine, gradients.ENGINES)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise UserError(f"the chunk size must be at least 1, got {self.chunk_size}")

    @property
    def needs_losses(self) -> tuple[losses.Loss, ...]:
        """The loss whose gradients are taken."""
        return (self.loss,)

    def score(self, key: Array, view: LearnerView, state: Any) -> "Changes":
        """Returns Δ({u}|S) of each unlabeled example u, and its terms."""
        grad_s = self._set_gradient(view, view.labeled)
        terms = gradients.norms_and_products(
            view.apply,
            view.variables,
            view.unlabeled,
            grad_s,
            engine=self.engine,
            chunk_size=self.chunk_size,
            on_progress=view.on_progress,
            mesh=view.mesh,
            loss=self.loss,
        )
        change = dynamics.change_of_training_dynamics(
            jnp.asarray(terms.squared_norm), jnp.asarray(terms.inner_product), self.gamma
        )
        return Changes(np.asarray(change), terms, grad_s, view)

    def select(self, key: Array, scored: "Changes", batch_size: int, state: Any) -> Query:
        """Returns the examples of largest Δ({u}|S)."""
        return super().select(key, scored.change, batch_size, state)

    def describe(
        self, view: LearnerView, scored: "Changes", query: Query
    ) -> dict[str, float | None]:
        """Returns the inner product's share of Δ over the query, and R of the query.

        Warns if the inner product dominates: then S is not fitted, and the query consists of images
        like the few examples of S with a large gradient.

        Returns:
          "inner_product_share": `dynamics.inner_product_share` of the query; "approximation_ratio":
          R(Q|S), Eq. 14, exactly, from the gradient of the whole query; None where it is 0/0.
        """
        # Both are defined with γ = 2, whatever γ chose the query.
        terms = jax.tree.map(lambda term: np.asarray(term)[query.positions], scored.terms)
        squared_norm, inner_product = terms.squared_norm, terms.inner_product
        share = float(dynamics.inner_product_share(squared_norm, inner_product))
        if share > 0.5 and 0 < self.gamma < math.inf:
            warnings.warn(
                f"the labeled set is not fitted: the inner product with its gradient makes up "
                f"{share:.0%} of the chosen Δ; train longer (a lower target_total_loss, "
                "or a higher max_epochs where training ended there)",
                stacklevel=3,
            )
        change = dynamics.change_of_training_dynamics(squared_norm, inner_product)
        chosen = Examples(view.unlabeled[query.positions], terms.label)
        grad_q = self._set_gradient(view, chosen)
        ratio = float(dynamics.approximation_ratio(change, grad_q, scored.grad_s))
        # 0/0 where no gradient is left, as of a network that is saturated.
        ratio = ratio if math.isfinite(ratio) else None
        return {"inner_product_share": share, "approximation_ratio": ratio}

    def _set_gradient(self, view: LearnerView, examples: Examples) -> Any:
        # A batch gradient needs less memory than scoring; 128 is what training takes at a time.
        size = self.chunk_size or 128
        return gradients.set_gradient(
            view.apply, view.variables, examples, size, view.mesh, self.loss
        )


class Changes(NamedTuple):
    """Δ of the unlabeled examples.

    Attributes:
      change: `[n]` Δ({u}|S).
      terms: the terms of Δ.
      grad_s: the gradient of the loss summed over S.
      view: the learner, for those who select by more than Δ.
    """

    change: np.ndarray
    terms: gradients.GradientTerms
    grad_s: Any
    view: LearnerView
