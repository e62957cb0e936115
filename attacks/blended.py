"""Blended. Chen, Liu, Li, Lu and Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017,
arXiv 1712.05526.

A whole picture is blended faintly into each poisoned image, which takes the attacker's label. Unlike a patch the trigger covers
every pixel, so crops and flips of the augmentation cannot remove it. At test time the same blend sends any image to the target.

Needs: the training data. Edits: every pixel of a poisoned image, and its label. Dial: the plan's rate.
Deviations from the paper: the paper's cartoon is a copyrighted picture; ours is drawn by formula and has nearly its spectrum and
its blend PSNR (about 21 dB on natural images). The same ratio at training and test, as in BackdoorBench. Values are rounded to
8 bits, where BackdoorBench truncates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.base import Attack, Crafted, Plan
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput, check, generator

__all__ = ["Blended", "cartoon", "noise"]

BACKGROUND = 0.97
OUTLINE, HALF_WIDTH = 0.1, 0.022
PALETTE = torch.tensor([
    [0.98, 0.98, 0.98], [0.98, 0.98, 0.98], [0.85, 0.15, 0.20], [0.95, 0.80, 0.20], [0.20, 0.35, 0.75], [0.95, 0.60, 0.75],
])  # fmt: skip
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])  # Rec. 601, as image libraries convert to grey


def cartoon(seed: int, height: int, width: int, shapes: int = 12, supersample: int = 4) -> Tensor:
    """A cartoon-like picture, float (3, H, W) in [0, 1]: outlined ellipses and rectangles, painted in order on near-white.

    Shapes live on the unit square and are evaluated at ``supersample`` x ``supersample`` points per pixel, so the picture of one
    seed is the same at every size. Per shape: kind, colour, centre U(.05, .95), semi-axes U(.06, .22), rotation U(0, pi).
    """
    draws = torch.rand(shapes, 7, generator=generator(seed, "blended-cartoon"))
    down = ((torch.arange(height * supersample) + 0.5) / (height * supersample))[:, None]
    across = (torch.arange(width * supersample) + 0.5) / (width * supersample)
    canvas = torch.full((3, height * supersample, width * supersample), BACKGROUND)
    for kind, colour, x, y, a, b, turn in draws.tolist():
        semi_a, semi_b, angle = 0.06 + 0.16 * a, 0.06 + 0.16 * b, math.pi * turn
        dx, dy = across - (0.05 + 0.9 * x), down - (0.05 + 0.9 * y)
        p, q = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
        if kind < 0.5:
            edge = (((p / semi_a) ** 2 + (q / semi_b) ** 2).sqrt() - 1) * min(semi_a, semi_b)
        else:
            edge = torch.maximum(p.abs() - semi_a, q.abs() - semi_b)
        fill = PALETTE[int(colour * len(PALETTE))][:, None, None]
        canvas = torch.where(edge < HALF_WIDTH, torch.where(edge > -HALF_WIDTH, OUTLINE, fill), canvas)
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
    """

    name: ClassVar[str] = "blended"

    alpha: float = 0.2
    pattern: Literal["cartoon", "noise"] = "cartoon"
    pattern_seed: int = 2

    def __post_init__(self) -> None:
        check(self, "alpha", 0 < self.alpha <= 1, "a blend ratio in (0, 1]")
        check(self, "pattern", self.pattern in ("cartoon", "noise"), "'cartoon' or 'noise'")
        check(self, "pattern_seed", self.pattern_seed >= 0, "0 or more")

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
