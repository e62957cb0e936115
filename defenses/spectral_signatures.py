"""Spectral Signatures: Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, arXiv 1811.00636.

Among the samples of the target label the poisoned ones have another mean in feature space than the clean ones. Where the two means
are far apart, the direction between them is that of largest variance. A sample's score is its squared projection on the top right
singular vector of its label's centred features; the highest scores are removed and a new network is trained on the rest.

Needs: model, poisoned training set. Edits: everything; the model is new, of the victim's architecture.
Dial: share of every label's samples that is removed, ``factor * rate``; default 1.5 * 0.1. Each point costs a whole training.
Deviations from the paper: the victim is the network whose features are read, and its embedding the representation. The bound on the
number of a label's poisoned samples is assumed, not known: ``rate``. The training follows the victim's recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from defenses.base import Candidate, DefenderView, Defense, Knowledge, lowest_loss
from defenses.filtering import by_label, filtered
from models.spec import Gt, Le, Lt, check

__all__ = ["SpectralSignatures", "outlier_scores"]

Rate = Annotated[float, Gt(0), Lt(1)]


def outlier_scores(features: Tensor) -> Tensor:
    """Squared projection of centred ``features``, float64 (n, d), on their top right singular vector: float64 (n,).

    >>> outlier_scores(torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0]], dtype=torch.float64)).round(decimals=6)
    tensor([1., 1., 4.], dtype=torch.float64)
    """
    centred = features - features.mean(0)
    scores: Tensor = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]) ** 2
    return scores


@dataclass(frozen=True)
class SpectralSignatures(Defense):
    """Settings of the removal.

    Attributes:
        rate: assumed share of poisoned samples among a label's, an upper bound (ours: 0.1; with the factor it is BackdoorBench's
            85th percentile).
        factor: of the removed samples to the assumed ones (ours, following secondary sources: 1.5).
        rates: further assumed rates at which a network is trained; every one costs a whole training (ours: none).

    >>> SpectralSignatures(rate=0.05, rates=(0.1,)).shares
    (0.075, 0.15)
    """

    name: ClassVar[str] = "spectral-signatures"
    family: ClassVar[str] = "detection, training anew"
    cost: ClassVar[str] = "one pass over the training set, one training as the victim's"
    dial_name: ClassVar[str] = "share of each label's samples removed"

    rate: Rate = 0.1
    factor: Annotated[float, Gt(0), Le(10)] = 1.5
    rates: tuple[Rate, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "factor", max(self.shares) < 1, "less than 1 / rate: some samples of every label must be kept")

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of every label's samples that are removed: the default, then the further ones."""
        return tuple(round(self.factor * rate, 6) for rate in dict.fromkeys((self.rate, *self.rates)))

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.TRAIN

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        scores = [(members, outlier_scores(features)) for members, features in by_label(view)]
        suspicion = torch.zeros(len(view.train), dtype=torch.float64)
        for members, outlying in scores:
            suspicion[members] = outlying.double()
        for share in self.shares:
            isolated = torch.zeros(len(view.train), dtype=torch.bool)
            for members, outlying in scores:
                isolated[members] = lowest_loss(-outlying, share)
            yield filtered(view, isolated, share, share == self.shares[0], self.name, suspicion)
