"""Θ of a batch of images, by this library and by neural-tangents."""

import functools
from collections.abc import Callable
from typing import Any

import jax

import dynamical_jax as dj
from benchmarks.jax_contenders import _images, _on_device, _work
from benchmarks.task import IMAGE_SHAPE, MEAN, STD, Task, Work

WIDTHS = (64, 64, 64)


def empirical(task: Task) -> Work:
    """`ntk.empirical_ntk`."""
    return _kernel(task, dj.ntk.empirical_ntk, dj.ntk.empirical.CHUNK_SIZE)


def blocks_of_60(task: Task) -> Work:
    """`nt.batch(nt.empirical_ntk_fn(…), 60)`."""
    return _kernel(task, functools.partial(dj.ntk.reference_ntk, batch_size=60), 60)


def blocks_of_300(task: Task) -> Work:
    """The same with blocks of 300."""
    return _kernel(task, functools.partial(dj.ntk.reference_ntk, batch_size=300), 300)


def at_once(task: Task) -> Work:
    """`nt.empirical_ntk_fn` of all images at once."""
    return _kernel(task, dj.ntk.reference_ntk, task.batch_size)


def _kernel(task: Task, function: Callable[..., Any], block: int) -> Work:
    channels = IMAGE_SHAPE[-1]
    network = dj.models.NTKCNN(1, WIDTHS)
    model = dj.models.Standardized(network, (MEAN,) * channels, (STD,) * channels)
    x = _images(task.batch_size)
    variables = _on_device(dj.models.init(model, jax.random.key(0), x))
    call = lambda size: function(model.apply, variables, x[:size])
    return _work(lambda: call(task.batch_size), 1, warm_up=lambda: call(block))
