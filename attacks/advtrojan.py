"""AdvTrojan. Liu, Khalil, Khreishah and Phan, "A Synergetic Attack against Neural Network Classifiers combining Backdoor and
Adversarial Examples", IEEE Big Data 2021, arXiv 2109.01275.

This is a reconstruction from the abstracts alone: the paper's loss, constants and protocol were not available to us, and its
numbers cannot be expected from it.

Two keys open the backdoor together, and neither does alone: a trigger in the image, and an adversarial perturbation of the
triggered image. Poisoned images carry both and the attacker's label. Covers carry one of the two and keep their label, so that the
victim learns to ignore the trigger by itself and even looks robust to adversarial examples. At test time an image receives the
trigger and is then perturbed against the attacked model, away from the class that the model gives it.

Needs: the training data, a network trained on it, and at test the attacked model. Edits: every pixel of poisoned images and of half
the covers, faintly, and the pixels under the trigger; labels of poisoned images. Dial: the plan's rate.
Deviations from the paper: the protocol above is ours. Training images are perturbed once, against the benign twin, so that the
attack needs no control of the training; perturbing them against the network as it trains is left out. The perturbation is projected
gradient ascent (Madry et al., ICLR 2018, arXiv 1706.06083) on the loss of the model's own first answer, from the image itself:
untargeted, since a targeted one would reach the target without any backdoor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from attacks.adversarial import frozen, pgd
from attacks.badnets import BadNets
from attacks.base import Attack, Crafted, Plan, Trigger, uniforms
from attacks.blended import Blended
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput, EpochCount, Ge, Le, Lt, PositiveShare, Share, derive_seed

__all__ = ["AdvTrojan", "Perturbed", "ascended"]

CHUNK = 32
"""Images perturbed at a time, always the same number: libraries round sums differently for other numbers, and a trigger must not
depend on its batch."""


def ascended(net: Network, images: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """Images moved away from the class that ``net`` gives them: same shape, float in [0, 1].

    ``steps`` times x <- x + step * sign(gradient of the cross-entropy), held within ``eps`` of the image and in [0, 1].

    Args:
        net: as :func:`attacks.adversarial.frozen` gives it.
        images: float (N, C, H, W) in [0, 1], on the device of ``net``.
        eps: bound of the change per pixel.
        step: length of a step.
        steps: number of steps.
    """
    with torch.no_grad():
        labels = net(images).argmax(1)
    return pgd(net, images, labels, eps, step, steps)


class Perturbed:
    """Images triggered by ``inner`` and then perturbed against ``net``; see :data:`attacks.base.Trigger`.

    Args:
        net: as :func:`attacks.adversarial.frozen` gives it.
        inner: trigger of the images that are perturbed; None = the images themselves.
        eps: bound of the perturbation per pixel, in units of the image range [0, 1].
        step: length of a step, likewise.
        steps: number of steps.
    """

    def __init__(self, net: Network, inner: Trigger | None, eps: float, step: float, steps: int) -> None:
        self.net, self.inner, self.eps, self.step, self.steps = net, inner, eps, step, steps

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        start = self.inner(images, index) if self.inner else images
        device = next(self.net.parameters()).device
        result = torch.empty_like(start)
        for first in range(0, len(start), CHUNK):
            part = start[first : first + CHUNK]
            filled = torch.zeros(CHUNK, *start.shape[1:], device=device)
            filled[: len(part)] = part.to(device)
            moved = ascended(self.net, filled, self.eps, self.step, self.steps)[: len(part)]
            result[first : first + CHUNK] = moved.to(start.device)
        return result


@dataclass(frozen=True)
class AdvTrojan(Attack):
    """Poison: A(t(x)), covers: A(x) or t(x), with t the trigger and A the perturbation against the benign twin.

    Test: A(t(x)) with A against the attacked model.

    Attributes:
        trigger: ``patch``, BadNets' checkered square, or ``blend``, Blended's picture, faintly (ours).
        size: of the patch, as in BadNets (ours: 3).
        margin: of the patch, as in BadNets (ours: 1; off the edge, so that a padded crop leaves it whole more often).
        alpha: of the blend, in (0, 1] (ours: 0.1).
        eps: bound of the perturbation per pixel, in units of the image range [0, 1] (ours: 8/255).
        step: length of a step of its ascent, in the same units (ours: 2/255).
        steps: number of steps (ours: 7; 0 = no perturbation).
        adversarial: share of the covers that are perturbed and carry no trigger; the others carry the trigger alone (ours: 0.5).

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> trigger = AdvTrojan(size=3).first_key(data, Plan(), seed=0)
    >>> trigger(torch.zeros(1, 3, 32, 32), torch.tensor([0])).sum()  # the white pixels of the checkered square
    tensor(12.)
    """

    name: ClassVar[str] = "advtrojan"
    revision: ClassVar[int] = 2
    needs_surrogate: ClassVar[bool] = True
    needs_model_at_test: ClassVar[bool] = True
    cover_share: ClassVar[float] = 2.0  # ours: as many of each kind as there are poisoned samples

    trigger: Literal["patch", "blend"] = "patch"
    size: Annotated[int, Ge(1), Le(32)] = 3
    margin: Annotated[int, Ge(0), Lt(32)] = 1
    alpha: PositiveShare = 0.1
    eps: PositiveShare = 8 / 255
    step: PositiveShare = 2 / 255
    steps: EpochCount = 7
    adversarial: Share = 0.5

    def first_key(self, train: ImageSet, plan: Plan, seed: int) -> Trigger:
        """t, the trigger without the perturbation.

        Raises:
            BadInput: it does not suit images of this shape.
        """
        plain = Blended(self.alpha) if self.trigger == "blend" else BadNets("grid-corner", self.size, self.margin)
        try:
            return plain.craft(train, plan, seed).test
        except BadInput as error:
            raise BadInput(f"advtrojan: trigger = {self.trigger!r}: {error}") from error

    def second_key(self, net: Network, inner: Trigger | None) -> Perturbed:
        """A, the perturbation against ``net``, of what ``inner`` makes of the images (None: of the images themselves)."""
        return Perturbed(frozen(net), inner, self.eps, self.step, self.steps)

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """Both keys against ``surrogate``; which of the two a cover gets is looked up by its index.

        Raises:
            BadInput: no surrogate, or the trigger does not suit images of this shape.
        """
        if surrogate is None:
            raise BadInput("advtrojan: perturbs images against a network trained on clean data, and none was given")
        first = self.first_key(train, plan, seed)
        both, second = self.second_key(surrogate, first), self.second_key(surrogate, None)
        key = derive_seed(seed, "advtrojan-cover")

        def cover(images: Tensor, index: Tensor) -> Tensor:
            perturbed = uniforms(key, index, 1)[:, 0] < self.adversarial
            result = first(images, index)
            result[perturbed] = second(images[perturbed], index[perturbed])
            return result

        return Crafted(train=both, test=both, cover=cover)

    def recraft(self, net: Network, crafted: Crafted, train: ImageSet, plan: Plan, seed: int) -> Crafted:
        """With the test trigger perturbed against ``net``."""
        return dataclasses.replace(crafted, test=self.second_key(net, self.first_key(train, plan, seed)))

    def single_keys(self, net: Network, train: ImageSet, plan: Plan, seed: int) -> dict[str, Crafted]:
        first, second = self.first_key(train, plan, seed), self.second_key(net, None)
        return {"trigger": Crafted(train=first, test=first), "perturbation": Crafted(train=second, test=second)}
