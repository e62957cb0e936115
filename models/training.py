"""Training and evaluation: the only place that picks a device or its arithmetic, or seeds the global generators.

Networks are on the CPU between two uses. Training and evaluation move them to the default device and back; results are on the CPU.
On CUDA the same call gives the same bits on one type of GPU: cuDNN and PyTorch use their deterministic kernels. Where PyTorch has
none, it warns. According to its documentation, of the operations used here only the backward pass of max-pooling has none. Its
windows do not overlap, so nothing is added up in another order.
"""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.backbone import Network
from models.classifier import Classifier
from models.cost import Cost, metered
from models.images import ImageSet, to_float
from models.loop import Loop, run
from models.recipe import Precision, Recipe

__all__ = [
    "Diverged", "Fitted", "accuracy", "arithmetic", "default_device", "embed", "fit", "in_batches", "logits", "on_device",
    "optimise", "predict", "seeded",
]  # fmt: skip

FLOOR = 16
"""Samples. Where memory is short, a batch of an evaluation is halved down to this many."""

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: without it cuBLAS may sum in another order


class Diverged(RuntimeError):
    """A training ended with weights that are not finite."""


@dataclass(frozen=True)
class Fitted:
    """A finished training and its cost.

    Attributes:
        net: the network, in evaluation mode on the CPU.
        seconds: wall time.
        samples_forward: samples sent forward through the full network.
        samples_backward: samples sent backward through it.
    """

    net: Network
    seconds: float
    samples_forward: int
    samples_backward: int


def default_device() -> torch.device:
    """CUDA when there is one, otherwise the CPU. Several processes may share one GPU; ``CUDA_VISIBLE_DEVICES`` chooses it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _pinned()
    return torch.device("cuda")


@functools.lru_cache(maxsize=1)
def _pinned() -> None:
    """CUDA's arithmetic for the whole process: float32 is float32, and the same call gives the same bits."""
    _products("reference")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _products(precision: Precision) -> None:
    """Whether products of float32 matrices and convs are rounded to TF32 on CUDA."""
    torch.set_float32_matmul_precision("highest" if precision == "reference" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "reference"


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Sets the precision of float32 products on CUDA inside; nothing changes on the CPU. Autocast is set by the trainer."""
    if default_device().type == "cpu":
        yield
        return
    before: Precision = "tf32" if torch.backends.cudnn.allow_tf32 else "reference"
    _products(precision)
    try:
        yield
    finally:
        _products(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global generators inside and restores them after. For library code that takes no generator."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def optimise(loop: Loop, data: ImageSet, recipe: Recipe, seed: int) -> Cost:
    """Trains ``loop`` in place; it ends in evaluation mode on the CPU. The same arguments give the same weights, bit for bit, on
    one machine type.

    The data are moved to the device once: batches are drawn, cropped and flipped there.

    Args:
        loop: what is trained.
        data: the training set. Fewer than two samples, or no epochs, leave the weights as they are.
        recipe: the loop's.
        seed: of the batches and of all else that is drawn in the training.

    Returns:
        Samples sent through the full network.

    Raises:
        Diverged: a weight is not finite at the end.
    """
    if recipe.epochs == 0 or len(data) < 2:
        loop.eval()
        return Cost()
    device = default_device()
    batches = loop.loader(data.to(device), seed)
    loop.total_steps = len(batches) * recipe.epochs
    loop.train()
    with metered() as cost, seeded(seed), arithmetic(recipe.precision), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders, loggers and idle GPUs does not apply here
        run(loop, batches, recipe, device)
    loop.to("cpu").eval()
    if not all(bool(torch.isfinite(value).all()) for value in loop.state_dict().values()):
        raise Diverged(f"training diverged: weights are not finite after {recipe.epochs} epochs at lr {recipe.lr}")
    return cost


def fit(module: Classifier, data: ImageSet, recipe: Recipe, seed: int) -> Fitted:
    """Trains a network; arguments and errors as in :func:`optimise`."""
    start = time.perf_counter()
    cost = optimise(module, data, recipe, seed)
    return Fitted(module.net, time.perf_counter() - start, cost.forward, cost.backward)


@contextmanager
def on_device(net: Network) -> Iterator[torch.device]:
    """``net`` on the default device and in evaluation mode; where it was, and its mode, are restored."""
    home, was_training, device = next(net.parameters()).device, net.training, default_device()
    net.to(device).eval()
    try:
        yield device
    finally:
        net.to(home).train(was_training)


def in_batches(step: Callable[[Tensor], Tensor], images: Tensor, batch: int | None, device: torch.device) -> list[Tensor]:
    """``step`` of float images on ``device``, in batches of fixed size: ``batch``, or what suits the device.

    Where memory does not suffice for a batch it is halved, and those after it are as small.

    Raises:
        RuntimeError: memory does not suffice for :data:`FLOOR` samples either.
    """

    def of(part: Tensor) -> Tensor:
        return step(to_float(part.to(device)).contiguous(memory_format=torch.channels_last))

    size = batch or (500 if device.type == "cpu" else 2000)
    done: list[Tensor] = []
    start = 0
    while start < len(images):
        try:
            done.append(of(images[start : start + size]))
            start += size
        except (RuntimeError, MemoryError) as error:
            if size <= FLOOR or not _out_of_memory(error):
                raise
            size = max(size // 2, FLOOR)
    return done


def _out_of_memory(error: Exception) -> bool:
    """Whether an error is a lack of memory: CUDA's has a class, those of libraries and the CPU only a message."""
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@torch.no_grad()
def predict(net: Network, images: Tensor, batch: int | None = None) -> Tensor:
    """Predicted classes int64 (N,) of uint8 images (N, C, H, W), in evaluation mode, in batches of fixed size, on the CPU.

    Computed on the default device; mode and place of the network are restored. The pass is tallied as forward samples.
    """
    with on_device(net) as device:
        parts = in_batches(lambda part: net(part).argmax(1).cpu(), images, batch, device)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


@torch.no_grad()
def embed(net: Network, images: Tensor, batch: int | None = None) -> list[Tensor]:
    """Embeddings of uint8 images (N, C, H, W) in evaluation mode, a list of float (B, d) in the batches of :func:`predict`.

    They stay on the default device; mode and place of the network are restored.
    """
    with on_device(net) as device:
        return in_batches(net.embed, images, batch, device)


@torch.no_grad()
def logits(net: Network, images: Tensor, batch: int | None = None) -> Tensor:
    """Logits float (N, num_classes) of uint8 images (N, C, H, W) in evaluation mode, on the CPU; otherwise as :func:`predict`."""
    with on_device(net) as device:
        return torch.cat(in_batches(lambda part: net(part).cpu(), images, batch, device))


def accuracy(net: Network, data: ImageSet, batch: int | None = None) -> float:
    """Share of ``data`` classified as labelled, in [0, 1]; NaN for an empty set."""
    if len(data) == 0:
        return math.nan
    return float((predict(net, data.images, batch) == data.labels.cpu()).double().mean())


