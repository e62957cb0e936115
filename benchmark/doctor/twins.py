"""Benign networks of a model's kind, trained from its own data: what their signs are, a benign model's may be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmark.data.datasets import load
from benchmark.data.splits import split_validation
from benchmark.doctor.signs import SEARCH, measured
from benchmark.run.world import World, divided, fresh
from benchmark.settings.cells import Scenario
from benchmark.storage.store import Store
from models.classifier import Classifier
from models.recipe import Recipe
from models.spec import derive_seed, digest
from models.training import accuracy, fit

__all__ = ["HELD_OUT", "Twin", "recipe_of", "shared", "twin", "whole"]

HELD_OUT = 500
"""Images that twins are not trained on, at least where there are twice as many: the search is made on these."""
MOST = 2500
"""Clean images that search and defenses work with, at most: the literature's 5 % of CIFAR-10."""


@dataclasses.dataclass(frozen=True)
class Twin:
    """A benign network: its signs by name, and its accuracy on the test images in [0, 1]."""

    values: dict[str, float]
    acc: float


def whole(scenario: Scenario, cache: Path) -> World:
    """Data of which all training images, at most 2,500, are clean ones of the defender's; a fifth of them for validation."""
    data = load(scenario.dataset, cache)
    if len(data.train) > MOST:
        return divided(data, MOST / len(data.train), scenario.seed)
    w = divided(data, 0.0, scenario.seed)
    fitting, validating = split_validation(data.train, scenario.seed)
    return dataclasses.replace(w, clean=data.train.subset(fitting), validation=data.train.subset(validating))


def shared(scenario: Scenario, cache: Path) -> World:
    """Data of which twins are trained on one part, and the defender holds the other: a twentieth, but at least 500, at most 2,500,
    and never more than a half."""
    data = load(scenario.dataset, cache)
    count = len(data.train)
    return divided(data, min(0.5, max(0.05, HELD_OUT / count), MOST / count), scenario.seed)


def recipe_of(scenario: Scenario, epochs: int) -> Recipe:
    """How twins are trained: the matrix's recipe, in so many one-cycle epochs up to a rate of 0.1."""
    return dataclasses.replace(scenario.recipe, epochs=epochs, schedule="one-cycle", lr=0.1, nesterov=True)


def twin(scenario: Scenario, w: World, epochs: int, number: int, store: Store) -> Twin:
    """A benign twin's signs, from the store where it is cached.

    Args:
        scenario: of the model. w: as :func:`shared` gives it. epochs: of training. number: of the twin, from 0.
    """
    recipe = recipe_of(scenario, epochs)
    settings = {
        "backbone": scenario.backbone.spec(), "recipe": recipe.spec(), "number": number, "search": SEARCH.spec(),
        "normalised": [*w.mean, *w.std], "images": len(w.train),
    }  # fmt: skip
    key = digest("doctor-twin", settings, w.data.fingerprint)

    def compute() -> None:
        net = fresh(scenario, w, derive_seed("doctor", "weights", number))
        fit(Classifier(net, recipe), w.train, recipe, derive_seed("doctor", "training", number))
        signs = measured(net.eval(), w.clean, derive_seed("doctor", "search"))
        store.write("twin", key, settings, {"values": signs.values, "acc": accuracy(net, w.data.test)})

    found = store.read("twin", key)
    if found is None:
        store.once("twin", key, compute)
        found = store.read("twin", key)
    assert found is not None
    return Twin(dict(found.outcome["values"]), float(found.outcome["acc"]))
