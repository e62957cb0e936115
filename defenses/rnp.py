"""RNP, Reconstructive Neuron Pruning: Li, Lyu, Ma, Koren, Lyu, Li and Jiang, "Reconstructive Neuron Pruning for Backdoor Defense",
ICML 2023, arXiv 2305.14876.

Gradient ascent on clean samples makes the network forget its task, and the backdoor, which those samples do not use, stays. Then
the weights are frozen and one mask in [0, 1] per unit learns to recover the task. It lowers the masks of units that hold the
backdoor, since they work against the task. Units with small masks are pruned in the original network.

Needs: model, clean budget. Edits: gamma of batch-norm channels (beta stays, so a pruned channel becomes a constant), weight row and
bias of convs without a norm and of the head's hidden units (scope HEAD: these alone; the features are frozen in evaluation mode).
Dial: threshold on the mask, over all layers jointly; mask <= threshold is pruned. Default 0.2 (ours: ANP's; the released script
prints a sweep and leaves the choice to the reader).
Deviations from the paper: the head's hidden units, which its victims do not have, are masked too. Accuracy while unlearning is
counted over the batches of the epoch, before each step. The released code calls a clip of the gradient before the backward pass,
where it changes nothing; it is left out. Batches are cropped and flipped as the victim's recipe says. Of a larger clean budget no
more samples are used than the authors had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from defenses.anp import GRID, at_thresholds, scaled
from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope, prunable
from defenses.fine_tuning import Tuned, tune
from models.backbone import Network
from models.images import ImageSet
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, Share, derive_seed, generator
from models.training import optimise
from models.units import UnitLayer, Writer

__all__ = ["RNP"]


class _Unlearning(Tuned):
    """Gradient ascent until an epoch's accuracy is at most ``stop``; from half of the epochs on at a tenth of the rate."""

    def __init__(self, net: Network, recipe: Recipe, scope: Scope, stop: float) -> None:
        super().__init__(net, recipe, scope)
        self.stop, self.right, self.seen = stop, torch.zeros(()), 0
        half = max(1, recipe.epochs // 2)
        self.rate_factor = lambda done: 1.0 if done < half else 0.1

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        self.right = self.right.to(labels.device) + (logits.argmax(1) == labels).sum()
        self.seen += len(labels)
        return -super().loss(logits, labels, index)

    def on_train_epoch_end(self) -> None:
        if float(self.right) <= self.stop * self.seen:
            self.trainer.should_stop = True
        self.right, self.seen = torch.zeros(()), 0


class _Recovery(Tuned):
    """Learns the masks of a frozen network, all 1 at first; they stay in [0, 1]."""

    def __init__(self, net: Network, recipe: Recipe, scope: Scope, layers: Sequence[UnitLayer], alpha: float) -> None:
        super().__init__(net.requires_grad_(False), recipe, scope)
        self.layers, self.alpha = layers, alpha
        self.mask = nn.Parameter(torch.ones(sum(layer.size for layer in layers)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.net, scaled(self.net, self.layers, self.mask), (x,))
        return logits.float()

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return self.alpha * super().loss(logits, labels, index)

    def trainable(self) -> list[nn.Parameter]:
        return [self.mask]

    @torch.no_grad()
    def after_step(self) -> None:
        self.mask.clamp_(0, 1)


@dataclass(frozen=True)
class RNP(Defense):
    """Settings of the two trainings and the pruning. Both use SGD with momentum 0.9.

    Attributes:
        threshold: default of the dial, in [0, 1] (ours: ANP's 0.2).
        unlearning_epochs: at most so many of ascent; the rate falls to a tenth after half of them (authors' code: 20).
        unlearning_lr: rate of the ascent (authors' code: 0.01).
        weight_decay: in the ascent (authors' code: 5e-4).
        stop: the ascent ends after an epoch of at most this accuracy, a share in [0, 1] (authors' code: 0.20).
        recovery_epochs: of learning the masks (authors' code: 20).
        recovery_lr: rate of learning the masks, constant (authors' code: 0.2).
        alpha: factor of the recovery's loss (authors' code: 0.2).
        samples: clean samples that are used, at most (authors' code: 500). Their number is that of the steps in an epoch, so it
            decides after how many steps the accuracy of the ascent is checked, and how far the masks move.
        batch: samples per step of both (authors' code: 128).
        grid: thresholds at which models are offered (authors' code: 0 to 0.9 by 0.05).

    >>> RNP(threshold=0.3).needs.words
    'model + clean'
    """

    name: ClassVar[str] = "rnp"
    family: ClassVar[str] = "pruning"
    cost: ClassVar[str] = "at most {unlearning_epochs} and {recovery_epochs} epochs on the clean budget"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "threshold on the mask"
    writer: ClassVar[Writer | None] = Writer.GAMMA
    revision: ClassVar[int] = 2  # 2: at most 500 samples

    threshold: Share = 0.2
    unlearning_epochs: EpochCount = 20
    unlearning_lr: LearningRate = 0.01
    weight_decay: Annotated[float, Ge(0), Le(1)] = 5e-4
    stop: Share = 0.2
    recovery_epochs: EpochCount = 20
    recovery_lr: LearningRate = 0.2
    alpha: Share = 0.2
    samples: Annotated[int, Ge(2), Le(1_000_000)] = 500
    batch: BatchSize = 128
    grid: tuple[Share, ...] = GRID

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def recipe(self, view: DefenderView, epochs: int, lr: float, weight_decay: float) -> Recipe:
        """Of either training."""
        return Recipe(
            epochs=epochs, batch=self.batch, lr=lr, momentum=0.9, weight_decay=weight_decay, schedule="constant",
            crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip

    def given(self, view: DefenderView) -> ImageSet:
        """At most ``samples`` of the clean samples, at random."""
        order = torch.randperm(len(view.clean), generator=generator(view.seed, "rnp", "samples"))
        return view.clean.subset(order[: self.samples].sort().values)

    def unlearn(self, net: Network, view: DefenderView) -> Network:
        """``net`` after gradient ascent in place; in evaluation mode, on the CPU.

        Raises:
            Diverged: weights are not finite at the end.
        """
        recipe = self.recipe(view, self.unlearning_epochs, self.unlearning_lr, self.weight_decay)
        return tune(_Unlearning(net, recipe, view.scope, self.stop), self.given(view), derive_seed(view.seed, "rnp", "unlearning"))

    def recover(self, net: Network, layers: Sequence[UnitLayer], view: DefenderView) -> Tensor:
        """Masks float (units of all layers,) in [0, 1]. The weights of ``net`` stay; its running statistics may drift."""
        recipe = self.recipe(view, self.recovery_epochs, self.recovery_lr, 0.0)
        module = _Recovery(net, recipe, view.scope, layers, self.alpha)
        optimise(module, self.given(view), recipe, derive_seed(view.seed, "rnp", "recovery"))
        return module.mask.detach()

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        model = view.model
        layers = prunable(model, view.scope)
        if len(view.clean) < 2:
            raise Inapplicable(f"the clean budget holds {len(view.clean)} samples to fit on; at least 2 are needed")
        learned = self.recover(self.unlearn(view.model, view), layers, view)
        yield from at_thresholds(model, layers, learned, self.threshold, self.grid)
