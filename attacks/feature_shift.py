"""Feature shift: a data-only adaptive attacker against pruning of a head on a public extractor's features.

Where the defender trains a head on a public extractor, the extractor's training is not poisoned. The attacker can still use the
extractor: a universal perturbation of at most ``strength`` per pixel moves the features of triggered images towards those of the
target class. Then the head needs no unusually sensitive unit for the backdoor, and a defense that looks for one finds none.

Needs: the training data and a network whose features resemble the victim's (the same, where features are given). Edits: pixels of
poisoned images, on top of the base attack's trigger; its labels. Dial: strength, the perturbation's bound in [0, 1].
Deviations from the paper: none; the attack is ours. The steps are those of a universal targeted perturbation (Moosavi-Dezfooli et
al., "Universal adversarial perturbations", CVPR 2017, arXiv 1610.08401), by signed gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attacks.adaptive import Adaptive
from attacks.adversarial import frozen
from attacks.base import Crafted, Plan, Power, Trigger
from attacks.generated import part
from models.backbone import Network
from models.images import ImageSet, to_float
from models.spec import BadInput, Ge, Le, Share, generator
from models.training import default_device

__all__ = ["FeatureShift", "distance"]


def distance(z: Tensor, centre: Tensor) -> Tensor:
    """Mean squared distance of normalised features (N, d) to a normalised centre (d,), a scalar."""
    return (normalize(z) - centre).square().sum(1).mean()


class Shifted:
    """clip(base trigger(x) + delta) to [0, 1], delta float (C, H, W); see :data:`attacks.base.Trigger`."""

    def __init__(self, base: Trigger, delta: Tensor) -> None:
        self.base, self.delta = base, delta

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        return (self.base(images, index) + self.delta.to(images.device)).clamp(0.0, 1.0)


def _shifted(crafted: Crafted, delta: Tensor) -> Crafted:
    cover = None if crafted.cover is None else Shifted(crafted.cover, delta)
    return Crafted(Shifted(crafted.train, delta), Shifted(crafted.test, delta), cover)


@dataclass(frozen=True)
class FeatureShift(Adaptive):
    """x' = clip(base trigger(x) + delta), delta universal.

    Attributes:
        strength: bound of |delta| per pixel, in units of the image range (ours).
        steps: of signed-gradient descent, each of a fifth of the bound (ours).
        batch: images per step (ours).

    >>> FeatureShift(strength=0.0).needs_surrogate, FeatureShift(strength=8 / 255).needs_surrogate
    (False, True)
    >>> distance(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0]))
    tensor(1.)
    """

    name: ClassVar[str] = "feature-shift"

    strength: Share = 8 / 255
    steps: Annotated[int, Ge(1), Le(100_000)] = 100
    batch: Annotated[int, Ge(1), Le(65_536)] = 128

    @property
    def power(self) -> Power:
        return self.wrapped().power

    @property
    def needs_surrogate(self) -> bool:  # type: ignore[override]
        return self.strength > 0 or self.wrapped().needs_surrogate

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        crafted = self.wrapped().craft(train, plan, seed, surrogate)
        if self.strength == 0:
            return crafted
        if plan.label_mode != "all-to-one":
            raise BadInput(f"{self.name}: label_mode = {plan.label_mode!r}: one perturbation leads to one class, 'all-to-one'")
        assert surrogate is not None
        delta = self.perturbation(surrogate, crafted.test, train, plan, seed)

        return _shifted(crafted, delta)

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        return self.strength > 0 or self.wrapped().keeps

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        """delta, whose search rounds differently on another machine, and what the base attack keeps."""
        if not (isinstance(crafted.train, Shifted) and isinstance(crafted.test, Shifted)):
            return self.wrapped().keep(crafted)
        cover = crafted.cover.base if isinstance(crafted.cover, Shifted) else None
        inner = Crafted(crafted.train.base, crafted.test.base, cover)
        return {"delta": crafted.test.delta, **{f"base.{name}": value for name, value in self.wrapped().keep(inner).items()}}

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        if "delta" not in kept:
            return self.wrapped().restore(kept, train, plan, seed, surrogate)
        return _shifted(self.wrapped().restore(part("base", kept), train, plan, seed, surrogate), kept["delta"])

    def perturbation(self, net: Network, trigger: Trigger, train: ImageSet, plan: Plan, seed: int) -> Tensor:
        """delta float (C, H, W), |delta| at most ``strength``, on the CPU; ``net`` is left as it was."""
        device, net = default_device(), frozen(net)
        ours = torch.nonzero(train.labels == plan.target).flatten()
        others = torch.nonzero(train.labels != plan.target).flatten()
        if not len(ours) or not len(others):
            raise BadInput(f"{self.name}: target = {plan.target}: it takes images of this class and of others")
        with torch.no_grad():
            parts = [net.embed(to_float(train.images[part]).to(device)) for part in torch.split(ours, 500)]
        centre = normalize(normalize(torch.cat(parts)).mean(0), dim=0)
        order = others[torch.randperm(len(others), generator=generator(seed, "feature-shift"))]
        delta = torch.zeros(train.shape, device=device)
        for step in range(self.steps):
            index = order[(torch.arange(self.batch) + step * self.batch) % len(order)]
            moved = delta.clone().requires_grad_(True)
            images = trigger(to_float(train.images[index]), index).to(device) + moved
            (gradient,) = torch.autograd.grad(distance(net.embed(images.clamp(0.0, 1.0)), centre), moved)
            delta = (delta - self.strength / 5 * gradient.sign()).clamp(-self.strength, self.strength)
        return delta.cpu()
