"""CT, confusion training: Qi, Xie, Wang, Wu, Mahloujifar and Mittal, "Towards A Proactive ML Approach for Detecting Backdoor Poison
Samples", USENIX Security 2023, arXiv 2205.13616.

A network is trained on the poisoned set while clean images with changing wrong labels destroy whatever it knows of the task. What
it still fits then is the tie between trigger and target. Round by round the set is cut down to what is fitted best, which is more
and more poison. Where the samples of a class that are still fitted form a cluster of their own, they are removed, and a network is
trained from scratch on the rest.

Needs: poisoned training set, clean budget. Edits: everything; the model is new, of the victim's architecture.
Dial: likelihood ratio above which the fitted samples of the most suspicious class are removed; default = ``threshold``. A further
point costs a training only where it removes other samples.
Deviations from the paper: it takes 2,000 clean images from the test file; here they are the clean budget. The numbers are the
authors' code's for CIFAR-10. Ours: clean and poisoned images of a step are one batch for the norms, confusion has the weight decay
of the training before it, the two main axes are computed exactly (the code: by random projections), ratios are compared as
logarithms, and the last training has that weight decay, too. Of each class both clusters must have 2 samples besides the share.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, lowest_loss
from models.backbone import Network
from models.classifier import Classifier
from models.extractors import embeddings
from models.images import Batches, ImageSet
from models.loop import Epochs
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Gt, Le, LearningRate, Lt, check, derive_seed
from models.training import fit, logits, predict

__all__ = ["CT", "class_weights", "distilled", "flagged", "log_ratio", "main_axes", "wrong_labels"]

SMALLEST, LARGEST, SMOOTH = 0.02, 0.99, 1e-3
"""Shares of a class that its fitted samples must lie between; what is added to covariances and class shares (authors' code)."""


def wrong_labels(predicted: Tensor, step: int, num_classes: int) -> Tensor:
    """Labels int64 (B,) that are never ``predicted``; in ``num_classes - 1`` steps in a row every other class has its turn."""
    return (predicted + 1 + step % (num_classes - 1)) % num_classes


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """``1 / sqrt(share of the class + 0.001)``, float (num_classes,)."""
    return (torch.bincount(labels, minlength=num_classes) / len(labels) + SMOOTH).rsqrt()


def distilled(losses: Tensor, labels: Tensor, share: float, divisor: int) -> Tensor:
    """The ``floor(share * N)`` samples of lowest loss, and of every class at least its n // divisor of lowest loss: bool (N,)."""
    kept = lowest_loss(losses, share)
    order = torch.argsort(losses, stable=True)
    for label in labels.unique():  # type: ignore[no-untyped-call]
        own = order[labels[order] == label]
        kept[own[: len(own) // divisor]] = True
    return kept


def main_axes(features: Tensor) -> np.ndarray:
    """Features float (n, d) as they are, on the two directions in which they vary most: float64 (n, 2)."""
    values = features.double()
    _, _, axes = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    projected: np.ndarray = (values @ axes[:2].T).numpy()
    return projected


def log_ratio(points: np.ndarray, fitted: np.ndarray) -> float:
    """Log of how much likelier one class's points are as two clusters than as one; 0 where one of them is too small.

    ``mean_i [log N(x_i; its own cluster) - log N(x_i; the others)]`` with the clusters' means and sample covariances, 0.001 added
    to every entry of these.

    Args:
        points: float (n, 2).
        fitted: bool (n,), which form the cluster that may be poison.
    """
    count, size = int(fitted.sum()), len(fitted)
    if min(count, size - count) < 2 or not SMALLEST <= count / size <= LARGEST:
        return 0.0
    parts = points[fitted], points[~fitted]
    own, rest = (multivariate_normal(part.mean(0), np.cov(part.T) + SMOOTH, allow_singular=True) for part in parts)
    return float((own.logpdf(points[fitted]) - rest.logpdf(points[fitted])).sum() / size)


def flagged(ratios: np.ndarray, threshold: float, margin: float) -> np.ndarray:
    """Classes whose fitted samples are removed, bool (classes,): the one of the largest ratio where that is over ``threshold``, and
    all with one over ``threshold + margin``. ``ratios``: their logarithms, float (classes,)."""
    largest = np.arange(len(ratios)) == ratios.argmax()
    found: np.ndarray = (largest & (ratios > _log(threshold))) | (ratios > _log(threshold + margin))
    return found


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else -math.inf


class _Confusing(Classifier):
    """Every step: clean images with wrong labels; every ``every``-th step samples of the distilled set with theirs, too.

    Args:
        net: the network, trained in place.
        recipe: of one epoch.
        clean: clean images, labelled as the base network predicts them.
        steps: of the training.
        every: see above.
        weight: lambda, (lambda - 1) / lambda of a mixed step's loss is that of the wrong labels.
        classes: weights of the classes in the loss of the others, float (num_classes,).
    """

    classes: Tensor

    def __init__(
        self, net: Network, recipe: Recipe, clean: ImageSet, steps: int, every: int, weight: float, classes: Tensor
    ) -> None:
        super().__init__(net, recipe)
        self.images, self.steps, self.every, self.weight = clean, steps, every, weight
        self.register_buffer("classes", classes)

    def loader(self, data: ImageSet, seed: int) -> Epochs:
        return _Mixed(self, data, seed)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        images, wrong, labels = batch
        answers = self(images)
        confused = cross_entropy(answers[: len(wrong)], wrong)
        if not len(labels):
            return confused
        fitted = cross_entropy(answers[len(wrong) :], labels, weight=self.classes)
        return ((self.weight - 1) * confused + fitted) / self.weight


class _Mixed:
    """Batches (images of both kinds, wrong labels of the first, labels of the others) of :class:`_Confusing`, without end."""

    def __init__(self, module: _Confusing, data: ImageSet, seed: int) -> None:
        self.module, self.data, self.seed = module, data, seed

    def __len__(self) -> int:
        return self.module.steps

    def _endless(self, data: ImageSet, purpose: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = Batches(data, self.module.recipe.batch, derive_seed(self.seed, purpose), drop_last=True)
        return itertools.chain.from_iterable(itertools.repeat(batches))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        clean = self._endless(self.module.images.to(self.data.images.device), "clean")
        poisoned = self._endless(self.data, "poisoned")
        for step in range(len(self)):
            images, predicted, _ = next(clean)
            wrong = wrong_labels(predicted, step, self.data.num_classes)
            if step % self.module.every:
                yield images, wrong, wrong[:0]
            else:
                others, labels, _ = next(poisoned)
                yield torch.cat([images, others]), wrong, labels


@dataclass(frozen=True)
class CT(Defense):
    """Settings of the rounds, a tuple of one value for each of them, of the detection and of the last training.

    Attributes:
        base_epochs: of the network that labels the clean images, trained as the last one (authors' code: 100).
        pretrain_epochs: of every round's training on the distilled set, from the last round's on (authors' code).
        pretrain_lr: of it, constant, SGD with momentum 0.9 (authors' code: 0.01).
        pretrain_batch: samples per step of it; confusion has as many clean ones, and as many others (authors' code: 32).
        iterations: steps of confusion (authors' code).
        rates: of confusion, SGD with momentum 0.7 (authors' code).
        weights: lambda, see :class:`_Confusing` (authors' code).
        every: steps between two that have samples of the distilled set, too (authors' code: 2).
        kept: shares of the set that are distilled after all rounds but the last (authors' code).
        threshold: default of the dial (authors' code: 1.5).
        margin: above the threshold, over which any class is suspicious (authors' code: 0.5).
        epochs: of the last training, x0.1 at half and three quarters (authors' code: 100).
        lr: of it (authors' code: 0.1).
        batch: samples per step of it (authors' code: 128).
        weight_decay: of SGD (authors' code: 1e-4).
        thresholds: further values of the dial (ours: none).

    >>> CT(thresholds=(3.0,)).needs.words
    'clean + train'
    >>> [wrong_labels(torch.tensor([2]), step, num_classes=4).item() for step in range(4)]
    [3, 0, 1, 3]
    """

    name: ClassVar[str] = "ct"
    family: ClassVar[str] = "detection, training anew"
    cost: ClassVar[str] = "{base_epochs} epochs and six rounds of training on parts of the training set, then {epochs} epochs"
    revision: ClassVar[int] = 2  # 2: gives what it orders the samples by
    dial_name: ClassVar[str] = "likelihood ratio above which samples are removed"

    base_epochs: EpochCount = 100
    pretrain_epochs: tuple[EpochCount, ...] = (100, 100, 40, 40, 40, 40)
    pretrain_lr: LearningRate = 0.01
    pretrain_batch: BatchSize = 32
    iterations: tuple[Annotated[int, Ge(1), Le(1_000_000)], ...] = (6000, 6000, 6000, 6000, 2000, 2000)
    rates: tuple[LearningRate, ...] = (0.001, 0.001, 0.001, 0.01, 0.01, 0.01)
    weights: tuple[Annotated[float, Ge(1), Le(10_000)], ...] = (20.0, 20.0, 20.0, 30.0, 30.0, 15.0)
    every: tuple[Annotated[int, Ge(1), Le(1_000_000)], ...] = (2, 2, 2, 2, 2, 2)
    kept: tuple[Annotated[float, Gt(0), Lt(1)], ...] = (1 / 2, 1 / 5, 1 / 25, 1 / 50, 1 / 100)
    threshold: Annotated[float, Ge(0), Le(10_000)] = 1.5
    margin: Annotated[float, Ge(0), Le(10_000)] = 0.5
    epochs: EpochCount = 100
    lr: LearningRate = 0.1
    batch: BatchSize = 128
    weight_decay: Annotated[float, Ge(0), Le(1)] = 1e-4
    thresholds: tuple[Annotated[float, Ge(0), Le(10_000)], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        rounds = len(self.kept) + 1
        for field in ("pretrain_epochs", "iterations", "rates", "weights", "every"):
            check(self, field, len(getattr(self, field)) == rounds, f"{rounds} values, one more than kept has")

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN | Knowledge.CLEAN

    def recipe(self, epochs: int, lr: float, view: DefenderView, momentum: float = 0.9) -> Recipe:
        """Of a round: without augmentation, at a constant rate."""
        return Recipe(
            epochs=epochs, batch=self.pretrain_batch, lr=lr, momentum=momentum, weight_decay=self.weight_decay,
            schedule="constant", crop=0, flip=False, precision=view.recipe.precision,
        )  # fmt: skip

    def trained(self, view: DefenderView, data: ImageSet, epochs: int, purpose: str) -> Network:
        """A new network, trained plainly on ``data``, in evaluation mode."""
        recipe = Recipe(
            epochs=epochs, batch=self.batch, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay, schedule="multistep",
            crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip
        net = view.fresh(derive_seed(view.seed, "ct", purpose))
        fit(Classifier(net, recipe), data, recipe, derive_seed(view.seed, "ct", purpose, "batches"))
        return net.eval()

    def confused(self, view: DefenderView) -> Network:
        """The network after the last round: it fits little but the poisoned samples."""
        data, clean, classes = view.train, view.clean, view.num_classes
        base = self.trained(view, data, self.base_epochs, "base")
        named = ImageSet(clean.images, predict(base, clean.images), classes)
        net, kept = view.fresh(derive_seed(view.seed, "ct", "weights")), torch.ones(len(data), dtype=torch.bool)
        last = len(self.kept)
        for number in range(last + 1):
            seed, part = derive_seed(view.seed, "ct", "round", number), data.subset(kept)
            learned = part if number < last else _joined(part, ImageSet(clean.images, (clean.labels + 1) % classes, classes))
            recipe = self.recipe(self.pretrain_epochs[number], self.pretrain_lr, view)
            fit(Classifier(net, recipe), learned, recipe, derive_seed(seed, "pretrain"))
            found, even = copy.deepcopy(net), torch.ones(classes)
            recipe = self.recipe(1, self.rates[number], view, momentum=0.7)
            module = _Confusing(
                found, recipe, named, self.iterations[number], self.every[number], self.weights[number],
                class_weights(part.labels, classes) if number < last else even,
            )  # fmt: skip
            fit(module, part, recipe, derive_seed(seed, "confuse"))
            if number < last:
                losses = cross_entropy(logits(found, data.images), data.labels, reduction="none")
                kept = distilled(losses, data.labels, self.kept[number], 100 if number == last - 1 else 50)
        return found

    def suspicious(self, net: Network, data: ImageSet) -> tuple[Tensor, np.ndarray]:
        """Samples that the confused network still fits, bool (N,), and every class's log ratio, float (classes,)."""
        fitted, z = predict(net, data.images) == data.labels, embeddings(net, data)
        ratios = np.zeros(data.num_classes)
        for label in range(data.num_classes):
            own = data.labels == label
            if int(own.sum()) > 2:
                ratios[label] = log_ratio(main_axes(z[own]), fitted[own].numpy())
        return fitted, ratios

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        data, clean = view.train, view.clean
        fewest = int(min((*self.kept, 1.0)) * len(data))
        if fewest < 2 or len(clean) < 2:
            raise Inapplicable(f"a round has {fewest} of {len(data)} samples, and {len(clean)} clean ones; it needs 2 of each")
        fitted, ratios = self.suspicious(self.confused(view), data)
        order = torch.where(fitted, torch.from_numpy(ratios)[data.labels], ratios.min() - 1)  # what is not fitted comes last
        nets: dict[bytes, Network] = {}
        for threshold in sorted({self.threshold, *self.thresholds}):
            which = flagged(ratios, threshold, self.margin)
            removed = fitted & torch.from_numpy(which)[data.labels]
            key = removed.numpy().tobytes()
            if key not in nets:
                nets[key] = self.trained(view, data.subset(~removed), self.epochs, "last")
            net = copy.deepcopy(nets[key]).requires_grad_(True)
            note = f"removed from classes {np.flatnonzero(which).tolist()}; largest log ratio {ratios.max():.2f}"
            yield Candidate(
                net, threshold, threshold == self.threshold, float(removed.sum()), isolated=removed, suspicion=order, note=note
            )


def _joined(one: ImageSet, other: ImageSet) -> ImageSet:
    return ImageSet(torch.cat([one.images, other.images]), torch.cat([one.labels, other.labels]), one.num_classes)
