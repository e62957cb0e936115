"""How a network is trained: the settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, Lt, Spec

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

    epochs: EpochCount = 100
    batch: BatchSize = 128
    lr: LearningRate = 0.01
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0), Le(1)] = 5e-4
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["cosine", "one-cycle", "multistep", "constant"] = "cosine"
    crop: Annotated[int, Ge(0), Le(64)] = 4
    flip: bool = True
    precision: Precision = "reference"
