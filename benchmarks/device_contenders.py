"""Scoring and training on several devices: what `benchmarks.scaling` times.

  python -m benchmarks.device_contenders cnn 128

prints, as JSON, what eight devices exchange, and how many floating-point operations one does.
"""

import functools
import json
import sys
from typing import Any

import jax
import numpy as np

import dynamical_jax as dj
from benchmarks import jax_contenders
from benchmarks.task import STEPS, Task, Work
from dynamical_jax import parallel, training
from dynamical_jax.gradients import scoring

MOST_DEVICES = 8


def score(num_devices: int, task: Task) -> Work:
    """A block of `batch_size` images, divided, in one call of the program that scores."""
    mesh = parallel.make_mesh(num_devices)
    program, arguments = _scoring(mesh, task)
    return jax_contenders._work(lambda: program(*arguments), 1)


def train(num_devices: int, task: Task) -> Work:
    """The steps of an epoch, each with a batch of `batch_size` images, divided, with Adam."""
    mesh = parallel.make_mesh(num_devices)
    program, arguments, state = _training(mesh, task)

    def epoch() -> Any:
        state[:] = program(*arguments(*state))
        return state

    return jax_contenders._work(epoch, 1 / STEPS)


score_on_1, score_on_2, score_on_4, score_on_8 = (
    functools.partial(score, count) for count in (1, 2, 4, 8)
)
train_on_1, train_on_2, train_on_4, train_on_8 = (
    functools.partial(train, count) for count in (1, 2, 4, 8)
)


def _scoring(mesh: Any, task: Task) -> tuple[Any, tuple]:
    model = jax_contenders._model(task)
    variables, direction = parallel.replicate(
        (
            jax_contenders._variables(model, task),
            jax_contenders._variables(model, task, seed=1)["params"],
        ),
        mesh,
    )
    images = parallel.rows(
        jax_contenders._images(task.batch_size, task), np.arange(task.batch_size), mesh
    )
    engine = dj.gradients.ENGINES["factored"]
    block = dj.Examples(images, None)
    return scoring._score_block, (model.apply, engine, variables, block, direction, mesh)


def _training(mesh: Any, task: Task, steps: int = STEPS) -> tuple[Any, Any, list]:
    model, size = jax_contenders._model(task), steps * task.batch_size
    buffer = parallel.replicate(
        dj.Examples(jax_contenders._images(size, task), jax_contenders._labels(size)), mesh
    )
    optimizer = training._optimizer(dj.TrainingConfig())
    variables = jax_contenders._variables(model, task)
    state = list(parallel.replicate((variables, optimizer.init(variables["params"])), mesh))
    order, rate = np.random.default_rng(0).permutation(size)[None], np.array([1e-3])
    key = dj.streams.key(0, "dropout", 0)

    def arguments(variables: Any, optimizer_state: Any) -> tuple:
        setting = (model, optimizer, task.batch_size, variables, optimizer_state, buffer)
        return (*setting, order, rate, 1, 1, size, key, mesh)

    return training._epochs, arguments, state


def facts(task: Task) -> dict[str, Any]:
    """Returns collectives on `MOST_DEVICES` devices, and operations of one device on one share."""
    mesh = parallel.make_mesh(MOST_DEVICES)
    program, arguments = _scoring(mesh, task)
    scored = program.lower(*arguments).compile()
    program, arguments, state = _training(mesh, task)
    trained = program.lower(*arguments(*state)).compile()
    return {
        "parameter_bytes": dj.resources.tree_bytes(state[0]["params"]),
        "score": parallel.collectives(scored),
        "train": parallel.collectives(trained),  # Of one step: epochs and steps are loops.
        "gradient_flops": _gradient_flops(task),
    }


def _gradient_flops(task: Task) -> float:
    """Floating-point operations of the gradient of a batch, as the compiler counts them."""
    model = jax_contenders._model(task)
    variables = jax_contenders._variables(model, task)
    batch = dj.Examples(
        jax_contenders._images(task.batch_size, task), jax_contenders._labels(task.batch_size)
    )
    step = jax.jit(functools.partial(training.batch_gradient, model))
    mask = np.ones(task.batch_size, bool)
    compiled = step.lower(variables, batch, mask, jax.random.key(0)).compile()
    return compiled.cost_analysis()["flops"]


if __name__ == "__main__":
    print(json.dumps(facts(Task(sys.argv[1], int(sys.argv[2])))))
