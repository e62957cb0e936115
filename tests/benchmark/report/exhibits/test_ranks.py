"""Rank tests, and the comparison with fine-tuning, over the fourteen attacks of cifar10-cpu: made-up rows, and the same by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from benchmark.analysis import rank_tests, stats
from benchmark.analysis.intervals import Interval
from benchmark.report.exhibits import ranks, seminal
from benchmark.report.exhibits.evidence import Missing, Source
from benchmark.report.figures import Dots
from benchmark.settings.cells import Cell
from benchmark.settings.load import find_matrix, load_matrix
from tests.benchmark.report.exhibits.test_exhibits import called, made_up, show, undefended

Triple = tuple[float, float, float]
NAMES = ("fine-tuning", "fine-pruning", "anp", "clp", "benign-salience")
ATTACKS = list(dict.fromkeys(cell.scenario.attack_label for cell in load_matrix(find_matrix("cifar10-cpu")).cells
                             if cell.scenario.attack is not None))  # fmt: skip
IMPLANTED = 14


def by_attack(base: dict[str, float], spread: float = 0.0) -> Callable[[Cell, float], Triple]:
    """RA of an entry: its base, moved by the attack and, within it, by the entry; the same along the dial."""

    def figures(cell: Cell, place: float) -> Triple:
        label = cell.defense_label
        if label == "none":
            return undefended(cell)
        number = ATTACKS.index(cell.scenario.attack_label)
        moved = spread * (((7 * number + 5 * list(base).index(label)) % 11) / 10 - 0.5) if label in base else 0.0
        ra = base.get(label, 0.1) + moved + 0.01 * cell.scenario.seed
        return 0.95, 0.96 - ra, ra

    return figures


def source(base: dict[str, float], spread: float = 0.0, attacks: int = 99) -> Source:
    """The ResNet of the matrix alone, so that an attack is a scenario."""
    keep = called(*base)

    def wanted(cell: Cell) -> bool:
        own = cell.scenario.attack_label in ATTACKS[:attacks] and cell.scenario.backbone_label.startswith("resnet")
        return own and keep(cell)

    return made_up("cifar10-cpu", by_attack(base, spread), keep=wanted)


def values(given: Source, defense: str) -> list[float]:
    """Means over seeds of RA, attack by attack, from the rows of the validation rule (or the default, without clean images)."""
    rule = "default" if defense in ("clp", "none") else "validation"
    found: dict[str, list[float]] = {}
    for attack, own, scope, selection, ra in zip(*(given.rows[name] for name in ("attack", "defense", "scope", "selection", "ra")),
                                                 strict=True):  # fmt: skip
        if (own, scope, selection) == (defense, "whole", rule):
            found.setdefault(attack, []).append(ra)
    return [sum(found[attack]) / len(found[attack]) for attack in ATTACKS if attack in found]


def slow_p(differences: list[float]) -> float:
    """Two-sided signed-rank test, sign pattern by sign pattern."""
    kept = [round(value, 6) for value in differences if round(value, 6)]
    order = [sum(abs(b) < abs(a) for b in kept) + (sum(abs(b) == abs(a) for b in kept) + 1) / 2 for a in kept]
    observed = sum(rank for rank, value in zip(order, kept, strict=True) if value > 0)
    sums = np.zeros(1)
    for rank in order:
        sums = np.concatenate([sums, sums + rank])
    return min(1.0, 2 * min(float((sums <= observed).mean()), float((sums >= observed).mean()))) if kept else 1.0


BASE = {"fine-tuning": 0.40, "fine-pruning": 0.42, "anp": 0.46, "benign-salience": 0.30}


def test_the_matrix_has_enough_attacks_for_rank_tests() -> None:
    assert len(ATTACKS) == IMPLANTED >= rank_tests.MIN_BLOCKS


def test_ranks_pairs_and_counts_by_hand() -> None:
    given = source(BASE, spread=0.15)
    shown = show(ranks, given)
    table = shown.frame
    by = {name: values(given, name) for name in BASE}
    mean = {name: np.mean([1 + sum(by[other][n] > by[name][n] for other in BASE)
                           + 0.5 * sum(by[other][n] == by[name][n] for other in BASE if other != name) for n in range(IMPLANTED)])
            for name in BASE}  # fmt: skip
    assert len(table) == 6
    raw = {}
    for _, line in table.iterrows():
        one, two = line["defense"], line["other"]
        assert (line["rank"], line["rank_other"]) == pytest.approx((mean[one], mean[two]))
        assert line["rank"] <= line["rank_other"]
        gaps = [a - b for a, b in zip(by[one], by[two], strict=True)]
        assert line["difference"] == pytest.approx(np.mean(gaps))
        won, lost = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
        assert (line["won"], line["tied"], line["lost"]) == (won, len(gaps) - won - lost, lost)
        raw[one, two] = slow_p(gaps)
        far = mean[two] - mean[one] > rank_tests.critical_difference(4, IMPLANTED)
        assert line["nemenyi"] == ("yes" if far else "no")
    ordered = sorted(raw, key=raw.__getitem__)
    floor = 0.0
    for step, pair in enumerate(ordered):
        floor = max(floor, min(1.0, (6 - step) * raw[pair]))
        assert float(table[(table["defense"] == pair[0]) & (table["other"] == pair[1])]["p"].iloc[0]) == pytest.approx(floor)
    assert set(table["nemenyi"]) == {"yes", "no"}
    assert f"{IMPLANTED} implanted scenarios are the blocks, and 4 entries with 6 pairs need 11" in shown.answer
    assert isinstance(shown.figure, Dots)
    (panel,) = shown.figure.panels
    best = sorted(mean, key=mean.__getitem__)
    assert panel.names[1:] == tuple(best)
    drawn = dict(panel.series)
    assert [part.mean for part in drawn["average rank"][1:]] == pytest.approx([mean[name] for name in best])
    assert drawn["critical difference"][0].high - 1 == pytest.approx(rank_tests.critical_difference(4, IMPLANTED))
    joined = {frozenset(pair) for group in panel.joined for pair in itertools.combinations((panel.names[at] for at in group), 2)}
    assert joined == {frozenset((line["defense"], line["other"])) for _, line in table.iterrows() if line["nemenyi"] == "no"}


def test_entries_that_changed_nothing_are_marked_in_table_text_and_figure() -> None:
    given = source(BASE, spread=0.1)
    at = (given.rows["defense"] == "anp") & given.rows["attack"].isin(ATTACKS[:3])
    shown = show(ranks, dataclasses.replace(given, rows=given.rows.assign(mark=np.where(at, "no change", ""))))
    assert "rest on cells in which nothing was changed: anp no change in 6 of 28." in shown.answer
    idle = shown.frame["idle"][(shown.frame["defense"] == "anp") | (shown.frame["other"] == "anp")]
    assert set(idle) == {"anp: no change in 6 of 28"}
    assert (shown.frame["idle"] != "").sum() == 3
    assert isinstance(shown.figure, Dots)
    assert "anp (no change in 6 of 28)" in shown.figure.panels[0].names
    assert "nothing was changed" not in show(ranks, given).answer


def test_too_few_scenarios_and_entries_that_miss_one() -> None:
    with pytest.raises(Missing, match="takes 11 implanted scenarios, here 10"):
        show(ranks, source(BASE, attacks=10))
    with pytest.raises(Missing, match="three entries"):
        show(ranks, source({"fine-tuning": 0.4, "anp": 0.5}))
    given = source(BASE, spread=0.1)
    gone = (given.rows["defense"] == "anp") & (given.rows["attack"] == ATTACKS[0])
    told = show(ranks, dataclasses.replace(given, rows=given.rows[~gone]))
    assert "Left out, because a scenario is missing: anp." in told.answer
    assert len(told.frame) == 3
    level = show(ranks, source(dict.fromkeys(BASE, 0.4), spread=0.1))
    assert "so no pair counts as different" in level.answer
    assert set(level.frame["nemenyi"]) == {"no"}


# -- fine-tuning, and the untouched model --------------------------------------------------------------------------------------


def test_differences_to_fine_tuning_and_to_the_untouched_model_by_hand() -> None:
    given = source({**BASE, "clp": 0.55, "benign-salience": 0.25}, spread=0.3)
    table = show(seminal, given).frame
    assert list(dict.fromkeys(table["against"])) == ["fine-tuning", "the untouched model"]
    assert set(table.loc[table["against"] == "fine-tuning", "defense"]) == {"fine-pruning", "anp", "clp", "benign-salience"}
    for against, control in (("fine-tuning", "fine-tuning"), ("the untouched model", "none")):
        mine = table[table["against"] == against]
        raw = []
        for _, line in mine.iterrows():
            gaps = [a - b for a, b in zip(values(given, line["defense"]), values(given, control), strict=True)]
            assert line["ra"] == pytest.approx(np.mean(gaps))
            assert (line["scenarios"], line["pairs"]) == (IMPLANTED, 2 * IMPLANTED)
            raw.append(slow_p(gaps))
            draw = np.random.default_rng(1).integers(0, IMPLANTED, (20000, IMPLANTED))
            low, high = np.quantile(np.array(gaps)[draw].mean(axis=1), [0.025, 0.975])
            # These gaps take few values, so the ends move in steps.
            assert (line["ra_low"], line["ra_high"]) == pytest.approx((low, high), abs=0.025)
        adjusted = [max(min(1.0, (len(raw) - step) * p) for step, p in enumerate(sorted(raw)) if p <= own) for own in raw]
        assert list(mine["p"]) == pytest.approx(adjusted)
        for (_, line), p in zip(mine.iterrows(), adjusted, strict=True):
            sign = "beats" if line["ra_low"] > 0 else "loses to" if line["ra_high"] < 0 else "not distinguishable"
            assert line["verdict"] == (sign if p < 0.05 else "not distinguishable")
    assert set(table["verdict"]) >= {"beats", "loses to"}


@pytest.mark.parametrize(("low", "high", "p", "words"), [
    (0.01, 0.1, 0.04, "beats"), (-0.1, -0.01, 0.04, "loses to"), (0.01, 0.1, 0.06, "not distinguishable"),
    (-0.01, 0.1, 0.01, "not distinguishable"), (math.nan, math.nan, 0.01, "not distinguishable"),
    (0.01, 0.1, math.nan, "not distinguishable"),
])  # fmt: skip
def test_a_verdict_takes_the_interval_and_the_test(low: float, high: float, p: float, words: str) -> None:
    assert seminal.verdict_words(Interval((low + high) / 2, low, high), p) == words


def test_with_few_scenarios_nothing_can_be_distinguished_and_the_text_says_how_many_it_takes() -> None:
    told = show(seminal, source({"fine-tuning": 0.3, "anp": 0.9, "clp": 0.1}, attacks=4))
    assert set(told.frame["verdict"]) == {"not distinguishable"}
    assert "With 4 scenarios no difference among 2 can be significant; that takes 7." in told.answer
    given = source({"fine-tuning": 0.3, "anp": 0.9, "clp": 0.1})
    part = given.rows[(given.rows["defense"] != "clp") | given.rows["attack"].isin(ATTACKS[:2])]
    some = show(seminal, dataclasses.replace(given, rows=part)).answer
    assert "1 cannot be distinguished from it, 1 of them with fewer than the 7 scenarios that it takes." in some
    many = show(seminal, given)
    assert "With 14 scenarios" not in many.answer
    assert "Against fine-tuning on the same clean images: 1 of 2 post-training entries have a significantly higher" in many.answer
    assert "higher RA (anp (whole) +60.0" in many.answer
    assert "1 a significantly lower one (clp (whole) -20.0 points" in many.answer
    assert isinstance(many.figure, Dots)
    assert many.figure.panels[0].names == ("clp: loses to", "anp: beats")


def test_other_budgets_and_defenses_that_train_anew_are_left_out_and_losses_of_acc_are_named() -> None:
    keep = called("fine-tuning", "anp", "abl")

    def figures(cell: Cell, place: float) -> Triple:
        return undefended(cell) if cell.defense_label == "none" else (0.95 - 0.02 * (cell.defense_label == "anp"), 0.1, 0.5)

    given = made_up("cifar10-cpu", figures, keep=keep)
    table = show(seminal, given)
    assert set(table.frame["defense"]) == {"fine-tuning", "anp"}  # ABL is given no model
    assert "Of those with a higher RA, 2 lose ACC significantly" in table.answer
    other = given.rows.assign(clean_images=given.rows["clean_images"].where(given.rows["defense"] != "anp", 7))
    shown = seminal.frame(dataclasses.replace(given, rows=other))
    assert set(shown.loc[shown["against"] == "fine-tuning", "defense"]) == set()
    assert set(shown.loc[shown["against"] != "fine-tuning", "defense"]) == {"fine-tuning", "anp"}
    assert "Nothing is compared with fine-tuning." in show(seminal, dataclasses.replace(given, rows=other)).answer
    with pytest.raises(Missing, match="fine-tuning"):
        seminal.frame(made_up("cifar10-cpu", keep=called("abl")))
    assert stats.UNDEFENDED in seminal.AGAINST
