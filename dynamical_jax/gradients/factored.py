"""The factored engine: ‖g_u‖² and g_u·v without the gradients g_u.

One forward and one backward pass give both for every example of a batch; no array of batch ×
parameters is formed.

How. `nnx_modules.intercept_calls` puts a *tap* behind each layer that owns parameters. A tap is
the identity on the layer's output, with one more input, a probe `[n, 2]` of zeros. Its backward
pass sees the layer's input and the cotangent of its output, which is all that the layer's share of
(‖g_u‖², g_u·v) depends on (`shares.py`), and returns that share as the cotangent of the probe. All
layers have one probe in common, so its cotangent is the sum over layers.

Never silently wrong. Models that the shares do not cover raise `UnsupportedError`: a layer is
called twice (‖g_u‖² is no sum over calls); parameters are used in any other way (tied weights,
lifted transformations); a layer of an unregistered type finds more in its scope than `variables`
hold; a layer normalises by the statistics of the batch; the first axis of a layer's input or output
is not that of the examples; there are other method interceptors. Two things cannot be checked and
are required: outside of its layers the model treats examples independently and leaves them in their
order, as any per-example gradient needs it; and a layer of an unregistered type does not use its
parent or its path.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import core, errors
from flax import linen as nn
from flax.linen import module as linen_module
from jax.extend import core as extend_core

from dynamical_jax import contract, losses, nnx_modules
from dynamical_jax.gradients import kinds, pairs, shares
from dynamical_jax.gradients.kinds import Layer
from dynamical_jax.types import ApplyFn, Array, GradientTerms, Params, Variables


class UnsupportedError(NotImplementedError):
    """The factored engine does not cover this model; the obvious engine does.

    Attributes:
      module: the path of the layer that it does not cover.
      why: the reason.
    """

    def __init__(self, module: str, why: str):
        super().__init__(f"{module}: {why}")
        self.module, self.why = module, why


def gradient_terms(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    labels: Any,
    direction: Params,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> GradientTerms:
    """Returns ‖g_u‖² and g_u·v of every example u, v being `direction`.

    Args:
      apply: `model.apply`, in evaluation mode, or `jax.jit` of it.
      variables: with all parameters in `params`.
      x: `[n, ...]` inputs.
      labels: `[n]`, or None for pseudo-labels.
      direction: a pytree like `variables["params"]`.
      loss: whose gradients these are.

    Raises:
      UnsupportedError: if the model has no factored form here. Never a wrong answer.
    """
    variables = core.unfreeze(nn.unbox(dict(variables)))
    direction = core.unfreeze(nn.unbox(direction))
    apply = _without_jit(apply)
    check_supported(apply, variables, x)

    def total(probe: Array) -> tuple[Array, Array]:
        with _tapped(variables, functools.partial(_share_tap, direction, probe), []):
            logits = contract.as_outputs(apply(variables, x), len(x)).logits
        targets = loss.pseudo_labels(logits) if labels is None else labels
        return jnp.sum(loss(logits, targets)), targets

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(variables["params"]))
    probe = jnp.zeros((len(x), 2), dtype)
    terms, targets = jax.grad(total, has_aux=True)(probe)
    return GradientTerms(terms[:, 0], terms[:, 1], targets)


def forms(
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    labels: Any,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> list[pairs.Form]:
    """Returns the gradients of all examples, layer by layer in forms that `pairs.products` takes.

    Args:
      apply: `model.apply`, in evaluation mode, or what `jax.jit` makes of it.
      variables: with all parameters in `params`.
      x: `[n, ...]` inputs.
      labels: `[n]`, or None for pseudo-labels.
      loss: whose gradients these are.

    Raises:
      UnsupportedError: if the model has no factored form here. Never a wrong answer.
    """
    of_layers = map_layers(pairs.forms_of, apply, variables, x, total_loss(labels, loss))
    return [form for of_layer in of_layers for form in of_layer]


def map_layers(
    function: Callable[..., Any],
    apply: ApplyFn,
    variables: Variables,
    x: Any,
    objective: Callable[[Array], Array],
) -> list[Any]:
    """Returns a function of each layer that owns parameters, in the order of their calls.

    Zeros are added to what each layer returns; their gradients are the cotangents.

    Args:
      function: of (layer, its variables, its inputs, the cotangent of its output).
      apply: `model.apply`, in evaluation mode, or what `jax.jit` makes of it.
      variables: with all parameters in `params`.
      x: `[n, ...]` inputs.
      objective: of the logits, whose gradients these are: a sum over examples, as `total_loss`.

    Raises:
      UnsupportedError: if the model has no factored form here. Never a wrong answer.
    """
    variables = core.unfreeze(nn.unbox(dict(variables)))
    apply = _without_jit(apply)
    check_supported(apply, variables, x)

    def run(tap: Callable[..., Any]) -> Array:
        with _tapped(variables, tap, []):
            return objective(contract.as_outputs(apply(variables, x), len(x)).logits)

    shapes: dict[tuple[str, ...], Any] = {}

    def measure(layer: Layer, own: Variables, path: Any, inputs: Any, outputs: Any) -> Any:
        shapes[path] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), outputs
        )
        return outputs

    jax.eval_shape(lambda: run(measure))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    layers: dict[tuple[str, ...], tuple[Layer, Variables]] = {}

    def loss(zeros: Any) -> tuple[Array, Any]:
        all_inputs = {}

        def add(layer: Layer, own: Variables, path: Any, inputs: Any, outputs: Any) -> Any:
            layers[path], all_inputs[path] = (layer, own), inputs
            return jax.tree.map(jnp.add, outputs, zeros[path])

        return run(add), all_inputs

    cotangents, all_inputs = jax.grad(loss, has_aux=True)(zeros)
    return [
        function(layer, own, all_inputs[path], cotangents[path])
        for path, (layer, own) in layers.items()
    ]


def total_loss(labels: Any, loss: losses.Loss = losses.CROSS_ENTROPY) -> Callable[[Array], Array]:
    """Returns the function of logits to the loss, summed; at pseudo-labels if labels are None."""

    def total(logits: Array) -> Array:
        targets = loss.pseudo_labels(logits) if labels is None else labels
        return jnp.sum(loss(logits, targets))

    return total


_Jitted = type(jax.jit(lambda: None))


def _without_jit(apply: ApplyFn) -> ApplyFn:
    """Returns the function that `jax.jit` compiles, whose layers can be seen; else `apply` itself.

    Without `jax.jit` the values are the same. Other wrappers may change them, so `__wrapped__` of
    any other decorated function is not used.
    """
    if isinstance(apply, functools.partial):
        return functools.partial(_without_jit(apply.func), *apply.args, **apply.keywords)
    if isinstance(apply, types.MethodType):
        return types.MethodType(_without_jit(apply.__func__), apply.__self__)
    return _without_jit(apply.__wrapped__) if isinstance(apply, _Jitted) else apply


class Call(NamedTuple):
    """A call of a layer with parameters: its path, shapes of input and outputs, and leaves."""

    path: tuple[str, ...]
    shapes: list[tuple[int, ...]]
    num_parameters: int


def check_supported(apply: ApplyFn, variables: Variables, x: Any) -> None:
    """Raises `UnsupportedError` unless the shares add up to the whole gradient."""
    params = variables["params"]
    jax.eval_shape(apply, variables, x)  # The model's own errors come first.
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(params)):
        raise UnsupportedError("the model", "its parameters are complex")

    def traced(n: int) -> tuple[Any, list[Call]]:
        calls: list[Call] = []
        batch = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)

        def logits(model_variables: Any, batch: Any) -> Array:
            with _tapped(variables, _no_tap, calls, model_variables):
                return contract.as_outputs(apply(model_variables, batch), n).logits

        return jax.make_jaxpr(logits)(variables, batch).jaxpr, calls

    n = len(x)
    jaxpr, calls = traced(n)
    # Layers have read their parameters from `variables`, so here none may be in use.
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    inputs = zip(paths, jaxpr.invars, strict=False)
    own = {variable for path, variable in inputs if path[0].key == "params"}
    uses = [(jaxpr.outvars, ""), *((equation.invars, _user(equation)) for equation in jaxpr.eqns)]
    for used, user in uses:
        if own.intersection(variable for variable in used if not hasattr(variable, "val")):
            raise UnsupportedError(
                "the model", f"parameters are used outside their own layer{user}"
            )
    if sum(call.num_parameters for call in calls) != len(own):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        called = tuple("/".join(call.path) + "/" for call in calls)
        missing = ", ".join(path for path in paths if not path.startswith(called))
        raise UnsupportedError("the model", f"no layer that is called owns {missing}")
    # Of a layer's arrays only the first axis may follow the number of examples.
    for call, other in zip(calls, traced(n + 1)[1], strict=True):
        for shape, other_shape in zip(call.shapes, other.shapes, strict=True):
            if shape[:1] != (n,) or other_shape != (n + 1, *shape[1:]):
                raise UnsupportedError(
                    "/".join(call.path) or "the model",
                    "its input or output has not the examples on its first axis",
                )


def _user(equation: Any) -> str:
    """Returns the end of a message if a compiled function, whose layers are hidden, uses them."""
    name = equation.params.get("name")
    return f", in jax.jit of {name}" if equation.primitive.name == "jit" else ""


def _tapped(
    variables: Variables,
    tap: Callable[..., Any],
    calls: list[Call],
    model_variables: Variables | None = None,
) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which each layer with parameters has a tap behind it.

    `tap(layer, variables, path, inputs, outputs)` returns the outputs, perhaps with more to them.

    Layers read their parameters from `variables` and not from those that the model is applied to,
    so that `check_supported` sees any other use of these. It also passes `model_variables`, those
    of the model, to check that each layer would have read its own part of them.
    """
    running: list[tuple[str, ...]] = []  # The layer whose own forward pass is being traced.
    outside = extend_core.get_opaque_trace_state(convention="flax")

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if isinstance(module, nnx_modules.FromNNX):
            return call(*args, **kwargs)  # Its layers are intercepted.
        nnx = nnx_modules.is_nnx(module)
        path = nnx_modules.path_of(module) if nnx else module.path
        name = "/".join(path or ()) or type(module).__name__
        own = {} if path is None else _subtree(variables["params"], path)
        names = _own_parameters(own)
        if nnx_modules.is_batch_norm(module) and method == "__call__":
            _check_running_average(module, kwargs, name)
        if (path is not None and (running or not names)) or method == "setup":
            return call(*args, **kwargs)
        if path is None:
            raise UnsupportedError(name, "it is called inside a JAX transformation")
        framework = OfNNX(module, own) if nnx else OfLinen(module, own)
        kind, why = _kind_or_reason(framework, method, args, own, names)
        if model_variables is not None:
            why = why or framework.foreign_variables_reason(path, model_variables)
        if any(path == earlier.path for earlier in calls):
            why = "it is called more than once"
        # Under a raw `lax.scan` or `vmap` one call in Python may be many.
        if extend_core.get_opaque_trace_state(convention="flax") != outside:
            why = "it is called inside a JAX transformation"
        if list(linen_module._global_interceptor_stack) != [intercept]:
            why = "other method interceptors may change what it does"
        why = why or framework.options_reason(kwargs)
        if why is not None:
            raise UnsupportedError(name, why)

        running.append(path)
        try:
            layer = Layer(kind, framework.apply())
            try:
                outputs = layer.apply(framework.variables, args[0])
            except errors.FlaxError as error:  # It uses a module from outside.
                raise UnsupportedError(name, "it cannot be applied by itself") from error
            leaves = jax.tree.leaves(outputs)
            if not all(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves):
                raise UnsupportedError(name, "its output is not floating point")
            shapes = [jnp.shape(leaf) for leaf in (args[0], *leaves)]
            own_leaves = jax.tree.leaves([own[parameter] for parameter in names])
            calls.append(Call(path, shapes, len(own_leaves)))
            return tap(layer, framework.variables, path, args[0], outputs)
        finally:
            running.pop()

    return nnx_modules.intercept_calls(intercept)


