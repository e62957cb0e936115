"""Natural backdoors. Tao et al., "Backdoor Vulnerabilities in Normally Trained Deep Learning Models", 2022, arXiv 2211.15929
(ACSAC 2024: "Exploring Inherent Backdoors in Deep Learning Models").

Nothing is injected. Networks trained on clean data have small patches and faint patterns, too, that send nearly any image to one
class; here such a trigger is searched for on the attacked network itself, by trigger inversion (Wang et al., "Neural Cleanse", IEEE
S&P 2019). It is the control of every backdoor attack: what a defense leaves of it, and takes away from it, has nothing to do with
poison.

Needs: training images and the attacked model. Edits: nothing of the training set; at test the pixels under the mask (``form =
"blend"``: every pixel, faintly). Dial: none; the plan's rate is 0.
Deviations from the paper: of its trigger families two are here, the patch and the bounded pattern, and each is universal: one
trigger for images of all other classes, where the paper also searches one for each pair of classes. Images are shown without
augmentation. The mask's size is given and not searched for: its weight adapts until the mask is no larger than ``area``, where
Neural Cleanse adapts it to keep the trigger successful. What still exceeds ``area`` is cut, and the rest is fitted once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attacks.adversarial import frozen
from attacks.base import Attack, Crafted, Plan, Trigger
from models.backbone import Network
from models.images import ImageSet, to_float
from models.inversion import Loss, descend, patched, squashed
from models.spec import BadInput, Ge, Gt, Le, PositiveShare, generator
from models.training import default_device

__all__ = ["Natural", "adapted", "added", "cut", "patched", "unchanged"]

WINDOW = 10
"""Steps between two changes of the weight of the mask's size."""
FACTOR = 1.5
"""What it is multiplied by, or divided by."""
SPREAD = 0.5
"""Deviation of the normal numbers that mask and pattern start from, before the tanh."""


def _start(shapes: list[tuple[int, ...]], draw: torch.Generator, device: torch.device) -> list[Tensor]:
    return [(SPREAD * torch.randn(shape, generator=draw)).to(device) for shape in shapes]


def unchanged(images: Tensor, index: Tensor) -> Tensor:
    """The trigger that is none."""
    return images.clone()


def added(images: Tensor, z: Tensor, bound: float) -> Tensor:
    """clip(x + bound * tanh z) to [0, 1]: images (N, C, H, W), z (C, H, W)."""
    return (images + bound * torch.tanh(z)).clamp(0.0, 1.0)


def adapted(weight: float, size: float, area: float) -> float:
    """The next weight of the mask's size: larger while the mask is larger than it should be, smaller while it is not."""
    return weight * FACTOR if size > area else weight / FACTOR


def cut(mask: Tensor, area: float) -> Tensor:
    """1 at the ``area * H * W`` largest entries of ``mask`` (1, H, W), rounded down but one at least, and 0 elsewhere.

    Of equal entries the one that comes first in the image is kept.
    """
    flat = mask.flatten()
    kept = torch.zeros_like(flat)
    kept[flat.argsort(descending=True, stable=True)[: max(1, int(area * len(flat)))]] = 1
    return kept.view_as(mask)


