"""EP, entropy-based pruning: Zheng, Tang, Li and Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022.

On a poisoned set a unit that answers the trigger has two populations of pre-activations: those of clean samples, close together,
and those of triggered ones, far away. Once they are standardised, such a distribution has a low entropy. Units far below their
layer's mean are pruned.

Needs: model, poisoned training set (no labels). Edits: gamma of batch-norm channels (beta stays, so a pruned channel becomes a
constant), weight row and bias of convs without a norm and of the head's hidden units (scope HEAD: these alone).
Dial: u, units of entropy below mean - u * std of their layer are pruned; smaller prunes more; default 3.
Deviations from the paper: none in the score. A unit that is constant on the batch has no distribution to standardise: it is kept
and left out of mean and std. Convs without a norm and linear units, which the paper does not have, are scored on their own output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope, prunable, pruned_candidate
from defenses.clp import CLP
from models.backbone import Network
from models.spec import BatchSize, Ge, Gt, Le, generator
from models.training import in_batches, on_device
from models.units import Scores, UnitLayer, Writer, capture, mean_std

__all__ = ["EP", "entropies", "far_below", "peaks"]


@torch.no_grad()
def peaks(net: Network, layers: Sequence[UnitLayer], images: Tensor) -> Scores:
    """Largest pre-activation of every unit over positions, float (N, units) by layer name.

    ``images``: uint8 (N, C, H, W), N >= 1, not augmented. ``net`` must be in evaluation mode.
    """
    with on_device(net) as device, capture(net, layers, "output") as seen:

        def largest(part: Tensor) -> Tensor:
            net(part)
            return torch.cat([seen[layer.name].reshape(len(part), layer.size, -1).amax(2) for layer in layers], 1).cpu()

        values = torch.cat(in_batches(largest, images, None, device))
    return dict(zip((layer.name for layer in layers), torch.split(values, [layer.size for layer in layers], 1), strict=True))


def entropies(values: Tensor, width: float) -> Tensor:
    """Entropy in nats of each column's histogram, float64 (units,); NaN for a constant column.

    Columns are standardised (unbiased). Bins are the open intervals ``(i * width, (i + 1) * width)``: what is on an edge is in
    none, but counts in the total.

    Args:
        values: float (N, units), N >= 2.
        width: of a bin, in standard deviations.

    >>> entropies(torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]]), 0.01)  # three bins of one sample: log 3
    tensor([1.0986,    nan], dtype=torch.float64)
    """
    columns = values.double().T
    spread = columns.std(1, keepdim=True)
    places = (columns - columns.mean(1, keepdim=True)) / spread / width
    found = torch.full((len(columns),), torch.nan, dtype=torch.float64)
    for unit, place in enumerate(places):
        if float(columns[unit].amax()) == float(columns[unit].amin()):
            continue
        inside = place[place != place.floor()]
        share = torch.unique(inside.floor(), return_counts=True)[1].double() / values.shape[0]
        found[unit] = -(share * share.log()).sum()
    return found


def far_below(scores: Tensor, u: float) -> Tensor:
    """Scores below ``mean - u * std`` of their layer (unbiased, strict), bool (units,); NaN is left out and never below."""
    known = ~torch.isnan(scores)
    mask = torch.zeros_like(known)
    mask[known] = mean_std(u)(-scores[known])
    return mask


@dataclass(frozen=True)
class EP(Defense):
    """Settings of the pruning.

    Attributes:
        u: default of the dial (authors' code: 3).
        width: of the histogram's bins, in standard deviations (authors' code: 0.01; BackdoorBench: 0.1).
        batch: samples of the training set that are measured, drawn at random without replacement (ours: 500, as many as BNP's
            authors' code measures).
        grid: dial values at which models are offered (ours: CLP's).

    >>> EP(u=2.5).needs.words
    'model + train'
    """

    name: ClassVar[str] = "ep"
    family: ClassVar[str] = "pruning"
    cost: ClassVar[str] = "one pass over {batch} training images"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "u (standard deviations below the layer's mean)"
    writer: ClassVar[Writer | None] = Writer.GAMMA

    u: Annotated[float, Ge(0), Le(100)] = 3.0
    width: Annotated[float, Gt(0), Le(10)] = 0.01
    batch: BatchSize = 500
    grid: tuple[Annotated[float, Ge(0), Le(100)], ...] = CLP.grid

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.TRAIN

    @property
    def z_threshold(self) -> float:
        return self.u

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        model, data = view.model, view.train
        layers = prunable(model, view.scope)
        if len(data) < 2:
            raise Inapplicable(f"the poisoned training set holds {len(data)} samples; at least 2 are needed")
        drawn = torch.randperm(len(data), generator=generator(view.seed, "ep", "draw"))[: self.batch].sort().values
        values = peaks(model, layers, data.subset(drawn).images)
        scores = {name: entropies(columns, self.width) for name, columns in values.items()}
        for u in sorted({self.u, *self.grid}):
            masks = {name: far_below(entropy, u) for name, entropy in scores.items()}
            yield pruned_candidate(model, masks, Writer.GAMMA, u, u == self.u)
