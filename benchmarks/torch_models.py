"""The models of `dynamical_jax.models` in PyTorch, from the published descriptions.

`tests/models/parity_test.py` holds them to ours: with the same weights, the same logits, gradients
and statistics. Where the networks come from torchvision the state has torchvision's names.
"""

import collections

import torch
from torch import nn


def cnn() -> nn.Module:
    """Returns the network of PyTorch's CIFAR-10 tutorial."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, before: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride != 1 or before != features:
            shortcut = nn.Conv2d(before, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[n, c, h, w]` to `[n, features, h/stride, w/stride]`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """ResNet-18 with the stem "imagenet" or "cifar"."""

    def __init__(self, stem: str = "imagenet"):
        super().__init__()
        self.stem = stem
        kernel, stride, pad = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        self.conv1 = nn.Conv2d(3, 64, kernel, stride, pad, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        before = 64
        for stage, features in enumerate((64, 128, 256, 512)):
            stride = 1 if stage == 0 else 2
            blocks = Block(before, features, stride), Block(features, features, 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            before = features
        self.fc = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits `[n, 10]` of images `[n, 3, h, w]`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = nn.functional.max_pool2d(x, 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))


def vgg11(dropout: float = 0.5) -> nn.Module:
    """Returns VGG-11 without batch normalisation."""
    layers, before = [], 3
    for features in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if features == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, features, 3, padding=1), nn.ReLU()]
            before = features
    return nn.Sequential(
        *layers,
        *(nn.AdaptiveAvgPool2d(7), nn.Flatten()),
        *(nn.Linear(25088, 4096), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(4096, 10),
    )


class Attention(nn.Module):
    """Self-attention; the layers have timm's names."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps tokens `[n, t, d]` to as many."""
        n, t, d = x.shape
        parts = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads)
        attended = nn.functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        return self.proj(attended.transpose(1, 2).reshape(n, t, d))


class Transformer(nn.Module):
    """A block of the vision transformer."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = Attention(width, num_heads)
        dense = {"fc1": nn.Linear(width, 4 * width), "gelu": nn.GELU()}
        dense["fc2"] = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(collections.OrderedDict(dense))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps tokens `[n, t, d]` to as many."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The vision transformer.

    Class token and table of positions are embeddings that each image looks up whole, so that
    libraries which take gradients layer by layer find them in layers.
    """

    def __init__(
        self,
        size: int = 224,
        patch_size: int = 16,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 10,
    ):
        super().__init__()
        num_tokens = 1 + (size // patch_size) ** 2
        self.patch_size = patch_size
        self.patch_embed = nn.Linear(3 * patch_size**2, width)
        self.cls_token, self.pos_embed = nn.Embedding(1, width), nn.Embedding(num_tokens, width)
        self.blocks = nn.Sequential(*(Transformer(width, num_heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits `[n, K]` of images `[n, 3, h, w]`."""
        size = self.patch_size
        patches = nn.functional.unfold(x, size, stride=size).transpose(1, 2)
        x = self.patch_embed(patches)
        token = self.cls_token(torch.zeros(len(x), 1, dtype=torch.long, device=x.device))
        x = torch.cat([token, x], dim=1)
        places = torch.arange(x.shape[1], device=x.device)
        x = x + self.pos_embed(places.repeat(len(x), 1))
        return self.head(self.norm(self.blocks(x))[:, 0])


MODELS = {
    "cnn": cnn,
    "resnet18": ResNet18,
    "resnet18-cifar": lambda: ResNet18("cifar"),
    "vgg11": vgg11,
    "vit_s": ViT,
}
