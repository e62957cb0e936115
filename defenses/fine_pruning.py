"""Fine-pruning: Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID
2018, arXiv 1805.12185.

A pruning-aware attacker can hide the backdoor in units that clean inputs use, so pruning alone fails. Fine-tuning alone fails too,
because clean samples give no gradient to silent units. Hence both, in that order: prune the silent units, then fine-tune the rest.

Needs: model, clean budget. Edits: the channels that the classifier reads, then every weight (scope HEAD: the head's hidden units,
then the head). Dial: share of units pruned; default = the share at which :mod:`defenses.pruning` stops.
Deviations from the paper: those of :mod:`defenses.pruning` and :mod:`defenses.fine_tuning`; pruned units, norm offset included, are
held at exactly zero after every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from defenses.base import Candidate, DefenderView, Scope, pruned_candidate
from defenses.fine_tuning import FineTuning
from defenses.pruning import Pruning, Site, clean_activations, steps, stop
from models.spec import Ge, Lt
from models.units import Writer

__all__ = ["FinePruning"]


@dataclass(frozen=True)
class FinePruning(FineTuning):
    """Settings of the fine-tuning, and of the pruning before it.

    Attributes:
        tau: as in :class:`defenses.pruning.Pruning`.
        levels: as in :class:`defenses.pruning.Pruning`.
        site: as in :class:`defenses.pruning.Pruning`.
        shares: further shares to prune and fine-tune at, each in [0, 1); every one costs a whole fine-tuning (ours: none).

    >>> FinePruning(tau=0.1).needs.words
    'model + clean'
    """

    name: ClassVar[str] = "fine-pruning"
    family: ClassVar[str] = "pruning, fine-tuning"
    cost: ClassVar[str] = "that of pruning, then {epochs} epochs on the clean budget"
    revision: ClassVar[int] = 2  # 2: cuts where the classifier reads
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "share of units pruned"

    tau: float = 0.04
    levels: tuple[float, ...] = Pruning.levels
    shares: tuple[Annotated[float, Ge(0), Lt(1)], ...] = ()
    site: Site = Pruning.site

    def __post_init__(self) -> None:
        super().__post_init__()
        Pruning(self.tau, self.levels, self.site)

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        activations = clean_activations(view, self.site)
        ladder = steps(activations, self.levels)
        default = stop(view, ladder, self.tau)
        wanted = {default: ladder[default], **steps(activations, self.shares)}
        for share, masks in sorted(wanted.items()):
            candidate = pruned_candidate(view.model, masks, Writer.OUTPUT, share, share == default)
            self.tune(candidate.model, view, masks)
            yield candidate
