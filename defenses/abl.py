"""ABL, anti-backdoor learning: Li, Lyu, Koren, Lyu, Li and Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021, arXiv 2110.11571.

Backdoors are learned faster than the task, and most of all where training climbs back whenever its loss falls below a floor: then
poisoned samples sink under the floor and clean ones hover above it. The samples of lowest loss are isolated and a training on the
rest follows. At last gradient ascent on the isolated few breaks the tie between trigger and target.

Needs: poisoned training set. Edits: everything; the model is new, of the victim's architecture.
Dial: epochs of unlearning; default = ``unlearning_epochs``.
Deviations from the paper: as in the authors' code, training on the rest and unlearning follow one another instead of sharing one
loss. Isolation shuffles its batches, which the code does not. Each stage starts with fresh momentum. The code trains with Cutout
and the victim's crop and flip; so does this. Nothing is stopped or chosen by attack success, and the last epoch is the result. At a
constant rate the losses of the last isolation epoch alone are a lottery; ``average`` can take those of several (ours).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, lowest_loss
from models.augmentations import cutout
from models.backbone import Network
from models.classifier import Classifier, Snapshots
from models.images import ImageSet
from models.recipe import Precision, Recipe
from models.spec import BatchSize, EpochCount, Ge, Gt, Le, LearningRate, Lt, derive_seed, uniforms
from models.training import fit, logits

__all__ = ["ABL", "CutOut", "local_ascent"]


def local_ascent(loss: Tensor, gamma: float) -> Tensor:
    """``sign(L - gamma) L`` of a batch's mean loss L, a scalar: descent above ``gamma``, ascent below.

    Its derivative is that of flooding, ``|L - gamma| + gamma``, everywhere, so the paper's two options are one training.
    """
    return torch.sign(loss.detach() - gamma) * loss


class _Isolating(Classifier):
    """Trains above the floor and adds up every sample's loss after each of the last ``average`` epochs; counts the batches
    below."""

    def __init__(self, net: Network, recipe: Recipe, gamma: float, data: ImageSet, average: int) -> None:
        super().__init__(net, recipe)
        self.gamma, self.data, self.average = gamma, data, average
        self.losses = torch.zeros(len(data))
        self.below = 0

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        plain = super().loss(logits, labels, index)
        self.below += int(plain.detach() < self.gamma)
        return local_ascent(plain, self.gamma)

    def on_train_epoch_end(self) -> None:
        if self.current_epoch + self.average >= self.recipe.epochs:
            self.losses += _losses(self.net, self.data)


def _losses(net: Network, data: ImageSet) -> Tensor:
    """Cross-entropy of every sample as labelled, in evaluation mode, float (N,)."""
    return cross_entropy(logits(net, data.images), data.labels, reduction="none")


class CutOut(Classifier):
    """Training on images with a square cleared, ``size`` pixels a side, elsewhere in every epoch; ``seed``: of the places."""

    def __init__(self, net: Network, recipe: Recipe, size: int, seed: int) -> None:
        super().__init__(net, recipe)
        self.size, self.seed = size, seed

    def on_batch(self, images: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        key = derive_seed(self.seed, "cutout", int(self.current_epoch))
        return cutout(images, uniforms(key, index, 2), self.size), labels


class _Unlearning(Snapshots):
    """Gradient ascent in training mode."""

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return -super().loss(logits, labels, index)


@dataclass(frozen=True)
class ABL(Defense):
    """Settings of the three stages. All use SGD with Nesterov momentum 0.9.

    Attributes:
        rate: share of the training set that is isolated, at most the share that is poisoned (Sec. 4.1: 0.01).
        gamma: floor of the batch loss while isolating (Sec. 4.1: 0.5).
        isolation_epochs: of that training, without augmentation (Sec. 4.1: 20).
        isolation_lr: constant (authors' code: 0.1).
        average: isolate by the mean of every sample's losses after each of so many last epochs (authors' code: 1, the last).
        epochs: of training on the rest, the first two thirds at ``lr``, the last at a tenth of it (authors' code: 60).
        lr: of training on the rest (authors' code: 0.1).
        batch: samples per step in all stages (authors' code: 128).
        weight_decay: in all stages (authors' code: 1e-4).
        hole: side of Cutout's square in pixels, 0 = none (authors' code: Cutout(1, 3), which clears 2 x 2 pixels: 1 to each
            side of a centre, the far end left out).
        unlearning_epochs: of ascent, without augmentation (authors' code: 5, the first of which only tests).
        unlearning_lr: constant (Sec. 4.1: 5e-4).
        points: further numbers of unlearning epochs at which models are offered (ours); they cost next to nothing.

    >>> sorted({*ABL(points=(0, 2)).points, ABL().unlearning_epochs})  # where models are offered
    [0, 2, 4]
    >>> local_ascent(torch.tensor([0.4, 0.6]), ABL().gamma)
    tensor([-0.4000,  0.6000])
    """

    name: ClassVar[str] = "abl"
    family: ClassVar[str] = "training anew"
    cost: ClassVar[str] = "{isolation_epochs} and {epochs} epochs on the training set, {unlearning_epochs} on the isolated part"
    revision: ClassVar[int] = 2  # 2: Cutout clears what the authors' clears
    dial_name: ClassVar[str] = "epochs of unlearning"

    rate: Annotated[float, Gt(0), Lt(1)] = 0.01
    gamma: Annotated[float, Ge(0), Le(100)] = 0.5
    isolation_epochs: EpochCount = 20
    isolation_lr: LearningRate = 0.1
    average: Annotated[int, Ge(1), Le(10_000)] = 1
    epochs: EpochCount = 60
    lr: LearningRate = 0.1
    batch: BatchSize = 128
    weight_decay: Annotated[float, Ge(0), Le(1)] = 1e-4
    hole: Annotated[int, Ge(0), Le(64)] = 2
    unlearning_epochs: EpochCount = 4
    unlearning_lr: LearningRate = 5e-4
    points: tuple[EpochCount, ...] = (0, 1, 2, 8)

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN

    def recipe(
        self, epochs: int, lr: float, crop: int = 0, flip: bool = False, precision: Precision = "reference"
    ) -> Recipe:
        """Of any of the stages."""
        return Recipe(
            epochs=epochs, batch=self.batch, lr=lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay,
            schedule="constant", crop=crop, flip=flip, precision=precision,
        )  # fmt: skip

    def isolate(self, net: Network, data: ImageSet, seed: int, precision: Precision = "reference") -> tuple[Tensor, str]:
        """Trains ``net`` in place above the floor.

        Returns:
            The samples of lowest loss afterwards, bool (N,); in how many batches the loss was below the floor, in words.
        """
        recipe = self.recipe(self.isolation_epochs, self.isolation_lr, precision=precision)
        module = _Isolating(net, recipe, self.gamma, data, self.average)
        fit(module, data, recipe, seed)
        losses = module.losses if recipe.epochs else _losses(net, data)
        return lowest_loss(losses, self.rate), f"{module.below} of {module.total_steps if recipe.epochs else 0} batches below gamma"

    def train(self, net: Network, data: ImageSet, view: DefenderView, seed: int) -> None:
        """Trains ``net`` in place on ``data`` with the victim's crop and flip, and Cutout."""
        first, victims = round(self.epochs * 2 / 3), view.recipe
        for part, (epochs, lr) in enumerate(((first, self.lr), (self.epochs - first, self.lr / 10))):
            recipe, own = self.recipe(epochs, lr, victims.crop, victims.flip, victims.precision), derive_seed(seed, part)
            fit(CutOut(net, recipe, self.hole, own) if self.hole else Classifier(net, recipe), data, recipe, own)

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        data = view.train
        taken = int(self.rate * len(data))
        if taken < 2:
            raise Inapplicable(f"rate = {self.rate} isolates {taken} of {len(data)} samples; unlearning needs at least 2")
        net = view.fresh(derive_seed(view.seed, "abl", "weights"))
        precision = view.recipe.precision
        mask, note = self.isolate(net, data, derive_seed(view.seed, "abl", "isolation"), precision)
        self.train(net, data.subset(~mask), view, derive_seed(view.seed, "abl", "training"))
        wanted = sorted({*self.points, self.unlearning_epochs})
        recipe = self.recipe(wanted[-1], self.unlearning_lr, precision=precision)
        module = _Unlearning(net, recipe, wanted)
        fit(module, data.subset(mask), recipe, derive_seed(view.seed, "abl", "unlearning"))
        for epochs in wanted:
            model = module.kept[epochs].requires_grad_(True).eval()
            yield Candidate(model, float(epochs), epochs == self.unlearning_epochs, float(epochs), isolated=mask, note=note)
