"""Random draws from a labelled set: limits, the test part, the clean budget, the validation part. The same on every machine."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from models.images import ImageSet
from models.spec import BadInput, generator

__all__ = ["draw", "fifth", "identity", "rest", "split_budget", "split_validation"]


def draw(labels: Tensor, total: int, source: torch.Generator, *, proportional: bool = False, keep_one: bool = False) -> Tensor:
    """Positions of ``total`` samples, sorted: equally many of each class as far as its size allows, or ``proportional`` to it.

    Every class is shuffled once and the classes take turns, so a smaller total is always a part of a larger one. ``keep_one``
    never takes the last sample of a class; fewer than ``total`` come back when nothing else is left.
    """
    _, group, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    shuffled = torch.randperm(len(labels), generator=source)
    turn = torch.randperm(len(counts), generator=source)
    position = shuffled[torch.argsort(group[shuffled], stable=True)]
    group = group[position]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[group]
    due = (rank + 0.5).double() / counts[group] if proportional else rank.double()
    order = torch.argsort(turn[group], stable=True)
    order = order[torch.argsort(due[order], stable=True)]
    if keep_one:
        order = order[(rank < counts[group] - 1)[order]]
    return position[order[:total]].sort().values


def rest(size: int, index: Tensor) -> Tensor:
    """The positions in 0..size-1 that are not in ``index``, sorted."""
    left = torch.ones(size, dtype=torch.bool)
    left[index] = False
    return left.nonzero()[:, 0]


def identity(data: ImageSet) -> str:
    """What the draws depend on: the labels in their order, and the number of classes."""
    return hashlib.sha256(repr(data.num_classes).encode() + data.labels.cpu().contiguous().numpy().tobytes()).hexdigest()


def fifth(everything: ImageSet, purpose: str, count: int) -> tuple[ImageSet, ImageSet]:
    """Train and a stratified test part of ``count`` images; every class stays in train."""
    source = generator(purpose, identity(everything))
    test = draw(everything.labels, count, source, proportional=True, keep_one=True)
    return everything.subset(rest(len(everything), test)), everything.subset(test)


def split_budget(data: ImageSet, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits a training set into the attacker's part and the defender's clean budget.

    The budget holds ``round(fraction * N)`` samples, equally many of each class as far as its size allows; the attacker keeps at
    least one of every class. Depends on labels, fraction and seed alone, and a smaller budget is a part of a larger one with the
    same seed. Limitation: samples are drawn one by one, so near-duplicates such as the frames of one GTSRB track may land on both
    sides, which makes that clean budget a little less telling than its size says.

    Args:
        data: the training set, N samples.
        fraction: in [0, 1); 0 = no budget.
        seed: of the scenario.

    Returns:
        The attacker's index and the budget's index: int64, sorted, disjoint, together 0..N-1.

    Raises:
        BadInput: the fraction is out of range, so small that it gives no image, or so large that a class would have none left.
    """
    total = round(fraction * len(data)) if 0 <= fraction < 1 else -1
    if total < 0 or (total == 0 and fraction > 0):
        least = 1 / max(len(data), 1)
        raise BadInput(f"clean budget: fraction = {fraction!r} is out of range; it must be 0, or between {least:.2g} and 1")
    source = generator("clean-budget", identity(data), seed)
    budget = draw(data.labels.cpu(), total, source, keep_one=True)
    if len(budget) < total:
        raise BadInput(
            f"clean budget: fraction = {fraction!r} leaves a class without training images; at most {len(budget)} of {len(data)} "
            "can be set aside"
        )
    return rest(len(data), budget), budget


def split_validation(budget: ImageSet, seed: int) -> tuple[Tensor, Tensor]:
    """Splits a clean budget of N samples into what a defense works with and what its dial is chosen on.

    One fifth is the validation part (at least one sample, and never all, once N >= 2), each class in proportion to its size.

    Returns:
        The defense's index and the validation index: int64, sorted, disjoint, together 0..N-1.
    """
    size = len(budget)
    total = min(max(round(size / 5), 1), size - 1) if size >= 2 else 0
    source = generator("validation-split", identity(budget), seed)
    validation = draw(budget.labels.cpu(), total, source, proportional=True)
    return rest(size, validation), validation
