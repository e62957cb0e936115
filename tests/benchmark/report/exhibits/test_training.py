"""One network trained in several ways: made-up rows, and the same figures by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from benchmark.report.exhibits import training
from benchmark.report.exhibits.evidence import Missing
from benchmark.settings.cells import Cell
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.settings.presets import recipes as recipe_presets
from models.recipe import Recipe
from tests.benchmark.report.exhibits.test_exhibits import made_up, show

Triple = tuple[float, float, float]
RANKED = {"fine-tuning": 0.3, "fine-pruning": 0.5, "clp": 0.2, "holder-pruning": 0.1, "pruning": 0.4}


def before(moves: dict[str, float]) -> Callable[[Cell], Triple]:
    """Undefended figures: seed 0 at ACC 0.94, seed 1 at 0.92, moved by the way of training."""
    return lambda cell: (0.94 - 0.02 * cell.scenario.seed + moves[cell.scenario.backbone_label], 0.99, 0.0)


def after(swapped: str) -> Callable[[Cell, float], Triple]:
    """Defended figures; under the label ``swapped`` the order of the defenses is reversed."""

    def figures(cell: Cell, place: float) -> Triple:
        ra = RANKED.get(cell.defense.name, 0.0)
        return 0.92, 0.1, 0.6 - ra if cell.scenario.backbone_label == swapped else ra

    return figures


def test_precisions_are_compared_pair_by_pair_and_by_the_order_of_the_defenses() -> None:
    moves = {"float32": 0.0, "tf32": 0.01, "bf16": -0.03}
    shown = show(training, made_up("precision", after("bf16"), before(moves), twin=lambda cell: 0.9))
    table = shown.frame.set_index(["attack", "trained"])
    for attack in ("badnets", "blended", "wanet"):
        for label, moved in moves.items():
            line = table.loc[(attack, label)]
            assert line["acc"] == pytest.approx(0.93 + moved)
            if label == "float32":
                assert line["span_acc"] == pytest.approx(0.02)
                assert line["span_asr"] == pytest.approx(0.0)
            else:
                assert line["d_acc"] == pytest.approx(moved)
    # 1 point lies within the 2 that the seeds span, 3 do not.
    tf32, bf16 = shown.answer.split("bf16 against")
    assert "all 3 attacks in ACC" in tf32
    assert "none of 3 attacks in ACC" in bf16
    assert "all 3 in ASR" in tf32
    # The order, by hand: of the pairs of defenses, those that agree minus those that do not.
    agree = sum((a - b) * (a - b) > 0 for a, b in combinations(RANKED.values(), 2))
    assert agree == 10
    assert "6 defenses by RA has a Kendall correlation of 1, and the best defense is the same" in tf32
    assert "6 defenses by RA has a Kendall correlation of -1, and the best defense differs" in bf16
    assert "between two different seeds the correlation is 1 on average across the two, and 1 within float32" in tf32
    assert "between two different seeds the correlation is -1 on average across the two, and 1 within float32" in bf16
    # No figure differs between seeds, so every difference is significant; fine-tuning has none: 0.6 - 0.3 is 0.3.
    assert "; with a defense, RA differs significantly for none of 6." in tf32
    assert "; with a defense, RA differs significantly for 5 of 6 (fine-pruning (whole) -40.0 points" in bf16
    for number, label in enumerate(moves):
        line = shown.frame[(shown.frame["defense"] == "clp (whole)") & (shown.frame["trained"] == label)].iloc[0]
        assert line["ra"] == pytest.approx(0.4 if label == "bf16" else 0.2)
        assert math.isnan(line["d_ra"]) if not number else line["d_ra"] == pytest.approx(0.2 if label == "bf16" else 0.0)
    titles = [panel.title for panel in shown.figure.panels]  # type: ignore[union-attr]
    assert titles == [*(f"{name} without a defense, difference to float32" for name in ("ACC", "ASR")), "RA after a defense"]


def test_an_order_that_seeds_alone_turn_round_is_told_from_one_that_the_training_does() -> None:
    turned = {"fine-tuning": 0.15, "fine-pruning": 0.35, "clp": 0.4, "holder-pruning": 0.45, "pruning": 0.22}

    def by_seed(cell: Cell, place: float) -> Triple:
        return 0.95, 0.1, (turned if cell.scenario.seed else RANKED).get(cell.defense.name, 0.0)

    shown = show(training, made_up("recipe", by_seed))
    names = ("fine-tuning", "fine-pruning", "clp", "holder-pruning", "holder-pruning", "pruning")
    expected = slow_tau([RANKED[name] for name in names], [turned[name] for name in names])
    assert -1 < expected < 0
    assert f"the correlation is {expected:.3g} on average across the two, and {expected:.3g} within 100 epochs" in shown.answer
    assert "has a Kendall correlation of 1," in shown.answer


def slow_tau(one: list[float], two: list[float]) -> float:
    """Kendall's tau-b, pair by pair."""
    pairs = list(combinations(range(len(one)), 2))
    signs = [((one[a] > one[b]) - (one[a] < one[b]), (two[a] > two[b]) - (two[a] < two[b])) for a, b in pairs]
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return sum(x * y for x, y in signs) / math.sqrt(untied[0] * untied[1])


