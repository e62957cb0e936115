"""SAU, Shared Adversarial Unlearning: Wei, Zhang, Zha and Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning
Shared Adversarial Examples", NeurIPS 2023, arXiv 2307.10562.

A triggered image is an adversarial example of the victim, and remains one of any network with the same backdoor. SAU looks for
perturbations of clean images that the victim and the network that is repaired mistake alike, and unlearns them: on a perturbed
image the network must leave the class that the victim gives it, where that is a wrong one. Per batch, the perturbation d maximises
``beta_1 adv(x + d) + beta_2 share(x + d)`` by projected sign steps; then a step lowers ``CE(x) + weight unlearn(x + d)``.

Needs: model, clean budget. Edits: every weight; running statistics stay.
Dial: the weight of the unlearning loss; larger unlearns more; 0 is fine-tuning by the same optimiser; default 1. Each value costs a
run.
Deviations from the paper: a reconstruction, since only its abstract and the documentation and settings of BackdoorBench were at
hand. Read there: which terms the sums have, their weights, that share is a Jensen-Shannon divergence, the optimiser, and the size
and steps of the perturbation. The terms' exact form is ours: adv is the mean cross-entropy of both networks, share the negative
divergence of their outputs, and unlearn the mean of ``-log(1 - p of the victim's class)`` over the batch, 0 where that class is
right. Ours, too: both networks in evaluation mode, perturbations that begin at 0 and keep pixels in [0, 1], a constant rate, batch
128 and no weight decay. A third loss, plain cross-entropy on perturbed images, has weight 0 in BackdoorBench and is left out.
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
Size = Annotated[float, Ge(0), Le(10)]


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the softmax of two logits (N, K), in nats, mean over samples: a scalar in [0, log 2]."""
    p, q = a.log_softmax(1), b.log_softmax(1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1).mean()


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

    def inner(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the perturbation maximises, a scalar."""
        ours, theirs = self(images), self.victim(images).float()
        adversarial = (cross_entropy(ours, labels) + cross_entropy(theirs, labels)) / 2
        return self.method.beta_1 * adversarial - self.method.beta_2 * divergence(ours, theirs)

    def perturbed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images moved by at most ``bound`` standard deviations per pixel, in [0, 1]; shape as given, without gradient."""
        unit = self.net.normalise.std
        low = (images - self.method.bound * unit).clamp(0, 1)
        high = (images + self.method.bound * unit).clamp(0, 1)
        found = images
        for _ in range(self.method.steps):
            found = found.detach().requires_grad_()
            (up,) = torch.autograd.grad(self.inner(found, labels), found)
            found = torch.clamp(found + self.method.step * unit * up.sign(), low, high)
        return found.detach()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        loss = self.loss(self(images), labels, index)
        if self.weight:
            moved = self.perturbed(images, labels)
            with torch.no_grad():
                victims = self.victim(moved).argmax(1)
            loss = loss + self.weight * unlearning(self(moved), labels, victims)
        return loss


@dataclass(frozen=True)
class SAU(Defense):
    """Settings of the perturbation, and of the training against it.

    Attributes:
        weight: of the unlearning loss beside the clean one's 1, default of the dial (BackdoorBench: 1).
        weights: further values at which models are offered; each costs a whole run (ours: none).
        beta_1: weight of the adversarial loss while perturbing (BackdoorBench: 0.01).
        beta_2: weight of the shared loss while perturbing (BackdoorBench: 1).
        bound: of the perturbation per pixel, in the standard deviations by which images are normalised (BackdoorBench: 0.2).
        step: size of a sign step, in the same unit (BackdoorBench: 0.2).
        steps: sign steps (BackdoorBench: 5).
        rounds: passes over the clean samples (BackdoorBench: 100).
        lr: of Adam, constant (BackdoorBench: 1e-4).
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
    cost: ClassVar[str] = "{rounds} epochs on the clean budget, {steps} steps of perturbation on two networks each"
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
            crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip
        for weight in sorted({self.weight, *self.weights}):
            module = _Unlearning(view.model, recipe, self, weight, view.model)
            net = tune(module, view.clean, derive_seed(view.seed, "sau"))
            yield Candidate(net, weight, weight == self.weight, weight)
