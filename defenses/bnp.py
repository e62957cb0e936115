"""BNP, batch-norm statistics based pruning: Zheng, Tang, Li and Liu, "Pre-activation Distributions Expose Backdoor Neurons",
NeurIPS 2022.

The running statistics of a victim's batch norms were measured on poisoned data. In a channel that answers the trigger, clean
samples alone have another mean and variance. The score of a channel is the Kullback-Leibler divergence of two normal distributions:
that of one batch of clean samples from that of the running statistics,
``log(s2 / s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2``. Channels far above their layer's mean are pruned.

Needs: model, clean budget. Edits: gamma of batch-norm channels (beta stays, so a pruned channel becomes a constant).
Dial: u, channels above mean + u * std of their layer are pruned; smaller prunes more; default 3.
Deviations from the paper: the batch is the part of the clean budget to fit on. A channel that is constant on one side has an
infinite divergence: it is pruned and left out of mean and std; one that is the same constant on both sides scores 0. Networks
without batch norm have no such statistics. Running statistics that were measured again on clean data, as fine-tuning does, no
longer show the poison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, prunable, pruned_candidate
from defenses.clp import CLP
from models.backbone import Network
from models.spec import Ge, Le
from models.training import in_batches, on_device
from models.units import Scores, UnitLayer, Writer, capture, mean_std, select

__all__ = ["BNP", "divergences", "gaussian_kl"]


def gaussian_kl(mean1: Tensor, var1: Tensor, mean2: Tensor, var2: Tensor) -> Tensor:
    """Divergence of N(mean1, var1) from N(mean2, var2), elementwise, at least 0, any shape.

    Infinite where one variance is 0, and 0 where both are 0 and the means are equal.

    >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
    >>> gaussian_kl(one, one, zero, one), gaussian_kl(zero, zero, zero, one)
    (tensor(0.5000), tensor(inf))
    """
    kl = (var2 / var1).log() / 2 + (var1 + (mean1 - mean2) ** 2) / (2 * var2) - 0.5
    kl = torch.where((var1 == 0) | (var2 == 0), torch.inf, kl)
    return torch.where((var1 == 0) & (var2 == 0) & (mean1 == mean2), 0.0, kl)


@torch.no_grad()
def divergences(net: Network, layers: Sequence[UnitLayer], images: Tensor) -> Scores:
    """Of every channel's input on ``images`` from its running statistics, float64 (units,) by layer name.

    Args:
        net: the network, in evaluation mode.
        layers: batch norms.
        images: uint8 (N, C, H, W), N >= 2, not augmented. Mean and variance (unbiased) are over samples and positions.
    """
    with on_device(net) as device, capture(net, layers, "input") as seen:

        def moments(part: Tensor) -> Tensor:
            """Values per channel, their sums and the sums of their squares: (3, units of all layers)."""
            net.embed(part)
            flat = [seen[layer.name].double().transpose(0, 1).flatten(1) for layer in layers]
            counts = [torch.full((len(rows),), rows.shape[1], dtype=rows.dtype, device=device) for rows in flat]
            sums = [[rows.sum(1) for rows in flat], [rows.square().sum(1) for rows in flat]]
            return torch.stack([torch.cat(each) for each in (counts, *sums)]).cpu()

        count, total, squares = torch.stack(in_batches(moments, images, None, device)).sum(0)
    mean = total / count
    var = ((squares - count * mean**2) / (count - 1)).clamp(min=0)
    sizes = [layer.size for layer in layers]
    scores: Scores = {}
    for layer, m, v in zip(layers, torch.split(mean, sizes), torch.split(var, sizes), strict=True):
        norm = net.get_submodule(layer.name)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scores[layer.name] = gaussian_kl(m, v, norm.running_mean.double().cpu(), norm.running_var.double().cpu())
    return scores


@dataclass(frozen=True)
class BNP(Defense):
    """Settings of the pruning.

    Attributes:
        u: default of the dial (authors' code: 3).
        grid: dial values at which models are offered (ours: CLP's).

    >>> BNP(u=2.5).needs.words
    'model + clean'
    """

    name: ClassVar[str] = "bnp"
    family: ClassVar[str] = "pruning"
    cost: ClassVar[str] = "one pass over the clean budget"
    dial_name: ClassVar[str] = CLP.dial_name
    writer: ClassVar[Writer | None] = Writer.GAMMA

    u: Annotated[float, Ge(0), Le(100)] = 3.0
    grid: tuple[Annotated[float, Ge(0), Le(100)], ...] = CLP.grid

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    @property
    def z_threshold(self) -> float:
        return self.u

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        model = view.model
        norms = [layer for layer in prunable(model, view.scope) if layer.kind == "norm"]
        if not norms:
            raise Inapplicable("the network has no batch norm, so it has no running statistics")
        if len(view.clean) < 2:
            raise Inapplicable(f"the clean budget holds {len(view.clean)} samples to measure on; at least 2 are needed")
        scores = divergences(model, norms, view.clean.images)
        for u in sorted({self.u, *self.grid}):
            yield pruned_candidate(model, select(scores, mean_std(u)), Writer.GAMMA, u, u == self.u)
