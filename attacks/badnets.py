"""BadNets. Gu, Dolan-Gavitt and Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017,
arXiv 1708.06733 (IEEE Access 2019).

The first backdoor attack on neural networks. A few training images receive a small patch in a corner and the attacker's label; the
network learns the patch as a feature of that class. At test time the same patch sends any image there.

Needs: the training data. Edits: the pixels under the patch (replaced), the label. Dial: the plan's rate.
Deviations from the paper: none in the trigger. The default patch is the public benchmark's plain white square; ``grid-corner`` is
the pattern of most defenses' own codes. Both are flush with the corner, where a padded random crop often cuts them: that is part of
the published setting, and makes a patch in the corner less effective than its size suggests. Above 32 pixels the patch grows by
nearest-neighbour scaling (the public benchmark's bilinear scaling blurs its edges); below, it keeps its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from attacks.base import Attack, Crafted, Plan
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput, Ge, Le, Lt

__all__ = ["BadNets", "patch"]

PATTERNS = {
    "white-corner": torch.ones(3, 3),
    "grid-corner": torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]),
}


def patch(pattern: Tensor, size: int, margin: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(mask bool (H, W), values float (H, W)): ``pattern`` (p, p) at ``size`` pixels a side, ``margin`` off the lower right corner.

    The mask is explicit, so that a patch may hold black pixels.
    """
    source = torch.arange(size) * len(pattern) // size
    rows = slice(height - margin - size, height - margin)
    columns = slice(width - margin - size, width - margin)
    mask, values = torch.zeros(height, width, dtype=torch.bool), torch.zeros(height, width)
    mask[rows, columns] = True
    values[rows, columns] = pattern[source][:, source]
    return mask, values


@dataclass(frozen=True)
class BadNets(Attack):
    """x' = x outside the patch, the patch inside, in every channel.

    Attributes:
        patch: ``white-corner`` (BackdoorBench) or ``grid-corner`` (the ANP, ABL and RNP codes).
        size: pixels a side on images up to 32 pixels (BackdoorBench: 3); ``round(size * S / 32)`` where the shorter side S is more.
        margin: pixels between the patch and the image's edges, scaled like ``size`` (BackdoorBench: 0).

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> black = torch.zeros(1, 3, 32, 32)
    >>> BadNets(size=2).craft(data, Plan(), seed=0).test(black, torch.tensor([0])).sum()  # 2 x 2 pixels in 3 channels
    tensor(12.)
    """

    name: ClassVar[str] = "badnets"

    patch: Literal["white-corner", "grid-corner"] = "white-corner"
    size: Annotated[int, Ge(1), Le(32)] = 3
    margin: Annotated[int, Ge(0), Lt(32)] = 0

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """The same patch for training and test; nothing is drawn."""
        _, height, width = train.shape
        scale = max(1.0, min(height, width) / 32)
        size, margin = round(self.size * scale), round(self.margin * scale)
        if size + margin > min(height, width):
            raise BadInput(f"badnets: size + margin = {size + margin} pixels do not fit images of {height} x {width}")
        mask, values = patch(PATTERNS[self.patch], size, margin, height, width)

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            return torch.where(mask.to(images.device), values.to(images.device), images)

        return Crafted(train=trigger, test=trigger)
