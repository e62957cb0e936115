"""SAU, Shared Adversarial Unlearning: Wei, Zhang, Zha and Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning
Shared Adversarial Examples", NeurIPS 2023, arXiv 2307.10562.

A triggered image is an adversarial example of the victim, and remains one of any network with the same backdoor. SAU looks for
perturbations of clean images that the victim and the network that is repaired mistake alike, and unlearns them: on a perturbed
image the network must leave the class that the victim gives it, where that is a wrong one. Per batch, the perturbation d maximises
``beta_1 adv(x + d) - beta_2 share(x + d)`` by projected sign steps; then a step lowers ``CE(x) + weight unlearn(x + d)``. adv is
the mean cross-entropy of both networks, each on the images whose class in it d has not changed yet; share is the Jensen-Shannon
divergence of their outputs, on the images that they do not mistake alike yet.

Needs: model, clean budget. Edits: every weight; running statistics stay.
Dial: the weight of the unlearning loss; larger unlearns more; 0 is fine-tuning by the same optimiser; default 1. Each value costs a
run.
Deviations from the paper: written from its abstract and from what the authors' code in BackdoorBench does and sets. Without its
clamps of probabilities; batch 128 instead of 256. Its third loss, plain cross-entropy on perturbed images, has weight 0 there and
is left out. As there, both networks are in evaluation mode, d begins at ``bound`` in every pixel, and pixels may leave [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Knowledge, Scope
from defenses.fine_tuning import Tuned, tune
from models.backbone import Network
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, derive_seed

__all__ = ["SAU", "divergence", "unlearning"]

Weight = Annotated[float, Ge(0), Le(1000)]
Size = Annotated[float, Ge(0), Le(1)]


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the softmax of two logits (N, K), in nats, of every sample: (N,) in [0, log 2]."""
    p, q = a.log_softmax(1), b.log_softmax(1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1)


def unlearning(logits: Tensor, labels: Tensor, victims: Tensor) -> Tensor:
    """Mean over samples of ``-log(1 - p)``, a scalar: p is the probability of the victim's class; 0 where that is the label.

    Args:
        logits: float (N, K) on perturbed images.
        labels: int64 (N,).
        victims: int64 (N,), the classes that the victim gives the same images.
    """
    rest = logits.scatter(1, victims[:, None], -torch.inf).logsumexp(1)
    return ((logits.logsumexp(1) - rest) * (victims != labels)).mean()


class _Unlearning(Tuned):
    """Training that unlearns what network and victim mistake alike, both in evaluation mode."""

    def __init__(self, net: Network, recipe: Recipe, method: SAU, weight: float, victim: Network) -> None:
        super().__init__(net, recipe, Scope.WHOLE)
        self.method, self.weight, self.victim = method, weight, victim.requires_grad_(False)

    def train(self, mode: bool = True) -> _Unlearning:
        super().train(mode)
        self.net.eval()
        self.victim.eval()
        return self

    def perturbed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images moved by at most ``bound`` per pixel, shape as given, without gradient; values may leave [0, 1].

        No further step is taken once both networks mistake all of them alike.
        """
        with torch.no_grad():
            before = self(images).argmax(1), self.victim(images).argmax(1)
        shift = torch.full_like(images, self.method.bound if self.method.steps else 0.0)
        for _ in range(self.method.steps):
            shift.requires_grad_()
            ours, theirs = self(images + shift), self.victim(images + shift).float()
            moved = [now.argmax(1) != then for now, then in zip((ours, theirs), before, strict=True)]
            alike = moved[0] & moved[1] & (ours.argmax(1) == theirs.argmax(1))
            if alike.all():
                break
            adversarial = sum((cross_entropy(now, labels, reduction="none") * ~gone).mean() / 2
                              for now, gone in zip((ours, theirs), moved, strict=True))  # fmt: skip
            gain = self.method.beta_1 * adversarial - self.method.beta_2 * (divergence(ours, theirs) * ~alike).mean()
            (up,) = torch.autograd.grad(gain, shift)
            shift = (shift.detach() + self.method.step * up.sign()).clamp(-self.method.bound, self.method.bound)
        return (images + shift).detach()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        loss = self.loss(self(images), labels, index)
        if self.weight:
            moved = self.perturbed(images, labels)
            with torch.no_grad():
                own, victims = self.victim(images).argmax(1), self.victim(moved).argmax(1)
            wrong = torch.where(victims == own, labels, victims)  # what d did not change is not the perturbation's
            loss = loss + self.weight * unlearning(self(moved), labels, wrong)
        return loss


@dataclass(frozen=True)
class SAU(Defense):
    """Settings of the perturbation, and of the training against it.

    Attributes:
        weight: of the unlearning loss beside the clean one's 1, default of the dial (authors' code: 1).
        weights: further values at which models are offered; each costs a whole run (ours: none).
        beta_1: weight of the adversarial loss while perturbing (authors' code: 0.01).
        beta_2: weight of the shared loss while perturbing (authors' code: 1).
        bound: of the perturbation per pixel, of images in [0, 1] (authors' code: 0.2).
        step: size of a sign step (authors' code: 0.2).
        steps: sign steps, at most (authors' code: 5).
        rounds: passes over the clean samples, without augmentation (authors' code: 100).
        lr: of Adam, constant (authors' code: 1e-4).
        batch: samples per step (ours: 128, as the other methods on this budget).

    >>> logits, label = torch.zeros(1, 4), torch.tensor([0])
    >>> unlearning(logits, label, torch.tensor([2]))  # -log(1 - 1/4)
    tensor(0.2877)
    >>> unlearning(logits, label, label)  # the victim is right
    tensor(0.)
    >>> SAU(rounds=10).needs.words
    'model + clean'
    """

    name: ClassVar[str] = "sau"
    family: ClassVar[str] = "unlearning"
    cost: ClassVar[str] = "{rounds} epochs on the clean budget, at most {steps} steps of perturbation on two networks each"
    revision: ClassVar[int] = 2  # 2: perturbation and losses as in the authors' code
    dial_name: ClassVar[str] = "weight of the unlearning loss"

    weight: Weight = 1.0
    weights: tuple[Weight, ...] = ()
    beta_1: Weight = 0.01
    beta_2: Weight = 1.0
    bound: Size = 0.2
    step: Size = 0.2
    steps: Annotated[int, Ge(0), Le(1000)] = 5
    rounds: EpochCount = 100
    lr: LearningRate = 1e-4
    batch: BatchSize = 128

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        recipe = Recipe(
            epochs=self.rounds, batch=self.batch, lr=self.lr, optimizer="adam", weight_decay=0.0, schedule="constant",
            crop=0, flip=False, precision=view.recipe.precision,
        )  # fmt: skip
        for weight in sorted({self.weight, *self.weights}):
            module = _Unlearning(view.model, recipe, self, weight, view.model)
            net = tune(module, view.clean, derive_seed(view.seed, "sau"))
            yield Candidate(net, weight, weight == self.weight, weight)
