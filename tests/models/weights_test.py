"""Files of weights, as PyTorch and JAX programs write them, against PyTorch with the same weights.

No weights are downloaded: those of small networks are drawn at random and saved with right names.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_weights
from tiny_weights import save

import dynamical_jax as dj
from dynamical_jax.models import vit, weights

pytest.importorskip("safetensors", reason="needs the extra weights")

WIDTH, DEPTH, HEADS, PATCH, GRID, CLASSES = 128, 2, 2, 7, 3, 5
SIDE = PATCH * GRID


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(weights, "WIDTHS", {WIDTH: "vit_ti"})


def state(scaled=False, head=True):
    """The tensors of a vision transformer by timm's names."""
    return tiny_weights.vit(WIDTH, DEPTH, PATCH, GRID, CLASSES if head else None, scaled)


def renamed(tensors, names):
    """timm's tensors by other names: pairs of what is replaced, in turn."""
    result = {}
    for name, value in tensors.items():
        for old, new in names:
            name = name.replace(old, new)
        result[name] = value
    return result


def torchvision(tensors):
    names = [("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding")]
    names += [("patch_embed.proj", "conv_proj"), ("attn.qkv.", "self_attention.in_proj_")]
    names += [
        ("blocks.", "encoder.layers.encoder_layer_"),
        ("attn.proj", "self_attention.out_proj"),
    ]
    names += [("norm1", "ln_1"), ("norm2", "ln_2"), ("mlp.fc1", "mlp.linear_1")]
    names += [("mlp.fc2", "mlp.3"), ("norm.", "encoder.ln."), ("head.", "heads.head.")]
    return renamed(tensors, names)


def transformers(tensors):
    names = [("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings")]
    names += [("patch_embed.proj", "embeddings.patch_embeddings.projection")]
    names += [("attn.proj", "attention.output.dense"), ("blocks.", "encoder.layer.")]
    names += [("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")]
    names += [("norm.", "layernorm."), ("head.", "classifier.")]
    result = {}
    for name, value in renamed(tensors, names).items():
        parts = np.split(value, 3) if "qkv" in name else [value]
        kinds = ("query", "key", "value") if "qkv" in name else ("",)
        for kind, part in zip(kinds, parts, strict=True):
            result[name.replace("attn.qkv", f"attention.attention.{kind}")] = part
    return result | {"embeddings.mask_token": np.zeros((1, WIDTH), np.float32)}


def big_vision(tensors, old=False):
    attention, second, mlp = (
        ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
        if old
        else ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    )
    names = {"norm1": "LayerNorm_0", "norm2": second, "attn.proj": f"{attention}/out"}
    names |= {"mlp.fc1": f"{mlp}/Dense_0", "mlp.fc2": f"{mlp}/Dense_1"}
    names |= {"norm": "Transformer/encoder_norm", "head": "head", "patch_embed.proj": "embedding"}
    result = {}
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        place, inner = "", layer
        if layer.startswith("blocks."):
            _, index, inner = layer.split(".", 2)
            place = f"Transformer/encoderblock_{index}/"
        if inner == "attn.qkv":
            for part, own in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                if kind == "weight":
                    own = own.T.reshape(WIDTH, HEADS, -1)
                else:
                    own = own.reshape(HEADS, -1)
                kind_here = "kernel" if kind == "weight" else "bias"
                result[f"{place}{attention}/{part}/{kind_here}"] = own
        elif not layer:
            result[{"cls_token": "cls", "pos_embed": "pos_embedding"}[name]] = value
        else:
            if kind == "weight":
                kind = "scale" if "norm" in inner else "kernel"
                if value.ndim == 4:
                    value = value.transpose(2, 3, 1, 0)
                elif value.ndim == 2:
                    value = value.T
                if inner == "attn.proj":
                    value = value.reshape(HEADS, -1, WIDTH)
            result[f"{place}{names[inner]}/{kind}"] = value
    if old:
        result["Transformer/posembed_input/pos_embedding"] = result.pop("pos_embedding")
        return result
    # The class token has no position of its own.
    result["cls"] = result["cls"] + result["pos_embedding"][:, :1]
    result["pos_embedding"] = result["pos_embedding"][:, 1:]
    return {f"params/{name}": value for name, value in result.items()}


