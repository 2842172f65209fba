"""Selection by each strategy, from features of ResNet-18's size on the device."""

import jax
import jax.numpy as jnp
import numpy as np

import dynamical_jax as dj
from benchmarks.jax_contenders import _work
from benchmarks.task import Task, Work

EMBEDDING = 512
NUM_LABELED = 500


def select_from_10_classes(task: Task) -> Work:
    """Selection of `task.batch_size` of `task.pool_size` images by the strategy `task.model`."""
    return _selection(task, 10)


def select_from_101_classes(task: Task) -> Work:
    """The same with as many classes as Caltech-101."""
    return _selection(task, 101)


def _selection(task: Task, num_classes: int) -> Work:
    strategy = dj.strategies.create(task.model)
    key, state = jax.random.key(0), strategy.init()
    if task.model.startswith("dynamical"):  # benchmarks.pool times its scores.
        scores = jax.random.normal(key, (task.pool_size,))
        scored = dj.strategies.dynamical.Changes(scores, None, None, None)
        if task.model == "dynamical_sampled":
            scored = dj.strategies.sampled.Noisy(scored, scores)
    else:
        inputs = jax.random.normal(key, (NUM_LABELED + task.pool_size, num_classes + EMBEDDING))
        labeled = dj.Examples(inputs[:NUM_LABELED], np.zeros(NUM_LABELED, np.int32))
        outputs = inputs[NUM_LABELED:]
        apply = lambda variables, x: dj.Outputs(x[:, :num_classes], jnp.abs(x[:, num_classes:]))
        scored = strategy.score(key, dj.LearnerView(apply, {}, labeled, outputs), state)
        del inputs, labeled, outputs
    jax.block_until_ready(jax.tree.leaves(scored))
    return _work(lambda: strategy.select(key, scored, task.batch_size, state).positions, 1)
