"""The data of a scenario before any attack, and the networks built for it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from benchmark.data.datasets import Dataset, DatasetSpec, load, mean_std
from benchmark.data.splits import split_budget, split_validation
from benchmark.settings.cells import Cell, Scenario
from defenses.base import Inapplicable
from models.backbone import Network
from models.images import ImageSet
from models.spec import derive_seed

__all__ = ["World", "defender_seed", "fresh", "lesser", "world"]


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
    data = _dataset(spec, cache)
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