@functools.cache
def torch_vit(scaled, gelu="none", side=SIDE):
    """What PyTorch makes of pictures, with timm's network written down as it is published."""
    torch = pytest.importorskip("torch", reason="parity is checked where PyTorch is installed")
    given = {name: torch.from_numpy(value.copy()) for name, value in state(scaled).items()}
    functional = torch.nn.functional
    x = torch.from_numpy(pixels(side).transpose(0, 3, 1, 2).copy())
    norm = lambda x, name: functional.layer_norm(
        x, (WIDTH,), given[f"{name}.weight"], given[f"{name}.bias"], 1e-6
    )
    dense = lambda x, name: functional.linear(x, given[f"{name}.weight"], given[f"{name}.bias"])
    weight, bias = (given[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    x = functional.conv2d(x, weight, bias, stride=PATCH)
    grid = x.shape[-1]
    x = x.flatten(2).transpose(1, 2)
    table = given["pos_embed"]
    if grid != GRID:
        patches = table[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        patches = functional.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
        table = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], 1)
    x = torch.cat([given["cls_token"].expand(len(x), -1, -1), x], 1) + table
    for index in range(DEPTH):
        block = f"blocks.{index}."
        first, second = (given[f"{block}ls{i}.gamma"] if scaled else 1.0 for i in (1, 2))
        n, t, _ = x.shape
        qkv = dense(norm(x, f"{block}norm1"), f"{block}attn.qkv")
        qkv = qkv.reshape(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(n, t, WIDTH)
        x = x + first * dense(y, f"{block}attn.proj")
        y = dense(norm(x, f"{block}norm2"), f"{block}mlp.fc1")
        y = dense(functional.gelu(y, approximate=gelu), f"{block}mlp.fc2")
        x = x + second * y
    embedding = norm(x, "norm")[:, 0]
    return dense(embedding, "head").numpy(), embedding.numpy()


def pixels(side=SIDE):
    return np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def applied(module, variables, x):
    return module.apply(variables, x)


def module_of(loaded, num_classes=CLASSES):
    return dj.models.MODELS[loaded.model](num_classes, **dict(loaded.attributes))


def put(loaded, x, num_classes=CLASSES):
    module = module_of(loaded, num_classes)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    fresh = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7, leaf.dtype), shapes)
    return module, loaded.put(fresh)


FILES = {
    "timm": (".safetensors", False, lambda t: t),
    "dinov2": (".pth", True, lambda t: t | {"mask_token": np.zeros((1, WIDTH), np.float32)}),
    "torchvision": (".pt", False, torchvision),
    "transformers": (".safetensors", True, transformers),
    "big_vision": (".npz", False, big_vision),
    "augreg": (".npz", False, functools.partial(big_vision, old=True)),
    "wrapped": (".bin", False, lambda t: {f"module.{name}": v for name, v in t.items()}),
}


