"""Reads weights that PyTorch or JAX programs have saved, into the models of this package.

A table for each model and each way to name its tensors says where a parameter comes from. Each
tensor of a file is used exactly once, or the file is refused, with the names of those that are not.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax import words
from dynamical_jax.errors import UserError
from dynamical_jax.models import tensor_files, vit
from dynamical_jax.types import Variables


class Preprocessing(NamedTuple):
    """The images that a network was trained on.

    Attributes:
      size: their height and width.
      mean: of each channel, of values from 0 to 1, which was subtracted.
      std: likewise, by which was divided.
      interpolation: by which they were resized, "bilinear" or "bicubic".
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


IMAGENET = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
DINOV2 = IMAGENET._replace(interpolation="bicubic")
AUGREG = Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
BIG_VISION = AUGREG._replace(interpolation="bilinear")


class Source(NamedTuple):
    """Where a parameter comes from: names of tensors in a file, and what is made of them."""

    names: tuple[str, ...]
    convert: Callable[..., np.ndarray]


Table = Mapping[str, Source]
"""Path of a parameter, or of a statistic of BatchNorm, joined by slashes → where it comes from."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a file, equal to others if the files are.

    Attributes:
      path: of the file.
      model: the key of `models.MODELS` that they are of.
      attributes: name and value of each attribute of the module that they decide.
      preprocessing: of the images.
      names: whose names the tensors have.
      checksum: of the file.
      head: the module's last layer.
      values: path of a parameter → its value; without the last layer if the file has none.
    """

    path: str = dataclasses.field(compare=False)
    model: str
    attributes: tuple[tuple[str, Any], ...]
    preprocessing: Preprocessing
    names: str
    checksum: int
    head: str
    values: Mapping[str, np.ndarray] = dataclasses.field(compare=False, repr=False)

    @property
    def num_classes(self) -> int | None:
        """The number of outputs of the last layer; None if the file has none."""
        kernel = self.values.get(f"params/{self.head}/kernel")
        return None if kernel is None else kernel.shape[1]

    def describe(self, num_classes: int | None = None) -> str:
        """Returns a line that says what the file holds, and what is not used of it.

        Args:
          num_classes: K of the new last layer; None if only embeddings are wanted.
        """
        size = self.preprocessing.size
        line = f"{self.path}: {self.model} with {self.names}'s names, for images of {size}×{size}"
        if num_classes is None or num_classes == self.num_classes:
            return line
        if self.num_classes is None:
            new = words.count(num_classes, "class", "classes")
            return f"{line}; it has no last layer: there is a new one for {new}"
        old = words.count(self.num_classes, "class", "classes")
        return f"{line}; its last layer, for {old}, is replaced by a new one for {num_classes}"

    def put(self, variables: Variables) -> Variables:
        """Returns variables of the module with the values of the file.

        The last layer stays as it is if its number of classes is another.

        Raises:
          UserError: if the shape of another parameter differs.
        """
        return _replaced(variables, self._value, ())

    def _value(self, path: str, old: Any) -> Any:
        new = self.values.get(path)
        if path.endswith("positions/value"):
            new = vit.resize_positions(new, len(old))
        if path.split("/")[1] == self.head and (new is None or new.shape != old.shape):
            return old
        if new.shape != old.shape:
            raise UserError(
                f"{self.path}: {path.partition('/')[2]} is of shape {list(new.shape)}, and "
                f"{self.model} needs {list(old.shape)}"
            )
        return new.astype(old.dtype)


