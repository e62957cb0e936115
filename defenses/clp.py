"""CLP, Channel Lipschitzness-based Pruning: Zheng, Tang, Li and Liu, "Data-free Backdoor Removal based on Channel Lipschitzness",
ECCV 2022, arXiv 2208.03111.

A channel that turns a small trigger into a large change must have a large Lipschitz constant. An upper bound of it follows from the
weights alone: the spectral norm of the channel's kernel times the scale of its batch norm. Channels far above their layer's mean
are pruned.

Needs: model. Edits: channels of every batch norm, convs without one, and the head's hidden units (scope HEAD: these alone).
Dial: u, channels above mean + u * std of their layer are pruned; smaller prunes more; default 3.
Deviations from the paper: convs are paired with norms by data flow (``pairing="registration"`` is the released code's way: the
last conv registered before the norm). Channels of zero variance, infinite by the formula, are pruned and left out of mean and std.
Linear units, which the paper does not have, score the norm of their weight row: the same formula for a 1 x 1 kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from defenses.base import Candidate, DefenderView, Defense, Knowledge, Scope, prunable, pruned_candidate
from models.spec import Ge, Le
from models.units import Pairing, Writer, mean_std, select, weight_bounds

__all__ = ["CLP"]


@dataclass(frozen=True)
class CLP(Defense):
    """Settings of the pruning.

    Attributes:
        u: default of the dial (authors' code: 3).
        pairing: ``dataflow`` (ours) or ``registration`` (authors' code).
        grid: dial values at which models are offered (ours).

    >>> import torch
    >>> scores = torch.ones(10)
    >>> scores[3] = 5.0
    >>> mean_std(CLP(u=2.0).u)(scores).nonzero()  # units above mean + 2 std
    tensor([[3]])
    """

    name: ClassVar[str] = "clp"
    family: ClassVar[str] = "pruning"
    cost: ClassVar[str] = "no pass: singular values of every channel's kernel"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "u (standard deviations above the layer's mean)"
    writer: ClassVar[Writer | None] = Writer.GAMMA_BETA

    u: Annotated[float, Ge(0), Le(100)] = 3.0
    pairing: Pairing = "dataflow"
    grid: tuple[Annotated[float, Ge(0), Le(100)], ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL

    @property
    def z_threshold(self) -> float:
        return self.u

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        model = view.model
        scores = weight_bounds(model, prunable(model, view.scope, self.pairing))
        for u in sorted({self.u, *self.grid}):
            yield pruned_candidate(model, select(scores, mean_std(u)), Writer.GAMMA_BETA, u, u == self.u)
