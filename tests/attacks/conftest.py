"""Images with the statistics that decide how visible a trigger is, and how far apart two sets of images are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.backbone import Network
from models.images import ImageSet, quantise
from models.resnet import ResNet8
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


def banded(count: int = 64, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 4) -> ImageSet:
    """Small noisy images whose brightness tells their class."""
    labels = torch.arange(count) % classes
    noise = torch.randint(0, 90, (count, *shape), generator=generator("adaptive", count))
    return ImageSet((noise + 40 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, classes)


def seasoned(seed: int = 0, backbone: type = ResNet8, shape: tuple[int, int, int] = (1, 8, 8)) -> Network:
    """A small network with norms that look trained."""
    net = backbone(width=4, hidden=8).build(4, shape, [0.5] * shape[0], [0.25] * shape[0], seed)
    draw = generator("norms", seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.num_features, generator=draw) + 0.3)
                module.bias.copy_(torch.randn(module.num_features, generator=draw) * 0.2)
                module.running_mean.copy_(torch.randn(module.num_features, generator=draw) * 0.1)
                module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
    return net.eval()


@pytest.fixture
def pictures() -> Callable[..., ImageSet]:
    return banded


@pytest.fixture
def net_of() -> Callable[..., Network]:
    return seasoned


@pytest.fixture
def same() -> Callable[[Network, Network], bool]:
    """Whether two networks hold the same weights and statistics."""

    def equal(one: Network, other: Network) -> bool:
        left, right = one.state_dict(), other.state_dict()
        return all(torch.equal(left[name], right[name]) for name in left)

    return equal