def load(path: str | os.PathLike) -> Weights:
    """Returns the weights of a file.

    Names of torchvision and timm are known of resnet18 and vgg11; of the vision transformers those
    of torchvision, timm, DINOv2, transformers (its DINOv2) and big_vision.

    Args:
      path: a .safetensors, .npz or PyTorch file.

    Raises:
      UserError: if it cannot be read, or holds something else, with the names that do not fit.
    """
    path = os.fspath(path)
    tensors = {_plain(name): value for name, value in tensor_files.read(path).items()}
    family = next((family for family in FAMILIES if family.marker in tensors), None)
    if family is None:
        known = ", ".join(f"{family.marker} ({family.names})" for family in FAMILIES)
        raise UserError(
            f"{path} holds no weights of a model that is known here: it has {_listed(tensors)}; "
            f"known are files with {known}"
        )
    found, attributes, preprocessing, table = family.describe(path, tensors)
    head = family.head
    sources = {name for source in table.values() for name in source.names}
    of_head = {n for p, source in table.items() if f"/{head}/" in p for n in source.names}
    if not of_head & set(tensors):  # As files have it that are for embeddings only.
        table = {path: source for path, source in table.items() if f"/{head}/" not in path}
        sources -= of_head
    if missing := sorted(sources - set(tensors)):
        raise UserError(f"{path}: {found} needs {_listed(missing)}, which it does not have")
    ignored = [name for name in tensors if re.fullmatch(UNUSED, name)]
    if unused := sorted(set(tensors) - sources - set(ignored)):
        raise UserError(f"{path}: {found} has no use for {_listed(unused)}")
    values = {}
    for place, source in table.items():
        try:
            values[place] = source.convert(*(tensors[name] for name in source.names))
        except ValueError as error:
            shapes = [list(tensors[name].shape) for name in source.names]
            raise UserError(
                f"{path}: {', '.join(source.names)} of shape {shapes} is not that of {found}"
            ) from error
        if not np.all(np.isfinite(values[place])):
            raise UserError(f"{path}: {source.names[0]} holds numbers that are not finite")
    attributes = tuple(sorted(attributes.items()))
    checksum = tensor_files.checksum(path)
    preprocessing = _beside(path, preprocessing)
    return Weights(path, found, attributes, preprocessing, family.names, checksum, head, values)