def test_models_that_implant_one_way_only_are_in_no_order() -> None:
    def weak(cell: Cell) -> Triple:
        return (0.97, 0.99, 0.0) if cell.scenario.backbone_label == "100 epochs" else (0.97, 0.2, 0.7)

    shown = show(training, made_up("recipe", after("none"), weak))
    assert "Too few defenses have models that implanted both ways" in shown.answer
    assert set(shown.frame[shown.frame["trained"] == "fast"]["implanted"]) == {"0 of 2"}


def test_what_implants_one_way_only_counts_for_neither() -> None:
    def weak(cell: Cell) -> Triple:
        alone = cell.scenario.backbone_label == "fast" and cell.scenario.attack_label == "badnets"
        return (0.97, 0.2, 0.7) if alone else (0.97, 0.99, 0.0)

    def by_attack(cell: Cell, place: float) -> Triple:
        return 0.95, 0.1, 0.8 if cell.scenario.attack_label == "badnets" else RANKED.get(cell.defense.name, 0.0)

    shown = show(training, made_up("recipe", by_attack, weak))
    assert "Defenses are compared on 4 of 6 attacked models, which implanted every way (blended, wanet)." in shown.answer
    mine = shown.frame[shown.frame["defense"] == "clp (whole)"]
    assert list(mine["trained"]) == ["100 epochs", "fast"]
    assert list(mine["ra"]) == pytest.approx([0.2, 0.2])


def test_it_takes_one_network_trained_in_several_ways() -> None:
    with pytest.raises(Missing, match="several labels"):
        show(training, made_up("quick"))


@pytest.mark.parametrize("name", ["precision", "recipe"])
def test_the_matrices_change_the_training_alone(name: str) -> None:
    matrix, fast = load_matrix(find_matrix(name)), load_matrix(find_matrix("cifar10-fast"))
    nets = {str(scenario.backbone.spec()) for scenario in matrix.scenarios}
    assert nets == {str(scenario.backbone.spec()) for scenario in fast.scenarios}
    assert {scenario.seed for scenario in matrix.scenarios} == {0, 1, 2}
    # What is trained fast is what cifar10-fast trains: the store holds it once.
    shared = {str(scenario.spec()) for scenario in fast.scenarios}
    own = [scenario for scenario in matrix.scenarios if scenario.backbone_label in ("bf16", "fast")]
    assert len(own) == 9
    assert all(str(scenario.spec()) in shared for scenario in own)
    known = {(cell.defense_label, str(cell.defense.spec())) for cell in fast.cells}
    assert {(cell.defense_label, str(cell.defense.spec())) for cell in matrix.cells} <= known
    precisions = {dataclasses.asdict(scenario.recipe)["precision"] for scenario in matrix.scenarios}
    assert precisions == ({"reference", "tf32", "bf16"} if name == "precision" else {"reference", "bf16"})


@pytest.mark.parametrize("name", ["precision-small", "recipe-small"])
def test_the_small_matrices_change_the_training_alone(name: str) -> None:
    matrix, large = load_matrix(find_matrix(name)), load_matrix(find_matrix(name.removesuffix("-small")))
    assert len({str(scenario.backbone.spec()) for scenario in matrix.scenarios}) == 1
    recipes: dict[str, list[Any]] = {}
    for scenario in matrix.scenarios:
        recipes.setdefault(f"{scenario.attack_label} {scenario.seed}", []).append(scenario.recipe)
    assert len(recipes) == (9 if name == "precision-small" else 12)
    assert all(len(set(ways)) == 2 for ways in recipes.values())
    assert {cell.defense_label for cell in matrix.cells} == {cell.defense_label for cell in large.cells}
    first, other = recipes["badnets 0"]
    if name == "precision-small":
        assert dataclasses.replace(first, precision="bf16") == other
        quick = {str(scenario.spec()) for scenario in load_matrix(find_matrix("quick-all")).scenarios}
        assert all(str(s.spec()) in quick for s in matrix.scenarios if s.backbone_label == "float32"), "the store holds them once"
    else:
        assert first == Recipe(), "the literature's"
        fast = Recipe(**recipe_presets()["fast"])
        assert other == dataclasses.replace(fast, batch=128, lr=fast.lr * 128 / fast.batch, precision="reference")