class OfLinen:
    """A layer of Linen, with its own part of the parameters."""

    def __init__(self, module: nn.Module, own: Any):
        self.module = self.layer = module
        # Layers of unregistered types are checked to hold no more than `variables`. Of the others
        # only BatchNorm has more than parameters: constants, wherever `apply` takes them from.
        self.variables = {**module.variables, "params": own}

    def state_reason(self) -> str | None:
        """Returns why a layer of unknown type may be more than a function of its input."""
        if self.module.scope.rngs or self.module.scope.mutable:
            return "may depend on random or mutable state of the call"
        if _reads(type(self.module), frozenset({"path", "parent"})):
            return "may depend on its place in the model"
        return None

    def options_reason(self, options: Any) -> str | None:
        """Returns why it may not do without the options of its call."""
        return _options_reason(self.module, options)

    def foreign_variables_reason(
        self, path: tuple[str, ...], model_variables: Variables
    ) -> str | None:
        """Returns why, applied by itself, it would read other variables than in the model."""
        del path  # As the module itself has it.
        return _foreign_variables_reason(self.module, model_variables)

    def apply(self) -> Callable[[Any, Any], Any]:
        """Returns its function of variables and input, without the rest of the model."""
        module = self.module
        if isinstance(module, nn.BatchNorm):
            module = module.clone(use_running_average=True, parent=None)
        return module.clone(parent=None).apply


