"""How a network is trained: the settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

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
        momentum: of SGD.
        nesterov: use Nesterov momentum.
        weight_decay: of SGD and Adam.
        optimizer: ``sgd`` or ``adam``.
        schedule: ``cosine`` (per epoch, to zero), ``one-cycle`` (per step), ``multistep`` (x0.1 at 50 % and 75 %) or ``constant``.
        crop: zero padding of the random crop, in pixels.
        flip: mirror half of the samples.
        precision: of the arithmetic. ``reference`` = float32. ``tf32`` = matrix products and convs in TF32, in training and
            evaluation; on the CPU the same as ``reference``. ``bf16`` = TF32, and forward passes of training under autocast to
            bfloat16 (losses, norms and weights stay float32). On the CPU bfloat16 is faster than float32 where the processor has
            instructions for it (AVX512-BF16, AMX), and several times slower elsewhere.
        weights: of the finished network. ``half`` = rounded to float16 and computed with in float32, so that a file of
            half the size holds the very same network.
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
    weights: Literal["float32", "half"] = "float32"

    def spec(self) -> dict[str, Any]:
        """As every spec; ``weights`` is left out where nothing is rounded, so that keys of earlier versions stay valid."""
        return {key: value for key, value in super().spec().items() if (key, value) != ("weights", "float32")}