class TestViT:
    @pytest.mark.parametrize("names", FILES)
    def test_parity_with_pytorch(self, names, tmp_path):
        suffix, scaled, convert = FILES[names]
        loaded = weights.load(save(tmp_path / f"file{suffix}", convert(state(scaled))))
        assert loaded.model == "vit_ti"
        assert loaded.num_classes == CLASSES
        gelu = "tanh" if suffix == ".npz" else "none"
        expected = torch_vit(scaled, gelu)
        outputs = applied(*put(loaded, pixels()), pixels())
        np.testing.assert_allclose(outputs.logits, expected[0], atol=1e-4)
        np.testing.assert_allclose(outputs.embedding, expected[1], atol=1e-4)

    @pytest.mark.parametrize("grid", [2, 5])
    def test_images_of_another_size(self, grid, tmp_path):
        side = grid * PATCH
        loaded = weights.load(save(tmp_path / "file.safetensors", state()))
        outputs = applied(*put(loaded, pixels(side)), pixels(side))
        np.testing.assert_allclose(outputs.logits, torch_vit(False, side=side)[0], atol=1e-4)

    def test_sides_must_be_whole_patches(self):
        with pytest.raises(
            dj.UserError, match="need images whose sides are multiples of 16, got 8"
        ):
            jax.eval_shape(dj.models.ViTTi(3).init, jax.random.key(0), np.zeros((1, 8, 8, 3)))

    @pytest.mark.parametrize(
        ("make", "count"),
        # With 1,000 classes at 224×224 and patches of 16; as published.
        [(vit.ViTTi, 5_717_416), (vit.ViTS, 22_050_664), (vit.ViTB, 86_567_656)],
    )
    def test_sizes_are_those_of_the_published_models(self, make, count):
        shapes = jax.eval_shape(make(1000).init, jax.random.key(0), np.zeros((1, 224, 224, 3)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count

    @pytest.mark.slow  # Compiles both engines.
    def test_gradients_are_had_layer_by_layer(self):
        module = dj.models.ViT(3, 8, 2, depth=1, patch_size=4, layer_scale=True)
        x = pixels(8)
        variables = jax.jit(module.init)(jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)  # LayerScale is near 0.
        # Raises where they cannot be, and where they differ from those of vmap(jax.grad).
        dj.gradients.verify(module, variables, x)


class TestOthers:
    """The networks of the paper; PyTorch's are those of the benchmarks, by torchvision's names."""

    @pytest.mark.slow  # As the other large networks of PyTorch.
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    def test_resnet18(self, suffix, tmp_path):
        torch = pytest.importorskip("torch", reason="parity is checked where PyTorch is installed")
        torch_models = pytest.importorskip("benchmarks.torch_models")
        torch.manual_seed(0)
        model = torch_models.ResNet18()
        x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
        torch_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            model.train()(torch_x + 1)  # Statistics away from 0 and 1.
            expected = model.eval()(torch_x).numpy()
        tensors = {name: value.numpy() for name, value in model.state_dict().items()}
        loaded = weights.load(save(tmp_path / f"file{suffix}", tensors))
        assert (loaded.model, loaded.num_classes) == ("resnet18", 10)
        outputs = applied(*put(loaded, x, 10), x)
        np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)

    @pytest.mark.slow  # 129 million parameters.
    @pytest.mark.parametrize("names", ["torchvision", "timm"])
    def test_vgg11(self, names, tmp_path):
        torch = pytest.importorskip("torch", reason="parity is checked where PyTorch is installed")
        torch_models = pytest.importorskip("benchmarks.torch_models")
        torch.manual_seed(0)
        model = torch_models.vgg11(dropout=0.0).eval()
        x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        convs = [0, 3, 6, 8, 11, 13, 16, 18]
        dense = ["classifier.0", "classifier.3", "classifier.6"]
        if names == "timm":
            dense = ["pre_logits.fc1", "pre_logits.fc2", "head.fc"]
        layers = [*(f"features.{index}" for index in convs), *dense]
        values = [value.numpy() for value in model.state_dict().values()]
        tensors = {}
        for index, layer in enumerate(layers):
            weight, bias = values[2 * index : 2 * index + 2]
            if names == "timm" and layer == "pre_logits.fc1":
                weight = weight.reshape(-1, 512, 7, 7)
            if names == "timm" and layer == "pre_logits.fc2":
                weight = weight.reshape(*weight.shape, 1, 1)
            tensors |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
        loaded = weights.load(save(tmp_path / "file.safetensors", tensors))
        outputs = applied(*put(loaded, x, 10), x)
        np.testing.assert_allclose(outputs.logits, expected, atol=1e-4)

    def test_every_parameter_of_vgg11_has_its_place(self):
        described = weights._vgg11("", {})
        shapes = jax.eval_shape(
            dj.models.VGG11(3).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)
        )
        paths = jax.tree_util.tree_leaves_with_path(shapes)
        assert {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths} == set(
            described.table
        )


