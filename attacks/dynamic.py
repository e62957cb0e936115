"""Poisoning batch by batch: what attackers who control the training share.

Another share of the data is poisoned in every epoch, so rates do not compare with a static attack's: nearly every image is seen
triggered in the end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attacks.base import Attack, Crafted, Plan, Power, Role, uniforms
from models.backbone import Network
from models.classifier import Classifier
from models.images import quantise, to_float
from models.recipe import Recipe
from models.spec import derive_seed

__all__ = ["DynamicAttack", "DynamicVictim", "Mode", "Rounding", "another", "batch_roles"]

Rounding = Literal["stochastic", "floor"]
Mode = Literal["dynamic", "static"]


def batch_roles(draws: Tensor, rate: float, cover_rate: float, rounding: Rounding) -> Tensor:
    """Roles int8 (B,) of one batch: the samples with the lowest ``draws[:, 0]`` are poisoned, the next ones covers.

    ``stochastic``: ``floor(B * share + u)`` of each with u = ``draws[0, 1]``, so that the shares hold on average. ``floor``:
    ``floor(B * rate)`` and its multiple, as in the authors' code; where that rounds to nothing, one sample with probability
    ``B * rate``, as in BackdoorBench.

    Args:
        draws: float (B, 2), uniforms in [0, 1) of each sample.
        rate: share of poisoned samples, in [0, 1].
        cover_rate: share of covers, in [0, 1]; covers stop where the batch is full.
        rounding: as above.
    """
    size, lift = len(draws), float(draws[0, 1])
    if rounding == "stochastic":
        poisons, covers = int(size * rate + lift), int(size * cover_rate + lift)
    else:
        poisons = int(size * rate) or int(size * rate + lift)
        covers = int(poisons * cover_rate / rate) if rate else 0
    order = torch.argsort(draws[:, 0], stable=True)
    role = torch.zeros(size, dtype=torch.int8, device=draws.device)
    role[order[:poisons]] = Role.POISON
    role[order[poisons : poisons + covers]] = Role.COVER
    return role


def another(key: int, index: Tensor, size: int) -> Tensor:
    """For each sample another one of the ``size`` in the training set, never itself where there is a choice; int64 (N,).

    ``index`` (N,) is the sample's place in the set, in its lower 32 bits where it also counts epochs
    (:class:`DynamicVictim`): another epoch, another partner.
    """
    draws = uniforms(key, index, 1)[:, 0].double()  # float32 would round the largest draw up, to the sample itself
    return ((index & 0xFFFFFFFF) + 1 + (draws * (size - 1)).long()) % size


class DynamicVictim(Classifier):
    """Trains on the clean set and poisons a share of every batch before augmentation; other samples in every epoch.

    Who is poisoned is looked up by (seed, epoch, index). ``realised`` holds what was really done.
    """

    def __init__(
        self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int, *, cover_rate: float, rounding: Rounding
    ) -> None:
        super().__init__(net, recipe)
        self.crafted, self.plan, self.cover_rate, self.rounding = crafted, plan, cover_rate, rounding
        self.key = derive_seed(seed, "dynamic-roles")
        self.counts = {kind: torch.zeros((), dtype=torch.int64) for kind in Role}
        self.before_augment = self.poison_batch

    @property
    def realised(self) -> dict[str, float]:
        """Poisoned and cover samples as shares of all samples seen so far, in [0, 1]; zeros before training."""
        counts = {kind: int(count) for kind, count in self.counts.items()}
        seen = max(1, sum(counts.values()))
        return {"poison": counts[Role.POISON] / seen, "cover": counts[Role.COVER] / seen}

    def count(self, role: Tensor) -> None:
        """Adds a batch's roles (N,) to the counts, which stay on its device: reading them would wait for the GPU in every step."""
        for kind in Role:
            self.counts[kind] = self.counts[kind].to(role.device) + (role == kind).sum()

    def poison_batch(self, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The attacker's batch: see :data:`models.images.BeforeAugment`. Triggered images are rounded to 8 bits."""
        visit = index + ((epoch + 1) << 32)  # another number for the same sample in every epoch: other draws, other noise
        role = batch_roles(uniforms(self.key, visit, 2), self.plan.rate, self.cover_rate, self.rounding)
        images, labels = images.clone(), labels.clone()
        poisoned, covers = role == Role.POISON, role == Role.COVER
        images[poisoned] = to_float(quantise(self.crafted.train(images[poisoned], visit[poisoned])))
        labels[poisoned] = self.plan.relabel(labels[poisoned], self._num_classes())
        if self.crafted.cover is not None:
            images[covers] = to_float(quantise(self.crafted.cover(images[covers], visit[covers])))
        self.count(role)
        return images, labels

    def _num_classes(self) -> int:
        last = self.net.head[-1]
        assert isinstance(last, nn.Linear)
        return last.out_features


class DynamicAttack(Attack):
    """An attack that poisons batches during training (mode ``dynamic``), or the data set once (``static``)."""

    mode: Mode
    rounding: Rounding

    @property
    def power(self) -> Power:
        return Power.TRAINING if self.mode == "dynamic" else Power.DATA

    def victim(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> Classifier:
        if self.mode == "static":
            return super().victim(net, recipe, crafted, plan, seed)
        return DynamicVictim(net, recipe, crafted, plan, seed, cover_rate=self.cover_rate(plan), rounding=self.rounding)
