"""The gradients of a network that active learning needs (Eq. 6).

Each for any set size in bounded memory:

- `set_gradient`: g_S = Σ_{x∈S} ∇_θ ℓ(x, y), one pytree of parameters;
- `norms_and_products`: ‖g_u‖² and g_u·v of every example u, by one of the `ENGINES`;
- `gram`, `cross_gram`: g_u·g_v of all pairs, of up to some thousands of examples;
- `sketch`: a short vector of every example, whose inner products are g_u·g_v up to an error;
- `redundancy`: how alike the gradients of a query are;
- `per_example_gradients`: g_u itself, for small sets.

`register` tells the factored engine about your own layer, and `verify` checks that.

Gradients are over all trainable parameters with the model in evaluation mode, where the gradient of
an example depends on that example alone.
"""

from dynamical_jax.gradients.blocks import bucketed as bucketed
from dynamical_jax.gradients.blocks import each_block as each_block
from dynamical_jax.gradients.blocks import map_blocks as map_blocks
from dynamical_jax.gradients.factored import UnsupportedError as UnsupportedError
from dynamical_jax.gradients.gram import cross_gram as cross_gram
from dynamical_jax.gradients.gram import gram as gram
from dynamical_jax.gradients.kinds import register as register
from dynamical_jax.gradients.per_example import per_example_gradients as per_example_gradients
from dynamical_jax.gradients.redundancy import Redundancy as Redundancy
from dynamical_jax.gradients.redundancy import redundancy as redundancy
from dynamical_jax.gradients.scoring import ENGINES as ENGINES
from dynamical_jax.gradients.scoring import norms_and_products as norms_and_products
from dynamical_jax.gradients.set_gradient import set_gradient as set_gradient
from dynamical_jax.gradients.sketch import sketch as sketch
from dynamical_jax.gradients.verification import Verification as Verification
from dynamical_jax.gradients.verification import verify as verify
from dynamical_jax.types import GradientTerms as GradientTerms