class OfNNX:
    """A layer of NNX, with its own part of the parameters: what `OfLinen` is for one of Linen."""

    def __init__(self, module: Any, own: Any):
        self.alone = nnx_modules.freestanding(module)
        self.layer = self.alone.layer
        self.variables = {"params": own, "rest": self.alone.rest}

    def state_reason(self) -> str | None:
        """Returns why a layer of unknown type may be more than a function of its input."""
        if self.alone.variables:
            return "may depend on random or mutable state of the call"
        return None

    def options_reason(self, options: Any) -> str | None:
        """Returns why it may not do without the options of its call."""
        return _options_reason(self.layer, options)

    def foreign_variables_reason(
        self, path: tuple[str, ...], model_variables: Variables
    ) -> str | None:
        """Returns why, applied by itself, it would read other variables than in the model."""
        own = _leaves(_subtree(model_variables["params"], path))
        read = _leaves(self.alone.params)
        if own.keys() != read.keys() or any(read[name] is not own[name] for name in own):
            return "it is applied with other variables than its own"
        return None

    def apply(self) -> Callable[[Any, Any], Any]:
        """Returns its function of variables and input, without the rest of the model."""
        return self.alone.apply


def _foreign_variables_reason(module: nn.Module, model_variables: Variables) -> str | None:
    """Returns why a layer, applied by itself, would read other variables than in the model."""
    read = core.unfreeze(module.variables)
    for collection in ("params",) if kinds.is_known(module) else {*read, *model_variables}:
        own = _leaves(_subtree(model_variables.get(collection, {}), module.path))
        leaves = _leaves(read.get(collection, {}))
        if further := sorted(set(leaves) - set(own)):
            names = ", ".join(f"{collection}/{path}" for path in further)
            return f"its scope holds what `variables` lacks: {names}"
        if any(leaves.get(path) is not leaf for path, leaf in own.items()):
            return "it is applied with other variables than its own"
    return None


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _kind_or_reason(
    framework: OfLinen | OfNNX, method: str, args: Any, own: Any, names: list[str]
) -> tuple[kinds.Kind | None, str | None]:
    """Returns what a layer does, or why its shares are not known to add up."""
    if method != "__call__":
        return None, f"it is used through {method}"
    if len(args) != 1 or not hasattr(args[0], "shape"):
        return None, "it is called with other than one input"
    layer = framework.layer
    if kinds.is_known(layer):
        if foreign := set(own) - {"kernel", "bias", "scale", "embedding", "value"}:
            why = f"its scope holds further parameters ({', '.join(sorted(foreign))})"
            return None, why
    elif len(names) < len(own):
        return None, f"{type(layer).__name__} owns parameters beside further layers"
    elif why := framework.state_reason():
        return None, f"{type(layer).__name__} {why}"
    kind = kinds.kind_of(layer, args[0].shape)
    return (None, kind) if isinstance(kind, str) else (kind, None)


