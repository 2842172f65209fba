"""Files of weights, drawn at random, of networks that are small."""

import numpy as np
import pytest


def vit(width=192, depth=1, patch=4, grid=2, num_classes=None, scaled=False, seed=0):
    """The tensors of a vision transformer by timm's names; without head if there are no classes."""
    generator = np.random.default_rng(seed)
    draw = lambda *shape: generator.normal(0, 0.3 / np.sqrt(shape[-1]), shape).astype(np.float32)
    given = {
        "cls_token": draw(1, 1, width),
        "pos_embed": 5 * draw(1, 1 + grid**2, width),
        "patch_embed.proj.weight": draw(width, 3, patch, patch),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
    }
    sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    sizes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for index in range(depth):
        block = f"blocks.{index}."
        for name, shape in sizes.items():
            given[f"{block}{name}.weight"] = 5 * draw(*shape)
            given[f"{block}{name}.bias"] = draw(shape[0])
        for norm in ("norm1", "norm2"):
            given[f"{block}{norm}.weight"] = 1 + draw(width)
            given[f"{block}{norm}.bias"] = draw(width)
        if scaled:
            for scale in ("ls1", "ls2"):
                given[f"{block}{scale}.gamma"] = 1 + 5 * draw(width)
    if num_classes:
        given |= {"head.weight": draw(num_classes, width), "head.bias": draw(num_classes)}
    return given


def save(path, tensors):
    """Writes tensors as the suffix of the path says; returns the path as text."""
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".safetensors":
        numpy = pytest.importorskip("safetensors.numpy", reason="needs the extra weights")
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        numpy.save_file(contiguous, path)
    else:
        torch = pytest.importorskip("torch", reason="PyTorch writes its own files")
        tensors = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
        torch.save({"model": tensors, "epoch": 3} if path.suffix == ".pth" else tensors, path)
    return str(path)
