"""The backbone contract: ``forward = head after features``, with a head whose hidden units can be pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from models.cost import tally
from models.spec import Ge, Le, Spec

__all__ = ["Backbone", "GlobalAverage", "Network", "Normalise", "Width", "before_block", "block_places", "he_init", "unrolled"]

Width = Annotated[int, Ge(1), Le(1024)]
"""Channels of a network's first stage."""


class Normalise(nn.Module):
    """(x - mean) / std per channel. Part of the network, so that all images outside are in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class GlobalAverage(nn.Module):
    """(N, C, H, W) -> (N, C): the mean over all pixels, whatever the image size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def he_init(net: nn.Module, fan: Literal["fan_in", "fan_out"]) -> None:
    """Every conv of ``net``: normal weights of variance 2 / fan, zero bias (He et al., ICCV 2015, arXiv 1502.01852, Sec. 2.2).

    ``fan_out`` is what residual networks are customarily trained from; ``fan_in`` keeps the size of the forward signal, which a
    network without norms needs.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def unrolled(module: nn.Module) -> list[nn.Module]:
    """The modules that ``module`` runs one after the other: of nested ``nn.Sequential`` their parts, otherwise itself."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return [step for child in module for step in unrolled(child)]
    return [module]


def block_places(features: nn.Module) -> list[int]:
    """Where in ``unrolled(features)`` the modules with convs are: residual blocks, or single convs with none around them."""
    return [place for place, step in enumerate(unrolled(features)) if any(isinstance(part, nn.Conv2d) for part in step.modules())]


def before_block(features: nn.Module, blocks: int) -> int:
    """Where to cut ``unrolled(features)`` so that the last ``blocks`` of its blocks (:func:`block_places`) come after the cut.

    With 0 blocks the cut is after the last.

    Raises:
        ValueError: no block would be left before the cut.
    """
    places = block_places(features)
    if blocks >= len(places):
        raise ValueError(f"the features are {len(places)} blocks in a row; {blocks} cannot be cut off")
    return places[-blocks] if blocks else places[-1] + 1


class Network(nn.Module):
    """A classifier in two stages.

    ``features``: images float (N, C, H, W) in [0, 1] -> embedding (N, d). ``head``: embedding -> logits (N, num_classes); an
    ``nn.Sequential`` of linear layers with ReLU between them, or a single linear layer.
    """

    def __init__(self, normalise: Normalise, features: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.normalise = normalise
        self.features = features
        self.head = head

    @property
    def width(self) -> int:
        """Size d of the embedding."""
        return next(layer.in_features for layer in self.head if isinstance(layer, nn.Linear))

    def embed(self, x: Tensor) -> Tensor:
        """Images float (N, C, H, W) in [0, 1] -> features (N, d)."""
        z: Tensor = self.features(self.normalise(x))
        tally(len(x), z)
        return z

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(x))
        return logits


@dataclass(frozen=True)
class Backbone(Spec, ABC):
    """An architecture and its size.

    Attributes:
        width: channels of the first stage; every other count scales with it.
        hidden: units of the head's hidden layer; 0 = a plain linear head (what the literature's end-to-end victims have).
    """

    width: Width = 16
    hidden: Annotated[int, Ge(0), Le(8192)] = 128

    @abstractmethod
    def trunk(self, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        """The feature extractor for images of ``shape`` (C, H, W), and the size d of the embedding it returns."""

    def build(
        self, num_classes: int, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], seed: int
    ) -> Network:
        """A freshly initialised network; the same arguments give the same weights, whatever was drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            features, width = self.trunk(shape)
            if self.hidden:
                head = nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, num_classes))
            else:
                head = nn.Sequential(nn.Linear(width, num_classes))
            net = Network(Normalise(mean, std), features, head)
        return net.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]
