"""ASD, adaptively splitting dataset-based defense: Gao, Bai, Gu, Yang and Xia, "Backdoor Defense via Adaptively Splitting Poisoned
Dataset", CVPR 2023, arXiv 2303.12993.

The training set is split before every epoch: the clean pool keeps its labels, the rest loses them, and both are trained on
semi-supervised. The pool grows from a few samples known to be clean: class by class by the samples of lowest loss, then by the half
of lowest loss, at last by the half whose loss falls least when a copy of the network is trained on all labels for an epoch.
Poisoned samples are learned at once, so their losses fall most.

Needs: poisoned training set, seeds (samples of every class known to be clean). Edits: everything; the model is new, of the victim's
architecture. Dial: share of the set that is taken for clean; default = ``clean_share``. Each further point costs a whole training.
Deviations from the paper: the numbers are the authors' code's. Losses are recorded on images as they are (the code: augmented). The
last epoch is the result (the code also keeps the one of best test accuracy). The copy trains the last half of the blocks and the
head, which in ResNet-18 are the code's two last stages. Reported as isolated is the unlabelled side of the last split, by design
half of the set.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, lowest_loss
from defenses.dbd import symmetric_cross_entropy
from models.backbone import Network, before_block, block_places, unrolled
from models.images import Batches, ImageSet
from models.mixmatch import MixMatch
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Gt, Le, LearningRate, Lt, PositiveShare, derive_seed
from models.training import default_device, fit, logits

__all__ = ["ASD", "class_aware"]

OpenShare = Annotated[float, Gt(0), Lt(1)]


def class_aware(losses: Tensor, labels: Tensor, seeds: Tensor, count: int) -> Tensor:
    """The seeds and, of every label, the ``count`` other samples of lowest loss: bool (N,); ties go to the lower index.

    Args:
        losses: float (N,).
        labels: int64 (N,), as given.
        seeds: bool (N,).
        count: of each label; a label with fewer others gives all of them.
    """
    pool = seeds.clone()
    order = torch.argsort(losses, stable=True)
    for label in labels.unique():  # type: ignore[no-untyped-call]
        own = order[(labels == label)[order] & ~seeds[order]]
        pool[own[:count]] = True
    return pool


@dataclass(frozen=True)
class ASD(Defense):
    """Settings of the three phases, all from the authors' code.

    Attributes:
        aware_epochs: of the first phase, whose pool grows class by class.
        agnostic_epochs: of the second phase, whose pool is the share of lowest loss.
        meta_epochs: of the third phase, whose pool is the share whose loss falls least.
        grow: samples of every class that the first phase adds at a time.
        grow_epochs: epochs between two such additions; the first epochs have the seeds alone.
        clean_share: default of the dial: share of the set in the pools of the second and third phase.
        iterations: steps of MixMatch per epoch.
        batch: labelled samples per step of MixMatch, and as many unlabelled ones.
        lr: of Adam for MixMatch, constant.
        meta_lr: of Adam for the copy.
        meta_batch: samples per step of the copy (ours).
        sharpen: MixMatch's temperature.
        mixup: MixMatch's Beta parameter.
        unlabelled_weight: MixMatch's final weight of Lu; it grows linearly over all epochs.
        shares: further values of the dial (ours: none).

    >>> method = ASD()
    >>> [method.added(epoch) for epoch in (0, 4, 5, 59)]
    [0, 0, 10, 110]
    >>> class_aware(torch.tensor([0.3, 0.1, 0.2]), torch.zeros(3, dtype=torch.int64), torch.tensor([True, False, False]), 1)
    tensor([ True,  True, False])
    """

    name: ClassVar[str] = "asd"
    family: ClassVar[str] = "training anew"
    cost: ClassVar[str] = "{aware_epochs} + {agnostic_epochs} + {meta_epochs} epochs of {iterations} steps of MixMatch"
    revision: ClassVar[int] = 2  # 2: gives what it orders the samples by
    dial_name: ClassVar[str] = "share of the set taken for clean"

    aware_epochs: Annotated[int, Ge(1), Le(10_000)] = 60
    agnostic_epochs: EpochCount = 30
    meta_epochs: EpochCount = 30
    grow: Annotated[int, Ge(0), Le(1_000_000)] = 10
    grow_epochs: Annotated[int, Ge(1), Le(10_000)] = 5
    clean_share: OpenShare = 0.5
    iterations: Annotated[int, Ge(1), Le(1_000_000)] = 1024
    batch: BatchSize = 64
    lr: LearningRate = 0.002
    meta_lr: LearningRate = 0.015
    meta_batch: BatchSize = 128
    sharpen: PositiveShare = 0.5
    mixup: Annotated[float, Gt(0), Le(100)] = 0.75
    unlabelled_weight: Annotated[float, Ge(0), Le(1000)] = 15.0
    shares: tuple[OpenShare, ...] = ()

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN | Knowledge.SEEDS

    @property
    def epochs(self) -> int:
        """Of all phases together."""
        return self.aware_epochs + self.agnostic_epochs + self.meta_epochs

    def added(self, epoch: int) -> int:
        """Samples of every class that the first phase has added in an epoch, counted from 0."""
        return self.grow * (epoch // self.grow_epochs)

    def virtual(self, net: Network, data: ImageSet, recipe: Recipe, seed: int) -> Network:
        """A copy of ``net`` whose last half is trained for an epoch on all labels; ``net`` stays as it is."""
        device = default_device()
        twin, data = copy.deepcopy(net).to(device).requires_grad_(False).train(), data.to(device)
        blocks = len(block_places(twin.features))
        steps = unrolled(twin.features)[before_block(twin.features, blocks // 2) if blocks else 0 :]
        own = [parameter.requires_grad_() for part in (*steps, twin.head) for parameter in part.parameters()]
        optimizer = torch.optim.Adam(own, lr=self.meta_lr)
        with torch.enable_grad():
            for images, labels, _ in Batches(data, self.meta_batch, seed, crop=recipe.crop, flip=recipe.flip):
                optimizer.zero_grad()
                cross_entropy(twin(images), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return twin

    def pool(
        self, net: Network, data: ImageSet, seeds: Tensor, epoch: int, share: float, virtual: tuple[Recipe, int]
    ) -> tuple[Tensor, Tensor]:
        """Samples that keep their labels in an epoch, bool (N,), and what they were chosen by, float (N,), smaller = sooner.

        Args:
            net: the network so far.
            data: the training set.
            seeds: bool (N,).
            epoch: counted from 0.
            share: of the set in the pools of the second and third phase.
            virtual: recipe and seed of the copy's training.
        """
        labels = data.labels.cpu()

        def losses(model: Network) -> Tensor:
            return symmetric_cross_entropy(logits(model, data.images), labels)

        before = losses(net)
        if epoch < self.aware_epochs:
            return class_aware(before, labels, seeds, self.added(epoch)), before
        if epoch >= self.aware_epochs + self.agnostic_epochs:
            before = before - losses(self.virtual(net, data, *virtual))
        return lowest_loss(before, share), before

    def train(self, view: DefenderView, share: float) -> tuple[Network, Tensor, Tensor]:
        """A new network; the samples of the last pool, bool (N,); what they were chosen by, float (N,)."""
        data, seeds = view.train, view.seeds
        net = view.fresh(derive_seed(view.seed, "asd", "weights"))
        recipe = Recipe(
            epochs=self.epochs, batch=self.batch, lr=self.lr, optimizer="adam", weight_decay=0, schedule="constant",
            crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip
        epochs, order = iter(range(self.epochs)), torch.zeros(len(data))

        def split(model: Network, images: ImageSet) -> Tensor:
            nonlocal order
            epoch = next(epochs)
            own = recipe, derive_seed(view.seed, "asd", "virtual", epoch)
            mask, order = self.pool(model, images, seeds, epoch, share, own)
            return mask

        module = MixMatch(
            net, recipe, split, iterations=self.iterations, sharpen=self.sharpen, mixup=self.mixup,
            weight=self.unlabelled_weight, ramp=self.epochs,
        )  # fmt: skip
        fit(module, data, recipe, derive_seed(view.seed, "asd", "semi"))
        return net.requires_grad_(True).eval(), module.labelled, order

    def check(self, view: DefenderView, shares: list[float]) -> None:
        """Raises Inapplicable where a split would have fewer than two samples on a side."""
        data, seeds = view.train, view.seeds
        grown = class_aware(torch.zeros(len(data)), data.labels.cpu(), seeds, self.added(self.aware_epochs - 1))
        kept = [int(seeds.sum()), int(grown.sum()), *(int(share * len(data)) for share in shares)]
        if min(kept) < 2 or len(data) - max(kept) < 2:
            raise Inapplicable(f"clean pools of {kept} of {len(data)} samples: each side of a split needs at least 2")

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        shares = sorted({self.clean_share, *self.shares})
        self.check(view, shares)
        for share in shares:
            net, pool, order = self.train(view, share)
            yield Candidate(net, share, share == self.clean_share, 1 - share, isolated=~pool, suspicion=order)
