"""Flax NNX modules as models: Linen modules whose variables are the state of an NNX module.

So all that takes a Linen module takes an NNX one, and treats both alike. NNX has no interceptors of
calls; `intercept_calls` is `flax.linen.intercept_methods` for the layers of both.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import module as linen_module

from dynamical_jax import contract
from dynamical_jax.errors import UserError, reason
from dynamical_jax.types import Array, Variables

# `flax.nnx` is imported in functions, as it takes most of a second and most models are of Linen.


A_MODEL = "a model is a Flax module or a function of rngs that makes an NNX module"


def is_nnx(value: Any) -> bool:
    """Whether a value is an NNX module."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def as_model(model: Any) -> Any:
    """Returns an NNX module, or a function that makes one, as a Linen module; others as they are.

    It starts from the module's weights, or from those of a module that the function makes.

    Raises:
      UserError: if it is neither, or a function does not take `rngs`, or makes something else.
    """
    if is_nnx(model):
        return _model(*_taken_apart(model))
    if callable(model) and (isinstance(model, type) or not hasattr(model, "apply")):
        return _made_by(model)
    if not hasattr(model, "apply"):
        named = f"; dj.models.create({model!r}, data) makes it by name" * isinstance(model, str)
        raise UserError(f"{A_MODEL}, got {model!r:.100}{named}")
    return model


def from_nnx(module: Any) -> tuple["FromNNX", Variables]:
    """Returns an NNX module as a Linen module, and its weights as variables.

    Modules of one class with the same options become one Linen module, so that programs are
    compiled once for all of them.
    """
    of, start = _taken_apart(module)
    tree: dict[str, Any] = {}
    for slot, leaf in zip(of.slots, start.leaves, strict=True):
        if slot.collection is not None:
            _put(tree, (slot.collection, *slot.path), leaf)
    return _model(of, None), tree


def into_nnx(variables: Variables, module: Any) -> None:
    """Puts variables, as of `from_nnx`, into an NNX module, such as weights after training."""
    from flax import nnx

    of, start = _taken_apart(module)
    leaves = of.leaves(variables, list(start.leaves))
    nnx.update(module, jax.tree.unflatten(of.structure, leaves))


class Slot(NamedTuple):
    """A place for an array in the state of an NNX module: collection and path; no random state."""

    collection: str | None
    path: tuple[str, ...]


class Blueprint(NamedTuple):
    """An NNX module without its arrays."""

    graph: Any
    structure: Any
    slots: tuple[Slot, ...]

    def leaves(self, variables: Variables, others: list[Any]) -> list[Any]:
        """Returns the arrays, from the variables or, of random state, from `others`."""
        leaves = []
        for slot, other in zip(self.slots, others, strict=True):
            value = other
            if slot.collection is not None:
                value = variables[slot.collection]
                for name in slot.path:
                    value = value[name]
            leaves.append(value)
        return leaves


class Start(NamedTuple):
    """Arrays to start from; equal if they are the very same arrays."""

    leaves: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Start) or len(self.leaves) != len(other.leaves):
            return False
        return all(map(lambda a, b: a is b, self.leaves, other.leaves))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.leaves)))


@functools.lru_cache(32)  # Programs are compiled for each object.
def _model(of: Blueprint, start: Start | Callable[..., Any] | None) -> "FromNNX":
    return FromNNX(of, start)


def _made_by(make: Callable[..., Any]) -> "FromNNX":
    from flax import nnx

    try:
        inspect.signature(make).bind(rngs=None)
    except TypeError as error:
        raise UserError(f"{A_MODEL}, got {make}") from error

    def made() -> Any:
        module = make(rngs=nnx.Rngs(0))
        if not is_nnx(module):
            raise UserError(f"{make} must make an NNX module, and made {type(module).__name__}")
        return module

    return _model(_taken_apart(nnx.eval_shape(made))[0], make)


def _taken_apart(module: Any) -> tuple[Blueprint, Start]:
    from flax import nnx

    graph, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)
    slots = []
    for path, variable in nnx.to_flat_state(state):
        name: str | None = "constants"  # An array that is no variable.
        if isinstance(variable, nnx.RngState):
            name = None
        elif isinstance(variable, nnx.Variable):
            name = nnx.variablelib.variable_name_from_type(type(variable), allow_register=True)
        slots.append(Slot(name, tuple(map(str, path))))
    return Blueprint(graph, structure, tuple(slots)), Start(tuple(leaves))


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


