"""What a backdoor may leave in a network, measured without knowing the trigger.

- patch, additive: for every class the smallest trigger is searched that sends clean images to it, a patch (Neural Cleanse: Wang
  et al., IEEE S&P 2019) or an addition to all pixels. The sign is the largest anomaly index of the sizes. With fewer than three
  classes no size can be an outlier.
- weights: the largest z-score of a unit's Lipschitz bound in its layer (CLP: Zheng et al., ECCV 2022, arXiv 2208.03111). No images.
- statistics: the mean over the batch norms of the log of the largest divergence of clean inputs from the running statistics (BNP:
  Zheng et al., NeurIPS 2022); 0 without batch norms.

None of them tells a backdoor from a natural shortcut: what counts is whether benign networks of the same kind show as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defenses.bnp import divergences
from defenses.neural_cleanse import NeuralCleanse, Patch, Search, anomaly_indices
from models.backbone import Network
from models.images import ImageSet
from models.training import in_batches, on_device
from models.units import unit_layers, weight_bounds

__all__ = ["KINDS", "SEARCH", "SIGNS", "Additive", "Signs", "effect", "index", "measured", "outlier", "shift", "triggered"]

SEARCH = NeuralCleanse(search_epochs=30, samples=256, search_batch=32, patience=2, success=0.95)
"""The search (ours): shorter than the defense's, since it is made for every class, two kinds of trigger and every benign network.
Its length was set by its time, before any network was searched."""
SIGNS = {
    "patch": "smallest patch",
    "additive": "smallest addition",
    "weights": "largest weights",
    "statistics": "shifted statistics",
}
FEWEST = 3
"""Classes, and units of a layer, from which on one of them can be an outlier."""


class Additive(Search):
    """x + tanh z, cut to [0, 1]; its size is the mean over the channels of the absolute values, summed over the pixels."""

    @staticmethod
    def shown(images: Tensor, z: list[Tensor]) -> Tensor:
        return (images + torch.tanh(z[1]) + 0 * z[0].sum()).clamp(0, 1)

    @staticmethod
    def size(z: list[Tensor]) -> Tensor:
        return torch.tanh(z[1]).abs().mean(0).sum()


KINDS: dict[str, type[Search]] = {"patch": Search, "additive": Additive}


@dataclass(frozen=True)
class Signs:
    """What was measured on one network.

    Attributes:
        triggers: by kind, the smallest trigger that was found for every class.
        weights: see :func:`outlier`.
        statistics: see :func:`shift`.
    """

    triggers: dict[str, tuple[Patch, ...]]
    weights: float
    statistics: float

    @property
    def values(self) -> dict[str, float]:
        """Every sign by its name in :data:`SIGNS`; the larger, the more suspicious."""
        return {**{kind: index(found)[0] for kind, found in self.triggers.items()}, "weights": self.weights,
                "statistics": self.statistics}  # fmt: skip


def index(found: tuple[Patch, ...]) -> tuple[float, int]:
    """The largest anomaly index of triggers that work, and its class; of none, 0 and -1."""
    if len(found) < FEWEST:
        return 0.0, -1
    indices = anomaly_indices(torch.tensor([one.size for one in found]))
    works = [label for label, one in enumerate(found) if one.reached]
    if not works:
        return 0.0, -1
    label = max(works, key=lambda one: float(indices[one]))
    return min(float(indices[label]), 1e6), label


def outlier(net: Network) -> float:
    """The largest z-score of a unit's Lipschitz bound in its layer, over layers of at least three units."""
    found = [0.0]
    for bounds in weight_bounds(net, unit_layers(net)).values():
        finite = bounds[torch.isfinite(bounds)]
        if len(finite) >= FEWEST and float(finite.std()) > 0:
            found.append(float(((finite - finite.mean()) / finite.std()).max()))
    return max(found)


def shift(net: Network, images: Tensor) -> float:
    """The mean over the batch norms of log(1 + the largest finite divergence); 0 without any.

    Args:
        images: uint8 (N, C, H, W), clean, N >= 2.
    """
    norms = [layer for layer in unit_layers(net) if isinstance(net.get_submodule(layer.name), nn.BatchNorm2d)]
    if not norms:
        return 0.0
    found = [scores[torch.isfinite(scores)] for scores in divergences(net, norms, images).values()]
    return float(torch.tensor([math.log1p(float(scores.max())) if len(scores) else 0.0 for scores in found]).mean())


def measured(net: Network, clean: ImageSet, seed: int, progress: Callable[[str, int, int], None] = lambda *_: None) -> Signs:
    """All signs of a network.

    Args:
        net: in evaluation mode.
        clean: clean images of all classes.
        seed: of the search.
        progress: called after every search with what was searched, how many are done, and of how many.
    """
    with on_device(net) as device:
        data, frozen = clean.to(device), net.requires_grad_(False)
        triggers, done, total = {}, 0, len(KINDS) * clean.num_classes
        for kind, search in KINDS.items():
            found = []
            for label in range(clean.num_classes):
                found.append(SEARCH.invert(frozen, data, label, seed, search))
                done += 1
                progress(f"{kind}, class {label}", done, total)
            triggers[kind] = tuple(found)
    net.requires_grad_(True)
    return Signs(triggers, outlier(net), shift(net, clean.images))


def triggered(images: Tensor, kind: str, trigger: Patch) -> Tensor:
    """Images float (N, C, H, W) in [0, 1] with a trigger of that kind."""
    return KINDS[kind].shown(images, [trigger.mask.to(images.device), trigger.pattern.to(images.device)])


@torch.no_grad()
def effect(net: Network, data: ImageSet, kind: str, trigger: Patch, label: int) -> float:
    """Share of the images of other classes that the trigger sends to ``label``, in [0, 1]; NaN where there are none."""
    others = data.images[data.labels != label]
    if not len(others):
        return math.nan
    with on_device(net) as device:

        def sent(batch: Tensor) -> Tensor:
            found: Tensor = net(triggered(batch, kind, trigger)).argmax(1) == label
            return found.cpu()

        return float(torch.cat(in_batches(sent, others, None, device)).double().mean())
