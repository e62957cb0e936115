"""Fine-tuning on the clean budget: the baseline of Liu, Dolan-Gavitt and Garg, "Fine-Pruning", RAID 2018, arXiv 1805.12185.

The clean samples pull the network back towards its task, and catastrophic forgetting takes the backdoor along, or does not. All
weights move, batch norm in training mode, the crop and flip the victim was trained with. It often raises the accuracy of a weak
victim, so a negative accuracy drop is no error.

Needs: model, clean budget. Edits: every weight, or the head's alone at scope HEAD (the features are then frozen in evaluation mode,
running statistics included). Dial: none; the last epoch is the result.
Deviations from the paper: it gives no schedule for this baseline. The rates are BackdoorBench's (config/defense/ft/cifar10.yaml);
batch 128 for 256, cosine to zero over the epochs that are run, and no mixed precision are ours, one schedule for every method here
that fine-tunes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from defenses.base import Candidate, DefenderView, Defense, Knowledge, Scope
from models.backbone import Network
from models.classifier import Classifier
from models.images import ImageSet
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, derive_seed
from models.training import fit
from models.units import Writer, hold

__all__ = ["FineTuning", "Tuned", "fine_tuned", "tune"]


class Tuned(Classifier):
    """Plain training that may leave the features alone and holds pruned units at zero."""

    def __init__(self, net: Network, recipe: Recipe, scope: Scope, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(net, recipe)
        self.scope, self.masks = scope, masks or {}

    def train(self, mode: bool = True) -> Tuned:
        super().train(mode)
        if self.scope is Scope.HEAD:
            self.net.features.eval()  # running statistics are part of the features
        return self

    def trainable(self) -> list[nn.Parameter]:
        return list((self.net.head if self.scope is Scope.HEAD else self.net).parameters())

    def after_step(self) -> None:
        # Momentum and weight decay move pruned entries too: zeroing gradients alone would not hold them.
        hold(self.net, self.masks, Writer.OUTPUT)


def tune(module: Tuned, data: ImageSet, seed: int) -> Network:
    """The module's network trained in place under its recipe and scope; in evaluation mode, on the CPU, all parameters trainable.

    Raises:
        Diverged: weights are not finite at the end.
    """
    module.net.features.requires_grad_(module.scope is Scope.WHOLE)
    fit(module, data, module.recipe, seed)
    return module.net.cpu().requires_grad_(True).eval()  # a training of no epochs returns where it was


def fine_tuned(
    net: Network, data: ImageSet, recipe: Recipe, scope: Scope, seed: int, masks: Mapping[str, Tensor] | None = None
) -> Network:
    """``net`` fine-tuned in place on ``data``, units under ``masks`` exactly zero throughout; in evaluation mode, on the CPU.

    Raises:
        Diverged: weights are not finite at the end.
    """
    return tune(Tuned(net, recipe, scope, masks), data, seed)


@dataclass(frozen=True)
class FineTuning(Defense):
    """Settings of the fine-tuning.

    Attributes:
        epochs: passes over the clean samples (BackdoorBench: 100).
        lr: peak rate, cosine to zero (BackdoorBench: 0.01).
        batch: samples per step (ours: 128, as the other methods on this budget).
        weight_decay: of SGD (BackdoorBench: 5e-4).

    >>> FineTuning(epochs=10, lr=0.005).needs.words
    'model + clean'
    """

    name: ClassVar[str] = "fine-tuning"
    family: ClassVar[str] = "fine-tuning"
    cost: ClassVar[str] = "{epochs} epochs on the clean budget"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)

    epochs: EpochCount = 100
    lr: LearningRate = 0.01
    batch: BatchSize = 128
    weight_decay: Annotated[float, Ge(0), Le(1)] = 5e-4

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def recipe(self, view: DefenderView) -> Recipe:
        """These settings, with the victim's crop, flip and precision."""
        return Recipe(
            epochs=self.epochs, batch=self.batch, lr=self.lr, weight_decay=self.weight_decay, momentum=0.9, schedule="cosine",
            crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip

    def tune(self, net: Network, view: DefenderView, masks: Mapping[str, Tensor] | None = None) -> Network:
        """``net`` fine-tuned in place on the clean budget under these settings (see :func:`fine_tuned`)."""
        return fine_tuned(net, view.clean, self.recipe(view), view.scope, derive_seed(view.seed, "fine-tuning"), masks)

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        yield Candidate(self.tune(view.model, view))
