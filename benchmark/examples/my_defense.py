"""Largest bound. You, "Your paper", 2026: prune the units with the largest Lipschitz bounds.
Needs: model. Edits: units of the scope. Dial: share pruned. Deviations from the paper: none.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from defenses.base import Candidate, DefenderView, Defense, Knowledge, Scope, prunable, pruned_candidate
from models.units import Writer, select, top_share, weight_bounds


@dataclass(frozen=True)
class LargestBound(Defense):
    """Settings: ``share``, the published point of the dial."""
    name = "largest-bound"
    scopes = (Scope.HEAD, Scope.WHOLE)
    dial_name = "share of units pruned"
    needs = Knowledge.MODEL
    share: float = 0.05

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        model = view.model
        scores = weight_bounds(model, prunable(model, view.scope))
        for share in sorted({0.0, 0.01, 0.02, 0.1, 0.2, self.share}):
            masks = select(scores, top_share(share))
            yield pruned_candidate(model, masks, Writer.GAMMA_BETA, share, share == self.share)
