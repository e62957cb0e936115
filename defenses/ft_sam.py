"""FT-SAM: Zhu, Wei, Shen, Fan and Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023,
arXiv 2304.11823.

Plain fine-tuning hardly moves the weights that carry a backdoor, and these are often large. FT-SAM fine-tunes under the worst small
perturbation of the weights, min over w of max over ``||eps / |w| ||_2 <= rho`` of ``L(w + eps)``. The radius grows with the weight,
so that large weights are perturbed most. One step takes the gradient g at w, perturbs by ``eps = rho w^2 g / ||w g||_2``, and
descends from w along the gradient at ``w + eps``.

Needs: model, clean budget. Edits: every weight, or the head's alone at scope HEAD; norms and biases are perturbed like all others.
Dial: rho, the radius; larger changes more; 0 is fine-tuning; default 2. Each value costs a fine-tuning of two passes per step.
Deviations from the paper: those of :mod:`defenses.fine_tuning`, whose batches, rates and seed are used, so that the perturbation is
the only difference to it. Hence no label smoothing by default, and batch 128 for 256 (BackdoorBench's code smooths by 0.1, and its
rate swings between 0.01 and 0 every 100 steps). The paper has rho = 8 for Tiny ImageNet and GTSRB; here it is 2 everywhere.
Batch norm takes the batch's statistics in both passes and updates its running ones in the first alone, as BackdoorBench's code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Scope
from defenses.fine_tuning import FineTuning, Tuned, tune
from models.backbone import Network
from models.recipe import Recipe
from models.spec import Ge, Le, Lt, derive_seed

__all__ = ["FTSAM", "perturbation", "statistics_held"]

Radius = Annotated[float, Ge(0), Le(1000)]


def perturbation(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """``rho w^2 g / ||w g||_2`` of every entry, shapes as given; the norm is over all entries of all tensors.

    The step up the loss's linear approximation that is largest under ``||eps / |w| ||_2 <= rho``. Zeros where
    every ``w g`` is 0.
    """
    norm = torch.stack([(weight * gradient).norm() for weight, gradient in zip(weights, gradients, strict=True)]).norm()
    scale = rho / norm.clamp_min(1e-12)
    return [scale * weight.square() * gradient for weight, gradient in zip(weights, gradients, strict=True)]


@contextmanager
def statistics_held(net: nn.Module) -> Iterator[None]:
    """Inside, batch norms update no running statistics; in training mode they still take the batch's."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class _Sharp(Tuned):
    """Fine-tuning by the gradient at perturbed weights."""

    def __init__(self, net: Network, recipe: Recipe, scope: Scope, rho: float, smoothing: float) -> None:
        super().__init__(net, recipe, scope)
        self.rho, self.smoothing = rho, smoothing
        self.kept: list[Tensor] = []

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        # PyTorch spreads its share over all classes, the right one included.
        classes = logits.shape[1]
        return cross_entropy(logits, labels, label_smoothing=self.smoothing * classes / (classes - 1))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        weights = self.trainable()
        gradients = torch.autograd.grad(self.loss(self(images), labels, index), weights, allow_unused=True, materialize_grads=True)
        self.kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, shift in zip(weights, perturbation(self.kept, gradients, self.rho), strict=True):
                weight.add_(shift)
        with statistics_held(self.net):
            return self.loss(self(images), labels, index)

    @torch.no_grad()
    def on_after_backward(self) -> None:
        # Copies, because subtracting the perturbation again would leave rounding errors.
        for weight, kept in zip(self.trainable(), self.kept, strict=True):
            weight.copy_(kept)


@dataclass(frozen=True)
class FTSAM(FineTuning):
    """Settings of the fine-tuning, and of the perturbation.

    Attributes:
        rho: radius of the perturbation, default of the dial (paper: 2 for CIFAR-10).
        rhos: further radii at which models are offered; each costs a whole run (ours: none).
        smoothing: share of the label given to the other classes, in [0, 0.5) (ours: 0, as fine-tuning; BackdoorBench: 0.1).

    >>> w, g = [torch.tensor([2.0, 1.0])], [torch.tensor([1.0, 0.0])]
    >>> perturbation(w, g, FTSAM(rho=0.5).rho)  # half of the only weight with a gradient
    [tensor([1., 0.])]
    """

    name: ClassVar[str] = "ft-sam"
    family: ClassVar[str] = "fine-tuning"
    cost: ClassVar[str] = "{epochs} epochs on the clean budget, two passes a step"
    dial_name: ClassVar[str] = "rho (radius of the perturbation)"

    rho: Radius = 2.0
    rhos: tuple[Radius, ...] = ()
    smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        for rho in sorted({self.rho, *self.rhos}):
            module = _Sharp(view.model, self.recipe(view), view.scope, rho, self.smoothing)
            net = tune(module, view.clean, derive_seed(view.seed, "fine-tuning"))
            yield Candidate(net, rho, rho == self.rho, rho)
