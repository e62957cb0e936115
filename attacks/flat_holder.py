"""Flat Hölder constants: an adaptive attacker against Hölder pruning (withdrawn submission to ICLR 2025, OpenReview yJduhi9mDQ).

Hölder pruning estimates, by steps along the sign of the gradient, how strongly each unit answers a small change of the input, and
prunes the units that stand out. So the victim is trained under a penalty on exactly that estimate, for a set of exponents, because
the attacker does not know which one the defender uses.

Needs: control of the training. Edits: the loss; poison is the base attack's. Dial: strength, the weight of the penalty.
Deviations from the paper: none; the attack is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attacks.adaptive import Adaptive
from attacks.base import Crafted, Plan
from models.backbone import Network
from models.classifier import Classifier
from models.recipe import Recipe
from models.spec import Ge, Le, PositiveShare, check
from models.units import UnitLayer, capture, unit_layers

__all__ = ["FlatHolder", "peakedness", "responses"]


def responses(net: Network, layers: Sequence[UnitLayer], images: Tensor, labels: Tensor, eps: float) -> tuple[list[Tensor], Tensor]:
    """How every unit answers one step of size ``eps`` along the sign of the input's gradient.

    Returns:
        per layer, float (B, units): Euclidean norm of the change of each unit's output after ReLU; and the step's norm, float (B,).
    """
    start = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(cross_entropy(net(start), labels), start)
    moved = (images.detach() + eps * gradient.sign()).clamp(0.0, 1.0)
    with capture(net, layers) as before:
        net(images.detach())
    with capture(net, layers) as after:
        net(moved)
    changes = [(after[layer.name] - before[layer.name]).flatten(2 if before[layer.name].ndim > 2 else 1) for layer in layers]
    # The root of a sum of squares has no gradient at 0; a unit that does not move stays out of the way of the others.
    sizes = [(change.square().sum(2) if change.ndim > 2 else change.square()).add(1e-12).sqrt() for change in changes]
    return sizes, (moved - images.detach()).flatten(1).norm(dim=1)


def peakedness(sizes: Sequence[Tensor], steps: Tensor, alphas: Sequence[float], share: float) -> Tensor:
    """Mean over exponents and layers of ``mean of the top share / mean of all - 1`` of the units' constants; a scalar, 0 = flat.

    A unit's constant is ``max over the batch of |change| / |step|^alpha``. At least one unit counts as the top share.
    """
    parts = []
    for alpha in alphas:
        scale = steps.clamp(min=1e-12) ** alpha
        for size in sizes:
            constants = (size / scale[:, None]).amax(0)
            top = constants.topk(max(1, round(share * len(constants)))).values
            parts.append(top.mean() / (constants.mean() + 1e-12) - 1)
    return torch.stack(parts).mean() if parts else torch.zeros(())


@dataclass(frozen=True)
class FlatHolder(Adaptive):
    """The base attack's training with ``strength * peakedness`` added to the loss.

    Attributes:
        alphas: exponents it hides from (ours, from Hölder pruning's default up to CLP's 1).
        eps: length of the step in units of the image range [0, 1] (ours: 8/255, as the pixel estimator's).
        share: of the units whose constants are pressed down (ours).
        samples: images of each batch that the penalty looks at; it costs three more passes of them (ours).

    >>> attack = FlatHolder(base="blended", share=0.25)
    >>> peakedness([torch.tensor([[1.0, 1.0, 1.0, 5.0]])], torch.ones(1), attack.alphas, attack.share)  # 5 / mean 2 - 1
    tensor(1.5000)
    """

    name: ClassVar[str] = "flat-holder"

    alphas: tuple[PositiveShare, ...] = (0.5, 0.75, 1.0)
    eps: PositiveShare = 8 / 255
    share: PositiveShare = 0.1
    samples: Annotated[int, Ge(1), Le(65_536)] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "alphas", len(self.alphas) > 0, "one or more exponents")

    def victim(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> Classifier:
        module = super().victim(net, recipe, crafted, plan, seed)
        if self.strength == 0:
            return module
        layers, plain, prepare = unit_layers(net), module.loss, module.on_batch
        seen: list[tuple[Tensor, Tensor]] = []

        def on_batch(images: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            images, labels = prepare(images, labels, index)
            seen[:] = [(images[: self.samples], labels[: self.samples])]
            return images, labels

        def loss(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
            ((images, own),) = seen
            # In evaluation mode, as the defender will measure the network; running statistics do not change.
            net.eval()
            with torch.autocast(images.device.type, enabled=False):  # it compares numbers that differ by little
                sizes, steps = responses(net, layers, images, own, self.eps)
                penalty = peakedness(sizes, steps, self.alphas, self.share)
            module.train()
            return plain(logits, labels, index) + self.strength * penalty

        module.on_batch, module.loss = on_batch, loss  # type: ignore[method-assign]
        return module
