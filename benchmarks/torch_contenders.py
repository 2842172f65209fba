"""The same work on the same networks as in `jax_contenders`, in PyTorch.

Images are floats already, on the device. Each contender uses the options that the documentation of
its framework recommends for the purpose.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import attention

from benchmarks import torch_models
from benchmarks.task import (
    CHUNK_BYTES,
    MEAN,
    NUM_CLASSES,
    STD,
    STEPS,
    Task,
    Work,
)

MODELS = torch_models.MODELS

LOOP_SIZE = 8  # Images that a call of `loop` takes.


def forward_backward(task: Task) -> Work:
    """The gradient of the loss summed over one batch, in evaluation mode."""
    model = _model(task).eval()
    images, labels = _images(model, task, task.batch_size), _labels(model, task.batch_size)

    def call() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()

    return _work(call, 1)


def vmap(task: Task) -> Work:
    """‖g_u‖² and g_u·v by `torch.func.vmap` of `grad`, some images at a time."""
    model = _model(task).eval()
    size = _chunk_size(model, task)
    images, direction = _images(model, task, size), _direction(model)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    params = {name: state.pop(name) for name, _ in model.named_parameters()}

    def loss(params: Any, image: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, {**params, **state}, (image[None],))
        return nn.functional.cross_entropy(logits, logits.argmax(1))

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        # The fused attention has no rule for `vmap`, which would take one image after another.
        with attention.sdpa_kernel(attention.SDPBackend.MATH):
            return _norms_and_products(gradients(params, images).values(), direction)

    return _work(call, task.batch_size / size)


def loop(task: Task) -> Work:
    """‖g_u‖² and g_u·v by a backward pass for one image after another."""
    model = _model(task).eval()
    size = min(task.batch_size, LOOP_SIZE)
    images, direction = _images(model, task, size), _direction(model)
    params = list(model.parameters())

    def call() -> torch.Tensor:
        terms = []
        for image in images:
            logits = model(image[None])
            loss = nn.functional.cross_entropy(logits, logits.argmax(1))
            gradients = [gradient[None] for gradient in torch.autograd.grad(loss, params)]
            terms.append(torch.cat(_norms_and_products(gradients, direction)))
        return torch.stack(terms, dim=1)

    return _work(call, task.batch_size / len(images))


def backpack(task: Task) -> Work:
    """‖g_u‖² and g_u·v by BackPACK's `BatchGrad`, which the authors' program uses."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = _model(task).eval()
    size = _chunk_size(model, task)
    images, direction = _images(model, task, size), _direction(model)
    # First-order extensions look at layers with parameters alone, so ResNets need no conversion.
    for layer in model.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            extend(layer)
    cross_entropy = extend(nn.CrossEntropyLoss(reduction="sum"))
    # BackPACK's hooks see layers whose inputs, being images, require no gradients: as intended.
    warnings.filterwarnings("ignore", "Full backward hook is firing")

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        with backpack(BatchGrad()):
            logits = model(images)
            cross_entropy(logits, logits.argmax(1)).backward()
        terms = _norms_and_products([p.grad_batch for p in model.parameters()], direction)
        for parameter in model.parameters():
            del parameter.grad_batch
        return terms

    return _work(call, task.batch_size / size)


