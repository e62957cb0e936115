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
    """The data of a scenario before any attack: the attacker's training set, the clean budget in two parts, the test set."""

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
    """The scenario's data; the budget is drawn from (data, fraction, seed) alone, so every attack and defense shares it."""
    return _world(scenario.dataset, scenario.clean_fraction, scenario.seed, cache)


def lesser(w: World, cell: Cell) -> World:
    """The world with the budget that the cell allows: a smaller one is a part of a larger one, so of the pool that is held out.

    Raises:
        Inapplicable: fewer than two images, which cannot be split into a part to work with and a part to validate on.
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
    return scenario.backbone.build(w.data.train.num_classes, w.data.train.shape, w.mean, w.std, seed)


def defender_seed(scenario: Scenario) -> int:
    return derive_seed(scenario.seed, "defense")
