"""VGG for small images (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556): configurations A (11 layers) and E (19 layers).

As everyone trains it on 32x32 images: the three linear layers of 4096 units give way to a global average and the head, and each
conv is followed by batch norm (Ioffe and Szegedy, ICML 2015). A stage ends in a max-pool while both sides have at least 2 pixels,
so that any image fits. ``vgg11`` has no norms: the case in which a prunable unit is a conv's own output channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from models.backbone import Backbone, GlobalAverage, Width, he_init

__all__ = ["VGG11", "VGG11BN", "VGG19BN"]

_FACTORS = (1, 2, 4, 8, 8)
"""Channels of the five stages, in multiples of the width."""


def _trunk(shape: tuple[int, int, int], width: int, convs: Sequence[int], norm: bool) -> nn.Sequential:
    """``convs[i]`` = number of convs of stage i."""
    inputs, side = shape[0], min(shape[1:])
    layers: list[nn.Module] = []
    for count, factor in zip(convs, _FACTORS, strict=True):
        for _ in range(count):
            # A norm subtracts any bias before it, so only the plain conv has one.
            layers.append(nn.Conv2d(inputs, width * factor, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(width * factor), nn.ReLU()] if norm else [nn.ReLU()]
            inputs = width * factor
        if side >= 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    net = nn.Sequential(*layers, GlobalAverage())
    he_init(net, "fan_in")
    return net


@dataclass(frozen=True)
class _VGG(Backbone):
    convs: ClassVar[tuple[int, ...]]
    norm: ClassVar[bool] = True

    width: Width = 64  # Table 1 of the paper

    def trunk(self, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        return _trunk(shape, self.width, self.convs, self.norm), self.width * _FACTORS[-1]


@dataclass(frozen=True)
class VGG11BN(_VGG):
    """VGG-11 (configuration A) with batch norm; d = 8 x width."""

    name: ClassVar[str] = "vgg11-bn"
    convs: ClassVar[tuple[int, ...]] = (1, 1, 2, 2, 2)


@dataclass(frozen=True)
class VGG19BN(_VGG):
    """VGG-19 (configuration E) with batch norm; d = 8 x width."""

    name: ClassVar[str] = "vgg19-bn"
    convs: ClassVar[tuple[int, ...]] = (2, 2, 4, 4, 4)


@dataclass(frozen=True)
class VGG11(_VGG):
    """VGG-11 (configuration A) as published, without norms; d = 8 x width."""

    name: ClassVar[str] = "vgg11"
    convs: ClassVar[tuple[int, ...]] = (1, 1, 2, 2, 2)
    norm: ClassVar[bool] = False
