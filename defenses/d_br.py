"""D-BR, backdoor removal: Chen, Wu and Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS
2022, OpenReview AsH-Tx2U0Ug.

The detector of :mod:`defenses.distinguish` finds few samples that are surely poisoned and more that are surely clean. The
backdoored network unlearns the former by gradient ascent and relearns the latter by descent, in turns, at a small rate.

Needs: model, poisoned training set. Edits: every weight. Dial: epochs of unlearning and relearning; default = ``epochs``.
Deviations from the paper: the last epoch is the result (the authors' code keeps the epoch of the largest test ACC - ASR). The
thresholds and the sides come from the same draw of the transformation (the code: from two draws, so that the shares differ). The
features are the embedding, whatever the network. Crop and flip are the victim's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from defenses.base import Candidate, DefenderView, Defense, Knowledge
from defenses.distinguish import SampleDistinguishment
from models.backbone import Network
from models.classifier import Snapshots
from models.images import ImageSet
from models.loop import Epochs
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, LearningRate, derive_seed
from models.training import fit

__all__ = ["DBR"]


class _InTurns:
    """All batches of one loader, then all of another, each with a sign: -1 for those of the first."""

    def __init__(self, first: Epochs, second: Epochs) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for images, labels, index in self.first:
            yield images, labels, -index.new_ones(())
        for images, labels, index in self.second:
            yield images, labels, index.new_ones(())


class _Relearning(Snapshots):
    """Every epoch: ascent on the poisoned samples, then descent on the clean ones, in training mode, by one optimiser."""

    def __init__(self, net: Network, recipe: Recipe, wanted: Collection[int], clean: Tensor, poisoned: Tensor) -> None:
        super().__init__(net, recipe, wanted)
        self.clean, self.poisoned = clean, poisoned

    def loader(self, data: ImageSet, seed: int) -> Epochs:
        device = data.images.device
        first, second = (
            super(_Relearning, self).loader(data.subset(side.to(device)), derive_seed(seed, purpose))
            for side, purpose in ((self.poisoned, "unlearn"), (self.clean, "relearn"))
        )
        return _InTurns(first, second)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, sign = batch
        return sign * self.loss(self(images), labels, labels)


@dataclass(frozen=True)
class DBR(SampleDistinguishment, Defense):
    """Settings of the removal; see also :class:`defenses.distinguish.SampleDistinguishment`. SGD with momentum 0.9.

    Attributes:
        epochs: default of the dial (authors' code: 20).
        lr: constant (authors' code: 1e-4).
        batch: samples per step (authors' code: 128).
        points: further numbers of epochs at which models are offered (ours); those below ``epochs`` cost nothing.

    >>> DBR(clean_share=0.3).needs.words
    'model + train'
    """

    name: ClassVar[str] = "d-br"
    family: ClassVar[str] = "detection, unlearning"
    cost: ClassVar[str] = "{probe_epochs} and {intra_epochs} epochs on the training set, {epochs} on the two sides"
    dial_name: ClassVar[str] = "epochs of unlearning and relearning"

    epochs: EpochCount = 20
    lr: LearningRate = 1e-4
    batch: BatchSize = 128
    points: tuple[EpochCount, ...] = (1, 2, 5, 10)

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.TRAIN

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        model = view.model
        clean, poisoned, changes = self.distinguish(view)
        wanted = sorted({self.epochs, *self.points})
        recipe = Recipe(
            epochs=wanted[-1], batch=self.batch, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay, schedule="constant",
            crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip
        module = _Relearning(model, recipe, wanted, clean, poisoned)
        fit(module, view.train, recipe, derive_seed(view.seed, "d-br"))
        for epochs in wanted:
            net = module.kept[epochs].requires_grad_(True).eval()
            yield Candidate(net, float(epochs), epochs == self.epochs, float(epochs), isolated=poisoned, suspicion=changes)
