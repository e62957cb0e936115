"""Keys of stored stages: a victim, an extractor, a canary, a training from scratch, a defense run."""

from __future__ import annotations

from typing import Any

from attacks.base import Power
from benchmark.rules.canary import Canary, Planting
from benchmark.settings.cells import Cell, Scenario
from models.extractors import Extractor
from models.spec import digest

__all__ = ["REVISION", "canary_key", "cell_key", "extractor_key", "scratch_key", "victim_key"]

REVISION = 2
"""Raised when a stage gives a different result for the same settings. 2: victims are compared with their twins; losses are
paired."""


def victim_key(scenario: Scenario, fingerprint: str) -> str:
    """Key of a scenario's victim; ``fingerprint``: of its data set."""
    return digest("victim", REVISION, scenario.spec(), fingerprint)


def extractor_key(extractor: Extractor, scenario: Scenario, fingerprint: str) -> str:
    """Key of an extractor for a scenario; scenarios with the same images and architecture share it."""
    settings: dict[str, Any] = {
        "extractor": extractor.spec(),
        "dataset": scenario.dataset.spec(),
        "clean_fraction": scenario.clean_fraction,
        "backbone": scenario.backbone.spec(),
        "recipe": extractor.follows(scenario.recipe),
        "seed": scenario.seed,
    }
    if extractor.reads == "poisoned" and scenario.attack is not None:
        settings |= {"attack": scenario.attack.spec(), "plan": scenario.plan.spec()}
        if scenario.attack.power is Power.TRAINING:  # the poisoned set is exported by the victim's training
            settings["victim"] = victim_key(scenario, fingerprint)
        elif lent := scenario.surrogate():
            settings["surrogate"] = victim_key(lent, fingerprint)
    return digest("extractor", REVISION, settings, fingerprint)


def cell_key(cell: Cell, fingerprint: str) -> str:
    """Key of a cell's defense run."""
    return digest("defended", REVISION, cell.spec(), victim_key(cell.scenario, fingerprint))


def canary_key(cell: Cell, canary: Canary, fingerprint: str) -> str:
    """Key of a copy of the cell's victim with a canary; cells with the same victim and budget share it."""
    budget = {"budget": cell.budget} if cell.budget is not None else {}
    return digest("canary", REVISION, canary.spec(), Planting().spec(), budget, victim_key(cell.scenario, fingerprint))


def scratch_key(cell: Cell, fingerprint: str) -> str:
    """Key of a network that is trained from scratch on the cell's clean budget; the cells of all attacks share it."""
    scenario = cell.scenario
    settings = {
        "defense": cell.defense.spec(), "dataset": scenario.dataset.spec(), "clean_fraction": scenario.clean_fraction,
        "budget": cell.budget, "backbone": scenario.backbone.spec(), "recipe": scenario.recipe.spec(), "seed": scenario.seed,
    }  # fmt: skip
    return digest("scratch", REVISION, settings, fingerprint)
