"""The one training loop: the only place that builds a Trainer, picks a device or its arithmetic, or seeds the global generators.

Networks live on the CPU between two uses. Training and evaluation move them to the default device and back; what they return is on
the CPU. On CUDA the same call gives the same bits on one type of GPU: cuDNN and PyTorch are held to their deterministic kernels.
Where PyTorch has none, it warns. Going by its documentation, of what is used here that is the backward pass of max-pooling alone,
whose windows do not overlap and so leave nothing to add up in another order.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from models.backbone import Network
from models.classifier import Classifier, LightningEnvironment, pl
from models.cost import metered
from models.images import ImageSet, to_float
from models.progress import epoch_ended
from models.spec import Spec, check

__all__ = [
    "Diverged", "Fitted", "Precision", "Recipe", "accuracy", "arithmetic", "default_device", "embed", "fit", "logits", "predict",
    "predict_head", "seeded",
]  # fmt: skip

Precision = Literal["reference", "tf32", "bf16"]
FLOOR = 16
"""Samples: for want of memory, a batch of an evaluation is halved down to this many."""

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: without it cuBLAS may sum in another order


class Diverged(RuntimeError):
    """A training ended with weights that are not finite."""


@dataclass(frozen=True)
class Recipe(Spec):
    """How a network is trained. The defaults are BackdoorBench's CIFAR-10 recipe (config/attack/prototype/cifar10.yaml).

    Attributes:
        epochs: passes over the training set; 0 = leave the network as it is.
        batch: samples per step.
        lr: peak learning rate.
        momentum, nesterov, weight_decay: of SGD (weight decay also of Adam).
        optimizer: ``sgd`` or ``adam``.
        schedule: ``cosine`` (per epoch, to zero), ``one-cycle`` (per step), ``multistep`` (x0.1 at 50 % and 75 %) or ``constant``.
        crop: zero padding of the random crop, in pixels. flip: mirror half of the samples.
        precision: of arithmetic. ``reference`` = float32 everywhere. ``tf32`` = products of float32 matrices and convs in TF32, in
            evaluation too; float32 on the CPU, which has no such products. ``bf16`` = that, and the forward passes of training
            under autocast to bfloat16 (losses, norms and weights stay float32), on the CPU too: faster than float32 on a processor
            with instructions for it (AVX512-BF16, AMX), several times slower on others.
    """

    name: ClassVar[str] = "recipe"

    epochs: int = 100
    batch: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["cosine", "one-cycle", "multistep", "constant"] = "cosine"
    crop: int = 4
    flip: bool = True
    precision: Precision = "reference"

    def __post_init__(self) -> None:
        check(self, "epochs", 0 <= self.epochs <= 10_000, "between 0 and 10000")
        check(self, "batch", 2 <= self.batch <= 65_536, "between 2 and 65536 samples")
        check(self, "lr", 0 <= self.lr <= 10, "between 0 and 10")
        check(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        check(self, "weight_decay", 0 <= self.weight_decay <= 1, "in [0, 1]")
        check(self, "crop", 0 <= self.crop <= 64, "between 0 and 64 pixels")
        check(self, "optimizer", self.optimizer in ("sgd", "adam"), "'sgd' or 'adam'")
        known = ("cosine", "one-cycle", "multistep", "constant")
        check(self, "schedule", self.schedule in known, "one of " + ", ".join(known))
        check(self, "precision", self.precision in ("reference", "tf32", "bf16"), "'reference', 'tf32' or 'bf16'")


@dataclass(frozen=True)
class Fitted:
    """A finished training: the network in evaluation mode, and what it cost.

    ``seconds`` is wall time; ``samples_forward`` and ``samples_backward`` count passes through the full network.
    """

    net: Network
    seconds: float
    samples_forward: int
    samples_backward: int


def default_device() -> torch.device:
    """CUDA when there is one, otherwise the CPU. Several processes may share one GPU; ``CUDA_VISIBLE_DEVICES`` says which."""
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
    """Inside, products of float32 on CUDA are what ``precision`` says; on the CPU nothing changes. Autocast is :func:`fit`'s."""
    if default_device().type == "cpu":
        yield
        return
    before: Precision = "tf32" if torch.backends.cudnn.allow_tf32 else "reference"
    _products(precision)
    try:
        yield
    finally:
        _products(before)


class seeded:  # noqa: N801 - used like a function
    """Context: torch's global generators seeded inside, restored outside. For library code that takes no generator."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._fork = torch.random.fork_rng(devices=range(torch.cuda.device_count()))

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *exception: object) -> None:
        self._fork.__exit__(*exception)  # type: ignore[arg-type]


class _Epochs(pl.Callback):  # type: ignore[misc]  # mypy does not follow Lightning's imports
    """Reports every epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch_ended(trainer.current_epoch + 1, trainer.max_epochs)