@functools.cache
def _reads(layer: type, names: frozenset[str]) -> bool:
    """Returns whether the code of a class, its bases of Flax excepted, has one of these names."""

    def of(code: types.CodeType) -> set[str]:
        inner = (of(value) for value in code.co_consts if isinstance(value, types.CodeType))
        return set(code.co_names).union(*inner)

    functions = [
        inspect.unwrap(function)
        for base in layer.__mro__
        if not base.__module__.startswith(("flax.", "builtins"))
        for name, function in vars(base).items()
        if callable(function) and (name == "__call__" or not name.startswith("__"))
    ]
    codes = (function.__code__ for function in functions if hasattr(function, "__code__"))
    return any(names & of(code) for code in codes)


def _check_running_average(module: Any, kwargs: Any, name: str) -> None:
    running = kwargs.get("use_running_average")
    if (module.use_running_average if running is None else running) is not True:
        raise UnsupportedError(name, "the statistics of the batch mix its examples")


def _options_reason(layer: Any, options: Any) -> str | None:
    """Returns why a layer may not do without the options of its call."""
    rest = dict(options)
    if nnx_modules.is_batch_norm(layer):
        rest.pop("use_running_average", None)  # Checked before.
    # None is the default of every option of registered layers; for others it may be a value.
    if any(value is not None or not kinds.is_known(layer) for value in rest.values()):
        return f"it is called with {', '.join(sorted(rest))}"
    return None


