"""Blended. Chen, Liu, Li, Lu and Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017,
arXiv 1712.05526.

A whole picture is blended faintly into each poisoned image, which takes the attacker's label. Unlike a patch the trigger covers
every pixel, so crops and flips of the augmentation cannot remove it. At test time the same blend sends any image to the target.

Needs: the training data. Edits: every pixel of a poisoned image, and its label. Dial: the plan's rate.
Deviations from the paper: the paper's cartoon is a copyrighted picture; ours is drawn by formula. Brightness, contrast, spectrum
and blend PSNR (about 21 dB on natural images) are near those of BackdoorBench's picture. So is its symmetry: its correlation with
its own mirror image is 0.75 or more (0.75 there), so a horizontal flip of the augmentation leaves most of the trigger in place.
The same ratio at training and test, as in BackdoorBench. Values are rounded to 8 bits, where BackdoorBench truncates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from attacks.base import Attack, Crafted, Plan
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput, Ge, PositiveShare, generator

__all__ = ["Blended", "cartoon", "noise"]

Colour = tuple[float, float, float]
Ellipse = tuple[float, float, float, float, float, Colour]
"""Centre x, y, semi-axes a, b, turn in radians, fill; lengths in parts of the side of the picture."""

WHITE, DARK = (0.98, 0.98, 0.98), (0.1, 0.1, 0.1)
PALETTE = ((0.85, 0.15, 0.20), (0.95, 0.80, 0.20), (0.20, 0.35, 0.75), (0.95, 0.60, 0.75), (0.30, 0.65, 0.35), (0.95, 0.55, 0.20))
HALF_WIDTH = 0.008  # of the dark outline
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])  # Rec. 601, as image libraries convert to grey


def bear(seed: int) -> list[Ellipse]:
    """A bear with a balloon, ellipses on the unit square from back to front.

    Everything but the balloon comes in mirrored pairs or on the middle line. The seed draws sizes, colours and the side of the
    balloon.
    """
    gen = generator(seed, "blended-cartoon")
    ears, balloon, shirt, cheeks, nose = (PALETTE[i] for i in torch.randperm(len(PALETTE), generator=gen).tolist()[:5])
    high, wide, big, broad, apart, look, smile, side = torch.rand(8, generator=gen).tolist()
    eye, hand = 0.14 + 0.04 * apart, 0.4 if side < 0.5 else -0.4

    def pair(x: float, y: float, a: float, b: float, turn: float, colour: Colour) -> list[Ellipse]:
        return [(0.5 - x, y, a, b, turn, colour), (0.5 + x, y, a, b, -turn, colour)]

    return [
        *pair(0.2, 0.13 + 0.04 * high, 0.1 + 0.03 * wide, 0.1 + 0.03 * big, 0.0, ears),
        (0.5, 0.96, 0.19 + 0.06 * broad, 0.24, 0.0, shirt),
        (0.5, 0.93, 0.1, 0.09, 0.0, WHITE),
        *pair(0.25, 0.8, 0.1, 0.065, -0.7, WHITE),  # arms
        (0.5, 0.42, 0.34 + 0.04 * wide, 0.27 + 0.03 * big, 0.0, WHITE),  # head
        *pair(eye, 0.37, 0.035 + 0.015 * look, 0.045 + 0.015 * look, 0.0, DARK),
        *pair(eye + 0.06, 0.51, 0.05, 0.035, 0.0, cheeks),
        (0.5, 0.48, 0.05, 0.035, 0.0, nose),
        (0.5, 0.59, 0.05 + 0.04 * smile, 0.02, 0.0, nose),
        (0.5 + hand, 0.92, 0.012, 0.12, 0.0, DARK),  # string
        (0.5 + hand, 0.67, 0.085, 0.11, 0.0, balloon),
    ]


def cartoon(seed: int, height: int, width: int, supersample: int = 4) -> Tensor:
    """The bear painted on near-white, each ellipse with a dark outline: float (3, H, W) in [0, 1].

    It is evaluated at ``supersample`` x ``supersample`` points per pixel, so the picture of one seed is the same at every size.
    """
    down = ((torch.arange(height * supersample) + 0.5) / (height * supersample))[:, None]
    across = (torch.arange(width * supersample) + 0.5) / (width * supersample)
    canvas = torch.full((3, height * supersample, width * supersample), WHITE[0])
    for x, y, a, b, turn, colour in bear(seed):
        dx, dy = across - x, down - y
        p, q = dx * math.cos(turn) + dy * math.sin(turn), dy * math.cos(turn) - dx * math.sin(turn)
        edge = (((p / a) ** 2 + (q / b) ** 2).sqrt() - 1) * min(a, b)
        fill = torch.tensor(colour)[:, None, None]
        canvas = torch.where(edge < HALF_WIDTH, torch.where(edge > -HALF_WIDTH, DARK[0], fill), canvas)
    return torch.nn.functional.avg_pool2d(canvas, supersample)


def noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """A uniform random picture, float (C, H, W) in [0, 1): the paper's second pattern."""
    return torch.rand(channels, height, width, generator=generator(seed, "blended-noise"))


@dataclass(frozen=True)
class Blended(Attack):
    """x' = (1 - alpha) x + alpha T.

    Attributes:
        alpha: blend ratio in (0, 1] (BackdoorBench: 0.2).
        pattern: ``cartoon`` (for images with 1 or 3 channels; grey is its luminance) or ``noise`` (the paper's other picture).
        pattern_seed: which cartoon or noise (ours). It is a setting: every run of the benchmark shares one picture, as with a file.

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> black = torch.zeros(1, 3, 32, 32)
    >>> Blended(alpha=0.1).craft(data, Plan(), seed=0).test(black, torch.tensor([0])).max() <= 0.1
    tensor(True)
    """

    name: ClassVar[str] = "blended"
    revision: ClassVar[int] = 2

    alpha: PositiveShare = 0.2
    pattern: Literal["cartoon", "noise"] = "cartoon"
    pattern_seed: Annotated[int, Ge(0)] = 2

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """The same picture for training and test, drawn from ``pattern_seed`` alone."""
        picture = self.picture(*train.shape)

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            return torch.lerp(images, picture.to(images.device), self.alpha)

        return Crafted(train=trigger, test=trigger)

    def picture(self, channels: int, height: int, width: int) -> Tensor:
        """The blended picture T, float (C, H, W) in [0, 1].

        Raises:
            BadInput: the cartoon is asked for a number of channels other than 1 or 3.
        """
        if self.pattern == "noise":
            return noise(self.pattern_seed, channels, height, width)
        if channels not in (1, 3):
            raise BadInput(f"blended: pattern = 'cartoon' has 1 or 3 channels, the images have {channels}; use 'noise'")
        colour = cartoon(self.pattern_seed, height, width)
        return colour if channels == 3 else torch.einsum("c,chw->hw", LUMINANCE, colour)[None]
