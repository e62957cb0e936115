"""The post-training defenses on a model of unknown origin, judged without knowing the trigger.

Nobody knows the ASR. What can be measured is the accuracy on clean images that no defense worked with, and what is left of the
triggers that the search found in the model as it was given. The rule: of the defenses that cost at most three points of accuracy on
the validation images, the one that leaves the least of the strongest trigger; where none lowers it by ten points, none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmark.doctor.signs import KINDS, Signs, effect, index
from benchmark.run.own_model import Opened, defended, victim_of
from defenses.neural_cleanse import Patch
from models.backbone import Network
from models.images import ImageSet

__all__ = ["COSTS", "LOWERS", "Suspect", "Treated", "recommended", "suspects", "treated"]

COSTS = 0.03
"""Accuracy on the validation images that a recommended defense may cost (ours)."""
LOWERS = 0.10
"""What it must take from the effect of the strongest trigger (ours)."""


@dataclass(frozen=True)
class Suspect:
    """The most suspicious trigger of a kind: of the class with the largest anomaly index, else the smallest one."""

    kind: str
    label: int
    trigger: Patch


@dataclass(frozen=True)
class Treated:
    """A defense's outcome.

    Attributes:
        name: of the defense; empty for the model as it was given.
        val_acc, test_acc: accuracies in [0, 1]; NaN where it ended without a model.
        effects: by kind, the share of test images of other classes that the trigger found before sends to its class.
        net: the model; None where it ended without one. reason: why.
    """

    name: str
    val_acc: float
    test_acc: float
    effects: dict[str, float]
    net: Network | None
    reason: str

    @property
    def worst(self) -> float:
        """The effect of the strongest trigger; NaN without a model."""
        return max(self.effects.values(), default=math.nan)


def suspects(signs: Signs) -> tuple[Suspect, ...]:
    """One trigger of every kind."""
    found = []
    for kind in KINDS:
        triggers = signs.triggers[kind]
        label = index(triggers)[1]
        if label < 0:
            label = min(range(len(triggers)), key=lambda one: triggers[one].size)
        found.append(Suspect(kind, label, triggers[label]))
    return tuple(found)


def _effects(net: Network, test: ImageSet, triggers: Sequence[Suspect]) -> dict[str, float]:
    return {one.kind: effect(net, test, one.kind, one.trigger, one.label) for one in triggers}


def treated(
    model: Opened, triggers: Sequence[Suspect], progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[Treated]:
    """The model as it was given, then every defense of its matrix on it.

    Args:
        progress: called before every defense with its name, how many are done, and of how many.
    """
    w, victim = model.data, victim_of(model.cells[0].scenario, model.data, model.net)
    before, val_acc = victim.scorer(victim.net), victim.scorer.val_acc(victim.net)
    found = [Treated("", val_acc, before.acc, _effects(victim.net, w.data.test, triggers), victim.net, "")]
    for number, cell in enumerate(model.cells):
        progress(cell.defense_label, number, len(model.cells))
        result, net = defended(cell, victim, w, before)
        effects = {} if net is None else _effects(net, w.data.test, triggers)
        val_acc = math.nan if net is None else victim.scorer.val_acc(net)  # also of those that choose without clean images
        found.append(Treated(result.defense, val_acc, result.score.acc, effects, net, result.reason))
    return found


def recommended(found: Sequence[Treated]) -> Treated | None:
    """The defense that the rule above names; None where it names none. ``found``: as :func:`treated` gives it."""
    given, *others = found
    accurate = [one for one in others if one.net is not None and one.val_acc >= given.val_acc - COSTS]
    able = [one for one in accurate if one.worst <= given.worst - LOWERS]
    return min(able, key=lambda one: (one.worst, -one.val_acc), default=None)
