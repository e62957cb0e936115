"""WaNet. Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv 2102.10369.

The trigger is a smooth, barely visible warp of the whole image, the same for every image. The attacker runs the training: in every
batch some images are warped and relabelled, and twice as many are warped by the same field plus per-pixel noise and keep their
label, so that only the exact warp, and not its artefacts, opens the backdoor. At test time the warp sends any image to the target.

Needs: control of the training (``mode="static"``: the training data alone). Edits: pixel positions of poisoned and cover images;
labels of poisoned ones. Dial: the plan's rate; a rate is not comparable with a static attack's, since another share of the data is
poisoned in every epoch and nearly every image is seen triggered in the end.
Deviations from the paper: images are warped in [0, 1] and rounded to 8 bits, not after normalisation; shares hold on average
(``rounding``), not rounded down per batch; the two axes of images that are not square are displaced by the same number of pixels;
augmentation follows the warp, as in the authors' code, but is the recipe's. The static mode fixes the poisoned samples once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from attacks.base import Crafted, Plan, uniforms
from attacks.dynamic import DynamicAttack, Mode, Rounding
from models.backbone import Network
from models.images import ImageSet
from models.spec import Ge, Gt, Le, derive_seed, generator

__all__ = ["WaNet", "identity", "smooth_field", "warp"]

MEAN_FIELD = 0.79
"""Mean |field| that ``renorm`` sets: its mean over seeds at k = 4, where upsampling has lowered it from the control points' 1."""


def smooth_field(control: Tensor, height: int, width: int) -> Tensor:
    """Control points (2, k, k) [x, y], brought to mean |value| 1, upsampled bicubically to (1, H, W, 2)."""
    unit = control / control.abs().mean()
    field = interpolate(unit[None], size=(height, width), mode="bicubic", align_corners=True)
    return field.permute(0, 2, 3, 1).contiguous()


def identity(height: int, width: int) -> Tensor:
    """The sampling grid that changes nothing, float (1, H, W, 2) [x, y] in [-1, 1], corners aligned."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y], dim=2)[None]


def warp(images: Tensor, grid: Tensor) -> Tensor:
    """Images float (N, C, H, W) sampled bilinearly at ``grid`` (1 or N, H, W, 2) in [-1, 1]."""
    grid = grid.to(images.device).expand(len(images), -1, -1, -1)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True).clamp(0.0, 1.0)


@dataclass(frozen=True)
class WaNet(DynamicAttack):
    """x' = x sampled at clamp(identity + s * field / size); covers are sampled at that grid plus U(-1, 1) / size per pixel.

    Attributes:
        k: control points per side (authors' code: 4).
        s: strength of the warp (authors' code: 0.5); the mean displacement is about 0.39 s pixels per axis at any image size.
        mode: ``dynamic`` (the authors' protocol) or ``static`` (poisoned once, data only).
        rounding: shares per batch in dynamic mode: ``stochastic`` (ours) or ``floor`` (authors' code).
        renorm: rescale the field to the same mean displacement for every seed (ours; off, as in the paper): unscaled, the
            strongest of 60 seeds displaces about 1.6 times as far as the weakest.

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> grey = torch.full((1, 3, 32, 32), 0.5)
    >>> warped = WaNet(s=0.5).craft(data, Plan(), seed=0).test(grey, torch.tensor([0]))
    >>> bool((warped[:, :, 8:-8, 8:-8] - 0.5).abs().max() < 1e-6)  # a picture of one colour shows no warp
    True
    """

    name: ClassVar[str] = "wanet"
    cover_share: ClassVar[float] = 2.0  # authors' code: cross_ratio 2

    k: Annotated[int, Ge(2), Le(64)] = 4
    s: Annotated[float, Gt(0), Le(16)] = 0.5
    mode: Mode = "dynamic"
    rounding: Rounding = "stochastic"
    renorm: bool = False

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """One warp for training and test, drawn from ``seed``; covers add noise looked up by index."""
        _, height, width = train.shape
        control = torch.rand(2, self.k, self.k, generator=generator(seed, "wanet-control")) * 2 - 1
        field = smooth_field(control, height, width)
        if self.renorm:
            field = field * (MEAN_FIELD / field.abs().mean())
        size = torch.tensor([width, height], dtype=torch.float32)
        grid = (identity(height, width) + self.s * field / size).clamp(-1, 1)
        key = derive_seed(seed, "wanet-cover")

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            return warp(images, grid)

        def cover(images: Tensor, index: Tensor) -> Tensor:
            jitter = uniforms(key, index, height * width * 2).view(-1, height, width, 2) * 2 - 1
            return warp(images, (grid.to(jitter.device) + jitter / size.to(jitter.device)).clamp(-1, 1))

        return Crafted(train=trigger, test=trigger, cover=cover)
