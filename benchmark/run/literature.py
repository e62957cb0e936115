"""The second half of the attack-validity gate: does an attack reach its published figures?

The first half (:func:`benchmark.rules.metrics.gate`) checks whether the attack worked at all. This one compares the undefended
victim with the published figure of the same data set, network, recipe, attack, labels and rate. Where the nearest published figure
differs in any of these, it is printed with the differences, and there is no verdict.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from dataclasses import dataclass

from benchmark.analysis.published import FOLDER
from benchmark.rules.metrics import Score
from benchmark.settings.cells import Scenario
from models.backbone import Backbone
from models.recipe import Recipe

__all__ = ["NO_REFERENCE", "Reference", "compared", "differences", "nearest", "reference", "verdict"]

NO_REFERENCE = "no reference"
EPOCHS = {"cifar10": 100, "cifar100": 100, "gtsrb": 50}
"""BackdoorBench's length of training by data set (Tiny-ImageNet's schedule has no counterpart here)."""
CLASSES = {"cifar10": 10, "cifar100": 100, "gtsrb": 43}
PARAMETERS = {"preact-resnet18": (11_166_016, 512), "vgg19-bn": (139_581_248, 4096)}
"""Parameters of the published networks below their last layer, and that layer's inputs. BackdoorBench builds ``vgg19-bn`` with
``torchvision.models.vgg19_bn``, whose two hidden layers of 4,096 units hold 119.5 M of them; ours has a linear head."""
_CONSTANT = "learning rate 0.01 throughout, crops from 5 pixels of padding, rotations of 10 degrees"
RECIPES = {"wanet": _CONSTANT, "input-aware": _CONSTANT, "bpp": _CONSTANT}
"""Attacks that BackdoorBench trains by another recipe than the rest: ``random_crop: 5``, ``random_rotation: 10`` and learning rates
that first fall after 100 epochs (config/attack/wanet, inputaware and bpp, default.yaml; commits 59f6cda and 3f4b1a9)."""
TRIGGERS = {
    "trojannn": (tuple(EPOCHS), "another patch (an apple, whose values wrap around beyond 255)"),
    "lf": (("cifar100", "gtsrb"), "another tint (ours is that of CIFAR-10)"),
}
"""Attacks whose published trigger on these data sets is another one. The apple: :mod:`attacks.trojannn`. Peaks in red, green and
blue of BackdoorBench's pattern files, of 255: CIFAR-10 18, 0, 51, which is ours; CIFAR-100 51, 37, 2; GTSRB 51, 5, 21."""
ACC_TOLERANCE = {"cifar10": 1.5, "cifar100": 1.5, "gtsrb": 1.0}
"""ACC may be lower than the published one by this many points."""
LOW_RATE, LOW_RATE_TOLERANCE = 0.01, 15.0
"""At poisoning rates up to 1 % the ASR varies from one training to the next: it may be lower by this many points."""
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
    with (FOLDER / "undefended.csv").open(encoding="utf-8", newline="") as file:
        return {
            (line["dataset"], line["backbone"], line["attack"], float(line["rate"])): Reference(
                line["dataset"], float(line["acc"]), float(line["asr"]), float(line["ra"])
            )
            for line in csv.DictReader(file)
        }


@functools.lru_cache(maxsize=64)
def _parameters(backbone: Backbone, classes: int) -> int:
    network = backbone.build(classes, (3, 32, 32), [0.5] * 3, [0.25] * 3, 0)
    return sum(values.numel() for values in network.parameters())


def nearest(scenario: Scenario) -> tuple[float, Reference] | None:
    """The poisoning rate and figure published for a scenario's data set, backbone and attack; of several rates the nearest one (as
    a ratio). None where nothing is published."""
    if scenario.attack is None:
        return None
    kind = (scenario.dataset.source, scenario.backbone.name, scenario.attack.name)
    rates = [rate for *key, rate in _table() if tuple(key) == kind]
    if not rates or not scenario.plan.rate > 0 or kind[0] not in EPOCHS:
        return None
    rate = min(rates, key=lambda rate: abs(math.log(rate / scenario.plan.rate)))
    return rate, _table()[*kind, rate]


def differences(scenario: Scenario) -> tuple[str, ...]:
    """The differences between a scenario's protocol and that of its nearest published figure; empty where there are none.

    One difference is not counted: here the clean budget is taken out of the attacker's training set, which is smaller by as much.
    """
    found = nearest(scenario)
    if found is None or scenario.attack is None:
        return ()
    data, attack, plan, source = scenario.dataset, scenario.attack, scenario.plan, scenario.dataset.source
    sources, trigger = TRIGGERS.get(attack.name, ((), ""))
    differs = (
        "part of the data set, or resized" if data.train_limit or data.test_limit or data.size else "",
        _other_network(scenario),
        _other_recipe(scenario),
        "other settings of the attack" if attack != type(attack)() else "",
        trigger if source in sources else "",
        "other labels (all-to-one, target 0)" if plan.label_mode != "all-to-one" or plan.target != 0 else "",
        f"another rate ({100 * found[0]:g} %, ours {100 * plan.rate:g} %)" if found[0] != plan.rate else "",
    )
    return tuple(text for text in differs if text)


def _other_network(scenario: Scenario) -> str:
    (body, width), classes = PARAMETERS[scenario.backbone.name], CLASSES[scenario.dataset.source]
    theirs, ours = body + (width + 1) * classes, _parameters(scenario.backbone, classes)
    if scenario.frozen:
        return "a head on given features"
    return f"another network ({theirs / 1e6:.1f} M parameters, ours {ours / 1e6:.1f} M)" if ours != theirs else ""


def _other_recipe(scenario: Scenario) -> str:
    source, attack = scenario.dataset.source, scenario.attack
    if attack is not None and attack.name in RECIPES:
        return f"another recipe of training ({RECIPES[attack.name]})"
    # All other values are the defaults of Recipe; BackdoorBench mirrors CIFAR-10 only. Precision is not part of a protocol.
    theirs = Recipe(epochs=EPOCHS[source], crop=4, flip=source == "cifar10")
    return "another recipe of training" if dataclasses.replace(scenario.recipe, precision="reference") != theirs else ""


def reference(scenario: Scenario) -> Reference | None:
    """The published figure of a scenario's victim; None where there is none or the protocol differs."""
    found = nearest(scenario)
    return None if found is None or differences(scenario) else found[1]


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
    """The verdict, and a sentence: "literature: PASS (published ACC 91.3, ASR 95.0)", the differences from the nearest figure, or
    why there is none."""
    published, found = reference(scenario), nearest(scenario)
    if published is not None:
        result = verdict(victim, published, scenario.plan.rate)
        return result, f"literature: {result} (published ACC {published.acc:.1f}, ASR {published.asr:.1f})"
    if found is not None:
        differs = "; ".join(differences(scenario))
        return NO_REFERENCE, f"nearest reference: ACC {found[1].acc:.1f}, ASR {found[1].asr:.1f}; differs: {differs}"
    if scenario.attack is None:
        why = "no attack"
    elif scenario.dataset.source not in EPOCHS:
        why = f"no published figures for the data set {scenario.dataset.source}"
    else:
        why = f"nobody published this attack on {scenario.backbone.name}"
    return NO_REFERENCE, f"no literature reference: {why}"
