"""Our models against PyTorch's, with the same weights.

The PyTorch modules below are built from the published descriptions of the tutorial's network,
ResNet-18 and VGG-11; their state dictionaries have torchvision's names.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynamical_jax as dj
from dynamical_jax import training

torch = pytest.importorskip("torch", reason="parity is checked where PyTorch is installed")
nn = torch.nn


def torch_cnn():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class TorchBlock(nn.Module):
    def __init__(self, before, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride != 1 or before != features:
            shortcut = nn.Conv2d(before, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(features))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchResNet18(nn.Module):
    def __init__(self, stem):
        super().__init__()
        self.stem = stem
        kernel, stride, pad = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        self.conv1 = nn.Conv2d(3, 64, kernel, stride, pad, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        before = 64
        for stage, features in enumerate((64, 128, 256, 512)):
            stride = 1 if stage == 0 else 2
            blocks = TorchBlock(before, features, stride), TorchBlock(features, features, 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            before = features
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = nn.functional.max_pool2d(x, 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))


def torch_vgg11():
    layers, before = [], 3
    for features in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if features == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, features, 3, padding=1), nn.ReLU()]
            before = features
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        *(nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()),
        nn.Linear(4096, 10),
    )


MODELS = {
    "cnn": (torch_cnn, dj.models.CNN(10)),
    "resnet18-imagenet": (lambda: TorchResNet18("imagenet"), dj.models.ResNet18(10)),
    "resnet18-cifar": (lambda: TorchResNet18("cifar"), dj.models.ResNet18(10, stem="cifar")),
    "vgg11": (torch_vgg11, dj.models.VGG11(10, dropout=0.0)),
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


@pytest.mark.parametrize("key", MODELS)
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
    logits, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
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
