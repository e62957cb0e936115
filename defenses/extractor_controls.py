"""Controls on a trusted extractor: simple classifiers on its features.

A method that is given a good extractor must beat the simplest classifiers on it, or its head adds nothing. Nearest class mean
gives an image to the class whose mean feature is closest (Mensink, Verbeek, Perronnin and Csurka, "Distance-Based Image
Classification", IEEE TPAMI 2013); a linear probe is a linear layer trained on the frozen features (Alain and Bengio, "Understanding
intermediate layers using linear classifier probes", 2016, arXiv 1610.01644).

Needs: extractor, and labelled images: the clean budget or the poisoned training set. Edits: everything; the model is the extractor
with a head of its own. Dial: none.
Deviations from the paper: both papers' settings are other tasks'; the numbers are ours.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge
from models.backbone import Network
from models.extractors import embeddings, fit_head, mlp
from models.spec import EpochCount, Ge, Le, LearningRate, derive_seed

__all__ = ["LinearProbe", "NearestClassMean", "class_means"]


def class_means(z: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of every class, float (num_classes, d), and how many samples it has, int64 (num_classes,); 0 where none."""
    counts = torch.bincount(labels, minlength=num_classes)
    sums = torch.zeros(num_classes, z.shape[1], dtype=torch.float64).index_add_(0, labels, z.double())
    return (sums / counts.clamp(min=1)[:, None]).to(z.dtype), counts


@dataclass(frozen=True)
class _OnExtractor(Defense):
    control: ClassVar[bool] = True

    labels: Literal["clean", "train"] = "clean"

    @property
    def needs(self) -> Knowledge:
        return Knowledge.EXTRACTOR | (Knowledge.CLEAN if self.labels == "clean" else Knowledge.TRAIN)

    @abstractmethod
    def head(self, z: Tensor, labels: Tensor, view: DefenderView) -> nn.Sequential:
        """A head for features ``z`` (N, d) of images with ``labels`` (N,)."""

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        net = view.extractor.eval()
        data = view.clean if self.labels == "clean" else view.train
        if not len(data):
            raise Inapplicable(f"no labelled images: {self.labels!r} is empty")
        head = self.head(embeddings(net, data), data.labels, view)
        yield Candidate(Network(net.normalise, net.features, head).requires_grad_(True).eval())


@dataclass(frozen=True)
class NearestClassMean(_OnExtractor):
    """The class whose mean feature is closest, written as a linear head: exact, since ``|z - m|^2 = |z|^2 - 2 m z + |m|^2``.

    Attributes:
        labels: which images the means are taken over, the clean budget or the poisoned training set as labelled.
        metric: ``euclidean`` (Mensink et al., without their learned metric) or ``cosine``.

    >>> class_means(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), num_classes=2)[0]
    tensor([[1.],
            [5.]])
    >>> NearestClassMean(labels="train").needs.words
    'train + extractor'
    """

    name: ClassVar[str] = "nearest-class-mean"
    family: ClassVar[str] = "control"
    cost: ClassVar[str] = "one pass over the labelled images"

    metric: Literal["euclidean", "cosine"] = "euclidean"

    def head(self, z: Tensor, labels: Tensor, view: DefenderView) -> nn.Sequential:
        means, counts = class_means(z, labels, view.num_classes)
        weight = means if self.metric == "euclidean" else normalize(means)
        bias = -means.square().sum(1) / 2 if self.metric == "euclidean" else torch.zeros(view.num_classes)
        bias[counts == 0] = torch.finfo(bias.dtype).min / 2  # a class without samples is never the nearest
        linear = nn.Linear(z.shape[1], view.num_classes, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        return nn.Sequential(linear)


@dataclass(frozen=True)
class LinearProbe(_OnExtractor):
    """A linear head trained with cross-entropy and Adam on features computed once.

    Attributes:
        labels: which images it is trained on, the clean budget or the poisoned training set as labelled.
        epochs: passes over the features (ours, as all three those of the heads that Hölder pruning inspects).
        lr: of Adam, constant.
        batch: samples per step.

    >>> LinearProbe().needs.words
    'clean + extractor'
    """

    name: ClassVar[str] = "linear-probe"
    family: ClassVar[str] = "control"
    cost: ClassVar[str] = "one pass over the labelled images, {epochs} epochs of the head"

    epochs: EpochCount = 50
    lr: LearningRate = 1e-3
    batch: Annotated[int, Ge(1), Le(65_536)] = 256

    def head(self, z: Tensor, labels: Tensor, view: DefenderView) -> nn.Sequential:
        head = mlp(z.shape[1], (), view.num_classes, derive_seed(view.seed, self.name, "weights"))
        seed = derive_seed(view.seed, self.name, "batches")
        return fit_head(head, z, labels, epochs=self.epochs, lr=self.lr, batch=self.batch, seed=seed)
