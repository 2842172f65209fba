"""The task of a contender, and the work it returns; imports neither JAX nor PyTorch."""

from collections.abc import Callable
from typing import Any, NamedTuple

IMAGE_SHAPE = (32, 32, 3)
IMAGE_SHAPES = {"vit_s": (224, 224, 3)}
"""Model → shape of its images, where it is another."""
NUM_CLASSES = 10
# uint8 images are standardised with these.
MEAN, STD = 127.5, 64.0

STEPS = 4
"""Training steps in one call: an epoch of so many minibatches."""

CHUNK_BYTES = 2**30
"""Per-example gradients that `vmap`, here and in PyTorch, may form at a time."""


class Task(NamedTuple):
    """What a contender is to do.

    Attributes:
      model: a key of `MODELS` in `jax_contenders` and in `torch_contenders`.
      batch_size: images in a batch; None lets the library choose.
      pool_size: images in the pool, where there is one.
      precision: of matrix products; "default" for each framework's own.
      device: "cpu" or "gpu".
      num_features: of vectors, where the pool holds them.
    """

    model: str
    batch_size: int | None
    pool_size: int | None = None
    precision: str = "default"
    device: str = "cpu"
    num_features: int | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the model's images."""
        return IMAGE_SHAPES.get(self.model, IMAGE_SHAPE)


class Work(NamedTuple):
    """How a contender does its task; parameters and images exist, and nothing is compiled yet.

    Attributes:
      call: does a part of the work, and waits until it is done; returns the results.
      calls: how many calls the whole work would take: 5⅓ where a call scores 24 of 128 images, ¼
        where it is an epoch and the work is one of its four steps.
      warm_up: called first, if `call` itself would take too long; None calls `call`.
      device_memory: returns (bytes in use, peak of bytes in use) of an accelerator; None where the
        memory of the process counts.
    """

    call: Callable[[], Any]
    calls: float
    warm_up: Callable[[], Any] | None = None
    device_memory: Callable[[], tuple[int, int]] | None = None
