"""The gate's second half: which victims are compared with published ones, and what comes of it."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

import benchmark
from attacks import ATTACKS
from attacks.badnets import BadNets
from attacks.base import Plan
from attacks.wanet import WaNet
from benchmark.data.datasets import DatasetSpec
from benchmark.rules.metrics import Score
from benchmark.run.literature import PARAMETERS, Reference, compared, differences, nearest, reference, verdict
from benchmark.settings.cells import Frozen, Scenario
from benchmark.settings.load import find_matrix, load_matrix
from models.extractors import Supervised
from models.recipe import Recipe
from models.resnet import PreActResNet18
from models.vgg import VGG11BN, VGG19BN

PUBLISHED = Scenario(
    DatasetSpec(source="cifar10"), 0.05, PreActResNet18(width=64, hidden=0), "net", Recipe(crop=4, flip=True), BadNets(), "badnets",
    Plan(rate=0.1), 0,
)  # fmt: skip


def test_the_published_protocol_has_its_figure() -> None:
    assert differences(PUBLISHED) == ()
    assert reference(PUBLISHED) == Reference("cifar10", 91.32, 95.03, 4.67)
    said, words = compared(PUBLISHED, Score(0.915, 0.951, 0.04))
    assert (said, words) == ("PASS", "literature: PASS (published ACC 91.3, ASR 95.0)")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dataset": DatasetSpec(source="cifar10", train_limit=10000)}, "part of the data set"),
        ({"backbone": PreActResNet18(width=32, hidden=0)}, "another network (11.2 M parameters, ours 2.8 M)"),
        ({"backbone": PreActResNet18(width=64, hidden=128)}, "another network"),
        ({"frozen": Frozen(Supervised(), "x")}, "given features"),
        ({"attack": BadNets(size=4)}, "other settings"),
        ({"plan": Plan(rate=0.1, target=3)}, "other labels"),
        ({"recipe": Recipe(epochs=99)}, "another recipe"),
        ({"plan": Plan(rate=0.06)}, "another rate (5 %, ours 6 %)"),
    ],
)
def test_the_nearest_figure_is_printed_with_what_differs_and_judges_nothing(change: dict[str, object], why: str) -> None:
    scenario = dataclasses.replace(PUBLISHED, **change)  # type: ignore[arg-type]
    assert reference(scenario) is None
    result, words = compared(scenario, Score(0.9, 0.95, 0.0))
    assert result == "no reference"
    assert words.startswith("nearest reference: ACC 9")
    assert why in words.split("; differs: ")[1]
    assert len(differences(scenario)) == 1


def test_every_difference_is_named() -> None:
    scenario = dataclasses.replace(
        PUBLISHED, backbone=VGG19BN(width=64, hidden=0), attack=WaNet(), attack_label="wanet", recipe=Recipe(epochs=2),
        plan=Plan(rate=0.1, target=1),
    )  # fmt: skip
    named = [words.split(" (")[0] for words in differences(scenario)]
    assert named == ["another network", "another recipe of training", "other labels"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dataset": DatasetSpec(source="cifar10-q95")}, "no published figures for the data set cifar10-q95"),
        ({"backbone": VGG11BN(width=64, hidden=0)}, "nobody published this attack on vgg11-bn"),
        ({"attack": None}, "no attack"),
    ],
)
def test_without_a_published_figure_there_is_no_reference(change: dict[str, object], why: str) -> None:
    scenario = dataclasses.replace(PUBLISHED, **change)  # type: ignore[arg-type]
    assert reference(scenario) is None
    assert compared(scenario, Score(0.9, 0.95, 0.0)) == ("no reference", f"no literature reference: {why}")


def test_the_published_networks_by_their_layers() -> None:
    """Parameters of torchvision's VGG-19-BN and of PreAct-ResNet-18, layer by layer."""
    plan = [64, 64, 128, 128, *[256] * 4, *[512] * 8]
    features = sum(9 * before * after + after + 2 * after for before, after in zip([3, *plan], plan, strict=False))
    hidden = (512 * 7 * 7 * 4096 + 4096) + (4096 * 4096 + 4096)
    assert PARAMETERS["vgg19-bn"] == (features + hidden, 4096)
    blocks, width = 0, 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            blocks += 2 * width + 9 * width * out + 2 * out + 9 * out * out + (width * out if block == 0 and out > 64 else 0)
            width = out
    assert PARAMETERS["preact-resnet18"] == (3 * 9 * 64 + blocks, 512)


def test_156_figures_of_a_larger_vgg_and_those_of_other_recipes_and_triggers_judge_nothing() -> None:
    made = {attack.name: attack for attack in ATTACKS}

    def scenario(source: str, net: str, attack: str, rate: float) -> Scenario:
        recipe = Recipe(epochs=50 if source == "gtsrb" else 100, crop=4, flip=source == "cifar10")
        backbone = VGG19BN(width=64, hidden=0) if net == "vgg19-bn" else PreActResNet18(width=64, hidden=0)
        return Scenario(DatasetSpec(source=source), 0.05, backbone, net, recipe, made[attack](), attack, Plan(rate=rate), 0)

    with (Path(benchmark.__file__).parent / "analysis" / "published" / "undefended.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert sum(line["backbone"] == "vgg19-bn" for line in lines) == 156
    judged = set()
    for line in lines:
        if line["dataset"] == "tiny-imagenet":
            continue
        one = scenario(line["dataset"], line["backbone"], line["attack"], float(line["rate"]))
        figures = (float(line[name]) for name in ("acc", "asr", "ra"))
        assert nearest(one) == (float(line["rate"]), Reference(line["dataset"], *figures))
        if reference(one) is not None:
            judged.add((line["dataset"], line["backbone"], line["attack"]))
        elif line["backbone"] == "vgg19-bn":
            assert "another network (1" in compared(one, Score(0.9, 0.9, 0.0))[1]
    plain = {"badnets", "blended", "ssba", "lc", "sig"}
    assert judged == {(line["dataset"], "preact-resnet18", line["attack"]) for line in lines
                      if line["dataset"] in ("cifar10", "cifar100", "gtsrb") and line["backbone"] == "preact-resnet18"
                      and (line["attack"] in plain or (line["dataset"], line["attack"]) == ("cifar10", "lf"))}  # fmt: skip
    words = compared(scenario("cifar10", "vgg19-bn", "badnets", 0.1), Score(0.9, 0.9, 0.0))[1]
    assert words.endswith("; differs: another network (139.6 M parameters, ours 20.0 M)")
    assert "learning rate 0.01 throughout" in compared(scenario("cifar10", "preact-resnet18", "bpp", 0.1), Score(0.9, 0.9, 0.0))[1]
    assert "an apple" in compared(scenario("cifar10", "preact-resnet18", "trojannn", 0.1), Score(0.9, 0.9, 0.0))[1]
    assert "another tint" in compared(scenario("gtsrb", "preact-resnet18", "lf", 0.1), Score(0.9, 0.9, 0.0))[1]


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
    with (Path(benchmark.__file__).parent / "analysis" / "published" / "undefended.csv").open() as file:
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
    assert ("preact-resnet18", "blended 1 %") in found
    assert not {pair for pair in found if pair[0] == "vgg19-bn" or pair[1].startswith("wanet")}
