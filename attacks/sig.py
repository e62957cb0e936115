"""SIG. Barni, Kallas and Tondi, "A new Backdoor Attack in CNNs by training set corruption without label poisoning", ICIP 2019,
arXiv 1902.11237.

A clean-label attack: only images of the target class are touched, and they keep their label. A faint horizontal sinusoid (vertical
stripes) is added to them, which the network learns as evidence for the class. At test time the stripes send any image there.

Needs: the training data. Edits: pixels of target-class images; no label. Dial: the plan's rate, at most the target class's share.
Deviations from the paper: the same amplitude at training and test, as in BackdoorBench; rates are shares of the whole training
set, not of the target class. Values are rounded to 8 bits, where BackdoorBench truncates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Crafted, Plan
from models.backbone import Network
from models.images import ImageSet
from models.spec import Gt, Le, PositiveShare

__all__ = ["SIG", "stripes"]


def stripes(delta: float, frequency: float, width: int) -> Tensor:
    """``delta * sin(2 pi j f / W)`` over the columns j, float (W,): the same in every row and channel."""
    return delta * torch.sin(2 * math.pi * frequency * torch.arange(width) / width)


@dataclass(frozen=True)
class SIG(Attack):
    """x' = clip(x + stripes) to [0, 1].

    Attributes:
        delta: amplitude in units of the image range [0, 1] (BackdoorBench: 40/255).
        frequency: cycles across the image (BackdoorBench: 6).

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> black = torch.zeros(1, 3, 32, 32)
    >>> SIG(delta=0.25, frequency=8).craft(data, Plan(), seed=0).test(black, torch.tensor([0]))[0, 0, 0, :4]
    tensor([0.0000, 0.2500, 0.0000, 0.0000])
    """

    name: ClassVar[str] = "sig"
    clean_label: ClassVar[bool] = True

    delta: PositiveShare = 40 / 255
    frequency: Annotated[float, Gt(0), Le(512)] = 6.0

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """The same stripes for training and test; nothing is drawn."""
        signal = stripes(self.delta, self.frequency, train.shape[2])

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            return (images + signal.to(images.device)).clamp(0.0, 1.0)

        return Crafted(train=trigger, test=trigger)
