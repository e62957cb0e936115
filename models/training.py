"""The one training loop: the only place that builds a Trainer, picks a device, or seeds the global generators."""

from __future__ import annotations

import logging
import math
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from models.backbone import Network
from models.classifier import Classifier, pl
from models.cost import metered
from models.images import ImageSet, to_float
from models.spec import Spec, check

__all__ = [
    "Diverged", "Fitted", "Recipe", "accuracy", "default_device", "embed", "fit", "logits", "predict", "predict_head", "seeded",
]  # fmt: skip


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
        precision: ``reference`` = float32 everywhere.
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
    precision: Literal["reference"] = "reference"

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
        check(self, "precision", self.precision == "reference", "'reference'")


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
    """CUDA when there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def fit(module: Classifier, data: ImageSet, recipe: Recipe, seed: int) -> Fitted:
    """Trains ``module`` on ``data``; the same arguments give the same weights, bit for bit, on one machine type.

    Lightning's logger, checkpoints, progress bar and sanity check are off: the benchmark shows progress itself, and a small
    training would pay more for them than for its own arithmetic.

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
    with metered() as cost, seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders, loggers and idle GPUs does not apply here
        _quiet()
        trainer = pl.Trainer(
            max_epochs=recipe.epochs,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="32-true",
            logger=False,
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


@torch.no_grad()
def predict(net: Network, images: Tensor, batch: int = 500) -> Tensor:
    """Predicted classes int64 (N,) of uint8 images (N, C, H, W), in evaluation mode, in batches of fixed size.

    The mode the network was in is restored. The pass is tallied as forward samples.
    """
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    parts = []
    for start in range(0, len(images), batch):
        parts.append(net(_floats(images[start : start + batch], device)).argmax(1).cpu())
    net.train(was_training)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


@torch.no_grad()
def embed(net: Network, images: Tensor, batch: int = 500) -> list[Tensor]:
    """Embeddings of uint8 images (N, C, H, W) in evaluation mode, a list of float (B, d) in the batches of :func:`predict`."""
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    parts = [net.embed(_floats(images[start : start + batch], device)) for start in range(0, len(images), batch)]
    net.train(was_training)
    return parts


@torch.no_grad()
def logits(net: Network, images: Tensor, batch: int = 500) -> Tensor:
    """Logits float (N, num_classes) of uint8 images (N, C, H, W) in evaluation mode, computed on the default device, on the CPU.

    Mode and device of the network are restored.
    """
    device = next(net.parameters()).device
    parts = [net.head(z).cpu() for z in embed(net.to(default_device()), images, batch)]
    net.to(device)
    return torch.cat(parts)


@torch.no_grad()
def predict_head(net: Network, embedded: Sequence[Tensor]) -> Tensor:
    """What :func:`predict` says, from the embeddings that :func:`embed` gave: the same classes, without a pass of the features."""
    was_training = net.training
    net.eval()
    parts = [net.head(z).argmax(1).cpu() for z in embedded]
    net.train(was_training)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _floats(images: Tensor, device: torch.device) -> Tensor:
    return to_float(images.to(device)).contiguous(memory_format=torch.channels_last)


def accuracy(net: Network, data: ImageSet, batch: int = 500) -> float:
    """Share of ``data`` classified as labelled, in [0, 1]; NaN for an empty set."""
    if len(data) == 0:
        return math.nan
    return float((predict(net, data.images, batch) == data.labels.cpu()).double().mean())


