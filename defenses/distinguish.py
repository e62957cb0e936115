"""Sample distinguishment: the detector that D-BR and D-ST share (Chen, Wu and Wang, "Effective Backdoor Defense by Exploiting
Sensitivity of Poisoned Samples", NeurIPS 2022, OpenReview AsH-Tx2U0Ug).

A trigger breaks when the image is turned and moved, and what a network makes of a poisoned image then changes far more than for a
clean one. A probe network is trained for a few epochs, then its class centres are pushed apart; samples whose features change least
are taken for clean, those that change most for poisoned, the rest for neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from defenses.base import DefenderView, Inapplicable
from models.augmentations import rotated_and_moved
from models.backbone import Network
from models.classifier import Classifier
from models.extractors import embeddings
from models.images import ImageSet, quantise, to_float
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Gt, Le, LearningRate, Lt, Spec, check, derive_seed, uniforms
from models.training import fit

__all__ = ["SampleDistinguishment", "consistency", "intra_class_loss", "sides"]

PERIOD = 100
"""Epochs of the cosine that the probe's rate follows, of which its training runs through the first few (authors' code)."""
CHUNK = 2000
"""Images that are transformed at a time."""


def intra_class_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine between the class centres of a batch, each centre's with itself counted as 0: a scalar.

    The mean is over all K x K pairs of the K classes that are present.

    Args:
        features: float (B, d).
        labels: int64 (B,).
    """
    present, which = torch.unique(labels, return_inverse=True)
    members = one_hot(which, len(present)).to(features.dtype)
    centres = normalize((members.T @ features) / members.sum(0)[:, None], dim=1)
    cosines = centres @ centres.T
    return (cosines - torch.diag(cosines.diagonal())).mean()


def consistency(before: Tensor, after: Tensor) -> Tensor:
    """Mean square of the change of every sample's features, float (N,): the FCT metric. Features float (N, d)."""
    return (before - after).square().mean(1)


def sides(changes: Tensor, clean_share: float, poisoned_share: float) -> tuple[Tensor, Tensor]:
    """(taken for clean, taken for poisoned), bool (N,) each; a sample may be neither.

    Clean: at most the value at position ``floor(clean_share * N)`` of the sorted changes. Poisoned: at least the value at position
    ``N - floor(poisoned_share * N)``.

    Raises:
        Inapplicable: a share is less than two samples.
    """
    size = len(changes)
    least, most = int(clean_share * size), int(poisoned_share * size)
    if min(least + 1, most) < 2:
        raise Inapplicable(
            f"clean_share = {clean_share} and poisoned_share = {poisoned_share} of {size} samples: each side needs at least 2"
        )
    ordered = changes.sort().values
    return changes <= ordered[least], changes >= ordered[size - most]


class _Probing(Classifier):
    """Cross-entropy for ``plain`` epochs, then the intra-class loss alone; optimiser and rate run on."""

    def __init__(self, net: Network, recipe: Recipe, plain: int) -> None:
        super().__init__(net, recipe)
        self.plain = plain
        self.rate_factor = lambda done: 0.5 * (1 + math.cos(math.pi * int(done) / PERIOD))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        if int(self.current_epoch) < self.plain:
            return super().training_step(batch, batch_idx)
        images, labels, _ = batch
        return intra_class_loss(self.net.embed(images).float(), labels)


@dataclass(frozen=True)
class SampleDistinguishment(Spec):
    """The settings of the detector. The probe is trained without augmentation by SGD of momentum 0.9.

    Attributes:
        probe_epochs: of the probe on the labels (authors' code: 2).
        intra_epochs: of the probe on the intra-class loss (authors' code: 10).
        probe_lr: of the probe; it falls along a cosine of 100 epochs (authors' code: 0.01).
        probe_batch: samples per step of the probe (authors' code: 128).
        clean_share: share of the set that is taken for clean (authors' code: 0.2).
        poisoned_share: share of the set that is taken for poisoned (authors' code: 0.05).
        weight_decay: of SGD (authors' code: 5e-4).
    """

    probe_epochs: EpochCount = 2
    intra_epochs: EpochCount = 10
    probe_lr: LearningRate = 0.01
    probe_batch: BatchSize = 128
    clean_share: Annotated[float, Gt(0), Lt(1)] = 0.2
    poisoned_share: Annotated[float, Gt(0), Lt(1)] = 0.05
    weight_decay: Annotated[float, Ge(0), Le(1)] = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "poisoned_share", self.clean_share + self.poisoned_share <= 1, "at most 1 together with clean_share")

    def probe(self, view: DefenderView) -> Network:
        """The trained probe, in evaluation mode."""
        recipe = Recipe(
            epochs=self.probe_epochs + self.intra_epochs, batch=self.probe_batch, lr=self.probe_lr, momentum=0.9,
            weight_decay=self.weight_decay, schedule="constant", crop=0, flip=False, precision=view.recipe.precision,
        )  # fmt: skip
        net = view.fresh(derive_seed(view.seed, "distinguish", "weights"))
        fit(_Probing(net, recipe, self.probe_epochs), view.train, recipe, derive_seed(view.seed, "distinguish", "probe"))
        return net.eval()

    def changes(self, net: Network, data: ImageSet, seed: int) -> Tensor:
        """How much turning and moving every image changes its features, float (N,): one draw for each image."""
        moved = []
        for start in range(0, len(data), CHUNK):
            index = torch.arange(start, min(start + CHUNK, len(data)))
            moved.append(quantise(rotated_and_moved(to_float(data.images[index]), uniforms(seed, index, 3))))
        return consistency(embeddings(net, data), embeddings(net, ImageSet(torch.cat(moved), data.labels, data.num_classes)))

    def distinguish(self, view: DefenderView) -> tuple[Tensor, Tensor, Tensor]:
        """(taken for clean, taken for poisoned, changes) of the training set, bool (N,) twice and float (N,).

        Raises:
            Inapplicable: a share is less than two samples.
        """
        data = view.train
        sides(torch.zeros(len(data)), self.clean_share, self.poisoned_share)  # before anything is trained
        changes = self.changes(self.probe(view), data, derive_seed(view.seed, "distinguish", "moves"))
        return *sides(changes, self.clean_share, self.poisoned_share), changes
