"""The attack-validity gate's second half: does an attack come out as in the literature?

The first half (:func:`benchmark.metrics.gate`) asks whether an attack worked at all. This one puts the undefended victim beside
the published figure of the same data set, backbone, attack and rate, where the protocol is the same, and elsewhere says why not.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from benchmark.matrix import Scenario
from benchmark.metrics import Score
from models.training import Recipe

__all__ = ["NO_REFERENCE", "Reference", "compared", "protocol_differs", "reference", "verdict"]

NO_REFERENCE = "no reference"
EPOCHS = {"cifar10": 100, "cifar100": 100, "gtsrb": 50}
"""BackdoorBench's length of training by data set (Tiny-ImageNet's schedule has no counterpart here)."""
ACC_TOLERANCE = {"cifar10": 1.5, "cifar100": 1.5, "gtsrb": 1.0}
"""By how many points ACC may lie below the published one."""
LOW_RATE, LOW_RATE_TOLERANCE = 0.01, 15.0
"""At 1 % and less one training says little: ASR may lie this far below."""
HARDLY, NOT_IMPLANTED = 20.0, 30.0
"""Where the published ASR is below ``HARDLY``, the attack is expected not to implant: ours should stay below ``NOT_IMPLANTED``."""


@dataclass(frozen=True)
class Reference:
    """A published undefended victim, in percent."""

    dataset: str
    acc: float
    asr: float
    ra: float


@functools.lru_cache(maxsize=1)
def _table() -> dict[tuple[str, str, str, float], Reference]:
    with (Path(__file__).parent / "published" / "undefended.csv").open(encoding="utf-8", newline="") as file:
        return {
            (line["dataset"], line["backbone"], line["attack"], float(line["rate"])): Reference(
                line["dataset"], float(line["acc"]), float(line["asr"]), float(line["ra"])
            )
            for line in csv.DictReader(file)
        }


def protocol_differs(scenario: Scenario) -> str:
    """Why a scenario's victim cannot be put beside a published one; empty when it can.

    One difference is overlooked: the clean budget is held out of the attacker's set here, which is as much smaller.
    """
    source, backbone, attack, recipe = scenario.dataset.source, scenario.backbone, scenario.attack, scenario.recipe
    if attack is None:
        return "no attack"
    if source not in EPOCHS:
        return f"no published figures for the data set {source}"
    data = scenario.dataset
    if data.train_limit or data.test_limit or data.size:
        return "part of the data set, or resized"
    if scenario.frozen or backbone.width != 64 or backbone.hidden:
        return "another network"
    if attack != type(attack)() or scenario.plan.label_mode != "all-to-one" or scenario.plan.target != 0:
        return "the attack's settings differ"
    # The recipe's defaults are the rest of theirs; they mirror images of CIFAR-10 alone. How products are rounded is no protocol.
    if dataclasses.replace(recipe, precision="reference") != Recipe(epochs=EPOCHS[source], crop=4, flip=source == "cifar10"):
        return "another recipe of training"
    return ""


def reference(scenario: Scenario) -> Reference | None:
    """The published figure of a scenario's victim, if its protocol is the same and somebody published one."""
    if protocol_differs(scenario) or scenario.attack is None:
        return None
    return _table().get((scenario.dataset.source, scenario.backbone.name, scenario.attack.name, scenario.plan.rate))


def verdict(victim: Score, published: Reference | None, rate: float) -> str:
    """``PASS``, ``WARN`` (within three times the tolerance), ``FAIL`` or ``no reference``.

    Tolerance of ASR below the published one: ``max(5, 0.1 (100 - published) + 3)`` points, 15 at low rates; of ACC: 1.5, GTSRB 1.
    """
    if published is None:
        return NO_REFERENCE
    acc, asr = 100 * victim.acc, 100 * victim.asr
    short = published.acc - acc
    allowed = ACC_TOLERANCE[published.dataset]
    if published.asr < HARDLY:
        missing, tolerance = asr - NOT_IMPLANTED, 0.0
    else:
        missing = published.asr - asr
        tolerance = LOW_RATE_TOLERANCE if rate <= LOW_RATE else max(5.0, 0.1 * (100 - published.asr) + 3)
    if missing <= tolerance + 1e-9 and short <= allowed + 1e-9:
        return "PASS"
    if missing <= 3 * max(tolerance, 5.0) + 1e-9 and short <= 3 * allowed + 1e-9:
        return "WARN"
    return "FAIL"


def compared(scenario: Scenario, victim: Score) -> tuple[str, str]:
    """The verdict, and it in words: "literature: PASS (published ACC 91.3, ASR 95.0)", or why there is no reference."""
    published = reference(scenario)
    said = verdict(victim, published, scenario.plan.rate)
    if published is not None:
        return said, f"literature: {said} (published ACC {published.acc:.1f}, ASR {published.asr:.1f})"
    why = protocol_differs(scenario) or f"nobody published this attack at {100 * scenario.plan.rate:g} %"
    return said, f"no literature reference: {why}"
