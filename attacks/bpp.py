"""BppAttack. Wang, Zhai and Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image
Quantization and Contrastive Adversarial Learning", CVPR 2022, arXiv 2205.13383.

The trigger is a smaller colour palette: every channel is rounded to a few levels, with or without Floyd-Steinberg dithering. The
attacker runs the training: in every batch some images are quantised and relabelled, and others receive the rounding error of
*another* training image and keep their label, so that only an image's own quantisation opens the backdoor and not the look of
rounding errors. At test time quantising any image sends it to the target.

Needs: control of the training (``mode="static"``: the training data alone). Edits: colours of poisoned and cover images; labels of
poisoned ones. Dial: the plan's rate; a rate is not comparable with a static attack's, since another share of the data is poisoned
in every epoch and nearly every image is seen triggered in the end.
Deviations from the paper: shares hold on average (``rounding``), not rounded down per batch; the other image of a negative is any
other training image as it is, not one from a pool of augmented ones; augmentation follows the trigger, as in the authors' code, but
is the recipe's. The static mode fixes the poisoned samples once; with a cover rate of 0 it is the attack that data-only users run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from attacks.base import Crafted, Plan
from attacks.dynamic import DynamicAttack, Mode, Rounding, another
from models.backbone import Network
from models.images import ImageSet, to_float
from models.spec import Ge, Le, derive_seed

__all__ = ["Bpp", "dithered", "squeezed"]


def squeezed(images: Tensor, levels: int) -> Tensor:
    """Images in [0, 1] rounded to the nearest of ``levels`` equally spaced values from 0 to 1."""
    return (images * (levels - 1)).round().clamp(0, levels - 1) / (levels - 1)


def dithered(images: Tensor, levels: int) -> Tensor:
    """Floyd-Steinberg dithering (Proc. SID 17, 1976) of float (N, C, H, W) to ``levels`` values, each channel by itself.

    Pixels are rounded row by row, left to right; 7/16 of a pixel's error goes to its right, 3/16, 5/16 and 1/16 to the lower left,
    below and the lower right. What leaves the image is lost.

    All pixels (y, x) with the same ``x + 2 y`` depend only on smaller sums, so they are rounded together: 2 H + W steps, not H W.
    """
    _, _, height, width = images.shape
    row = torch.arange(height, device=images.device)
    result = torch.empty_like(images, memory_format=torch.contiguous_format)
    # error[:, :, y + 1, s + 3] is the error of pixel (y, s - 2 y); the margins, and places outside the image, stay 0.
    error = images.new_zeros(*images.shape[:2], height + 1, 2 * height + width + 1)
    for step in range(2 * height + width - 2):
        column = step - 2 * row
        inside = (column >= 0) & (column < width)
        rows, columns = row[inside], column[inside]
        left, lower_left = error[:, :, rows + 1, step + 2], error[:, :, rows, step + 2]
        above, lower_right = error[:, :, rows, step + 1], error[:, :, rows, step]
        value = images[:, :, rows, columns] + (left * 7 + lower_left * 3 + above * 5 + lower_right) / 16
        rounded = squeezed(value, levels)
        result[:, :, rows, columns] = rounded
        error[:, :, rows + 1, step + 3] = value - rounded
    return result


@dataclass(frozen=True)
class Bpp(DynamicAttack):
    """x' = round(x (levels - 1)) / (levels - 1); covers are clip(x + (z' - z)) to [0, 1] with z another training image.

    Attributes:
        levels: values left per channel (authors' code and BackdoorBench: 8, that is 3 bits; authors' README: 32).
        dither: Floyd-Steinberg dithering (the paper describes it; off in the authors' code and BackdoorBench).
        mode: ``dynamic`` (the authors' protocol) or ``static`` (poisoned once, data only).
        rounding: shares per batch in dynamic mode: ``stochastic`` (ours) or ``floor`` (authors' code).

    >>> squeezed(torch.tensor([0.2, 0.4, 0.9]), levels=3)
    tensor([0.0000, 0.5000, 1.0000])
    >>> Bpp(mode="static").power
    <Power.DATA: 'data'>
    """

    name: ClassVar[str] = "bpp"
    cover_share: ClassVar[float] = 1.0  # authors' code and BackdoorBench: as many negatives as poisoned samples

    levels: Annotated[int, Ge(2), Le(128)] = 8
    dither: bool = False
    mode: Mode = "dynamic"
    rounding: Rounding = "stochastic"

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """The same quantisation for training and test; covers look the other image up by index."""
        key = derive_seed(seed, "bpp-negative")

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            return dithered(images, self.levels) if self.dither else squeezed(images, self.levels)

        def cover(images: Tensor, index: Tensor) -> Tensor:
            chosen = another(key, index, len(train)).to(train.images.device)
            other = to_float(train.images[chosen]).to(images.device)
            return (images + (trigger(other, chosen) - other)).clamp(0.0, 1.0)

        return Crafted(train=trigger, test=trigger, cover=cover)
