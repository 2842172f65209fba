"""Selection by each strategy, from features of ResNet-18's size on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import dynamical_jax as dj
from benchmarks.jax_contenders import _work
from benchmarks.task import Task, Work

EMBEDDING = 512
SMALL = 128
NUM_LABELED = 500


def select_from_10_classes(task: Task) -> Work:
    """Selection of `task.batch_size` of `task.pool_size` images by the strategy `task.model`."""
    return _selection(task, 10)


def select_from_101_classes(task: Task) -> Work:
    """The same with as many classes as Caltech-101."""
    return _selection(task, 101)


def query_from_small_features(task: Task) -> Work:
    """The whole query from 10 logits and 128 features, since a peer does not score by itself."""
    strategy = dj.strategies.create(task.model)
    view, key = _view(task, 10, SMALL), jax.random.key(0)
    jax.block_until_ready(view.unlabeled)
    score, state = strategy.score, strategy.init()
    select = lambda: strategy.select(key, score(key, view, state), task.batch_size, state)
    return _work(lambda: select().positions, 1)


def _view(task: Task, num_classes: int, size: int) -> dj.LearnerView:
    inputs = jax.random.normal(
        jax.random.key(0), (NUM_LABELED + task.pool_size, num_classes + size)
    )
    labeled = dj.Examples(inputs[:NUM_LABELED], np.zeros(NUM_LABELED, np.int32))
    apply = lambda variables, x: dj.Outputs(x[:, :num_classes], jnp.abs(x[:, num_classes:]))
    if task.model.endswith("bald"):  # Dropout of the embedding, and a last layer after it.
        last = 0.1 * jax.random.normal(jax.random.key(1), (size, num_classes))
        drop = nn.Dropout(0.5, deterministic=True)
        apply = lambda variables, x: drop.apply({}, jnp.abs(x[:, num_classes:])) @ last
    return dj.LearnerView(apply, {}, labeled, inputs[NUM_LABELED:])


def _selection(task: Task, num_classes: int) -> Work:
    strategy = dj.strategies.create(task.model)
    key, state = jax.random.key(0), strategy.init()
    if task.model.startswith("dynamical"):  # benchmarks.pool times its scores.
        scores = jax.random.normal(key, (task.pool_size,))
        scored = dj.strategies.dynamical.Changes(scores, None, None, None)
        if task.model == "dynamical_sampled":
            scored = dj.strategies.sampled.Noisy(scored, scores)
    else:
        scored = strategy.score(key, _view(task, num_classes, EMBEDDING), state)
    jax.block_until_ready(jax.tree.leaves(scored))
    return _work(lambda: strategy.select(key, scored, task.batch_size, state).positions, 1)
