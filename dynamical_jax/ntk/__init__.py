"""The neural tangent kernel of any Flax model, and its theory (§2.2, Eq. 1–3).

- `empirical_ntk`: Θ or 𝒦 of thousands of examples; `combined_gradients`: Tr(Wᵀ Θ W) without Θ. Both
  need JAX alone;
- `from_sketch`: Θ of larger sets, up to an error;
- `reference_ntk`, `infinite_width_ntk`, `kernel_regression`: by neural-tangents, which the extra
  `theory` installs and `neural_tangents()` makes work on current JAX.
"""

from dynamical_jax.ntk import alignment as alignment
from dynamical_jax.ntk import generalization as generalization
from dynamical_jax.ntk import mmd as mmd
from dynamical_jax.ntk.compatibility import neural_tangents as neural_tangents
from dynamical_jax.ntk.empirical import combined_gradients as combined_gradients
from dynamical_jax.ntk.empirical import empirical_ntk as empirical_ntk
from dynamical_jax.ntk.reference import infinite_width_ntk as infinite_width_ntk
from dynamical_jax.ntk.reference import kernel_regression as kernel_regression
from dynamical_jax.ntk.reference import reference_ntk as reference_ntk
from dynamical_jax.ntk.sketched import from_sketch as from_sketch