class FromNNX(nn.Module):
    """An NNX module as a Linen module.

    It is in training mode, `module.train()`, if `train` is true, else in that of evaluation. All
    its random streams follow from Linen's "dropout". Statistics are in the collections that Linen
    has for them.

    Attributes:
      of: the module without its arrays.
      start: what it is initialised to, or a function of `rngs` that makes such a module.
    """

    of: Blueprint
    start: Start | Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Returns what the NNX module does."""
        from flax import nnx

        if self.is_initializing():
            self._initialize()
        key = self.make_rng("dropout") if self.has_rng("dropout") else jax.random.key(0)
        leaves = self.of.leaves(self.variables, self._random_state(key))
        module = nnx.merge(self.of.graph, jax.tree.unflatten(self.of.structure, leaves))
        module.train() if train else module.eval()
        parameters = inspect.signature(module).parameters
        flags = [parameters[flag] for flag in contract.OTHER_FLAGS if flag in parameters]
        # `module.train()` is what a flag is by default that is None by default.
        told = "train" in parameters or any(flag.default is not None for flag in flags)
        options = contract.train_option(module, train) if told else {}
        with _intercepted(module, self.path), _explained(module, x):
            outputs = module(x, **options)
        self._update(module)
        return outputs

    def _initialize(self) -> None:
        from flax import nnx

        start, tree = self.start, {}
        if not isinstance(start, Start):
            _, start = _taken_apart(start(rngs=nnx.Rngs(self.make_rng("params"))))
        for slot, leaf in zip(self.of.slots, start.leaves, strict=True):
            if slot.collection is not None:
                _put(tree, (slot.collection, *slot.path), jnp.asarray(leaf))
        for collection, values in tree.items():
            for name, value in values.items():
                self.put_variable(collection, name, value)

    def _random_state(self, key: Array) -> list[Any]:
        state = jax.tree.unflatten(self.of.structure, range(len(self.of.slots)))
        from flax import nnx

        leaves: list[Any] = [None] * len(self.of.slots)
        for index, (_, variable) in enumerate(nnx.to_flat_state(state)):
            if isinstance(variable, nnx.RngKey):
                leaves[index] = jax.random.fold_in(key, index)
            elif isinstance(variable, nnx.RngState):
                leaves[index] = jnp.zeros((), jnp.uint32)
        return leaves

    def _update(self, module: Any) -> None:
        from flax import nnx

        if self.is_initializing():
            return
        now = {
            tuple(map(str, path)): jax.tree.leaves(variable)[0]
            for path, variable in nnx.to_flat_state(nnx.state(module))
        }
        tree: dict[str, Any] = {}
        for collection, path in self.of.slots:
            if collection is not None and self.is_mutable_collection(collection):
                _put(tree, (collection, *path), now[path])
        for collection, values in tree.items():
            for name, value in values.items():
                self.put_variable(collection, name, value)


@contextlib.contextmanager
def _explained(module: Any, x: Any) -> Iterator[None]:
    """Raises `UserError`, with the shape of the inputs, where a module fails.

    Not while its calls are intercepted: what intercepts them answers their errors.
    """
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        if _interceptors:
            raise
        raise UserError(
            f"{type(module).__name__} fails with x of shape {x.shape}, which is "
            f"{len(x)} of shape {x.shape[1:]} ({reason(error)})"
        ) from error


# --- Interceptors ---

_interceptors: list[Callable[..., Any]] = []
_paths: dict[int, tuple[str, ...]] = {}  # Of the modules whose calls are intercepted, by `id`.


@contextlib.contextmanager
def intercept_calls(interceptor: Callable[..., Any]) -> Iterator[None]:
    """A context in which an interceptor, as of `nn.intercept_methods`, sees NNX's layers, too.

    Of these it sees `__call__` of those that own parameters, and of `nnx.BatchNorm`.
    """
    _interceptors.append(interceptor)
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        _interceptors.pop()


def path_of(module: Any) -> tuple[str, ...] | None:
    """Returns the path of an intercepted NNX layer; None inside of a transformation of NNX."""
    return _paths.get(id(module))


def is_batch_norm(module: Any) -> bool:
    """Whether a module of either framework normalises by statistics of the batch."""
    return isinstance(module, nn.BatchNorm) or (
        is_nnx(module) and isinstance(module, sys.modules["flax.nnx"].BatchNorm)
    )


class Freestanding(NamedTuple):
    """An NNX layer by itself.

    Attributes:
      layer: the layer, of the class that it had, in evaluation mode.
      params: its parameters.
      rest: its other arrays.
      variables: whether some of these are variables, which a call may change.
      apply: its function of `{"params": …, "rest": …}` and its input.
    """

    layer: Any
    params: dict[str, Array]
    rest: list[Any]
    variables: bool
    apply: Callable[[Any, Any], Any]


def freestanding(module: Any) -> Freestanding:
    """Returns a copy of an intercepted NNX layer."""
    from flax import nnx

    swapped = type(module)
    object.__setattr__(module, "__class__", swapped.__mro__[1])
    try:
        layer = nnx.clone(module)
    finally:
        object.__setattr__(module, "__class__", swapped)
    if is_batch_norm(layer):
        layer.use_running_average = True
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    leaves, structure = jax.tree.flatten(params)
    rest_leaves, rest_structure = jax.tree.flatten(rest)

    def apply(variables: Any, x: Any) -> Any:
        params = jax.tree.unflatten(structure, jax.tree.leaves(variables["params"]))
        rest = jax.tree.unflatten(rest_structure, variables["rest"])
        return nnx.merge(graph, params, rest)(x)

    tree: dict[str, Any] = {}
    for (path, _), leaf in zip(nnx.to_flat_state(params), leaves, strict=True):
        _put(tree, tuple(map(str, path)), leaf)
    some = any(isinstance(variable, nnx.Variable) for _, variable in nnx.to_flat_state(rest))
    return Freestanding(layer, tree, rest_leaves, some, apply)


@contextlib.contextmanager
def _intercepted(module: Any, prefix: tuple[str, ...]) -> Iterator[None]:
    """Lets the interceptors see the calls of a module's layers."""
    from flax import nnx

    mine = []
    if _interceptors:
        for path, layer in list(nnx.iter_modules(module)):
            owns = any(isinstance(value, nnx.Param) for value in vars(layer).values())
            if (owns or is_batch_norm(layer)) and callable(layer):
                object.__setattr__(layer, "__class__", _intercepting(type(layer)))
                _paths[id(layer)] = (*prefix, *map(str, path))
                mine.append(id(layer))
    try:
        yield
    finally:
        for key in mine:
            del _paths[key]


@functools.cache  # Each class is registered with JAX for good.
def _intercepting(kind: type) -> type:
    """Returns a class derived from `kind` whose calls pass through the interceptors."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = functools.partial(kind.__call__, self)
        context = linen_module.InterceptorContext(self, "__call__", function)
        for interceptor in _interceptors:
            function = functools.partial(_through, interceptor, function, context)
        return function(*args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _through(interceptor: Any, function: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
    return interceptor(function, args, kwargs, context)