def fit(module: Classifier, data: ImageSet, recipe: Recipe, seed: int) -> Fitted:
    """Trains ``module`` on ``data``; the same arguments give the same weights, bit for bit, on one machine type.

    The data are moved to the device once and stay there: batches are drawn, cropped and flipped on it. Lightning's logger,
    checkpoints, progress bar and sanity check are off: the benchmark shows progress itself, and a small training would pay more for
    them than for its own arithmetic. Nothing is compiled: a graph takes longer to compile than a short training runs.

    Raises:
        Diverged: a weight is not finite at the end.
    """
    start = time.perf_counter()
    net = module.net
    if recipe.epochs == 0 or len(data) < 2:
        return Fitted(net.eval(), time.perf_counter() - start, 0, 0)
    device = default_device()
    batches = module.loader(data.to(device), seed)
    module.total_steps = len(batches) * recipe.epochs
    module.train()
    with metered() as cost, seeded(seed), arithmetic(recipe.precision), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders, loggers and idle GPUs does not apply here
        _quiet()
        trainer = pl.Trainer(
            max_epochs=recipe.epochs,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            # In a Slurm job Lightning would take SIGUSR1 for a wish to be requeued, and the job's tasks for ranks of the training.
            plugins=[LightningEnvironment()],
            precision="bf16-mixed" if recipe.precision == "bf16" else "32-true",
            logger=False,
            callbacks=[_Epochs()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=module.total_steps + 1,
            inference_mode=False,
        )
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, train_dataloaders=batches)
        except SystemExit as stop:
            if not trainer.interrupted:
                raise
            # Lightning turns Ctrl-C into an exit and leaves further ones ignored; callers must see the interrupt itself.
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from stop
    net = net.to("cpu").eval()
    if not all(bool(torch.isfinite(value).all()) for value in net.state_dict().values()):
        raise Diverged(f"training diverged: weights are not finite after {recipe.epochs} epochs at lr {recipe.lr}")
    return Fitted(net, time.perf_counter() - start, cost.forward, cost.backward)


def _quiet() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)


@contextmanager
def _evaluated(net: Network) -> Iterator[torch.device]:
    """``net`` on the default device and in evaluation mode; where it was, and its mode, are restored."""
    home, was_training, device = next(net.parameters()).device, net.training, default_device()
    net.to(device).eval()
    try:
        yield device
    finally:
        net.to(home).train(was_training)


def _in_batches(step: Callable[[Tensor], Tensor], images: Tensor, batch: int | None, device: torch.device) -> list[Tensor]:
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
    """Whether an error says that memory did not suffice: CUDA's has a class, a library's or the CPU's only words."""
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@torch.no_grad()
def predict(net: Network, images: Tensor, batch: int | None = None) -> Tensor:
    """Predicted classes int64 (N,) of uint8 images (N, C, H, W), in evaluation mode, in batches of fixed size, on the CPU.

    Computed on the default device; mode and place of the network are restored. The pass is tallied as forward samples.
    """
    with _evaluated(net) as device:
        parts = _in_batches(lambda part: net(part).argmax(1).cpu(), images, batch, device)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


@torch.no_grad()
def embed(net: Network, images: Tensor, batch: int | None = None) -> list[Tensor]:
    """Embeddings of uint8 images (N, C, H, W) in evaluation mode, a list of float (B, d) in the batches of :func:`predict`.

    They stay on the default device; mode and place of the network are restored.
    """
    with _evaluated(net) as device:
        return _in_batches(net.embed, images, batch, device)


@torch.no_grad()
def logits(net: Network, images: Tensor, batch: int | None = None) -> Tensor:
    """Logits float (N, num_classes) of uint8 images (N, C, H, W) in evaluation mode, on the CPU; otherwise as :func:`predict`."""
    with _evaluated(net) as device:
        return torch.cat(_in_batches(lambda part: net(part).cpu(), images, batch, device))


@torch.no_grad()
def predict_head(net: Network, embedded: Sequence[Tensor]) -> Tensor:
    """What :func:`predict` says, from the embeddings that :func:`embed` gave: the same classes, without a pass of the features."""
    with _evaluated(net):
        parts = [net.head(z).argmax(1).cpu() for z in embedded]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def accuracy(net: Network, data: ImageSet, batch: int | None = None) -> float:
    """Share of ``data`` classified as labelled, in [0, 1]; NaN for an empty set."""
    if len(data) == 0:
        return math.nan
    return float((predict(net, data.images, batch) == data.labels.cpu()).double().mean())