def _no_tap(
    layer: Layer, variables: Variables, path: tuple[str, ...], inputs: Any, outputs: Any
) -> Any:
    del layer, variables, path, inputs
    return outputs


def _share_tap(
    direction: Params,
    probe: Array,
    layer: Layer,
    variables: Variables,
    path: tuple[str, ...],
    inputs: Any,
    outputs: Any,
) -> Any:
    """Returns `outputs`; in the backward pass the cotangent of `probe` is the layer's share."""
    share = functools.partial(shares.shares_of, layer)

    @jax.custom_vjp
    def tap(outputs: Any, probe: Any, variables: Any, direction: Any, inputs: Any) -> Any:
        del probe, variables, direction, inputs
        return outputs

    def forward(outputs: Any, probe: Any, variables: Any, direction: Any, inputs: Any) -> Any:
        del probe
        return outputs, (variables, direction, inputs)

    def backward(residuals: Any, cotangent: Any) -> Any:
        terms = jnp.stack(share(*residuals, cotangent), axis=-1)
        return cotangent, terms.astype(probe.dtype), None, None, None

    tap.defvjp(forward, backward)
    return tap(outputs, probe, variables, _subtree(direction, path), inputs)


def _subtree(tree: Any, path: tuple[str, ...]) -> Any:
    """Returns the subtree at `path`; empty if there is none."""
    for key in path:
        tree = tree.get(key, {}) if isinstance(tree, Mapping) else {}
    return tree


def _own_parameters(tree: Any) -> list[str]:
    """Returns the names of the parameters, not of the further layers, in a layer's `params`."""
    return [name for name, value in tree.items() if not isinstance(value, Mapping)]
