"""Makes neural-tangents work on newer versions of JAX.

The newest neural-tangents, 0.6.5 of 2023, imports names that JAX has since moved. This module puts
the missing names back when neural-tangents is first used, and not before. TensorFlow, which
`neural_tangents.experimental` would import, is left out with that module.
"""

import functools
import importlib.util
import sys
import types
from typing import Any

import jax

from dynamical_jax.errors import UserError

TESTED = ((0, 10), (0, 13))
"""First version of JAX on which this was tested, and first version on which it was not."""

NAMES_IN_EXTEND = ("Jaxpr", "JaxprEqn", "Literal", "Var", "Primitive", "ClosedJaxpr")
NAMES_IN_CORE = ("ShapedArray", "Value", "AbstractValue", "eval_context")


@functools.cache
def neural_tangents() -> Any:
    """Returns the module `neural_tangents`.

    Its `empirical_ntk_fn` works with implementations 1 and 2; `stax`, `predict`, `batch` and
    `monte_carlo_kernel_fn` work without limits.

    Raises:
      UserError: if it is not installed, or JAX is of a version that was not tested.
    """
    version = jax.__version_info__[:2]
    if not TESTED[0] <= version < TESTED[1]:
        oldest, newest = (".".join(map(str, bound)) for bound in TESTED)
        raise UserError(
            f"neural-tangents was made to work with JAX from {oldest} to before {newest}, this is "
            f"{jax.__version__}: install one of these"
        )
    if not is_installed():
        raise UserError("neural-tangents is not installed: pip install 'dynamical-jax[theory]'")
    _restore_names()
    import neural_tangents as nt

    return nt


def is_installed() -> bool:
    """Returns whether neural-tangents is installed."""
    return importlib.util.find_spec("neural_tangents") is not None


def _restore_names() -> None:
    from jax._src import core as source_core
    from jax._src import source_info_util, util
    from jax._src.interpreters import ad as source_ad
    from jax.extend import core as extend_core
    from jax.interpreters import ad

    for names, source in ((NAMES_IN_EXTEND, extend_core), (NAMES_IN_CORE, source_core)):
        for name in names:
            _put_back(jax.core, name, getattr(source, name, None))
    for name in dir(source_ad):
        if not name.startswith("__"):
            _put_back(ad, name, getattr(source_ad, name))
    _put_back(ad, "source_info_util", source_info_util)
    _put_back(ad, "zeros_like_p", extend_core.Primitive("zeros_like"))  # Never bound any more.
    _put_back(jax.random, "KeyArray", jax.Array)
    if "jax.util" not in sys.modules and not hasattr(jax, "util"):
        moved = types.ModuleType("jax.util")
        moved.safe_map, moved.safe_zip = util.safe_map, util.safe_zip
        sys.modules["jax.util"] = jax.util = moved
    sys.modules.setdefault(
        "neural_tangents.experimental", types.ModuleType("neural_tangents.experimental")
    )


def _put_back(module: Any, name: str, value: Any) -> None:
    if name not in vars(module) and value is not None:
        setattr(module, name, value)