class TestFile:
    def test_the_last_layer_is_replaced_where_classes_differ(self, tmp_path):
        path = save(tmp_path / "file.safetensors", state())
        loaded = weights.load(path)
        _, variables = put(loaded, pixels(), 3)
        np.testing.assert_array_equal(variables["params"]["head"]["kernel"], np.full((WIDTH, 3), 7))
        np.testing.assert_array_equal(variables["params"]["norm"]["bias"], state()["norm.bias"])
        assert loaded.describe(3) == (
            f"{path}: vit_ti with timm or DINOv2's names, for images of {SIDE}×{SIDE}; its last "
            "layer, for 5 classes, is replaced by a new one for 3"
        )
        assert loaded.describe(CLASSES).endswith(f"{SIDE}×{SIDE}")
        without = weights.load(save(tmp_path / "other.safetensors", state(head=False)))
        assert without.num_classes is None
        assert "there is a new one for 3 classes" in without.describe(3)
        assert put(without, pixels(), 3)[1]["params"]["head"]["bias"].tolist() == [7, 7, 7]

    def test_bfloat16(self, tmp_path):
        import safetensors.flax

        tensors = {name: jnp.asarray(value, jnp.bfloat16) for name, value in state().items()}
        safetensors.flax.save_file(tensors, tmp_path / "file.safetensors")
        loaded = weights.load(tmp_path / "file.safetensors")
        expected = np.asarray(tensors["norm.bias"], np.float32)
        np.testing.assert_array_equal(loaded.values["params/norm/bias"], expected)

    def test_preprocessing(self, tmp_path):
        load = lambda tensors: weights.load(save(tmp_path / "file.safetensors", tensors))
        half = (0.5, 0.5, 0.5)
        assert load(state()).preprocessing == (SIDE, half, half, "bicubic")
        imagenet = weights.IMAGENET
        assert load(state(True)).preprocessing == (SIDE, *imagenet[1:3], "bicubic")
        assert load(torchvision(state())).preprocessing == (SIDE, *imagenet[1:])
        large = state() | {"pos_embed": np.zeros((1, 1 + 80**2, WIDTH), np.float32)}
        assert load(large).preprocessing.size == 224
        config = {"input_size": [3, 96, 96], "mean": [0.1] * 3, "std": [0.2] * 3}
        config["interpolation"] = "bilinear"
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
        own = (96, (0.1, 0.1, 0.1), (0.2, 0.2, 0.2), "bilinear")
        assert load(state()).preprocessing == own

    def test_images_are_resized_and_standardised(self, tmp_path):
        loaded = weights.load(save(tmp_path / "file.safetensors", state()))
        model = dj.models.pretrained(loaded, 3)
        x = np.random.default_rng(0).integers(100, 150, (2, 8, 8, 3), np.uint8)
        ours = model.standardize(x)
        theirs = [dj.images.resize(image, SIDE, SIDE, "bicubic") for image in x]
        np.testing.assert_allclose(ours, np.stack(theirs) / 127.5 - 1, atol=1.6 / 127.5)
        grey = model.standardize(x[..., :1])
        np.testing.assert_allclose(grey, model.standardize(x[..., [0, 0, 0]]), atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t | {"neck.weight": t["norm.bias"]}, "vit_ti has no use for neck.weight$"),
            (
                lambda t: {n: v for n, v in t.items() if "blocks.1.attn.qkv" not in n},
                "vit_ti needs blocks.1.attn.qkv.bias, blocks.1.attn.qkv.weight, which it does not",
            ),
            (lambda t: {n: v for n, v in t.items() if n != "head.bias"}, "vit_ti needs head.bias"),
            (
                lambda t: {n + ".x": v for n, v in t.items()},
                "holds no weights of a model .* it has ",
            ),
            (
                lambda t: t | {"norm.bias": t["norm.bias"][1:]},
                r"norm/bias is of shape \[127\], and vit_ti needs \[128\]",
            ),
            (
                lambda t: t | {"blocks.0.mlp.fc1.weight": t["norm.bias"]},
                r"blocks.0.mlp.fc1.weight of shape \[\[128\]\] is not that of vit_ti",
            ),
            (
                lambda t: t | {"norm.bias": t["norm.bias"] / 0},
                "norm.bias holds numbers that are not",
            ),
            (lambda t: t | {"cls_token": np.zeros((1, 1, 100), np.float32)}, "of width 100; known"),
        ],
    )
    def test_tensors_that_do_not_fit(self, change, message, tmp_path):
        with np.errstate(all="ignore"):
            path = save(tmp_path / "file.safetensors", change(state()))
        with pytest.raises(dj.UserError, match=message) as error:
            put(weights.load(path), pixels())
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(path)

    @pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
    @pytest.mark.parametrize(
        "damage", [lambda b: b[: len(b) // 2], lambda b: b"junk", lambda b: b""]
    )
    def test_damaged_files(self, suffix, damage, tmp_path):
        path = tmp_path / f"file{suffix}"
        save(path, {"norm.bias": np.zeros(1000, np.float32)})
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(dj.UserError, match="is no whole") as error:
            weights.load(path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
    def test_a_pickle_is_not_run(self, suffix, tmp_path):
        if suffix == ".pth":
            pytest.importorskip("torch", reason="PyTorch refuses it")
        ran = tmp_path / "ran"
        path = tmp_path / f"file{suffix}"
        content = f"cposix\nsystem\n(S'touch {ran}'\ntR.".encode()
        path.write_bytes(content)
        with pytest.raises(dj.UserError, match=f"file{suffix}"):
            weights.load(path)
        assert not ran.exists()

    def test_vectors_of_images_are_no_weights(self, tmp_path):
        path = tmp_path / "features.npz"
        np.savez(path, embedding=np.eye(2), path=["a.jpg", "b.jpg"])
        with pytest.raises(dj.UserError, match=r"holds no weights, .* 'path' .* go to --features"):
            weights.load(path)

    def test_a_file_that_may_not_be_read(self, tmp_path, monkeypatch):
        def refuse(path, mode):
            raise PermissionError(13, "Permission denied", path)

        path = save(tmp_path / "file.safetensors", state())
        monkeypatch.setattr(weights.tensor_files, "open", refuse, raising=False)
        with pytest.raises(dj.UserError, match=r"^cannot read \S+: Permission denied$"):
            weights.load(path)

    def test_names_of_files(self, tmp_path, monkeypatch):
        with pytest.raises(dj.UserError, match=r"there is no file none\.npz"):
            weights.load("none.npz")
        with pytest.raises(dj.UserError, match=r"one of \.safetensors, \.npz, .* got a\.h5"):
            weights.load("a.h5")
        save(tmp_path / "file.safetensors", state())
        (tmp_path / "file.pth").touch()
        for name, package in (("file.pth", "torch"), ("file.safetensors", "safetensors.flax")):
            monkeypatch.setitem(__import__("sys").modules, package, None)
            with pytest.raises(dj.UserError, match=r"needs PyTorch|needs the package safetensors"):
                weights.load(tmp_path / name)
