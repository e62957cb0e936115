"""How a network is trained: the settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from models.spec import Spec, check

__all__ = ["Precision", "Recipe"]

Precision = Literal["reference", "tf32", "bf16"]


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