def _beside(path: str, preprocessing: Preprocessing) -> Preprocessing:
    """Returns the preprocessing that a config.json of timm beside a file has; else the given."""
    try:
        config = json.loads(pathlib.Path(path).with_name("config.json").read_bytes())
        config = config.get("pretrained_cfg", config)
        return Preprocessing(
            int(config["input_size"][-1]),
            tuple(map(float, config["mean"])),
            tuple(map(float, config["std"])),
            "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return preprocessing


# Counters of BatchNorm, and a token that only training by DINO's masks needs.
UNUSED = r".*num_batches_tracked|mask_token|embeddings\.mask_token"


def _plain(name: str) -> str:
    """Returns a name without what wrappers put before all, and as newer torchvisions have it."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


# What is made of tensors.


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _first(x: np.ndarray) -> np.ndarray:
    """Of a token or a table with an axis for the examples."""
    (x,) = x
    return x


def _row(x: np.ndarray) -> np.ndarray:
    return x.reshape(1, -1)


def _conv(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0)


def _dense(x: np.ndarray) -> np.ndarray:
    # timm keeps some dense layers as convolutions of 1×1.
    return x.reshape(x.shape[:2]).T if x.ndim == 4 else x.transpose(1, 0)


def _dense_of_map(x: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Of a dense layer on a map that PyTorch flattens with the channels first."""
    return x.reshape(-1, channels, size, size).transpose(2, 3, 1, 0).reshape(-1, len(x))


def _patches(x: np.ndarray) -> np.ndarray:
    return _conv(x).reshape(-1, len(x))


def _joined(*parts: np.ndarray) -> np.ndarray:
    """Of query, key and value; their dense kernels `[out, in]` or biases."""
    return np.concatenate(parts).T


def _joined_heads(*parts: np.ndarray) -> np.ndarray:
    """Of Flax's query, key and value, `[in, heads, out]` or `[heads, out]`."""
    return np.concatenate(
        [part.reshape(len(part), -1) if part.ndim == 3 else part.reshape(-1) for part in parts], -1
    )


def _token_before(table: np.ndarray) -> np.ndarray:
    """Gives the class token, of which big_vision's table has no entry, zeros."""
    (table,) = table
    if round(len(table) ** 0.5) ** 2 == len(table):
        return np.concatenate([np.zeros_like(table[:1]), table])
    return table


def _layer(place: str, name: str, convert: Callable[..., Any] = _dense) -> Iterator:
    """Yields the entries of a layer with a kernel and a bias."""
    yield f"params/{place}/kernel", Source((f"{name}.weight",), convert)
    yield f"params/{place}/bias", Source((f"{name}.bias",), _same)


def _norm(place: str, name: str, running: bool = False) -> Iterator:
    yield f"params/{place}/scale", Source((f"{name}.weight",), _same)
    yield f"params/{place}/bias", Source((f"{name}.bias",), _same)
    if running:
        yield f"batch_stats/{place}/mean", Source((f"{name}.running_mean",), _same)
        yield f"batch_stats/{place}/var", Source((f"{name}.running_var",), _same)


# Models.


class Described(NamedTuple):
    """The model that a file holds: key, attributes of the module, images, and its table."""

    model: str
    attributes: dict[str, Any]
    preprocessing: Preprocessing
    table: Table


class Family(NamedTuple):
    """A way to name tensors.

    Attributes:
      names: whose names these are.
      marker: a tensor that only such files have.
      head: our name of the last layer.
      describe: returns what a file holds, from its path and its tensors.
    """

    names: str
    marker: str
    head: str
    describe: Callable[[str, Mapping[str, np.ndarray]], Described]


def _resnet18(path: str, tensors: Mapping[str, np.ndarray]) -> Described:
    table = {"params/conv1/kernel": Source(("conv1.weight",), _conv)}
    table |= dict(_norm("bn1", "bn1", running=True))
    for stage in range(1, 5):
        for block in range(2):
            place, name = f"layer{stage}_{block}", f"layer{stage}.{block}"
            for number in (1, 2):
                source = Source((f"{name}.conv{number}.weight",), _conv)
                table[f"params/{place}/conv{number}/kernel"] = source
                table |= dict(_norm(f"{place}/bn{number}", f"{name}.bn{number}", running=True))
            if stage > 1 and block == 0:
                source = Source((f"{name}.downsample.0.weight",), _conv)
                table[f"params/{place}/downsample_conv/kernel"] = source
                table |= dict(_norm(f"{place}/downsample_bn", f"{name}.downsample.1", running=True))
    table |= dict(_layer("fc", "fc"))
    stem = "cifar" if tensors["conv1.weight"].shape[-1] == 3 else "imagenet"
    return Described("resnet18", {"stem": stem}, IMAGENET, table)


def _vgg11(path: str, tensors: Mapping[str, np.ndarray]) -> Described:
    table = {}
    for index, place in enumerate((0, 3, 6, 8, 11, 13, 16, 18)):
        table |= dict(_layer(f"conv{index}", f"features.{place}", _conv))
    names = ("classifier.0", "classifier.3", "classifier.6")
    if "pre_logits.fc1.weight" in tensors:
        names = ("pre_logits.fc1", "pre_logits.fc2", "head.fc")
    first = functools.partial(_dense_of_map, size=7, channels=512)
    for index, (name, convert) in enumerate(zip(names, (first, _dense, _dense), strict=True)):
        table |= dict(_layer(f"fc{index + 1}", name, convert))
    return Described("vgg11", {}, IMAGENET, table)


WIDTHS = {192: "vit_ti", 384: "vit_s", 768: "vit_b"}
LARGEST_SIZE = 448
"""Transformers for larger images, such as DINOv2's for 518×518, see them at 224×224."""


class _Names(NamedTuple):
    """Names of the tensors of a vision transformer in PyTorch, `{}` being the number of a block."""

    token: str
    table: str
    patches: str
    qkv: tuple[str, ...]
    proj: str
    norms: tuple[str, str]
    dense: tuple[str, str]
    scales: tuple[str, str]
    norm: str
    head: str


TIMM = _Names(
    token="cls_token",
    table="pos_embed",
    patches="patch_embed.proj",
    qkv=("blocks.{}.attn.qkv.",),
    proj="blocks.{}.attn.proj",
    norms=("blocks.{}.norm1", "blocks.{}.norm2"),
    dense=("blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2"),
    scales=("blocks.{}.ls1.gamma", "blocks.{}.ls2.gamma"),
    norm="norm",
    head="head",
)
TORCHVISION = _Names(
    token="class_token",
    table="encoder.pos_embedding",
    patches="conv_proj",
    qkv=("encoder.layers.encoder_layer_{}.self_attention.in_proj_",),
    proj="encoder.layers.encoder_layer_{}.self_attention.out_proj",
    norms=("encoder.layers.encoder_layer_{}.ln_1", "encoder.layers.encoder_layer_{}.ln_2"),
    dense=("encoder.layers.encoder_layer_{}.mlp.0", "encoder.layers.encoder_layer_{}.mlp.3"),
    scales=("", ""),
    norm="encoder.ln",
    head="heads.head",
)
TRANSFORMERS = _Names(
    token="embeddings.cls_token",
    table="embeddings.position_embeddings",
    patches="embeddings.patch_embeddings.projection",
    qkv=tuple(
        f"encoder.layer.{{}}.attention.attention.{part}." for part in ("query", "key", "value")
    ),
    proj="encoder.layer.{}.attention.output.dense",
    norms=("encoder.layer.{}.norm1", "encoder.layer.{}.norm2"),
    dense=("encoder.layer.{}.mlp.fc1", "encoder.layer.{}.mlp.fc2"),
    scales=("encoder.layer.{}.layer_scale1.lambda1", "encoder.layer.{}.layer_scale2.lambda1"),
    norm="layernorm",
    head="classifier",
)


def _vit(names: _Names, path: str, tensors: Mapping[str, np.ndarray]) -> Described:
    """Of PyTorch's vision transformers."""
    table = {
        "params/class_token/value": Source((names.token,), _first),
        "params/positions/value": Source((names.table,), _first),
        **dict(_layer("patch_embed", names.patches, _patches)),
        **dict(_norm("norm", names.norm)),
        **dict(_layer("head", names.head)),
    }
    depth = _depth(tensors, names.norms[0] + ".weight")
    scaled = names.scales[0].format(0) in tensors
    for index in range(depth):
        place = f"block{index}"
        for kind, part in (("kernel", "weight"), ("bias", "bias")):
            parts = tuple(name.format(index) + part for name in names.qkv)
            table[f"params/{place}/qkv/{kind}"] = Source(parts, _joined)
        table |= dict(_layer(f"{place}/proj", names.proj.format(index)))
        for number in (1, 2):
            table |= dict(_norm(f"{place}/norm{number}", names.norms[number - 1].format(index)))
            table |= dict(_layer(f"{place}/fc{number}", names.dense[number - 1].format(index)))
            if scaled:
                source = Source((names.scales[number - 1].format(index),), _row)
                table[f"params/{place}/ls{number}/value"] = source
    # Of weights with LayerScale DINOv2's are the usual ones, of the others timm's AugReg.
    preprocessing = IMAGENET if names is TORCHVISION else DINOV2 if scaled else AUGREG
    return _transformer(
        path,
        {"depth": depth, "layer_scale": scaled},
        preprocessing,
        table,
        width=tensors[names.token].shape[-1],
        patch_size=_shape(tensors, f"{names.patches}.weight", (16,))[-1],
        num_positions=_shape(tensors, names.table, (1, 197))[1],
    )


def _big_vision(path: str, tensors: Mapping[str, np.ndarray]) -> Described:
    """Of the vision transformers of big_vision, and those before it with the same names."""
    old = "Transformer/posembed_input/pos_embedding"
    token_table = old if old in tensors else "pos_embedding"

    def layer(place: str, name: str, kinds: tuple[str, str] = ("kernel", "bias")) -> Iterator:
        for kind in kinds:
            yield f"params/{place}/{kind}", Source((f"{name}/{kind}",), _same)

    flat = lambda x: x.reshape(-1, x.shape[-1])
    table = {
        "params/class_token/value": Source(("cls",), _first),
        "params/positions/value": Source((token_table,), _token_before),
        "params/patch_embed/kernel": Source(("embedding/kernel",), flat),
        "params/patch_embed/bias": Source(("embedding/bias",), _same),
        **dict(layer("norm", "Transformer/encoder_norm", ("scale", "bias"))),
        **dict(layer("head", "head")),
    }
    block = "Transformer/encoderblock_{}/"
    depth = _depth(tensors, f"{block}LayerNorm_0/scale")
    # Modules were numbered together once, and each kind by itself since.
    before = f"{block}MlpBlock_3/Dense_0/kernel".format(0) in tensors
    attention, second, mlp = (
        ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
        if before
        else ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    )
    for index in range(depth):
        place, name = f"block{index}", block.format(index)
        for kind in ("kernel", "bias"):
            parts = tuple(f"{name}{attention}/{part}/{kind}" for part in ("query", "key", "value"))
            table[f"params/{place}/qkv/{kind}"] = Source(parts, _joined_heads)
        out = f"{name}{attention}/out"
        table[f"params/{place}/proj/kernel"] = Source((f"{out}/kernel",), flat)
        table[f"params/{place}/proj/bias"] = Source((f"{out}/bias",), _same)
        table |= dict(layer(f"{place}/norm1", f"{name}LayerNorm_0", ("scale", "bias")))
        table |= dict(layer(f"{place}/norm2", f"{name}{second}", ("scale", "bias")))
        table |= dict(layer(f"{place}/fc1", f"{name}{mlp}/Dense_0"))
        table |= dict(layer(f"{place}/fc2", f"{name}{mlp}/Dense_1"))
    return _transformer(
        path,
        {"depth": depth, "gelu": "tanh"},
        BIG_VISION,
        table,
        width=tensors["embedding/kernel"].shape[-1],
        patch_size=tensors["embedding/kernel"].shape[0],
        num_positions=_shape(tensors, token_table, (1, 197))[1],
    )


def _transformer(
    path: str,
    attributes: dict[str, Any],
    preprocessing: Preprocessing,
    table: Table,
    width: int,
    patch_size: int,
    num_positions: int,
) -> Described:
    """Returns what a file of a vision transformer holds, from the shapes of its tensors."""
    if width not in WIDTHS:
        known = ", ".join(f"{width} ({model})" for width, model in WIDTHS.items())
        raise UserError(f"{path}: a vision transformer of width {width}; known are {known}")
    size = int(num_positions**0.5) * patch_size  # With the class token's position or without.
    if size <= LARGEST_SIZE:
        preprocessing = preprocessing._replace(size=size)
    attributes |= {"width": width, "num_heads": width // 64, "patch_size": patch_size}
    return Described(WIDTHS[width], attributes, preprocessing, table)


def _shape(tensors: Mapping[str, np.ndarray], name: str, default: Any) -> tuple[int, ...]:
    """Returns a tensor's shape; the default where it is missing, which is reported later."""
    return tensors[name].shape if name in tensors else default


def _depth(tensors: Mapping[str, Any], name: str) -> int:
    """Returns the number of blocks, from a name with `{}` for the number of one."""
    depth = 0
    while name.format(depth) in tensors:
        depth += 1
    return depth


FAMILIES = (
    Family("torchvision or timm", "layer1.0.conv1.weight", "fc", _resnet18),
    Family("torchvision or timm", "features.0.weight", "fc3", _vgg11),
    Family("timm or DINOv2", TIMM.token, "head", functools.partial(_vit, TIMM)),
    Family("torchvision", TORCHVISION.token, "head", functools.partial(_vit, TORCHVISION)),
    Family("transformers", TRANSFORMERS.token, "head", functools.partial(_vit, TRANSFORMERS)),
    Family("big_vision", "embedding/kernel", "head", _big_vision),
)


def _replaced(tree: Any, value: Callable[[str, Any], Any], path: tuple[str, ...]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _replaced(part, value, (*path, key)) for key, part in tree.items()}
    return value("/".join(path), tree)


def _listed(names: Any) -> str:
    names = sorted(names)
    listed = ", ".join(names[:4]) or "nothing"
    return f"{listed} and {len(names) - 4} more" if len(names) > 4 else listed
