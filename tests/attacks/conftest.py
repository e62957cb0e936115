"""Images with the statistics that decide how visible a trigger is, and how far apart two sets of images are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from models.images import ImageSet, quantise
from models.spec import generator


def octaves(count: int, channels: int, size: int, draw: torch.Generator) -> Tensor:
    """Noise of halving amplitude from coarse to fine, as in natural images; unit variance."""
    total = torch.zeros(count, channels, size, size)
    for level, amplitude in ((2, 1.0), (4, 0.9), (8, 0.55), (16, 0.3), (32, 0.15)):
        coarse = torch.randn(count, channels, level, level, generator=draw)
        total += amplitude * interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return total / total.std()


@pytest.fixture(scope="session")
def natural() -> ImageSet:
    """300 images 3 x 32 x 32 in 10 classes; mean, spread and mean edge .48, .25 and 15/255, near CIFAR-10's .48, .26, 14."""
    draw = generator("natural-like")
    grey, tint = octaves(300, 1, 32, draw), octaves(300, 3, 32, draw)
    images = quantise(0.475 + 0.245 * grey + 0.09 * tint)
    return ImageSet(images, torch.arange(300) % 10, 10)


@pytest.fixture(scope="session")
def distance() -> Callable[[Tensor, Tensor], tuple[float, float, float]]:
    """(PSNR in dB, mean over images; largest difference; mean difference), both of 255, between uint8 sets (N, C, H, W)."""

    def measure(one: Tensor, other: Tensor) -> tuple[float, float, float]:
        apart = one.double() - other.double()
        psnr = 10 * torch.log10(255**2 / apart.square().flatten(1).mean(1).clamp_min(1e-9))
        return float(psnr.mean()), float(apart.abs().max()), float(apart.abs().mean())

    return measure
