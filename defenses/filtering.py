"""What detectors of poisoned training samples share: the victim's features by label, and a training from scratch on the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from defenses.base import Candidate, DefenderView, Inapplicable
from models.backbone import Network
from models.classifier import Classifier
from models.extractors import embeddings
from models.images import ImageSet
from models.recipe import Recipe
from models.spec import derive_seed
from models.training import fit

__all__ = ["by_label", "filtered", "trained"]


def trained(view: DefenderView, data: ImageSet, recipe: Recipe, purpose: str) -> Network:
    """A fresh network of the victim's architecture, trained on ``data``; in evaluation mode, on the CPU.

    Raises:
        Diverged: weights are not finite at the end.
    """
    net = view.fresh(derive_seed(view.seed, purpose, "weights"))
    fit(Classifier(net, recipe), data, recipe, derive_seed(view.seed, purpose, "batches"))
    return net.requires_grad_(True).eval()


def by_label(view: DefenderView) -> list[tuple[Tensor, Tensor]]:
    """Of every given label of the poisoned training set, in ascending order: its samples, int64 (n,), and their embeddings by the
    victim, float64 (n, d), n >= 1.

    Raises:
        Inapplicable: the training set holds fewer than two samples.
    """
    data = view.train
    if len(data) < 2:
        raise Inapplicable(f"the poisoned training set holds {len(data)} samples; at least 2 are needed")
    z = embeddings(view.model, data).double()
    groups = (torch.nonzero(data.labels == label).flatten() for label in sorted(set(data.labels.tolist())))
    return [(members, z[members]) for members in groups]


def filtered(
    view: DefenderView, isolated: Tensor, dial: float, is_default: bool, purpose: str, suspicion: Tensor, note: str = ""
) -> Candidate:
    """A network trained by the victim's recipe on the samples that are not ``isolated``, bool (N,); the victim where none is.

    The weights and batches are seeded by ``purpose``, the same for every dial. The strength is the number of isolated samples.
    ``suspicion``: float (N,), what they were isolated by.
    """
    count = int(isolated.sum())
    model = trained(view, view.train.subset(~isolated), view.recipe, purpose) if count else view.model
    return Candidate(model, dial, is_default, float(count), isolated=isolated, suspicion=suspicion, note=note)
