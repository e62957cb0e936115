"""The data of a scenario before any attack, the networks built for it, and victims that are read from files of the zoo."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attacks.base import Crafted, PoisonedSet, Role, apply
from benchmark.data.datasets import Dataset, DatasetSpec, load, mean_std
from benchmark.data.splits import split_budget, split_validation
from benchmark.settings.cells import Cell, Scenario
from benchmark.storage import zoo
from defenses.base import Inapplicable
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput, derive_seed, generator
from models.training import Diverged
from models.weights import check_state, fit_state

__all__ = ["World", "clean_seeds", "defender_seed", "divided", "fresh", "lesser", "rebuilt", "restored", "world"]

SEEDS_PER_CLASS = 10
"""Training samples of every class known to be clean, where a track grants them (protocol of ASD: Gao et al., CVPR 2023)."""


@dataclass(frozen=True)
class World:
    """The data of a scenario before any attack.

    Attributes:
        data: the data set, with the test set.
        train: the attacker's training set.
        clean: the part of the clean budget that a defense works with.
        validation: the part of the clean budget that candidates are validated on.
        mean: of every channel of ``train``.
        std: of every channel of ``train``.
    """

    data: Dataset
    train: ImageSet
    clean: ImageSet
    validation: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]


@functools.lru_cache(maxsize=2)
def _dataset(spec: DatasetSpec, cache: Path) -> Dataset:
    return load(spec, cache)


@functools.lru_cache(maxsize=2)
def _world(spec: DatasetSpec, fraction: float, seed: int, cache: Path) -> World:
    return divided(_dataset(spec, cache), fraction, seed)


def divided(data: Dataset, fraction: float, seed: int) -> World:
    """The world of a data set; ``fraction``: of the training images that are the clean budget, drawn by ``seed``."""
    attacker, budget = split_budget(data.train, fraction, seed)
    train, held_out = data.train.subset(attacker), data.train.subset(budget)
    fitting, validating = split_validation(held_out, seed)
    mean, std = mean_std(train)
    return World(data, train, held_out.subset(fitting), held_out.subset(validating), mean, std)


def world(scenario: Scenario, cache: Path) -> World:
    """The scenario's data. The clean budget depends on data, fraction and seed alone, so all attacks and defenses share it."""
    return _world(scenario.dataset, scenario.clean_fraction, scenario.seed, cache)


def lesser(w: World, cell: Cell) -> World:
    """The world with the clean budget of the cell. Smaller budgets are subsets of larger ones.

    Raises:
        Inapplicable: the budget has fewer than two images and cannot be split into the two parts.
    """
    if cell.budget is None:
        return w
    seed, whole = cell.scenario.seed, w.data.train
    size = round(cell.budget * len(whole))
    if size < 2:
        raise Inapplicable(f"a clean budget of {100 * cell.budget:g} % of {len(whole)} images is {size}: at least 2 are needed")
    held_out = whole.subset(split_budget(whole, cell.budget, seed)[1])
    fitting, validating = split_validation(held_out, seed)
    return dataclasses.replace(w, clean=held_out.subset(fitting), validation=held_out.subset(validating))


def fresh(scenario: Scenario, w: World, seed: int) -> Network:
    """An untrained network of the scenario's backbone."""
    return scenario.backbone.build(w.data.train.num_classes, w.data.train.shape, w.mean, w.std, seed)


def defender_seed(scenario: Scenario) -> int:
    """Seed of everything on the defender's side."""
    return derive_seed(scenario.seed, "defense")


def restored(
    scenario: Scenario, w: World, kept: Mapping[str, Tensor], net: Network, surrogate: Callable[[], Network | None]
) -> Crafted:
    """The triggers of a finished victim.

    Args:
        scenario: with an attack.
        w: its data.
        kept: what :meth:`attacks.base.Attack.keep` gave.
        net: the victim.
        surrogate: gives the network on which the attack crafts; called only where it is needed.
    """
    attack, plan, seed = scenario.attack, scenario.plan, derive_seed(scenario.seed, "attack")
    assert attack is not None
    return attack.recraft(net, attack.restore(kept, w.train, plan, seed, surrogate), w.train, plan, seed)


def rebuilt(
    card: zoo.Card, scenario: Scenario, w: World, surrogate: Callable[[], Network | None]
) -> tuple[Network, Crafted | None, dict[str, Tensor]]:
    """The network of a file of the zoo in evaluation mode, its triggers (None without an attack) and the tensors that they need.

    Arguments as in :func:`restored`.

    Raises:
        BadInput: the file is damaged, or does not fit the scenario.
    """
    tensors = card.tensors()
    state = zoo.part("net", tensors)
    with torch.device("meta"):  # a card of a few bytes may claim a width that fills the memory
        check_state(fresh(scenario, w, 0), state, card.weights)
    net = fresh(scenario, w, 0)
    fit_state(net, state, card.weights)
    net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    kept = zoo.part("trigger", tensors)
    if scenario.attack is None:
        return net, None, kept
    try:
        crafted = restored(scenario, w, kept, net, surrogate)
        apply(crafted.test, w.data.test.images[:1], torch.zeros(1, dtype=torch.int64))  # tensors of another shape fail here
        return net, crafted, kept
    except Diverged:
        raise
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{card.weights}: its trigger does not fit {scenario.attack.name}: {reason}") from error


def clean_seeds(poisoned: PoisonedSet, seed: int) -> Tensor:
    """At most :data:`SEEDS_PER_CLASS` random clean samples of every class: bool (N,)."""
    order = torch.randperm(len(poisoned.role), generator=generator(seed))
    mask = torch.zeros(len(order), dtype=torch.bool)
    for label in range(poisoned.visible.num_classes):
        own = (poisoned.true_labels[order] == label) & (poisoned.role[order] == Role.CLEAN)
        mask[order[own][:SEEDS_PER_CLASS]] = True
    return mask
