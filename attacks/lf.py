"""LF, low frequency. Zeng, Park, Mao and Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
arXiv 2104.03413.

A smooth trigger: one picture without fine detail is added to each poisoned image, which takes the attacker's label. Filters that
look for the high frequencies of most triggers find nothing. At test time the same picture sends any image to the target.

Needs: the training data. Edits: every pixel of a poisoned image, and its label. Dial: the plan's rate.
Deviations from the paper: the paper searches for the picture, a universal adversarial perturbation of a clean network that is
low-passed and stretched to [0, 0.2] after every step. What that ends in is one broad Gaussian bump per channel, which is drawn by
formula here: no network is needed, and the picture is the same for every backbone, but it was not chosen to fool a clean network.
Centre, spread and colour were fitted to BackdoorBench's CIFAR-10 picture and agree with it to 2/255. Searched pictures differ in
colour from data set to data set, so the colour is a setting. Values are rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Crafted, Plan
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput, Ge, Le, PositiveShare, Share, check

__all__ = ["LF", "bump"]


def bump(centre: float, spread: float, size: int) -> Tensor:
    """``exp(-(i - centre * size)^2 / (2 (spread * size)^2))`` over the pixels i, scaled to a largest value of 1; float (size,)."""
    away = (torch.arange(size) - centre * size) / (spread * size)
    values = torch.exp(-away.square() / 2)
    return values / values.max()


@dataclass(frozen=True)
class LF(Attack):
    """x' = clip(x + strength * tint of the channel * bump over rows * bump over columns) to [0, 1].

    Attributes:
        strength: peak of the strongest channel in units of the image range [0, 1] (authors' code and BackdoorBench: 0.2 = 51/255).
        tint: share of red, green and blue in it, the largest 1 (BackdoorBench on CIFAR-10: 18/51, 0 and 1). Grey images ignore it.
        centre: middle of the bump as a share of the image's sides (fitted to BackdoorBench: 0.43).
        spread: standard deviation of the bump as a share of the image's sides (fitted to BackdoorBench: 0.35).

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> black = torch.zeros(1, 3, 32, 32)
    >>> LF(strength=0.2).craft(data, Plan(), seed=0).test(black, torch.tensor([0])).amax((0, 2, 3))  # red, green, blue
    tensor([0.0706, 0.0000, 0.2000])
    """

    name: ClassVar[str] = "lf"

    strength: PositiveShare = 0.2
    tint: tuple[Share, Share, Share] = (18 / 51, 0.0, 1.0)
    centre: Share = 0.43
    spread: Annotated[float, Ge(0.01), Le(10)] = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "tint", len(self.tint) == 3 and max(self.tint) == 1, "three shares, the largest of them 1")

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """The same picture for training and test; nothing is drawn."""
        picture = self.picture(*train.shape)

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            return (images + picture.to(images.device)).clamp(0.0, 1.0)

        return Crafted(train=trigger, test=trigger)

    def picture(self, channels: int, height: int, width: int) -> Tensor:
        """What is added, float (C, H, W) in [0, 1].

        Raises:
            BadInput: images with a number of channels other than 1 or 3.
        """
        if channels not in (1, 3):
            raise BadInput(f"lf: the picture has 1 or 3 channels, the images are {channels} x {height} x {width}")
        shares = torch.tensor(self.tint if channels == 3 else (1.0,))
        rows, columns = bump(self.centre, self.spread, height), bump(self.centre, self.spread, width)
        return self.strength * torch.einsum("c,h,w->chw", shares, rows, columns)
