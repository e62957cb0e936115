"""Activation Clustering: Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy and Srivastava, "Detecting Backdoor Attacks on
Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019, arXiv 1811.03728.

Clean and poisoned samples of one label got it for different reasons, so their activations form two clusters. The activations of
each label's samples are reduced to a few independent components and split in two by k-means. The smaller cluster is taken for
poisoned where it holds few of the label's samples, and a new network is trained on the rest.

Needs: model, poisoned training set. Edits: everything; the model is new, of the victim's architecture.
Dial: share of a label's samples below which its smaller cluster is removed; larger removes more; default 0.35. Each point costs a
whole training.
Deviations from the paper: it compares several ways to judge the clusters. Relative size is the default; ``rule="silhouette"`` also
asks that the clusters fit the data. A third way, which trains a network without a cluster and classifies the cluster with it, is
left out. The paper corrects the labels of what it found and trains on; here a new network is trained without it, by the victim's
recipe. Independent components are a rotation of the whitened principal components, and distances do not change with a rotation, so
k-means gets the whitened ones. The activations are the victim's embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from defenses.base import Candidate, DefenderView, Defense, Knowledge
from defenses.filtering import by_label, filtered
from models.spec import Ge, Gt, Le, derive_seed

__all__ = ["ActivationClustering", "halves", "reduced"]

Size = Annotated[float, Gt(0), Le(0.5)]


def reduced(features: Tensor, dims: int, whiten: bool) -> Tensor:
    """The first ``dims`` principal components of ``features``, float64 (n, d), or as many as there are: float64 (n, k).

    ``whiten``: all with the same variance, as independent components have it.
    """
    u, s, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    rank = int((s > s[0] * max(features.shape) * torch.finfo(s.dtype).eps).sum())
    u, s = u[:, : min(dims, rank)], s[: min(dims, rank)]
    points: Tensor = u * len(features) ** 0.5 if whiten else u * s
    return points


def halves(points: Tensor, seed: int) -> Tensor:
    """The smaller of two clusters of ``points``, float64 (n, k), bool (n,); none where all points are equal.

    k-means of ten starts. Of two equal clusters it is the one without the first point.
    """
    if not points.shape[1]:
        return torch.zeros(len(points), dtype=torch.bool)
    found = KMeans(2, n_init=10, random_state=seed % 2**32).fit_predict(points.numpy())
    second = torch.from_numpy(found) != int(found[0])
    return second if int(second.sum()) * 2 <= len(second) else ~second


@dataclass(frozen=True)
class ActivationClustering(Defense):
    """Settings of the clustering and of the rule.

    Attributes:
        size: a cluster of a smaller share of its label's samples is removed, in (0, 0.5]; 0.5 removes every label's smaller
            cluster, BackdoorBench's rule (ours, following secondary sources: 0.35).
        sizes: further values of ``size``; every one costs a whole training (ours: none).
        dims: components kept (BackdoorBench: 10).
        components: ``independent`` (paper) or ``principal`` (BackdoorBench).
        rule: ``size`` alone, or ``silhouette``: only where the mean silhouette of the two clusters is above ``silhouette``.
        silhouette: in [-1, 1] (ours, following secondary sources: 0.1).

    >>> features = torch.tensor([[0.0], [0.1], [0.2], [9.0]], dtype=torch.float64)
    >>> ActivationClustering().smaller(features, seed=0)
    tensor([False, False, False,  True])
    """

    name: ClassVar[str] = "activation-clustering"
    family: ClassVar[str] = "detection, training anew"
    cost: ClassVar[str] = "one pass over the training set, one training as the victim's"
    dial_name: ClassVar[str] = "size below which a cluster is removed"

    size: Size = 0.35
    sizes: tuple[Size, ...] = ()
    dims: Annotated[int, Ge(1), Le(65_536)] = 10
    components: Literal["independent", "principal"] = "independent"
    rule: Literal["size", "silhouette"] = "size"
    silhouette: Annotated[float, Ge(-1), Le(1)] = 0.1

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.TRAIN

    def smaller(self, features: Tensor, seed: int) -> Tensor:
        """The smaller cluster of one label's ``features``, float64 (n, d): bool (n,); none where the rule rejects the clusters."""
        points = reduced(features, self.dims, self.components == "independent")
        small = halves(points, seed)
        if self.rule == "silhouette" and int(small.sum()) and len(small) > 2:
            small &= float(silhouette_score(points.numpy(), small.numpy())) > self.silhouette
        return small

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        seed = derive_seed(view.seed, self.name, "clusters")
        clusters = [(members, self.smaller(features, seed)) for members, features in by_label(view)]
        suspicion = torch.zeros(len(view.train), dtype=torch.float64)  # the smaller a sample's cluster, the more suspected
        for members, small in clusters:
            share = float(small.double().mean())
            suspicion[members] = torch.where(small, 1 - share, share).double()
        for size in dict.fromkeys((self.size, *self.sizes)):
            isolated = torch.zeros(len(view.train), dtype=torch.bool)
            for members, small in clusters:
                isolated[members] = small & (float(small.double().mean()) < size)
            labels = sum(bool(isolated[members].any()) for members, _ in clusters)
            note = f"a cluster of {labels} of {len(clusters)} labels removed"
            yield filtered(view, isolated, size, size == self.size, self.name, suspicion, note)
