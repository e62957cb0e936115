"""Activation pruning: the first half of Liu, Dolan-Gavitt and Garg, "Fine-Pruning", RAID 2018, arXiv 1805.12185.

A backdoor is thought to use units that are inactive on clean inputs. The last channels are sorted by their mean activation on
clean samples and pruned in ascending order. Pruning goes on until accuracy on held-out clean samples drops.

Needs: model, clean budget. Edits: the channels that the classifier reads (``site="last-conv"``: the units of the last convolution;
at scope HEAD the head's hidden layers).
Dial: share of those units pruned; default = the largest whose validation accuracy is within ``tau`` of the victim's.
Deviations from the paper: the released code has a fixed number of pruned units for each network; the tolerance ``tau`` and
the stop on a validation part of the same clean budget are ours (BackdoorBench stops on test accuracy). The paper prunes the last
convolution of networks without shortcuts, where it is what the classifier reads. In a residual network it is not: the last block's
shortcut is added behind it and carries a trigger past what is pruned. So the cut is made where the classifier reads, as in
BackdoorBench's code, on activations after ReLU and before pooling. ``last-conv`` is the paper to the letter: in residual networks
the last convolution larger than 1x1, with its norm, measured before the shortcut is added. With several hidden layers in the head,
each is sorted by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope, prunable, pruned_candidate
from models.backbone import Network
from models.images import to_float
from models.spec import Ge, Lt, Share, check
from models.training import accuracy, default_device
from models.units import Masks, Scores, UnitLayer, Writer, capture, embedding_layer, largest_within, prune

__all__ = ["Pruning", "Site", "clean_activations", "last_layers", "least_active", "mean_activations", "steps", "stop"]

Site = Literal["classifier-input", "last-conv"]


def last_layers(net: Network, scope: Scope, site: Site) -> tuple[UnitLayer, ...]:
    """The channels that the classifier reads, or the last convolution's units (WHOLE); all hidden layers of the head (HEAD).

    Raises:
        Inapplicable: there are none.
    """
    if scope is Scope.WHOLE and site == "classifier-input":
        return (embedding_layer(net),)
    layers = prunable(net, scope)
    if scope is Scope.HEAD:
        return layers

    def spatial(layer: UnitLayer) -> bool:
        convs = [net.get_submodule(path) for path in layer.writers]
        return any(isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1 for conv in convs)

    inside = [layer for layer in layers if not layer.head]
    if not inside:
        raise Inapplicable("nothing to prune at scope 'whole': the features have no convolution")
    return (([layer for layer in inside if spatial(layer)] or inside)[-1],)


@torch.no_grad()
def mean_activations(net: Network, layers: Sequence[UnitLayer], images: Tensor, batch: int = 500) -> Scores:
    """Mean activation after ReLU of every unit over samples and positions, float64 (units,) by layer name.

    ``images``: uint8 (N, C, H, W), N >= 1, not augmented. ``net`` must be in evaluation mode.
    """
    device = next(net.parameters()).device
    total = {layer.name: torch.zeros(layer.size, dtype=torch.float64) for layer in layers}
    with capture(net, layers) as seen:
        for start in range(0, len(images), batch):
            net(to_float(images[start : start + batch].to(device)).contiguous(memory_format=torch.channels_last))
            for name, output in seen.items():
                total[name] += output.reshape(*output.shape[:2], -1).double().mean(2).sum(0).cpu()
    return {name: value / len(images) for name, value in total.items()}


def least_active(activations: Scores, share: float) -> Masks:
    """Masks of the ``round(share * n)`` least active units of each layer, but never its last one; ties by lower index."""
    masks: Masks = {}
    for name, values in activations.items():
        count = min(round(share * len(values)), len(values) - 1)
        masks[name] = torch.zeros(len(values), dtype=torch.bool)
        masks[name][torch.argsort(values, stable=True)[:count]] = True
    return masks


def clean_activations(view: DefenderView, site: Site) -> Scores:
    """Mean activation of the units this method prunes, on the clean budget: float64 (units,) by layer name.

    Raises:
        Inapplicable: no such units, or an empty part of the clean budget.
    """
    net = view.model.to(default_device())
    if not len(view.clean) or not len(view.validation):
        raise Inapplicable("both parts of the clean budget must hold samples: one to measure activations on, one to stop on")
    return mean_activations(net, last_layers(net, view.scope, site), view.clean.images)


def steps(activations: Scores, shares: Sequence[float]) -> dict[float, Masks]:
    """Masks by the share of units they really prune, in the order of ``shares``; those that round alike fall together."""
    units = sum(len(values) for values in activations.values())
    found = [least_active(activations, share) for share in shares]
    return {sum(int(mask.sum()) for mask in masks.values()) / units: masks for masks in found}


def stop(view: DefenderView, ladder: dict[float, Masks], tau: float) -> float:
    """The last share of ``ladder`` (ascending) before validation accuracy falls more than ``tau`` below the victim's."""
    net = view.model.to(default_device())
    floor = accuracy(net, view.validation) - tau
    position = largest_within(
        list(ladder.values()), lambda masks: accuracy(prune(net, masks, Writer.OUTPUT), view.validation), floor
    )
    return list(ladder)[position]


@dataclass(frozen=True)
class Pruning(Defense):
    """Settings of the pruning.

    Attributes:
        tau: tolerated drop of validation accuracy, a share in [0, 1] (ours: 0.04, one tolerance for all methods).
        levels: shares at which models are offered, ascending, each in [0, 1) (ours).
        site: of the cut at scope WHOLE: ``classifier-input`` (BackdoorBench's code) or ``last-conv`` (paper).

    >>> activations = {"layer": torch.tensor([3.0, 0.1, 2.0, 0.2])}
    >>> list(steps(activations, Pruning(levels=(0.0, 0.25, 0.5)).levels))  # shares at which models are offered
    [0.0, 0.25, 0.5]
    >>> least_active(activations, 0.5)["layer"]
    tensor([False,  True, False,  True])
    """

    name: ClassVar[str] = "pruning"
    family: ClassVar[str] = "pruning"
    cost: ClassVar[str] = "one pass over the clean budget, one over its validation part per step of the dial"
    revision: ClassVar[int] = 2  # 2: cuts where the classifier reads
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "share of units pruned"
    writer: ClassVar[Writer | None] = Writer.OUTPUT

    tau: Share = 0.04
    levels: tuple[Annotated[float, Ge(0), Lt(1)], ...] = tuple(round(0.05 * step, 2) for step in range(20))
    site: Site = "classifier-input"

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = list(self.levels) == sorted(set(self.levels))
        check(self, "levels", ascending and 0 in self.levels, "ascending shares, beginning with 0")

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        ladder = steps(clean_activations(view, self.site), self.levels)
        default = stop(view, ladder, self.tau)
        model = view.model
        for share, masks in ladder.items():
            yield pruned_candidate(model, masks, Writer.OUTPUT, share, share == default)
