"""D-ST, secure training: Chen, Wu and Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS
2022, OpenReview AsH-Tx2U0Ug.

The detector of :mod:`defenses.distinguish` decides whose labels are used. A feature extractor is trained from scratch by
contrastive learning: a clean sample is pulled to all samples of its label, any other sample to its own second view alone. On the
frozen extractor a linear classifier learns the clean samples and unlearns the poisoned ones; the uncertain ones have no part.

Needs: poisoned training set. Edits: everything; the model is new, of the victim's architecture with a linear head.
Dial: weight of unlearning in the classifier's training; default = ``unlearning``.
Deviations from the paper: the last epoch of the classifier is the result (the authors' code keeps the one of best test accuracy).
The thresholds and the sides come from the same draw of the transformation (the code: from two draws). The features are the
embedding, whatever the network. Crops of the views are bilinear (:func:`models.augmentations.simclr_view`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from defenses.base import Candidate, DefenderView, Defense, Knowledge, Scope
from defenses.distinguish import SampleDistinguishment
from defenses.fine_tuning import Tuned, tune
from models.augmentations import VIEW_DRAWS, simclr_view
from models.backbone import Network
from models.extractors import mlp
from models.recipe import Recipe
from models.simclr import SimCLR
from models.spec import BatchSize, EpochCount, Ge, Gt, Le, LearningRate, derive_seed, uniforms
from models.training import fit

__all__ = ["DST", "semi_supervised_contrastive_loss", "warmed_up"]

BASE_TEMPERATURE, WARM_FROM, LOWEST = 0.07, 0.02, 1e-3
"""Of the contrastive training (authors' code): the loss is scaled by temperature / 0.07; the rate starts at 0.01 of 0.5 and ends at
a thousandth of its peak."""


def semi_supervised_contrastive_loss(z: Tensor, labels: Tensor, clean: Tensor, temperature: float) -> Tensor:
    """``-(t / 0.07) mean_i 1/|P_i| sum_(p in P_i) log softmax_p(s(i, .) / t)`` over all views i: a scalar.

    s is the cosine, and the softmax is over all other views of the batch. P_i of a clean sample are all other views of its label,
    whether those are clean or not; of any other sample its own second view alone.

    Args:
        z: float (B, 2, d), two views of every sample; need not be normalised.
        labels: int64 (B,).
        clean: bool (B,), whose labels count.
        temperature: t.
    """
    size = len(z)
    flat = normalize(torch.cat([z[:, 0], z[:, 1]]), dim=1)
    itself = torch.eye(2 * size, dtype=torch.bool, device=z.device)
    other_view = itself.roll(size, 1)
    known, given = clean.repeat(2), labels.repeat(2)
    positive = (other_view | (known[:, None] & (given[:, None] == given))) & ~itself
    logs = (flat @ flat.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0.0)
    return -temperature / BASE_TEMPERATURE * ((logs * positive).sum(1) / positive.sum(1)).mean()


def warmed_up(done: float, epochs: int, warm_up: int) -> float:
    """Factor on the rate after ``done`` epochs: linear from 0.02 for ``warm_up`` epochs, then a cosine by epoch down to 0.001."""

    def cosine(epoch: float) -> float:
        return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))

    if done < warm_up:
        return WARM_FROM + (cosine(min(warm_up, epochs)) - WARM_FROM) * done / warm_up
    return cosine(int(done))


class _Contrastive(SimCLR):
    clean: Tensor

    def __init__(self, net: Network, recipe: Recipe, clean: Tensor, warm_up: int, **settings: Any) -> None:
        super().__init__(net, recipe, blur=0.0, **settings)
        self.register_buffer("clean", clean)
        self.rate_factor = lambda done: warmed_up(done, recipe.epochs, warm_up)

    def projected(self, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))

    def objective(self, z: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return semi_supervised_contrastive_loss(z, labels, self.clean[index], self.temperature)


class _Classifying(Tuned):
    """The head alone on strong views: cross-entropy of the clean samples minus ``weight`` times that of the poisoned ones."""

    poisoned: Tensor

    def __init__(self, net: Network, recipe: Recipe, poisoned: Tensor, weight: float, flip: bool, seed: int) -> None:
        super().__init__(net, recipe, Scope.HEAD)
        self.register_buffer("poisoned", poisoned)
        self.weight, self.flip, self.seed = weight, flip, seed

    def on_batch(self, images: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        key = derive_seed(self.seed, "view", int(self.current_epoch))
        with torch.autocast(images.device.type, enabled=False):
            return simclr_view(images, uniforms(key, index, VIEW_DRAWS), self.flip, 0.0), labels

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        losses, poisoned = cross_entropy(logits, labels, reduction="none"), self.poisoned[index]
        clean, bad = ((losses * side).sum() / side.sum().clamp(min=1) for side in (~poisoned, poisoned))
        return clean - self.weight * bad


@dataclass(frozen=True)
class DST(SampleDistinguishment, Defense):
    """Settings of the two trainings; see also :class:`defenses.distinguish.SampleDistinguishment`. SGD with momentum 0.9.

    Attributes:
        ssl_epochs: of the contrastive training (authors' code: 200).
        ssl_batch: images per step of it (authors' code: 512).
        ssl_lr: peak rate at batch 512, scaled by batch / 512 (authors' code: 0.5).
        warm_up_epochs: in which the rate grows to its peak (authors' code: 10, for batches of more than 256).
        temperature: of the loss (authors' code: 0.1).
        ssl_weight_decay: of the contrastive training (authors' code: 1e-4).
        head_epochs: of the classifier (authors' code: 10).
        head_batch: samples per step of it (authors' code: 512).
        head_lr: of it, constant (authors' code: 5).
        unlearning: default of the dial (authors' code: 0.001).
        grid: further weights at which a classifier is trained on the same extractor (ours).

    >>> DST(ssl_epochs=40).needs.words
    'train'
    >>> [round(warmed_up(done, epochs=200, warm_up=10), 3) for done in (0, 5, 10, 100, 200)]
    [0.02, 0.507, 0.994, 0.5, 0.001]
    """

    name: ClassVar[str] = "d-st"
    family: ClassVar[str] = "detection, training anew"
    cost: ClassVar[str] = (
        "{probe_epochs} and {intra_epochs} epochs on the training set, {ssl_epochs} of contrastive learning, "
        "{head_epochs} of the head"
    )
    dial_name: ClassVar[str] = "weight of unlearning"

    ssl_epochs: EpochCount = 200
    ssl_batch: BatchSize = 512
    ssl_lr: LearningRate = 0.5
    warm_up_epochs: EpochCount = 10
    temperature: Annotated[float, Gt(0), Le(100)] = 0.1
    ssl_weight_decay: Annotated[float, Ge(0), Le(1)] = 1e-4
    head_epochs: EpochCount = 10
    head_batch: BatchSize = 512
    head_lr: LearningRate = 5.0
    unlearning: Annotated[float, Ge(0), Le(100)] = 0.001
    grid: tuple[Annotated[float, Ge(0), Le(100)], ...] = (0.0, 0.01)

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN

    def recipe(self, view: DefenderView, epochs: int, batch: int, lr: float, weight_decay: float) -> Recipe:
        """Of either training, which augment by themselves."""
        return Recipe(
            epochs=epochs, batch=batch, lr=lr, momentum=0.9, weight_decay=weight_decay, schedule="constant", crop=0, flip=False,
            precision=view.recipe.precision,
        )  # fmt: skip

    def extractor_of(self, view: DefenderView, clean: Tensor) -> Network:
        """A network whose features are trained by the contrastive loss, with a fresh linear head; ``clean``: bool (N,)."""
        net, seed = view.fresh(derive_seed(view.seed, "d-st", "weights")), derive_seed(view.seed, "d-st", "extractor")
        recipe = self.recipe(view, self.ssl_epochs, self.ssl_batch, self.ssl_lr * self.ssl_batch / 512, self.ssl_weight_decay)
        module = _Contrastive(
            net, recipe, clean, self.warm_up_epochs, width=net.width, temperature=self.temperature, flip=view.recipe.flip, seed=seed
        )
        fit(module, view.train, recipe, seed)
        return Network(net.normalise, net.features, mlp(net.width, (), view.num_classes, derive_seed(seed, "head")))

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        clean, poisoned, changes = self.distinguish(view)
        base, used = self.extractor_of(view, clean), clean | poisoned
        recipe = self.recipe(view, self.head_epochs, self.head_batch, self.head_lr, 0.0)
        seed = derive_seed(view.seed, "d-st", "head")
        for weight in sorted({self.unlearning, *self.grid}):
            module = _Classifying(copy.deepcopy(base), recipe, poisoned[used], weight, view.recipe.flip, seed)
            net = tune(module, view.train.subset(used), seed)
            yield Candidate(net, weight, weight == self.unlearning, weight, isolated=poisoned, suspicion=changes)
