"""The gate's second half: which victims are compared with published ones, and what comes of it."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

import benchmark
from attacks.badnets import BadNets
from attacks.base import Plan
from benchmark.datasets import DatasetSpec
from benchmark.literature import Reference, compared, protocol_differs, reference, verdict
from benchmark.matrix import Frozen, Scenario, find_matrix, load_matrix
from benchmark.metrics import Score
from models.extractors import Supervised
from models.resnet import PreActResNet18
from models.training import Recipe

PUBLISHED = Scenario(
    DatasetSpec(source="cifar10"), 0.05, PreActResNet18(width=64, hidden=0), "net", Recipe(crop=4, flip=True), BadNets(), "badnets",
    Plan(rate=0.1), 0,
)  # fmt: skip


def test_the_published_protocol_has_its_figure() -> None:
    assert protocol_differs(PUBLISHED) == ""
    assert reference(PUBLISHED) == Reference("cifar10", 91.32, 95.03, 4.67)
    said, words = compared(PUBLISHED, Score(0.915, 0.951, 0.04))
    assert (said, words) == ("PASS", "literature: PASS (published ACC 91.3, ASR 95.0)")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dataset": DatasetSpec(source="cifar10-q95")}, "data set cifar10-q95"),
        ({"dataset": DatasetSpec(source="cifar10", train_limit=10000)}, "part of the data set"),
        ({"backbone": PreActResNet18(width=32, hidden=0)}, "another network"),
        ({"backbone": PreActResNet18(width=64, hidden=128)}, "another network"),
        ({"frozen": Frozen(Supervised(), "x")}, "another network"),
        ({"attack": BadNets(size=4)}, "settings differ"),
        ({"plan": Plan(rate=0.1, target=3)}, "settings differ"),
        ({"recipe": Recipe(epochs=99)}, "another recipe"),
        ({"attack": None}, "no attack"),
        ({"plan": Plan(rate=0.07)}, "nobody published this attack at 7 %"),
    ],
)
def test_a_difference_of_protocol_is_no_reference(change: dict[str, object], why: str) -> None:
    scenario = dataclasses.replace(PUBLISHED, **change)  # type: ignore[arg-type]
    assert reference(scenario) is None
    said, words = compared(scenario, Score(0.9, 0.95, 0.0))
    assert said == "no reference"
    assert why in words


@pytest.mark.parametrize(
    ("acc", "asr", "published", "rate", "expected"),
    [
        (91.3, 95.0, (91.3, 95.0), 0.1, "PASS"),
        (89.8, 90.0, (91.3, 95.0), 0.1, "PASS"),  # exactly 1.5 and 5 points short
        (89.7, 95.0, (91.3, 95.0), 0.1, "WARN"),
        (91.3, 89.9, (91.3, 95.0), 0.1, "WARN"),
        (91.3, 79.9, (91.3, 95.0), 0.1, "FAIL"),  # more than three times 5
        (86.7, 95.0, (91.3, 95.0), 0.1, "FAIL"),  # more than three times 1.5
        (93.0, 41.0, (93.0, 50.0), 0.1, "WARN"),  # tolerance 0.1 * 50 + 3 = 8
        (93.0, 42.0, (93.0, 50.0), 0.1, "PASS"),
        (93.0, 60.0, (93.0, 74.7), 0.01, "PASS"),  # 15 points at low rates
        (93.0, 2.0, (93.0, 12.0), 0.01, "PASS"),  # expected not to implant
        (93.0, 31.0, (93.0, 12.0), 0.01, "WARN"),
        (93.0, 90.0, (93.0, 12.0), 0.01, "FAIL"),
    ],
)
def test_verdicts(acc: float, asr: float, published: tuple[float, float], rate: float, expected: str) -> None:
    assert verdict(Score(acc / 100, asr / 100, 0.0), Reference("cifar10", *published, 0.0), rate) == expected


def test_gtsrb_is_held_to_one_point() -> None:
    assert verdict(Score(0.975, 0.99, 0.0), Reference("gtsrb", 98.5, 99.0, 0.0), 0.1) == "PASS"
    assert verdict(Score(0.974, 0.99, 0.0), Reference("gtsrb", 98.5, 99.0, 0.0), 0.1) == "WARN"


def test_the_table_holds_shares_of_a_hundred_once_each_and_no_figure_known_to_be_wrong() -> None:
    with (Path(benchmark.__file__).parent / "published" / "undefended.csv").open() as file:
        lines = list(csv.DictReader(file))
    keys = [(line["dataset"], line["backbone"], line["attack"], line["rate"]) for line in lines]
    assert len(set(keys)) == len(keys) > 300
    assert all(0 <= float(line[name]) <= 100 for line in lines for name in ("acc", "asr", "ra"))
    assert all(float(line["asr"]) + float(line["ra"]) <= 100.5 for line in lines)
    assert not [key for key in keys if key[1:3] == ("vgg19-bn", "lf")]
    assert not [key for key in keys if key[0] == "cifar10" and key[2] in ("lc", "sig") and key[3] == "0.1"]


def test_the_matrix_of_the_literatures_protocol_is_compared() -> None:
    scenarios = load_matrix(find_matrix("cifar10")).scenarios
    found = {(s.backbone.name, s.attack_label) for s in scenarios if reference(s) is not None}
    assert ("preact-resnet18", "badnets 10 %") in found
    assert ("vgg19-bn", "blended 1 %") in found
    assert ("preact-resnet18", "wanet 5 %") in found