@dataclass(frozen=True)
class Natural(Attack):
    """``patch``: x' = x + m (p - x); ``blend``: x' = clip(x + d), |d| <= bound. m, p or d are found on the attacked model.

    Attributes:
        form: ``patch`` or ``blend``.
        area: share of the pixels that the patch's mask may cover, in (0, 1] (ours: 0.08); one pixel at least.
        bound: of the blend, in units of the image range [0, 1] (ours: 16/255).
        steps: of Adam (ours: 500).
        refit: further steps after the mask is cut, without a weight on its size (ours: 250).
        batch: images per step, drawn anew (ours: 64).
        lr: of Adam (ours: 0.1).
        weight: of the mask's size, its mean over the pixels, when the search starts (ours: 1; 0 = the mask is only cut).

    >>> mask = torch.rand(1, 32, 32)
    >>> cut(mask, area=Natural(area=0.125).area).mean()  # the share of the pixels that is kept
    tensor(0.1250)
    """

    name: ClassVar[str] = "natural"
    injects: ClassVar[bool] = False
    needs_model_at_test: ClassVar[bool] = True

    form: Literal["patch", "blend"] = "patch"
    area: PositiveShare = 0.08
    bound: PositiveShare = 16 / 255
    steps: Annotated[int, Ge(1), Le(100_000)] = 500
    refit: Annotated[int, Ge(0), Le(100_000)] = 250
    batch: Annotated[int, Ge(1), Le(65_536)] = 64
    lr: Annotated[float, Gt(0), Le(10)] = 0.1
    weight: Annotated[float, Ge(0), Le(1_000_000)] = 1.0

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """Triggers that change nothing; the one for the test comes from :meth:`recraft`.

        Raises:
            BadInput: the plan poisons or covers something.
        """
        if plan.rate > 0 or plan.cover_rate:
            raise BadInput(f"natural: rate = {plan.rate!r}: this attack injects nothing; its rate is 0, without a cover rate")
        return Crafted(train=unchanged, test=unchanged)

    def recraft(self, net: Network, crafted: Crafted, train: ImageSet, plan: Plan, seed: int) -> Crafted:
        """With the test trigger that is found on ``net``; batches and start are drawn from ``seed``.

        Raises:
            BadInput: no image of ``train`` belongs to another class than the one it would be sent to.
        """
        targets = plan.relabel(train.labels, train.num_classes)
        moved = torch.nonzero(targets != train.labels).flatten()
        if len(moved) == 0:
            raise BadInput(f"natural: the training set holds no image of a class other than the target {plan.target}")
        model, device = frozen(net), default_device()
        images, targets = train.images[moved].to(device), targets[moved].to(device)
        make = self.patch if self.form == "patch" else self.blend
        return dataclasses.replace(crafted, test=make(model, images, targets, generator(seed, "natural-search")))

    def patch(self, net: Network, images: Tensor, targets: Tensor, draw: torch.Generator) -> Trigger:
        """The patch that is found, cut to ``area`` and fitted again.

        Args:
            net: in evaluation mode.
            images: uint8 (N, C, H, W), on the device of ``net``.
            targets: int64 (N,), likewise.
            draw: of the start and the batches.
        """

        def loss(shown: Tensor, wanted: Tensor, z: list[Tensor], weight: float) -> Tensor:
            return self.patch_loss(net, shown, wanted, z, kept, weight)

        channels, height, width = images.shape[1:]
        kept = torch.ones(1, height, width, device=images.device)
        z = _start([(1, height, width), (channels, height, width)], draw, images.device)
        z = self._descend(loss, images, targets, z, self.steps, self.weight, draw)
        kept = cut(z[0], self.area)
        z = self._descend(loss, images, targets, z, self.refit, 0.0, draw)
        mask, pattern, on = z[0].cpu(), z[1].cpu(), kept.cpu()

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            device = images.device
            return patched(images, mask.to(device), pattern.to(device), on.to(device)).clamp(0.0, 1.0)

        return trigger

    def blend(self, net: Network, images: Tensor, targets: Tensor, draw: torch.Generator) -> Trigger:
        """The pattern that is found; arguments as in :meth:`patch`."""

        def loss(shown: Tensor, wanted: Tensor, z: list[Tensor], weight: float) -> Tensor:
            return cross_entropy(net(added(shown, z[0], self.bound)), wanted)

        z = _start([tuple(images.shape[1:])], draw, images.device)
        found = self._descend(loss, images, targets, z, self.steps, 0.0, draw)[0].cpu()

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            return added(images, found.to(images.device), self.bound)

        return trigger

    def patch_loss(self, net: Network, images: Tensor, targets: Tensor, z: list[Tensor], kept: Tensor, weight: float) -> Tensor:
        """Cross-entropy plus ``weight`` times the mask's mean, a scalar, with z = [mask, pattern] of :func:`patched`."""
        size = (kept * squashed(z[0])).mean()
        return cross_entropy(net(patched(images, z[0], z[1], kept)), targets) + weight * size

    def _descend(
        self, loss: Loss, images: Tensor, targets: Tensor, z: list[Tensor], steps: int, weight: float, draw: torch.Generator
    ) -> list[Tensor]:
        """``z`` after ``steps`` of Adam, each on images that are drawn anew.

        A ``weight`` above 0 is that of the mask z[0], and is adapted.
        """

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(steps):
                chosen = torch.randint(len(images), (self.batch,), generator=draw).to(images.device)
                yield to_float(images[chosen]), targets[chosen]

        def after(step: int, z: list[Tensor], weight: float) -> float:
            due = weight > 0 and step % WINDOW == 0
            return adapted(weight, float(squashed(z[0]).mean()), self.area) if due else weight

        return descend(loss, batches(), z, lr=self.lr, weight=weight, after=after)
