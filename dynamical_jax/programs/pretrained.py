"""The pretrained network that the flags name."""

import functools

from absl import flags

from dynamical_jax import models
from dynamical_jax.errors import UserError
from dynamical_jax.models import Weights, weights
from dynamical_jax.programs import binary, options


def load() -> Weights | None:
    """Returns the weights that the flags name, if any; sets --model where they decide it.

    Raises:
      UserError: if they cannot be read, or a flag has no effect beside them or without them.
    """
    if options.WEIGHTS.value is None:
        for flag in (options.TRAIN, options.BACKBONE_LEARNING_RATE):
            if binary.is_given(flag.name):
                raise UserError(f"--{flag.name} has an effect beside --weights only")
        return None
    if binary.is_given("stem"):
        raise UserError("--stem has no effect beside --weights, which decide it")
    model = options.MODEL.value
    if model in models.FOR_VECTORS:
        if options.TRAIN.value == "all":
            raise UserError(f"--train=all trains the network of --weights, and not {model}")
        return _load(options.WEIGHTS.value)
    found = _load(options.WEIGHTS.value)
    if model not in (None, found.model):
        raise UserError(f"{found.path} holds weights of {found.model}, and --model is {model}")
    if options.TRAIN.value == "head":
        if binary.is_given("backbone_learning_rate"):
            raise UserError("--backbone_learning_rate has an effect with --train=all only")
        flags.FLAGS["model"].value = None  # What is trained is the default for vectors.
    else:
        flags.FLAGS["model"].value = found.model
    return found


def embeds() -> bool:
    """Whether images are embedded, and a model learns from vectors."""
    return options.WEIGHTS.value is not None and options.TRAIN.value == "head"


def image_size(network: Weights | None) -> int | None:
    """Returns the size of images that files are resized to: --image_size, or that of weights."""
    if options.IMAGE_SIZE.value is None and network is not None:
        return network.preprocessing.size
    return options.IMAGE_SIZE.value


def interpolation(network: Weights | None) -> str:
    """Returns by which interpolation image files are resized."""
    return "bilinear" if network is None else network.preprocessing.interpolation


@functools.cache
def _load(path: str) -> Weights:
    return weights.load(path)
