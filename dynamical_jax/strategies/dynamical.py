"""dynamicAL: query what increases the training dynamics most (§3.2)."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from dynamical_jax import dynamics, gradients
from dynamical_jax.errors import UserError
from dynamical_jax.strategies.base import LearnerView, Strategy
from dynamical_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Dynamical(Strategy):
    """Chooses the b examples of largest Δ({u}|S) at their pseudo-labels, Eq. 10–12.

    Attributes:
      gamma: weight of g_u·g_S in Δ (Figure 5): 2 is the paper's method, 0 the gradient norm alone,
        `math.inf` the inner product alone.
      engine: how gradients are computed, a key of `gradients.ENGINES`; changes no score.
      chunk_size: examples at a time; by default what memory allows; changes no score.
    """

    gamma: float = 2.0
    engine: str = "factored"
    chunk_size: int | None = None

    def __post_init__(self):
        if math.isnan(self.gamma) or self.gamma < 0:
            raise UserError(f"gamma must be at least 0 (inf is allowed), got {self.gamma}")
        if self.engine not in gradients.ENGINES:
            choices = ", ".join(gradients.ENGINES)
            raise UserError(f"unknown engine {self.engine!r}; choose from {choices}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise UserError(f"the chunk size must be at least 1, got {self.chunk_size}")

    def score(self, key: Array, view: LearnerView, state: Any) -> Array:
        """Returns Δ({u}|S) of each unlabeled example u."""
        # A batch gradient needs less memory than scoring; 128 is what training takes at a time.
        grad_s = gradients.set_gradient(
            view.apply, view.variables, view.labeled, self.chunk_size or 128
        )
        terms = gradients.norms_and_products(
            view.apply,
            view.variables,
            view.unlabeled,
            grad_s,
            engine=self.engine,
            chunk_size=self.chunk_size,
            on_progress=view.on_progress,
        )
        return dynamics.change_of_training_dynamics(
            jnp.asarray(terms.squared_norm), jnp.asarray(terms.inner_product), self.gamma
        )
