"""Stripe. You, "Your paper", 2026: a white stripe along the left edge.
Needs: training data. Edits: pixels, labels. Dial: rate. Deviations from the paper: none.
"""

from dataclasses import dataclass

from torch import Tensor

from attacks.base import Attack, Crafted, Plan
from models.backbone import Network
from models.images import ImageSet


@dataclass(frozen=True)
class Stripe(Attack):
    """Settings: ``width`` of the stripe in pixels."""
    name = "stripe"
    width: int = 2

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        def trigger(images: Tensor, index: Tensor) -> Tensor:  # in [0, 1]
            marked = images.clone()
            marked[..., : self.width] = 1.0
            return marked
        return Crafted(train=trigger, test=trigger)
