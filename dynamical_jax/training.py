"""Trains on the labeled set until it is fitted, and evaluates.

One epoch is one compiled program for any number of labels: the labeled examples are in a buffer of
`capacity` rows on the device, and the number of minibatches depends on how many labels there are.
The last rows of a minibatch may be masked; these change neither gradients nor loss nor BatchNorm
statistics.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from dynamical_jax import contract, losses, models, nnx_modules, parallel, resources, streams, words
from dynamical_jax.errors import DivergedError, UserError
from dynamical_jax.gradients import bucketed, each_block
from dynamical_jax.types import ApplyFn, Array, Examples, Variables, check_fields, take_rows

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    # Decoupled weight decay; with a decay of 0 this is Adam.
    "adam": lambda learning_rate, weight_decay: optax.adamw(
        learning_rate, weight_decay=weight_decay
    ),
    "sgd": lambda learning_rate, weight_decay: optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=0.9)
    ),
}
"""name → optimiser, whose updates are proportional to the learning rate."""
SCHEDULES = ("constant", "cosine")

# A call of the compiled program runs several epochs if it takes fewer seconds than this: of a
# linear layer's epoch 95 % are the call. Longer calls would delay progress bars and Ctrl-C.
SHORT_CALL = 0.1
# Most epochs in a call.
LARGEST_DISPATCH = 32


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is fitted to the labeled set.

    Optimizer, learning rate and batch size are the paper's (App. C.1) by default.

    Attributes:
      optimizer: a key of `OPTIMIZERS`; its state starts anew in every round.
      learning_rate: its learning rate; with a schedule, the first one.
      schedule: "constant", or "cosine", which falls from `learning_rate` and would reach 0 after
        `max_epochs`.
      batch_size: most examples in a step; the steps of an epoch differ in size by one at most.
      weight_decay: decoupled for Adam, an L2 term of the gradient for SGD.
      target_accuracy: training does not stop before this share of S is classified correctly. All
        three targets are checked in evaluation mode; a target of None is always met.
      target_loss: training does not stop before the mean loss on S is at most this.
      target_total_loss: training does not stop before the loss summed over S, by default the
        paper's (Eq. 4), is at most this. `docs/convergence.md` says why this is the default.
      min_epochs: training takes at least so many epochs.
      max_epochs: training stops after so many epochs, even if a target is not met. If all targets
        are None, it takes exactly so many.
      look_every: number of epochs between evaluations on S.
      backbone_learning_rate: of all layers but the last of a `models.Pretrained`; None:
        `learning_rate`. A schedule lowers both.
      loss: of an example, whose mean over a minibatch is minimised. An accuracy is the share of
        examples whose pseudo-label is the target; the target losses are of this loss.
    """

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    batch_size: int = 128
    weight_decay: float = 0.0
    target_accuracy: float | None = 0.99
    target_loss: float | None = None
    target_total_loss: float | None = 1.0
    min_epochs: int = 0
    max_epochs: int = 500
    look_every: int = 5
    backbone_learning_rate: float | None = None
    loss: losses.Loss = losses.CROSS_ENTROPY

    def __post_init__(self):
        check_fields(self)
        words.check_known("optimizer", self.optimizer, OPTIMIZERS)
        words.check_known("schedule", self.schedule, SCHEDULES)
        for name in ("batch_size", "max_epochs", "look_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of training must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.min_epochs <= self.max_epochs:
            raise UserError(
                f"min_epochs must be from 0 to max_epochs, got {self.min_epochs} and "
                f"{self.max_epochs}"
            )
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise UserError("the learning rate must be positive, weight decay not negative")
        rate = self.backbone_learning_rate
        if rate is not None and not rate > 0:
            raise UserError(
                f"the backbone's learning rate must be positive, got {rate}; to train the last "
                "layer alone, embed the images first (--train=head)"
            )
        if self.target_accuracy is not None and not 0 <= self.target_accuracy <= 1:
            raise UserError(f"target accuracy must be in [0, 1], got {self.target_accuracy}")
        for name in ("target_loss", "target_total_loss"):
            target = getattr(self, name)
            if target is not None and not target > 0:
                raise UserError(f"{name} must be above 0, got {target}")

    @property
    def has_target(self) -> bool:
        """Whether training may stop before `max_epochs`."""
        targets = (self.target_accuracy, self.target_loss, self.target_total_loss)
        return any(target is not None and math.isfinite(target) for target in targets)

    def largest_loss(self, size: int) -> float | None:
        """Returns the largest mean cross-entropy of a fitted set of this size; None: any."""
        mean, total = self.target_loss, self.target_total_loss
        targets = [target for target in (mean, total and total / size) if target is not None]
        return min(filter(math.isfinite, targets), default=None)

    def is_fitted(self, labeled: "Evaluation", size: int) -> bool:
        """Returns whether all targets are met.

        Args:
          labeled: evaluation on the labeled set S.
          size: |S|.
        """
        accuracy, loss = self.target_accuracy, self.largest_loss(size)
        return (accuracy is None or labeled.accuracy >= accuracy) and (
            loss is None or labeled.loss <= loss
        )


class Evaluation(NamedTuple):
    """Accuracy in [0, 1] and mean cross-entropy over a set."""

    accuracy: float
    loss: float


class Fit(NamedTuple):
    """A fitted model.

    Attributes:
      variables: the model's.
      epochs: number of epochs of training.
      labeled: evaluation on the labeled set S.
      converged: whether the targets were met before training stopped.
    """

    variables: Variables
    epochs: int
    labeled: Evaluation
    converged: bool


class Progress(NamedTuple):
    """The state of training: all that later epochs depend on, besides the arguments of `fit`."""

    epoch: int
    variables: Variables
    optimizer_state: Any


OnEpoch = Callable[[Progress, Evaluation | None], None]
"""Called after one or several epochs with the state of training, and the evaluation on S or None.

It is called whenever S was evaluated, and in between as the arguments of `fit` say.
"""


def begin(variables: Variables, config: TrainingConfig) -> Progress:
    """Returns the state of training before its first epoch. `variables` are copied."""
    optimizer = _optimizer(config)
    return Progress(0, *_copy_and_init(optimizer, dict(variables)))


@functools.partial(jax.jit, static_argnames="optimizer")
def _copy_and_init(
    optimizer: optax.GradientTransformation, variables: Variables
) -> tuple[Variables, Any]:
    return jax.tree.map(jnp.copy, variables), optimizer.init(variables["params"])


def fit(
    model: Any,
    start: Variables | Progress,
    labeled: Examples,
    config: TrainingConfig,
    seed: int,
    round_index: int = 0,
    *,
    capacity: int | None = None,
    eval_batch_size: int = 256,
    on_epoch: OnEpoch = lambda progress, labeled: None,
    call_every: int | None = None,
    mesh: Mesh | None = None,
) -> Fit:
    """Trains a model on the labeled set until the targets of `config` are met.

    Args:
      model: a module called with `(x, train=False)` or `(x)`, as `ApplyFn` describes, or an
        `nnx.Module`, which itself stays as it is.
      start: variables to start from, which are not changed; or the progress of an earlier call with
        the same arguments, whose arrays are used up. Then the result is that of the earlier call,
        bit for bit.
      labeled: the labeled set S, on the host.
      config: optimiser, stopping rule and so on.
      seed: with `round_index`, determines the order of examples and the dropout masks.
      round_index: which round of active learning this is.
      capacity: rows of the device's buffer. Calls with equal capacity share one compiled program;
        changes no result.
      eval_batch_size: number of examples evaluated at a time; changes no result.
      on_epoch: called after each look at S, each multiple of `call_every` and the last epoch; where
        an epoch takes long, after each of them. Must not keep arrays, whose memory is reused.
      call_every: number of epochs; with None the looks decide alone.
      mesh: devices among which each batch is divided, as `parallel.make_mesh` makes it.

    Raises:
      DivergedError: if a loss is not finite.
      UserError: if a label is no class of the model.
    """
    model = nnx_modules.as_model(model)
    count = len(labeled.y)
    capacity = max(capacity or count, count)
    _check_memory(start, labeled.x, capacity, min(config.batch_size, capacity))
    buffer = Examples(*(jnp.asarray(_padded(np.asarray(part[:]), capacity)) for part in labeled))
    buffer = parallel.replicate(buffer, mesh)
    optimizer = _optimizer(config, _last_layer(model, config))
    # `begin` copies the variables, since the epochs donate theirs.
    progress = start if isinstance(start, Progress) else begin(start, config)
    epoch, *state = progress
    variables, optimizer_state = parallel.replicate(state, mesh)
    contract.check_labels(model.apply, variables, labeled.x, labeled.y, config.loss.of_classes)

    def look() -> Evaluation | None:
        """Returns the evaluation on S if it is due after this epoch, else None."""
        if epoch == 0 or (epoch % config.look_every and epoch != config.max_epochs):
            return None
        # In the buffer, without another copy.
        evaluation = _evaluate(
            model.apply, variables, buffer, count, eval_batch_size, mesh, config.loss
        )
        if not math.isfinite(evaluation.loss):
            raise DivergedError(
                f"training diverged: after epoch {epoch} the loss is not finite; a learning rate "
                f"below {config.learning_rate:g} may help"
                f"{contract.explain_not_finite(variables, labeled.x)}"
            )
        return evaluation

    def is_over() -> bool:
        if epoch == config.max_epochs:
            return True
        may_stop = config.has_target and labeled_now is not None and epoch >= config.min_epochs
        return may_stop and config.is_fitted(labeled_now, count)

    intervals = [config.look_every, call_every or config.look_every]
    most_at_once = min(*intervals, LARGEST_DISPATCH)
    at_once = 1  # So many epochs are one call of the program, so that short ones cost no calls.
    key = streams.key(seed, "dropout", round_index)
    labeled_now = look()  # Training may have been interrupted when it was about to stop.
    while not is_over():
        due = min(config.max_epochs, *((epoch // every + 1) * every for every in intervals))
        epochs = range(epoch + 1, min(epoch + at_once, due) + 1)
        orders = [
            streams.generator(seed, "order", round_index, number).permutation(count)
            for number in epochs
        ]
        started = time.perf_counter()
        variables, optimizer_state = _epochs(
            model,
            optimizer,
            min(config.batch_size, capacity),
            variables,
            optimizer_state,
            buffer,
            _padded(np.stack([_padded(order, capacity) for order in orders]), most_at_once),
            _padded(np.array([_learning_rate(config, n) for n in epochs]), most_at_once),
            epochs.start,
            len(epochs),
            count,
            key,
            mesh,
            config.loss,
        )
        epoch = epochs[-1]
        labeled_now = look()  # Waits for a few numbers, which come after the epochs.
        if labeled_now is None:
            jax.block_until_ready(variables)
        short = parallel.smallest(time.perf_counter() - started < SHORT_CALL)
        at_once = min(2 * at_once, most_at_once) if short else max(at_once // 2, 1)
        on_epoch(Progress(epoch, variables, optimizer_state), labeled_now)
    return Fit(variables, epoch, labeled_now, config.is_fitted(labeled_now, count))


def _check_memory(start: Variables | Progress, x: Any, capacity: int, batch_size: int) -> None:
    """Raises `UserError` if training takes more memory than is free, whatever the layers take."""
    variables = start.variables if isinstance(start, Progress) else start
    row = math.prod(x.shape[1:])
    # The labeled set; weights, gradient and moments; a batch as floats, and its standardised form.
    needed = (
        capacity * row * x.dtype.itemsize
        + 4 * resources.tree_bytes(variables)
        + 2 * batch_size * row * 4
    )
    resources.check_device_memory(
        needed,
        f"training on {capacity} inputs of {'×'.join(map(str, x.shape[1:]))}",
        "take smaller inputs, fewer labels, or a smaller batch size of training",
    )


def evaluate(
    apply: ApplyFn,
    variables: Variables,
    examples: Examples,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> Evaluation:
    """Returns accuracy and mean loss over a set, in evaluation mode, block by block.

    Where the inputs are on the device, or on each, all blocks are one call of one program. Others
    are copied block by block, each while the one before is computed.
    """
    return _evaluate(apply, variables, examples, len(examples.y), batch_size, mesh, loss)


def _evaluate(
    apply: ApplyFn,
    variables: Variables,
    examples: Examples,
    size: int,
    batch_size: int,
    mesh: Mesh | None,
    loss: losses.Loss,
) -> Evaluation:
    """Evaluates on the first `size` of the examples, on all where they are not on each device."""
    devices = parallel.num_devices(mesh)
    variables = parallel.replicate(variables, mesh)

    def totals(some: Examples, divided: bool, starts: np.ndarray, counts: np.ndarray) -> Array:
        """Evaluates rows of `some`: those of each device from a start on, so many."""
        spans = np.stack([starts, starts + counts], axis=1)
        return _evaluate_blocks(
            *(apply, mesh, loss, len(some.y) // devices if divided else block_size, divided),
            *(variables, some, parallel.rows(spans, np.arange(devices), mesh)),
        )

    def totals_of_block(slots: np.ndarray, count: int) -> Array:
        positions, counted = order.block(slots, count)
        block = Examples(*(parallel.rows(part, positions, mesh) for part in examples))
        counts = np.zeros(len(positions), int)
        counts[counted] = 1  # On each device those from the front.
        return totals(block, True, np.zeros(devices, int), counts.reshape(devices, -1).sum(axis=1))

    if parallel.is_on_each(examples.x, mesh):
        share = -(-size // devices)
        block_size, starts = bucketed(share, batch_size), share * np.arange(devices)
        found = [totals(examples, False, starts, np.clip(size - starts, 0, share))]
    else:
        order = parallel.Order(examples.x, mesh)
        block_size = bucketed(-(-order.size // devices), batch_size) * devices
        found = list(each_block(totals_of_block, order.size, block_size, smallest=devices))
    # One row for each block of each device; summed in double precision.
    rows = np.concatenate([part.reshape(-1, 2) for part in parallel.fetch(found)])
    correct, total = np.sum(rows, axis=0, dtype=np.float64)
    return Evaluation(float(correct / size), float(total / size))


@functools.partial(jax.jit, static_argnames=("apply", "mesh", "loss", "block_size", "divided"))
def _evaluate_blocks(
    apply: ApplyFn,
    mesh: Mesh | None,
    loss: losses.Loss,
    block_size: int,
    divided: bool,
    variables: Variables,
    examples: Examples,
    spans: Array,
) -> Array:
    """Returns `[devices, blocks, 2]` numbers of right predictions and sums of losses.

    Args:
      apply: the model.
      mesh: the devices.
      loss: of an example.
      block_size: examples that a device evaluates at a time.
      divided: whether each device has a part of the examples, or all of them.
      variables: the model's.
      examples: the set, or a part of it.
      spans: `[devices, 2]` the first row that each device evaluates, and the one after the last.
    """

    def totals(variables: Variables, examples: Examples, spans: Array) -> Array:
        start, stop = spans[0]

        def of_block(index: Array) -> Array:
            slots = start + index * block_size + jnp.arange(block_size)
            x, y = (take_rows(part, jnp.clip(slots, 0, stop - 1)) for part in examples)
            logits = contract.as_outputs(apply(variables, x), block_size).logits
            same = loss.pseudo_labels(logits) == y
            correct = jnp.all(same.reshape(block_size, -1), axis=1)
            each, mask = loss(logits, y), slots < stop
            return jnp.stack([jnp.vdot(mask, correct.astype(each.dtype)), jnp.vdot(mask, each)])

        most = -(-len(examples.y) // block_size)
        none = jnp.zeros((most, 2), jax.eval_shape(of_block, 0).dtype)
        count = (stop - start + block_size - 1) // block_size
        write = lambda index, found: found.at[index].set(of_block(index))
        return jax.lax.fori_loop(0, count, write, none)[None]

    return parallel.on_each(totals, mesh, False, divided, True)(variables, examples, spans)


@functools.partial(
    jax.jit,
    static_argnames=("model", "optimizer", "batch_size", "mesh", "loss"),
    donate_argnames=("variables", "optimizer_state"),
)
def _epochs(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    variables: Variables,
    optimizer_state: Any,
    buffer: Examples,
    orders: Array,
    learning_rates: Array,
    first: Array,
    num_epochs: Array,
    count: Array,
    key: Array,
    mesh: Mesh | None = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> tuple[Variables, Any]:
    """Runs epochs `first`, `first` + 1, …, with the first rows of `orders` and `learning_rates`."""

    def run(index: Array, carry: tuple) -> tuple:
        variables, optimizer_state = carry
        hyperparams = optimizer_state.hyperparams
        rate = learning_rates[index].astype(hyperparams["learning_rate"].dtype)
        optimizer_state = optimizer_state._replace(
            hyperparams={**hyperparams, "learning_rate": rate}
        )
        return _epoch(
            *(model, optimizer, batch_size, variables, optimizer_state, buffer),
            *(orders[index], count, jax.random.fold_in(key, first + index), mesh, loss),
        )

    return jax.lax.fori_loop(0, num_epochs, run, (dict(variables), optimizer_state))


def _epoch(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    variables: Variables,
    optimizer_state: Any,
    buffer: Examples,
    order: Array,
    count: Array,
    key: Array,
    mesh: Mesh | None = None,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> tuple[Variables, Any]:
    """Runs one epoch over the first `count` entries of `order`."""
    num_steps = (count + batch_size - 1) // batch_size
    share, rest = jnp.divmod(count, num_steps)

    def step(index: Array, carry: tuple) -> tuple:
        variables, optimizer_state = carry
        # Equal shares, so that no step has only a few examples.
        start = index * share + jnp.minimum(index, rest)
        stop = start + share + (index < rest)
        slots = start + jnp.arange(parallel.multiple(batch_size, mesh))
        rows = order[jnp.minimum(slots, len(order) - 1)]
        batch = Examples(buffer.x[rows], buffer.y[rows])
        batch, mask = parallel.divided((batch, slots < stop), mesh)
        gradient, _, statistics = batch_gradient(
            model, variables, batch, mask, jax.random.fold_in(key, index), loss
        )
        gradient, statistics = parallel.together((gradient, statistics), mesh)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**statistics, "params": params}, optimizer_state

    return jax.lax.fori_loop(0, num_steps, step, (dict(variables), optimizer_state))


def batch_gradient(
    model: nn.Module,
    variables: Variables,
    batch: Examples,
    mask: Array,
    dropout_key: Array,
    loss: losses.Loss = losses.CROSS_ENTROPY,
) -> tuple[Any, Array, Variables]:
    """Returns gradient and value of the mean loss over unmasked rows, and new statistics.

    Guaranteed: rows where `mask` is False change nothing, BatchNorm statistics included.

    Args:
      model: a module, as in `fit`.
      variables: its variables.
      batch: x `[n, ...]`, y `[n]`.
      mask: `[n]` bool, at least one True.
      dropout_key: for the module's "dropout" stream.
      loss: of each row.
    """
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss_of(params: Any) -> tuple[Array, Variables]:
        with nnx_modules.intercept_calls(functools.partial(_mask_batch_norm, mask)):
            outputs, statistics = model.apply(
                {"params": params, **rest},
                batch.x,
                **contract.train_option(model, True),
                mutable=list(rest),
                rngs={"dropout": dropout_key},
            )
        logits = contract.as_outputs(outputs, len(batch.x)).logits
        each = loss(logits, batch.y)
        return jnp.sum(each, where=mask) / jnp.sum(mask), statistics

    (mean, statistics), gradient = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    return gradient, mean, statistics


def _mask_batch_norm(mask: Array, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Passes the mask to every BatchNorm, so that models need not do it."""
    if contract.is_nnx(context.module) and "batch_stats" in context.module.variables:
        raise UserError(
            "a BatchNorm of NNX in nnx.bridge.to_linen would count the rows that fill up a batch "
            "of training: pass the NNX module itself, which is told to leave them out"
        )
    if nnx_modules.is_batch_norm(context.module) and context.method_name == "__call__":
        x = args[0] if args else kwargs["x"]
        mask = mask.reshape(-1, *[1] * (x.ndim - 1))
        own = kwargs.get("mask")
        kwargs = {**kwargs, "mask": mask if own is None else mask & own}
    return call(*args, **kwargs)


def _optimizer(config: TrainingConfig, last_layer: str | None = None) -> Any:
    """Returns the optimiser; the structure of its state does not depend on the last layer."""
    rate = config.backbone_learning_rate
    share = None if rate is None else rate / config.learning_rate
    return _cached_optimizer(config.optimizer, config.weight_decay, share, last_layer)


@functools.cache
def _cached_optimizer(
    name: str, weight_decay: float, share: float | None, last_layer: str | None
) -> optax.GradientTransformation:
    # Cached because programs are compiled per optimiser object. The learning rate is part of the
    # state, so that a schedule over a number of steps that grows each round compiles once.
    def make(learning_rate: Any) -> optax.GradientTransformation:
        optimizer = OPTIMIZERS[name](learning_rate, weight_decay)
        if share is None:
            return optimizer
        return optax.chain(optimizer, optax.stateless(functools.partial(_slower, share)))

    def _slower(share: float, updates: Any, params: Any) -> Any:
        """Makes the updates of all layers but the last smaller."""
        del params
        of_last = lambda path: any(key.key == last_layer for key in path)
        return jax.tree.map_with_path(
            lambda path, update: update if of_last(path) else share * update, updates
        )

    return optax.inject_hyperparams(make)(learning_rate=0.0)


def _last_layer(model: nn.Module, config: TrainingConfig) -> str | None:
    """Returns the name of a pretrained network's last layer, if others are trained more slowly."""
    if config.backbone_learning_rate is None:
        return None
    if not isinstance(model, models.Pretrained):
        raise UserError(
            "only pretrained networks (models.pretrained) have a backbone_learning_rate"
        )
    return model.weights.head


def _learning_rate(config: TrainingConfig, epoch: int) -> float:
    if config.schedule == "constant":
        return config.learning_rate
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.max_epochs)
    return float(schedule(epoch - 1))


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
