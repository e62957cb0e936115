"""Residual networks for small images.

- ResNet (He et al., CVPR 2016, arXiv 1512.03385): conv-norm-ReLU blocks; three stages for CIFAR (ResNet-8, ResNet-20), or the four
  stages of ResNet-18 behind a 3x3 stem, as everyone trains it on 32x32 images.
- PreAct-ResNet (He et al., ECCV 2016, arXiv 1603.05027): norm-ReLU-conv blocks, in the form the backdoor literature trains on
  CIFAR: the shortcut conv reads the activated input and has no norm, and no norm follows the last block.
- ResNet-9 (Page, "How to train your ResNet", 2018): convs and max-pools with two residual blocks; little arithmetic for its
  accuracy, because most of it is done at half the image's sides and less.
- WideResNet (Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146): three stages of the same blocks, with the final norm and ReLU.

Every stage but the first halves the image's sides and doubles the channels. Any image of at least 8x8 pixels fits. Every ReLU is a
module of its own, so that a defense can bound it (:mod:`models.bounded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from models.backbone import Backbone, GlobalAverage, Width, he_init

__all__ = ["WRN16", "PreActResNet18", "ResNet8", "ResNet9", "ResNet18", "ResNet20"]


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class _Shortcut(nn.Conv2d):
    """A 1x1 conv that reads every ``step``-th pixel: a strided 1x1 conv, written as slice and conv.

    The strided form must be avoided: in channels_last and with fewer than 16 input channels, oneDNN writes its gradient past the
    end of a buffer (uxlfoundation/oneDNN issue 6035), which crashes or, worse, only changes the weights.
    """

    def __init__(self, inputs: int, outputs: int, step: int) -> None:
        super().__init__(inputs, outputs, 1, bias=False)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.step, :: self.step])


class _Block(nn.Module):
    """conv-norm-ReLU-conv-norm, plus the input (through a 1x1 conv and norm where the shape changes), then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_Shortcut(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        summed: Tensor = self.relu2(out + self.shortcut(x))
        return summed


class _PreActBlock(nn.Module):
    """norm-ReLU-conv twice, plus the input; where the shape changes, plus a 1x1 conv of the activated input instead."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.shortcut = _Shortcut(inputs, outputs, stride) if stride != 1 or inputs != outputs else None
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + skip


class _Trunk(nn.Sequential):
    """Stem, stages ``layer1``, ``layer2``, ..., global average. ``blocks[i]`` = number of blocks of stage i."""

    def __init__(self, channels: int, width: int, blocks: Sequence[int], *, preact: bool, last_norm: bool = False) -> None:
        super().__init__()
        kind = _PreActBlock if preact else _Block
        self.conv1 = _conv(channels, width)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(width)
        self.act = nn.Identity() if preact else nn.ReLU()
        size = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            layers: list[nn.Module] = []
            for block in range(count):
                layers.append(kind(size, outputs, 2 if stage and not block else 1))
                size = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.last = nn.Sequential(nn.BatchNorm2d(size), nn.ReLU()) if last_norm else nn.Identity()
        self.pool = GlobalAverage()
        he_init(self, "fan_out")


@dataclass(frozen=True)
class _ResNet(Backbone):
    """Shared by the catalogue's entries, which differ in the numbers below and their default width."""

    blocks: ClassVar[tuple[int, ...]]
    preact: ClassVar[bool] = False
    last_norm: ClassVar[bool] = False

    def trunk(self, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        net = _Trunk(shape[0], self.width, self.blocks, preact=self.preact, last_norm=self.last_norm)
        return net, self.width * 2 ** (len(self.blocks) - 1)


@dataclass(frozen=True)
class ResNet8(_ResNet):
    """ResNet-8 for CIFAR: three stages of one block; d = 4 x width. Width 16: Sec. 4.2 of the paper; shortcuts: option B."""

    name: ClassVar[str] = "resnet8"
    blocks: ClassVar[tuple[int, ...]] = (1, 1, 1)


class _Residual(nn.Module):
    """The input plus two conv-norm-ReLU of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return x + added


@dataclass(frozen=True)
class ResNet9(Backbone):
    """ResNet-9: a stem, then three stages of conv-norm-ReLU and max-pool, the first and last with a residual block; d = 8 x width.

    Width 64: the source. The embedding is a global average where the source has a max-pool over its last 4x4 pixels.
    """

    name: ClassVar[str] = "resnet9"

    width: Width = 64

    def trunk(self, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        width = self.width

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [_conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

        net = nn.Sequential(
            *stage(shape[0], width)[:-1], *stage(width, 2 * width), _Residual(2 * width), *stage(2 * width, 4 * width),
            *stage(4 * width, 8 * width), _Residual(8 * width), GlobalAverage(),
        )  # fmt: skip
        he_init(net, "fan_out")
        return net, 8 * width


@dataclass(frozen=True)
class ResNet20(_ResNet):
    """ResNet-20 for CIFAR: three stages of three blocks; d = 4 x width. Width 16: Sec. 4.2 of the paper; shortcuts: option B."""

    name: ClassVar[str] = "resnet20"
    blocks: ClassVar[tuple[int, ...]] = (3, 3, 3)


@dataclass(frozen=True)
class ResNet18(_ResNet):
    """ResNet-18 with a 3x3 stem and no max-pool: four stages of two blocks; d = 8 x width. Width 64: Table 1 of the paper."""

    name: ClassVar[str] = "resnet18"
    blocks: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)

    width: Width = 64


@dataclass(frozen=True)
class PreActResNet18(_ResNet):
    """PreAct-ResNet-18, the literature's usual victim: four stages of two pre-activation blocks; d = 8 x width.

    Width 64: as ResNet-18. The embedding is the average of the last residual sum, without norm or ReLU, and can be negative.
    """

    name: ClassVar[str] = "preact-resnet18"
    blocks: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)
    preact: ClassVar[bool] = True

    width: Width = 64


@dataclass(frozen=True)
class WRN16(_ResNet):
    """WideResNet-16-1: three stages of (16 - 4) / 6 = 2 pre-activation blocks; d = 4 x width.

    Width 16 x widening factor 1: Table 1 of the paper. A factor k is ``width = 16 k``, with the stem widened too (the paper's has
    16 channels whatever k is).
    """

    name: ClassVar[str] = "wrn16-1"
    blocks: ClassVar[tuple[int, ...]] = (2, 2, 2)
    preact: ClassVar[bool] = True
    last_norm: ClassVar[bool] = True
