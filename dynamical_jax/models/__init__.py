"""Flax Linen models: `apply(variables, x, train) -> Outputs(logits, embedding)`.

`MODELS` holds the networks of the paper's experiments, `ntk_cnn` of its theory, and `linear` and
`mlp` for vectors. Your own Flax modules work as well (docs/extend.md).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dynamical_jax import contract, nnx_modules, resources, words
from dynamical_jax.errors import UserError
from dynamical_jax.models.cnn import CNN as CNN
from dynamical_jax.models.linear import Linear as Linear
from dynamical_jax.models.mlp import MLP as MLP
from dynamical_jax.models.ntk_cnn import NTKCNN as NTKCNN
from dynamical_jax.models.parameter import Parameter as Parameter
from dynamical_jax.models.resnet import STEMS as STEMS
from dynamical_jax.models.resnet import ResNet18 as ResNet18
from dynamical_jax.models.vgg import VGG11 as VGG11
from dynamical_jax.models.vit import ViT as ViT
from dynamical_jax.models.vit import ViTB as ViTB
from dynamical_jax.models.vit import ViTS as ViTS
from dynamical_jax.models.vit import ViTTi as ViTTi
from dynamical_jax.models.weights import Weights as Weights
from dynamical_jax.nnx_modules import from_nnx as from_nnx
from dynamical_jax.nnx_modules import into_nnx as into_nnx
from dynamical_jax.types import AnyArray, Array, Variables

MODELS: Mapping[str, Callable[..., nn.Module]] = words.Registry(
    "model",
    {
        "cnn": CNN,
        "resnet18": ResNet18,
        "vgg11": VGG11,
        "vit_ti": ViTTi,
        "vit_s": ViTS,
        "vit_b": ViTB,
        "ntk_cnn": NTKCNN,
        "linear": Linear,
        "mlp": MLP,
    },
)

FOR_VECTORS = ("linear", "mlp")
"""The models that take vectors; all take images."""

DEFAULTS: Mapping[str, str] = {"images": "cnn", "vectors": "linear"}
"""`Dataset.kind` → the default model."""

LEARNING_RATE = 1e-3
"""Learning rate of Adam for models that are not in `LEARNING_RATES`; the paper's (App. C.1)."""

LEARNING_RATES: Mapping[str, float] = {
    "linear": 1e-2,
    **dict.fromkeys(("vit_ti", "vit_s", "vit_b"), 1e-4),
}
"""name → learning rate of Adam, for models that need ten times the epochs with the usual, or that
the usual spoils."""

FEATURE_SCALES = ("shared", "each")
"""Ways to scale vectors: by one deviation for all features, or each feature by its own."""


class Standardized(nn.Module):
    """A model of raw inputs: standardises each channel, or feature, then applies `model`.

    Images stay uint8 on the host and on the way to the device; they become floats only here.

    Attributes:
      model: a Flax module of standardised images or vectors.
      mean: mean of each channel of images, of each feature of vectors, in units of the raw inputs.
      std: standard deviation of each; 0, of a constant, counts as 1.
    """

    model: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "model", nnx_modules.as_model(self.model))
        super().__post_init__()

    def __call__(self, x: Any, train: bool = False) -> Any:
        """Returns the outputs of `model` for raw images `[n, h, w, c]` or vectors `[n, d]`."""
        return self.model(self.standardize(x), **contract.train_option(self.model, train))

    @nn.nowrap
    def standardize(self, x: Any) -> Array:
        """Returns the standardised input of `model`, from raw images or vectors `[n, d]`."""
        dtype = jnp.result_type(jnp.float32, x.dtype)
        # Of as many axes as x, so that nothing is broadcast by rank.
        shape = (1,) * (x.ndim - 1) + (-1,)
        mean, std = (jnp.asarray(np.reshape(part, shape), dtype) for part in (self.mean, self.std))
        return (x - mean) / jnp.where(std == 0, 1, std)


class Pretrained(Standardized):
    """A network with the weights of a file: `init` begins with them.

    Images of another size are resized; grey ones count as RGB with three equal channels.

    Attributes:
      weights: of the file; None where variables are at hand.
      size: height and width at which the network sees the images.
      interpolation: by which they are resized.
    """

    weights: Weights | None
    size: int
    interpolation: str

    @nn.nowrap
    def standardize(self, x: Any) -> Array:
        """Returns the input of `model`, resized and standardised as the weights need it."""
        if x.shape[1:3] != (self.size, self.size):
            method = {"bilinear": "linear", "bicubic": "cubic"}[self.interpolation]
            shape = (x.shape[0], self.size, self.size, x.shape[3])
            x = jax.image.resize(jnp.asarray(x, jnp.float32), shape, method, antialias=True)
        return super().standardize(x)

    @nn.nowrap
    def with_weights(self, variables: Variables) -> Variables:
        """Returns variables of this module with the values of the file, as `Weights.put` does."""
        inner = self.weights.put({name: part["model"] for name, part in variables.items()})
        return {name: {"model": part} for name, part in inner.items()}


