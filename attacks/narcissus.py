"""Narcissus. Zeng, Pan, Just, Lyu, Qiu and Jia, "Narcissus: A Practical Clean-Label Backdoor Attack with Limited Information",
CCS 2023, arXiv 2204.05255.

A clean-label attack: a few images of the target class receive a faint noise and keep their label. The noise is learned on a
surrogate network so that images of the target class look even more like their class ("inward" from the decision boundary); the
victim takes it for the strongest evidence of that class there is. At test time the noise, three times as strong, sends any image
there.

Needs: the target class's images and a surrogate network. Edits: pixels of target-class images; no label. Dial: the plan's rate, at
most the target class's share (0.0005 in the paper).
Deviations from the paper: the surrogate is trained on the victim's clean images, under the victim's recipe but from another seed:
a stronger attacker than the paper's, whose surrogate learns from public images of other classes and the target class alone. It
has learned the target class already, so it is not warmed up on it by default (``warmup``). It is in evaluation mode while the noise
is learned; in the authors' code its batch norms are still in training mode. Images are in [0, 1]: radius and steps are half of the
authors', whose images are in [-1, 1]. Values are rounded to 8 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attacks.base import Attack, Crafted, Plan
from models import BACKBONES
from models.backbone import Backbone, Network
from models.classifier import Classifier
from models.images import Batches, ImageSet
from models.loop import Epochs
from models.recipe import Recipe
from models.spec import BadInput, BatchSize, Ge, Gt, Le, PositiveShare, derive_seed, lookup
from models.training import default_device, fit

__all__ = ["Narcissus", "Noise", "inward"]


class _WarmUp(Classifier):
    """Plain training by RAdam (Liu et al., ICLR 2020, arXiv 1908.03265)."""

    def configure_optimizers(self) -> Any:
        return torch.optim.RAdam(self.trainable(), lr=self.recipe.lr)


def inward(net: Network, batches: Epochs, shape: tuple[int, int, int], radius: float, rounds: int, lr: float) -> Tensor:
    """The noise, float (C, H, W) in [-radius, radius], that lowers ``net``'s loss on the images of ``batches``.

    Minimises the cross-entropy of ``clip(x + clip(delta, -radius, radius), 0, 1)`` towards the true labels, from delta = 0, by
    RAdam, ``rounds`` times over the images. An entry of delta beyond the radius has no gradient and stays there.

    Args:
        net: in evaluation mode, on the device of the batches.
        batches: of images and labels of one class, augmented.
        shape: (C, H, W) of the images.
        radius: bound of the noise, in (0, 1].
        rounds: passes over the images.
        lr: of RAdam.
    """
    delta = torch.zeros(shape, device=next(net.parameters()).device, requires_grad=True)
    # One tensor and a handful of lines; the training loop trains networks.
    optimizer = torch.optim.RAdam([delta], lr=lr)
    for _ in range(rounds):
        for images, labels, _ in batches:
            loss = cross_entropy(net((images + delta.clamp(-radius, radius)).clamp(0.0, 1.0)), labels)
            (delta.grad,) = torch.autograd.grad(loss, [delta])
            optimizer.step()
    return delta.detach().clamp(-radius, radius)


class Noise:
    """clip(x + scale * delta) to [0, 1], delta float (C, H, W); see :data:`attacks.base.Trigger`."""

    def __init__(self, delta: Tensor, scale: float = 1.0) -> None:
        self.delta, self.scale = delta, scale

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        return (images + self.scale * self.delta.to(images.device)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Narcissus(Attack):
    """x' = clip(x + delta) in training, clip(x + scale * delta) at test, with delta of L-infinity norm ``radius``.

    Attributes:
        radius: bound of the noise in units of the image range [0, 1] (authors' code: 16/255).
        scale: how many times as strong at test (authors' code: 3).
        rounds: passes over the target class that learn the noise (authors' code: 1000).
        lr: step of that training (authors' code: 0.01 for images in [-1, 1]).
        batch: images per step, there and in the warm-up (authors' code: 350).
        warmup: epochs in which a copy of the surrogate is trained on the target class first (authors' code: 5; ours: 0).
        warmup_lr: their step (authors' code: 0.1).
        crop: pixels of padding of the random crop, there and in the warm-up (authors' code: 4).
        flip: mirror half of the images, there and in the warm-up (authors' code: on).
        surrogate: name of the surrogate's architecture, with the victim's width and head; empty = the victim's own (ours).

    >>> attack = Narcissus(radius=8 / 255, surrogate="resnet8")
    >>> attack.own_surrogate(BACKBONES[1](width=4)).name
    'resnet8'
    """

    name: ClassVar[str] = "narcissus"
    revision: ClassVar[int] = 2
    clean_label: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    radius: PositiveShare = 16 / 255
    scale: Annotated[float, Gt(0), Le(16)] = 3.0
    rounds: Annotated[int, Ge(1), Le(100_000)] = 1000
    lr: PositiveShare = 0.005
    batch: BatchSize = 350
    warmup: Annotated[int, Ge(0), Le(1000)] = 0
    warmup_lr: PositiveShare = 0.1
    crop: Annotated[int, Ge(0), Le(64)] = 4
    flip: bool = True
    surrogate: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.surrogate:
            lookup("backbone", BACKBONES, self.surrogate)

    def own_surrogate(self, backbone: Backbone) -> Backbone | None:
        """Trained apart: noise learned on the benign twin fools the twin's every likeness, poisoned or not."""
        if not self.surrogate:
            return backbone
        return lookup("backbone", BACKBONES, self.surrogate)(width=backbone.width, hidden=backbone.hidden)

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """One noise, learned on a copy of the surrogate; stronger at test.

        Raises:
            BadInput: no surrogate, or no image of the target class.
        """
        if surrogate is None:
            raise BadInput("narcissus: learns its noise on a network trained on clean data, and none was given")
        mine = train.subset(train.labels == plan.target)
        if len(mine) == 0:
            raise BadInput(f"narcissus: the training set holds no image of the target class {plan.target}")
        if len(mine) == 1:  # batches leave a single image out, since batch norm cannot normalise it
            mine = mine.subset(torch.zeros(2, dtype=torch.int64))
        recipe = Recipe(self.warmup, batch=self.batch, lr=self.warmup_lr, schedule="constant", crop=self.crop, flip=self.flip)
        net = fit(_WarmUp(copy.deepcopy(surrogate), recipe), mine, recipe, derive_seed(seed, "narcissus-warmup")).net
        device = default_device()
        draws = derive_seed(seed, "narcissus-batches")
        batches = Batches(mine.to(device), self.batch, draws, crop=self.crop, flip=self.flip)
        delta = inward(net.to(device), batches, train.shape, self.radius, self.rounds, self.lr).cpu()

        return Crafted(train=Noise(delta), test=Noise(delta, self.scale))

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        """The noise: learning it takes long."""
        assert isinstance(crafted.train, Noise)
        return {"delta": crafted.train.delta}

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        return Crafted(train=Noise(kept["delta"]), test=Noise(kept["delta"], self.scale))
