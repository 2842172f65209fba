"""Our models against PyTorch's, with the same weights.

The PyTorch modules, which the benchmarks use as well, are built from the published descriptions of
the tutorial's network, ResNet-18 and VGG-11.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_weights

import dynamical_jax as dj
from dynamical_jax import training

torch = pytest.importorskip("torch", reason="parity is checked where PyTorch is installed")
torch_models = pytest.importorskip("benchmarks.torch_models")
nn = torch.nn

MODELS = {
    "cnn": (torch_models.cnn, dj.models.CNN(10)),
    "resnet18-imagenet": (torch_models.ResNet18, dj.models.ResNet18(10)),
    "resnet18-cifar": (
        lambda: torch_models.ResNet18("cifar"),
        dj.models.ResNet18(10, stem="cifar"),
    ),
    "vgg11": (lambda: torch_models.vgg11(dropout=0.0), dj.models.VGG11(10, dropout=0.0)),
}
# A module → the map [c, h, w] that PyTorch flattens before its first dense layer.
FLATTENED = {"cnn": (16, 5, 5), "vgg11": (512, 7, 7)}


def flax_name(name, names):
    """layer1.0.downsample.1 → (layer1_0, downsample_bn); sequential models go by position."""
    if name[0].isdigit():
        return (names[name],)
    name = name.replace("downsample.0", "downsample_conv").replace("downsample.1", "downsample_bn")
    stage, _, inner = name.partition(".")
    return (f"{stage}_{inner[0]}", inner[2:]) if inner else (stage,)


def converted(model, key):
    """The state of a PyTorch model as Flax variables."""
    weighted = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    convs = [name for name in weighted if isinstance(model.get_submodule(name), nn.Conv2d)]
    first = 1 if key == "cnn" else 0
    names = {name: f"conv{i + first}" for i, name in enumerate(convs)}
    dense = [name for name in weighted if name not in convs]
    names |= {name: f"fc{i + 1}" for i, name in enumerate(dense)}
    params, statistics = {}, {}
    for name in weighted:
        module = model.get_submodule(name)
        # Copies: torch's buffers are updated in place by a step in training mode.
        weight = module.weight.detach().numpy().copy()
        if weight.ndim == 4:
            own = {"kernel": weight.transpose(2, 3, 1, 0)}
        elif weight.ndim == 2:
            if weight.shape[1] == np.prod(FLATTENED.get(key, 0)):
                maps = weight.reshape(-1, *FLATTENED[key])
                weight = maps.transpose(0, 2, 3, 1).reshape(weight.shape)
            own = {"kernel": weight.T}
        else:
            own = {"scale": weight}
            own_statistics = {
                "mean": module.running_mean.numpy().copy(),
                "var": module.running_var.numpy().copy(),
            }
        if module.bias is not None:
            own["bias"] = module.bias.detach().numpy().copy()
        into, into_statistics = params, statistics
        *parents, last = flax_name(name, names)
        for parent in parents:
            into = into.setdefault(parent, {})
            into_statistics = into_statistics.setdefault(parent, {})
        into[last] = own
        if "scale" in own:
            into_statistics[last] = own_statistics
    return jax.tree.map(jnp.asarray, {"params": params, "batch_stats": pruned(statistics)})


def pruned(tree):
    if not isinstance(tree, dict):
        return tree
    return {
        key: pruned(value)
        for key, value in tree.items()
        if not (isinstance(value, dict) and not pruned(value))
    }


def slow(key):
    return pytest.param(key, marks=pytest.mark.slow)


# The large ones take 37 s together.
@pytest.mark.parametrize("key", ["cnn", *map(slow, list(MODELS)[1:])])
def test_logits_statistics_and_gradient(key):
    torch.manual_seed(0)
    make, module = MODELS[key]
    model = make()
    x = np.random.default_rng(0).normal(size=(6, 32, 32, 3)).astype(np.float32)
    y = np.arange(6).astype(np.int32)
    torch_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        for _ in range(3):  # Statistics away from 0 and 1 before evaluation is compared.
            model.train()(torch_x + 1)
    variables = converted(model, key)
    drawn = jax.eval_shape(module.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, drawn["params"])

    with torch.no_grad():
        expected = model.eval()(torch_x).numpy()
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x).logits, expected, atol=1e-4)

    model.train()
    expected = model(torch_x)
    loss = nn.functional.cross_entropy(expected, torch.from_numpy(y).long())
    loss.backward()
    # Two rows of padding, which must change nothing.
    padded = dj.Examples(np.concatenate([x, x[:2] + 5]), np.concatenate([y, y[:2]]))
    mask = jnp.arange(8) < 6
    step = jax.jit(training.batch_gradient, static_argnums=0)
    gradient, our_loss, statistics = step(module, variables, padded, mask, jax.random.key(0))
    apply = functools.partial(module.apply, train=True, mutable=["batch_stats"])
    logits, _ = jax.jit(apply)(variables, x)
    np.testing.assert_allclose(logits.logits, expected.detach(), atol=1e-4)
    np.testing.assert_allclose(our_loss, loss.item(), atol=1e-4)
    after = converted(model, key)
    assert jax.tree.structure(statistics.get("batch_stats", {})) == jax.tree.structure(
        after["batch_stats"]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        statistics.get("batch_stats", {}),
        after["batch_stats"],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    expected = converted(model, key)["params"]
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        # By norm: through a dozen BatchNorms of six images, float32 keeps about three digits.
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs) + 1e-6


def test_vision_transformer(tmp_path):
    torch.manual_seed(0)
    model = torch_models.ViT(8, patch_size=4, width=192, depth=1, num_heads=3)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state["cls_token"] = state.pop("cls_token.weight")[None]
    state["pos_embed"] = state.pop("pos_embed.weight")[None]
    patches = state.pop("patch_embed.weight").reshape(192, 3, 4, 4)
    named = {
        "patch_embed.proj.weight": patches,
        "patch_embed.proj.bias": state.pop("patch_embed.bias"),
    }
    weights = dj.models.weights.load(tiny_weights.save(tmp_path / "vit.npz", state | named))
    assert weights.names == "timm or DINOv2"
    ours = dj.models.MODELS[weights.model](10, **dict(weights.attributes))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    drawn = jax.eval_shape(ours.init, jax.random.key(0), x)
    variables = weights.put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), drawn))
    with torch.no_grad():
        expected = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(jax.jit(ours.apply)(variables, x).logits, expected, atol=1e-4)