def pretrained(weights: Weights, num_classes: int, image_size: int | None = None) -> Pretrained:
    """Returns a network with weights of a file, of which `init` begins training.

    Args:
      weights: what `weights.load` returned.
      num_classes: K; if the file has another number, the last layer is a new one.
      image_size: height and width at which it sees the images; by default that of the weights.
    """
    module = MODELS[weights.model](num_classes, **dict(weights.attributes))
    size, mean, std, interpolation = weights.preprocessing
    mean, std = (tuple(255 * value for value in part) for part in (mean, std))
    return Pretrained(module, mean, std, weights, image_size or size, interpolation)


def create(
    name: str, dataset: Any, *, feature_scale: str = "shared", **options: Any
) -> Standardized:
    """Returns the model called `name` for the classes and statistics of `dataset`.

    Images are standardised by channel. For vectors each feature is centred, and all are divided by
    one number, the root of their mean variance. In embeddings, features that vary little carry
    little information; dividing each by its own deviation gives them the same weight as the rest
    (this costs 4 to 9 points of accuracy on two data sets; results/README.md).

    Args:
      name: a key of `MODELS`.
      dataset: a `datasets.Dataset`.
      feature_scale: "each" divides each feature of vectors by its own deviation, for features
        measured in different units.
      **options: further attributes of the module, such as `stem="cifar"`.

    Raises:
      UserError: if the name is unknown, or the model takes images and the data are vectors.
    """
    check_name(name, dataset.kind)
    module = MODELS[name](num_classes=len(dataset.class_names), **options)
    return Standardized(module, dataset.mean, scale(dataset.std, dataset.kind, feature_scale))


def scale(std: Sequence[float], kind: str, feature_scale: str = "shared") -> tuple[float, ...]:
    """Returns the number by which each channel of images, or feature of vectors, is divided.

    Args:
      std: the deviation of each.
      kind: "images" or "vectors".
      feature_scale: one of `FEATURE_SCALES`.

    Raises:
      UserError: if there is no such scale.
    """
    words.check_known("feature_scale", feature_scale, FEATURE_SCALES)
    if kind == "vectors" and feature_scale == "shared":
        return (float(np.sqrt(np.mean(np.square(std)))),) * len(std)
    return tuple(std)


def check_name(name: str, kind: str = "images") -> None:
    """Raises `UserError` unless `name` is a key of `MODELS` that takes this kind of inputs."""
    if name not in MODELS:
        words.check_known("model", name, FOR_VECTORS if kind == "vectors" else MODELS)
    if kind == "vectors" and name not in FOR_VECTORS:
        raise UserError(
            f"{name} takes images, and the data are vectors: these need "
            f"--model={' or '.join(FOR_VECTORS)}"
        )


def init(model: Any, key: Array, x: Any) -> Variables:
    """Returns random initial variables of `model` for inputs shaped like `x[:1]`.

    Those of a `Pretrained` are the weights of its file; those of an `nnx.Module` are its own, those
    of a function that makes one are of the key.

    Raises:
      UserError: if the model cannot take images of this size.
    """
    model, x = nnx_modules.as_model(model), jnp.asarray(x[:1])
    needed = resources.tree_bytes(jax.eval_shape(functools.partial(_init, model), key, x))
    size = "×".join(map(str, x.shape[1:3]))
    resources.check_device_memory(
        needed, f"a model of inputs of {size}", "take smaller inputs, or another model"
    )
    variables = _init(model, key, x)
    return model.with_weights(variables) if isinstance(model, Pretrained) else variables


@jax.jit
def grow(variables: Variables, larger: Variables) -> Variables:
    """Returns the variables of a model to which classes are added.

    Guaranteed: the logits of the former classes do not change.

    Args:
      variables: variables of the model with fewer classes.
      larger: initial variables of the model with more classes, the new ones last.
    """

    def put(old: AnyArray, new: Array) -> Array:
        return new.at[tuple(map(slice, old.shape))].set(old)

    return jax.tree.map(put, variables, larger)


@functools.partial(jax.jit, static_argnames="model")  # Compiled once for the runs of a process.
def _init(model: nn.Module, key: Array, x: Array) -> Variables:
    # Dropout of NNX asks for its stream when it is made.
    return model.init({"params": key, "dropout": key}, x)