def opacus(task: Task) -> Work:
    """‖g_u‖² alone, by Opacus' ghost norms (`GradSampleModuleFastGradientClipping`).

    Linear layers have ghost norms there; gradients of all others are formed. No gradient of the
    batch is computed beside them.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = _with_affine(_model(task))
    images = _images(model, task, task.batch_size).requires_grad_()
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum")
    for module in wrapped.modules():  # It takes gradients in training mode only.
        module.training = not isinstance(module, nn.Dropout)
    inputs = [images, *_tables(model)]
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # Of embeddings: as intended.

    def call() -> tuple[torch.Tensor]:
        logits = wrapped(images)
        loss = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
        torch.autograd.grad(loss, inputs)
        return (wrapped.get_norm_sample().square(),)

    return _work(call, 1)


def dattri_llm(task: Task) -> Work:
    """‖g_u‖² alone, by dattri-llm, which forms the gradients of those layers where that is cheaper.

    As it recommends where nothing is trained, layers are frozen, so that no gradient of the batch
    is computed beside them.
    """
    from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig
    from dattri_llm.gradient import ops

    model = _model(task).eval().requires_grad_(False)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise TypeError("dattri-llm has no gradients of examples for BatchNorm")
    images = _images(model, task, task.batch_size).requires_grad_()
    for table in _tables(model):
        table.requires_grad_()
    warnings.filterwarnings("ignore", ".* have no trainable parameter")
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # Of embeddings: as intended.
    config = HookManagerConfig(linear_io=REGISTER_ALL, capture_style="auto", include_frozen=True)
    manager = HookManager(model, config)

    def call() -> tuple[torch.Tensor]:
        with manager.collect():
            logits = model(images)
            nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum").backward()
            gradient = manager.get_gradient()
        images.grad = None
        types = gradient.layer_types
        return (sum(ops.grad_norm_sq(part, types[name]) for name, part in gradient.data.items()),)

    return _work(call, 1)


class Affine(nn.Module):
    """BatchNorm in evaluation mode as a layer without buffers, which Opacus refuses."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.statistics = (norm.running_mean, norm.running_var)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scales and shifts each channel of `[n, c, h, w]`."""
        return nn.functional.batch_norm(x, *self.statistics, self.weight, self.bias, eps=self.eps)


def _with_affine(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        affine = Affine(child) if isinstance(child, nn.BatchNorm2d) else _with_affine(child)
        setattr(module, name, affine)
    return module


def _tables(model: nn.Module) -> list[nn.Parameter]:
    """Those of embeddings, which no gradient reaches from the images."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


def training_step(task: Task) -> Work:
    """Training steps with PyTorch's default Adam: forward, backward, update."""
    return _training(task, fused=None)


def fused_training_step(task: Task) -> Work:
    """The same, with Adam's update as one fused kernel."""
    return _training(task, fused=True)


def _training(task: Task, fused: bool | None) -> Work:
    model, size = _model(task).train(), STEPS * task.batch_size
    images, labels = _images(model, task, size), _labels(model, size)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)

    def epoch() -> None:
        for rows in torch.randperm(size, device=images.device).split(task.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()

    return _work(epoch, 1 / STEPS)


def _norms_and_products(
    gradients: Iterable[torch.Tensor], direction: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares and products over parameters, of gradients `[n, ...]`."""
    flat = [gradient.flatten(1) for gradient in gradients]
    squared_norm = sum(torch.linalg.vector_norm(g, dim=1) ** 2 for g in flat)
    inner_product = sum(g @ v.flatten() for g, v in zip(flat, direction, strict=True))
    return squared_norm, inner_product


def _work(call: Callable[[], Any], calls: float) -> Work:
    if not torch.cuda.is_available():
        return Work(call, calls)

    def waiting() -> Any:
        results = call()
        torch.cuda.synchronize()
        return results

    memory = lambda: (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    return Work(waiting, calls, device_memory=memory)


def _model(task: Task) -> nn.Module:
    """The network with PyTorch's initial weights, on the device that JAX uses."""
    if task.device != "cpu" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch has no CUDA, and JAX is on a GPU")
    if task.precision != "default":
        exact = task.precision == "float32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
        torch.backends.cudnn.allow_tf32 = not exact
    torch.manual_seed(0)
    return MODELS[task.model]().to("cpu" if task.device == "cpu" else "cuda")


def _direction(model: nn.Module) -> list[torch.Tensor]:
    generator = np.random.default_rng(1)
    shapes = [parameter.shape for parameter in model.parameters()]
    return [_like(model, generator.standard_normal(shape, np.float32)) for shape in shapes]


def _chunk_size(model: nn.Module, task: Task) -> int:
    """How many per-example gradients fit into `CHUNK_BYTES`, at least one."""
    gradient_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    return max(1, min(task.batch_size, CHUNK_BYTES // gradient_bytes))


def _images(model: nn.Module, task: Task, size: int) -> torch.Tensor:
    raw = np.random.default_rng(0).integers(0, 256, (size, *task.image_shape), np.uint8)
    standardized = (raw.transpose(0, 3, 1, 2).astype(np.float32) - MEAN) / STD
    return _like(model, np.ascontiguousarray(standardized))


def _labels(model: nn.Module, size: int) -> torch.Tensor:
    return _like(model, np.random.default_rng(1).integers(0, NUM_CLASSES, size))


def _like(model: nn.Module, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(next(model.parameters()).device)
