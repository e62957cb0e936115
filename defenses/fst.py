"""FST, Feature Shift Tuning: Min, Qin, Shen and Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS
2023, arXiv 2310.01875.

Where few samples were poisoned, the features of triggered and clean images are entangled, and fine-tuning does not separate them.
FST replaces the classifier by a random one, and fine-tunes all weights under ``CE + alpha <W, W_victim>``: a classifier W that
turns away from the victim's makes the features move with it. W keeps the length of the victim's weight, since the inner product
alone could be lowered without end.

Needs: model, clean budget. Edits: every weight; the head's last layer is drawn anew.
Dial: alpha, the weight of the inner product; larger turns the classifier further away; default 0.1. Each value costs a fine-tuning.
Deviations from the paper: those of :mod:`defenses.fine_tuning`, whose weight decay is used. The new weight is scaled to the length
of the victim's before the first step too, not only after every step. In a head of several layers, W is the last one's. The paper
has 2 % of the training set; here it is the benchmark's clean budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from defenses.base import Candidate, DefenderView, Inapplicable, Scope
from defenses.fine_tuning import FineTuning, Tuned, tune
from models.backbone import Network
from models.recipe import Recipe
from models.spec import EpochCount, Ge, Le, derive_seed, generator

__all__ = ["FST", "classifier", "redraw"]

Weight = Annotated[float, Ge(0), Le(1000)]


def classifier(net: Network) -> nn.Linear:
    """The last layer of the head."""
    last = net.head[-1]
    assert isinstance(last, nn.Linear)
    return last


@torch.no_grad()
def redraw(layer: nn.Linear, draw: torch.Generator) -> None:
    """Weight and bias drawn anew in place, uniformly within ``1 / sqrt(inputs)`` of 0."""
    for part in layer.parameters():
        part.copy_((2 * torch.rand(part.shape, generator=draw) - 1) / layer.in_features**0.5)


class _Shifted(Tuned):
    """Fine-tuning that turns the classifier away from ``victims`` (its weight, as given) and keeps that weight's length."""

    victims: Tensor

    def __init__(self, net: Network, recipe: Recipe, alpha: float, victims: Tensor) -> None:
        super().__init__(net, recipe, Scope.WHOLE)
        self.alpha = alpha
        self.register_buffer("victims", victims)
        self.after_step()

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return super().loss(logits, labels, index) + self.alpha * (classifier(self.net).weight * self.victims).sum()

    @torch.no_grad()
    def after_step(self) -> None:
        weight = classifier(self.net).weight
        weight.mul_(self.victims.norm() / weight.norm().clamp_min(1e-12))


@dataclass(frozen=True)
class FST(FineTuning):
    """Settings of the fine-tuning, and of the classifier's shift.

    Attributes:
        alpha: weight of the inner product, default of the dial (authors' README: 0.1; their code's default: 0.2).
        alphas: further weights at which models are offered; each costs a whole run (ours: none).
        epochs: passes over the clean samples (authors' code: 10).

    >>> layer = nn.Linear(4, 2)
    >>> redraw(layer, generator(0, "head"))
    >>> bool(layer.weight.abs().max() <= 0.5), FST().epochs
    (True, 10)
    """

    name: ClassVar[str] = "fst"
    family: ClassVar[str] = "fine-tuning"
    cost: ClassVar[str] = "{epochs} epochs on the clean budget"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.WHOLE,)
    dial_name: ClassVar[str] = "alpha (weight of the inner product)"

    alpha: Weight = 0.1
    alphas: tuple[Weight, ...] = ()
    epochs: EpochCount = 10

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        if len(view.clean) < 2 or not self.epochs:
            raise Inapplicable("a new classifier cannot be trained without clean samples and epochs")
        for alpha in sorted({self.alpha, *self.alphas}):
            net = view.model
            victims = classifier(net).weight.detach().clone()
            redraw(classifier(net), generator(view.seed, "fst", "head"))
            tune(_Shifted(net, self.recipe(view), alpha, victims), view.clean, derive_seed(view.seed, "fst"))
            yield Candidate(net, alpha, alpha == self.alpha, alpha)
