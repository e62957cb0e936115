"""LC, label-consistent. Turner, Tsipras and Madry, "Label-Consistent Backdoor Attacks", 2019, arXiv 1912.02771.

A clean-label attack: only images of the target class are touched, and they keep their label. Each is first made hard to classify by
an adversarial perturbation of a network of the attacker's own, then a small pattern is put into its corners: a victim that cannot
learn such images from their content learns the pattern instead. At test time the pattern alone sends any image to the target.

Needs: the training data and a network trained on it. Edits: pixels of target-class images; no label. Dial: the plan's rate, at most
the target class's share.
Deviations from the paper: the network that is fooled is trained plainly, on the same data and with the victim's architecture (the
paper trains it adversarially): its perturbations look more like noise and less like another class. The paper's other way to make
images hard, interpolation in the latent space of a GAN, is left out. Rates are shares of the whole training set, not of the target
class. Above 32 pixels the pattern grows by nearest-neighbour scaling. The whole target class is perturbed once, whatever the rate,
so that an image's perturbation does not depend on which others are poisoned. Values are rounded to 8 bits, where BackdoorBench
truncates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.adversarial import frozen, pgd
from attacks.base import Attack, Crafted, Plan
from models.backbone import Network
from models.images import ImageSet, to_float
from models.spec import BadInput, EpochCount, PositiveShare
from models.training import default_device

__all__ = ["LC", "corner_signs"]

SIGNS = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
"""The pattern in the lower right corner: 1 = brighter, -1 = darker."""
BATCH = 250
"""Images perturbed at a time: part of the result, since another batch size rounds other sums."""


def corner_signs(corners: Literal["all", "lower-right"], height: int, width: int) -> Tensor:
    """Where the pattern brightens (1), darkens (-1) and leaves alone (0), float (H, W).

    3 x 3 pixels on images up to 32 pixels, ``round(3 * S / 32)`` a side where the shorter side S is more. The left corners hold the
    mirror image of the right ones, so that a horizontal flip changes nothing; the upper ones equal the lower ones.

    Raises:
        BadInput: the image is too small for two patterns side by side.
    """
    side = min(height, width)
    size = round(3 * max(1.0, side / 32))
    if 2 * size > side:
        raise BadInput(f"lc: two patterns of {size} pixels do not fit side by side into images of {height} x {width}")
    source = torch.arange(size) * len(SIGNS) // size
    block = SIGNS[source][:, source]
    signs = torch.zeros(height, width)
    signs[height - size :, width - size :] = block
    if corners == "all":
        signs[:size, width - size :] = block
        signs[:size, :size] = signs[height - size :, :size] = block.flip(1)
    return signs


@dataclass(frozen=True)
class LC(Attack):
    """Training: x' = clip(x + perturbation + amplitude * signs) to [0, 1]. Test: the same without the perturbation.

    Attributes:
        eps: bound of the perturbation per pixel, in units of the image range [0, 1]. BackdoorBench has 8/255 in its code and 16/255
            in its data; ours is the larger, because the network that is fooled is not a robust one.
        step: of the perturbation, same units (BackdoorBench: 1.5/255).
        steps: how many (BackdoorBench: 100; 0 = no perturbation, the pattern alone).
        corners: ``all`` (BackdoorBench; a flip changes nothing and a padded crop leaves one of them whole) or ``lower-right``; the
            authors' code has both.
        amplitude: what the pattern adds or takes away, in (0, 1]; 1 overrides the pixels, less is the paper's fainter pattern
            (authors' code and BackdoorBench: 1).

    >>> corner_signs("lower-right", 6, 6)[3:, 3:]
    tensor([[-1., -1.,  1.],
            [-1.,  1., -1.],
            [ 1., -1.,  1.]])
    >>> LC(eps=8 / 255).clean_label
    True
    """

    name: ClassVar[str] = "lc"
    clean_label: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True

    eps: PositiveShare = 16 / 255
    step: PositiveShare = 1.5 / 255
    steps: EpochCount = 100
    corners: Literal["all", "lower-right"] = "all"
    amplitude: PositiveShare = 1.0

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """Perturbs every training image of the target class against ``surrogate``; nothing is drawn.

        A perturbation belongs to one image and is looked up by its index: the training trigger on any image but those (they alone
        can be poisoned) is the pattern alone.

        Raises:
            BadInput: no surrogate, or images smaller than 6 pixels.
        """
        table = self._perturbations(train, plan, surrogate)
        return self._triggers(train, plan, lambda: table)

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        """The perturbations are computed when an image is first triggered for training: that takes long, and no test needs it."""
        return self._triggers(train, plan, functools.cache(lambda: self._perturbations(train, plan, surrogate())))

    def _perturbations(self, train: ImageSet, plan: Plan, surrogate: Network | None) -> Tensor:
        """Zero, then the perturbation of every image of the target class, in the order of ``train``: float (1 + M, C, H, W)."""
        if surrogate is None:
            raise BadInput("lc: perturbs images against a network trained on clean data, and none was given")
        mine = torch.nonzero(train.labels.cpu() == plan.target).flatten()
        table = torch.zeros(1 + len(mine), *train.shape)
        device = default_device()
        net = frozen(surrogate)
        for start in range(0, len(mine), BATCH):
            images = to_float(train.images[mine[start : start + BATCH]].to(device))
            labels = torch.full((len(images),), plan.target, device=device)
            perturbation = pgd(net, images, labels, self.eps, self.step, self.steps) - images
            table[1 + start : 1 + start + len(images)] = perturbation.cpu()
        return table

    def _triggers(self, train: ImageSet, plan: Plan, table: Callable[[], Tensor]) -> Crafted:
        """Both triggers; ``table``: gives the perturbations."""
        signs = self.amplitude * corner_signs(self.corners, *train.shape[1:])
        mine = torch.nonzero(train.labels.cpu() == plan.target).flatten()
        # Row 0 is the zero that every other image gets; the last place is for indices the set does not have.
        row = torch.zeros(len(train) + 1, dtype=torch.int64)
        row[mine] = 1 + torch.arange(len(mine))

        def test(images: Tensor, index: Tensor) -> Tensor:
            return (images + signs.to(images.device)).clamp(0.0, 1.0)

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            perturbation = table()[row[index.cpu().clamp(max=len(train))]]
            return test((images + perturbation.to(images.device)).clamp(0.0, 1.0), index)

        return Crafted(train=trigger, test=test)
