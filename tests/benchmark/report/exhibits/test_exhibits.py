"""Exhibits on rows made up for the shipped matrices: every answer both ways, figures against slow twins, the same bytes twice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from attacks.adaptive import Adaptive
from benchmark.__main__ import app
from benchmark.analysis import intervals, stats
from benchmark.report import figures, render, style
from benchmark.report.exhibits import (
    adaptive,
    alpha,
    benign,
    budget,
    canary,
    controls,
    detectors,
    elsewhere,
    evidence,
    extractor,
    natural,
    performance,
    pruned,
    rate,
    replaced,
    robust,
    scope,
    selection,
    significance,
    size,
    threshold,
    validity,
    wording,
)
from benchmark.report.exhibits import write as exhibits
from benchmark.report.exhibits.catalogue import EXHIBITS
from benchmark.report.exhibits.evidence import Answer, Exhibit, Missing, Source
from benchmark.report.exhibits.write import brief_table, caption, command, source_of, table_latex, table_markdown, write_exhibits
from benchmark.report.figures import Dots, Lines
from benchmark.run.outcome import cell_rows
from benchmark.settings.cells import Cell, Matrix
from benchmark.settings.load import find_matrix, load_matrix, matrix_names
from benchmark.storage import rows as files
from benchmark.storage.rows import Curve, Row, Timing
from benchmark.storage.store import Entry
from defenses.base import Knowledge
from defenses.holder_pruning import HolderPruning

Triple = tuple[float, float, float]
ROOT = Path(__file__).resolve().parents[4]
DIAL = (0.0, 0.25, 0.5, 0.75, 1.0)


class Shown(NamedTuple):
    """What an exhibit shows of a source."""

    answer: str
    frame: pd.DataFrame
    figure: Lines | Dots | None


def show(answer: Answer, source: Source) -> Shown:
    table = answer.frame(source)
    return Shown(exhibits.wording(Exhibit("", "", "", "", answer), table).text, table, answer.figure(table))


Figures = Callable[[Cell, float], tuple[float, float, float]]
"""(cell, place on its dial) -> (ACC, ASR, RA) of a candidate."""


def plain_figures(cell: Cell, place: float) -> tuple[float, float, float]:
    """More ASR goes the further the dial is turned, at some cost; a little different for every seed."""
    if cell.defense_label == "none":
        return undefended(cell)
    ra = 0.6 * place + 0.01 * cell.scenario.seed
    return 0.97 - 0.1 * place, 0.95 - 0.6 * place, min(ra, 0.05 + 0.6 * place)


def undefended(cell: Cell) -> tuple[float, float, float]:
    return 0.97, 0.97, 0.02


def made_up(
    name: str,
    figures: Callable[[Cell, float], Triple] = plain_figures,
    before: Callable[[Cell], Triple] = undefended,
    *,
    keep: Callable[[Cell], bool] = lambda cell: True,
    refuse: Callable[[Cell], str] = lambda cell: "",
    seconds: Callable[[Cell], float] = lambda cell: 1.0,
    twin: Callable[[Cell], float] = lambda cell: 0.975,
    again: float = 0.3,
    precision: float = 0.5,
    matrix: Matrix | None = None,
) -> Source:
    """Rows of a shipped matrix, as its first two seeds would give them had they scored what ``figures`` says; nothing is trained.

    ``again``: how much more ASR a trigger has that is found again on the defended model.
    """
    matrix = matrix or load_matrix(find_matrix("quick-all" if name == "quick" else name))  # with every defense
    every = []
    for cell in matrix.cells:
        if cell.scenario.seed > 1 or not keep(cell):
            continue
        own = before(cell)
        victim = {**dict(zip(("acc", "asr", "ra"), own, strict=True)), "status": "ok", "val_acc": own[0],
                  "realised_rate": cell.scenario.plan.rate, "train_size": 1000, "seconds": 5.0, "asr_benign": 0.02,
                  "acc_loss": twin(cell) - own[0], "acc_loss_se": 0.001}  # fmt: skip
        clean = Knowledge.CLEAN in cell.grants
        dial = cell.defense.dial_name != ""
        crafted = cell.scenario.attack is not None and cell.scenario.attack.needs_model_at_test
        candidates = []
        for place in DIAL if dial else (0.5,):
            acc, asr, ra = figures(cell, place)
            candidates.append({
                "dial": place if dial else None, "is_default": place == 0.5, "strength": place,
                "pruned": round(40 * place) if dial else 0, "note": "", "acc": acc, "asr": asr, "ra": ra, "val_acc": acc,
                "forward": 10, "backward": 0, "units": 40, "val_loss": own[0] - acc if clean else None,
                **({"isolated": 50, "precision": precision, "recall": 0.25} if cell.track.name == "train" else {}),
                **({"asr_recraft": min(1.0, asr + again), "ra_recraft": 0.0} if crafted else {}),
            })
        if Knowledge.MODEL in cell.defense.needs and cell.defense_label != "none":
            candidates.append({
                **dict.fromkeys(("dial", "knob")), "is_default": False, "starts": False, "kept": True, "changed": False,
                "strength": 0.0, "pruned": 0, "note": "", **dict(zip(("acc", "asr", "ra"), own, strict=True)), "val_acc": own[0],
                "forward": 0, "backward": 0, "units": 40, "val_loss": 0.0 if clean else None,
            })  # fmt: skip
        for number, candidate in enumerate(candidates if cell.canaried else ()):
            candidate |= {"canary_asr": [1 - 0.1 * number, 0.9], "canary_loss": [0.0, 0.0]}
        outcome = {
            "status": "ok", "reason": "", "candidates": candidates, "units": 40, "used": cell.defense.needs.words, "trained": False,
            "extractor_forward": 0, "extractor_backward": 0, "clean_images": round(1000 * (cell.budget or 0.2)),
            "seconds": seconds(cell), "peak_mib": 1.0, "victim_seconds": 5.0,
        }  # fmt: skip
        if refuse(cell):
            outcome |= {"status": "refused", "reason": refuse(cell), "candidates": [], "units": 0}
        benign = {"status": "ok", "acc": twin(cell)}
        every.append(cell_rows(matrix.name, "digits", cell, "f", Entry(outcome, {}), Entry(victim, {}), Entry(benign, {})))
    tables = (files.frame([row for result in every for row in result.rows]),
              files.frame([curve for result in every for curve in result.curves]),
              files.frame([result.timing for result in every]))  # fmt: skip
    return Source(name, *tables, matrix, {"datasets": {"digits": {"train": 1250, "test": 100}}})


def stored(source: Source, results: Path) -> None:
    """Writes a source as a run would."""
    folder = results / source.name
    kinds: tuple[tuple[type[Any], pd.DataFrame], ...] = (Row, source.rows), (Curve, source.curves), (Timing, source.timings)
    rows, curves, timings = ([kind(**record) for record in table.to_dict("records")] for kind, table in kinds)
    files.write(folder, rows, curves, timings)
    (folder / "matrix.toml").write_text(source.matrix.settings)
    (folder / "manifest.json").write_text('{"datasets": {"digits": {"train": 1250, "test": 100}}}')


def called(*names: str) -> Callable[[Cell], bool]:
    """Cells of these defenses (by label) and of none, on the first attack and backbone of their matrix alone."""
    return lambda cell: cell.defense_label in (*names, "none")


def steady(values: dict[str, float], other: float = 0.3) -> Callable[[Cell, float], Triple]:
    """RA by defense label or scope, the same all along the dial; ACC is kept."""

    def figures(cell: Cell, place: float) -> Triple:
        if cell.defense_label == "none":
            return undefended(cell)
        ra = values.get(cell.defense_label, values.get(cell.scope.value, other)) + 0.001 * cell.scenario.seed
        return 0.97, 0.98 - ra, ra

    return figures


# -- what every answer stands on -----------------------------------------------------------------------------------------------


def test_every_exhibit_reads_a_shipped_matrix_and_has_a_name_of_its_own() -> None:
    assert {exhibit.matrix for exhibit in EXHIBITS} <= set(matrix_names())
    assert len({exhibit.name for exhibit in EXHIBITS}) == len(EXHIBITS)
    assert {command(exhibit) for exhibit in EXHIBITS if exhibit.matrix == "quick"} == {"make benchmark"}
    assert {command(exhibit) for exhibit in EXHIBITS if exhibit.matrix == "alpha"} == {"make benchmark MATRIX=alpha"}


ASKED = sorted({(exhibit.answer.__name__.rpartition(".")[2], exhibit.matrix) for exhibit in EXHIBITS})


@pytest.mark.parametrize(("answer", "matrix"), ASKED, ids=["-".join(pair) for pair in ASKED])
def test_every_exhibit_answers_from_its_own_matrix(answer: str, matrix: str) -> None:
    exhibit = next(one for one in EXHIBITS if one.matrix == matrix and one.answer.__name__.endswith(f".{answer}"))
    source = made_up(matrix)
    source = dataclasses.replace(source, elsewhere=(dataclasses.replace(source, name=f"{matrix}-other"),))
    table = exhibit.answer.frame(source)
    written = exhibits.wording(exhibit, table)
    assert written.text.endswith(".")
    assert "nan" not in written.text
    assert len(table) > 0
    lines = table_markdown(exhibit, table).splitlines()
    assert len(lines) == len(table) + 2
    assert len({line.count(" | ") for line in lines}) == 1
    assert len(brief_table(exhibit, table, written).splitlines()) <= written.longest + 4
    assert {*written.brief, *([written.by] if written.by else [])} <= set(table.columns)
    words = caption(exhibit, source, written.about)
    for part in ("dataset: digits", "backbone: ", "attack (poisoning rate): ", "seed: 0, 1", "scenarios implanted", "judged by"):
        assert part in words
    paper = table_latex(exhibit, table, words)
    assert all(rule in paper for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{"))


def test_paired_is_the_mean_of_scenario_means_of_differences_and_the_sign_follows_its_interval() -> None:
    source = made_up("scope", keep=called("pruning"))
    table = stats.implanted_worlds(source.rows[(source.rows["selection"] == "default") & (source.rows["defense"] == "pruning")])
    left, right = (table[table["scope"] == scope].reset_index(drop=True) for scope in ("head", "whole"))
    left["ra"] = [0.1 * number for number in range(len(left))]
    right = right.iloc[1:]
    found, pairs = evidence.paired_gap(left, right, "ra")
    by: dict[tuple[str, ...], list[float]] = {}
    for _, line in left.iterrows():
        for _, other in right.iterrows():
            if all(line[name] == other[name] for name in stats.WORLD):
                by.setdefault(tuple(line[name] for name in stats.SCENARIO), []).append(line["ra"] - other["ra"])
    assert pairs == sum(map(len, by.values())) == len(left) - 1
    assert found.mean == pytest.approx(np.mean([np.mean(values) for values in by.values()]))
    sides = {(0.1, 0.2): 1, (-0.2, -0.1): -1, (-0.1, 0.1): 0, (math.nan, math.nan): 0}
    assert [evidence.verdict(intervals.Interval(0.0, *ends)) for ends in sides] == list(sides.values())


def test_words_for_figures() -> None:
    part = intervals.Interval(0.1234, 0.1, 0.15)
    assert wording.percents(part) == "12.3 % [10.0, 15.0]"
    assert wording.points(part) == "+12.3 points [+10.0, +15.0]"
    assert wording.points(intervals.Interval(-0.01, math.nan, math.nan)) == "-1.0 points"
    assert wording.points(intervals.Interval(math.nan, math.nan, math.nan)) == "not measured"
    assert wording.percent(-0.0001) == "0.0 %"
    assert [wording.out_of(*pair) for pair in ((0, 3), (2, 3), (3, 3), (1, 1))] == ["none of 3", "2 of 3", "all 3", "1 of 1"]
    assert wording.few(list("abcde")) == "a, b, c and 2 more"
    assert wording.few(list("abcd")) == "a, b, c, d"
    assert wording.few([]) == "none"
    assert wording.in_brackets([]) == wording.after_colon([]) == ""
    assert wording.in_brackets(["a"]) + wording.after_colon(["b"]) == " (a): b"


@pytest.mark.parametrize("answer", [performance, scope, threshold, selection, size])
def test_nothing_is_said_of_attacks_that_did_not_implant(answer: Answer) -> None:
    source = made_up("scope", before=lambda cell: (0.97, 0.2, 0.7), keep=called("pruning"))
    with pytest.raises(Missing):
        show(answer, source)


# -- each answer, both ways ----------------------------------------------------------------------------------------------------


def holder_figures(answer: Callable[[HolderPruning, float], float]) -> Callable[[Cell, float], Triple]:
    def figures(cell: Cell, place: float) -> Triple:
        if not isinstance(cell.defense, HolderPruning):
            return undefended(cell)
        ra = answer(cell.defense, place) + 0.001 * cell.scenario.seed
        return 0.97, 0.9 - ra, ra

    return figures


def test_alpha_changes_nothing_or_something() -> None:
    moving = ("steps of unequal length", "distance between embeddings")
    falling = holder_figures(lambda d, place: (d.clip or d.distance == "feature") * 0.3 * (1 - d.alpha))
    better = show(alpha, made_up("alpha", falling))
    # 2 scopes, 4 exponents, 2 attacks, 2 seeds, 5 points.
    assert "alpha cannot change the ranking, and does not: all 160 models" in better.answer
    assert "(the Lipschitz quotient) in all 3 comparisons" in better.answer
    assert set(better.frame.loc[better.frame["same"] < 1, "mode"]) == set(moving)
    worse = show(alpha, made_up("alpha", holder_figures(lambda d, place: 0.3 * d.alpha + 0.1 * place)))
    assert "in none of 3 comparisons and a lower one in 3" in worse.answer
    assert "alpha cannot change the ranking, yet 160 of 160 models differ" in worse.answer


def test_alphas_agreement_counts_points_one_by_one() -> None:
    source = made_up("alpha", holder_figures(lambda d, place: 0.1 + 0.3 * place * (place < 0.6 or d.alpha)))
    shown = show(alpha, source)
    known = {cell.defense_label: cell.defense for cell in source.matrix.cells}
    for _, line in shown.frame.iterrows():
        points: dict[float, dict[tuple[object, ...], Triple]] = {}
        for _, point in source.curves.iterrows():
            defense = known[point["defense"]]
            if not isinstance(defense, HolderPruning) or point["kept"]:
                continue
            if point["scope"] == line["scope"] and alpha.mode(defense) == line["mode"]:
                key = (point["backbone"], point["attack"], point["seed"], point["dial"])
                points.setdefault(defense.alpha, {})[key] = (point["acc"], point["asr"], point["ra"])
        mine, other = points[line["alpha"]], points[1.0]
        assert line["points"] == len(mine.keys() | other.keys())
        assert line["same"] == pytest.approx(sum(mine[key] == other[key] for key in mine) / len(mine))


@pytest.mark.parametrize(("head", "whole", "words"), [
    (0.6, 0.2, "higher on the head for all 8 defenses"), (0.2, 0.6, "on the whole network for 8"),
    (0.4, 0.4, "on the head for none of 8 defenses, and on the whole network for none"),
])  # fmt: skip
def test_scope_says_where_ra_is_higher_and_compares_seconds_at_equal_scope(head: float, whole: float, words: str) -> None:
    def seconds(cell: Cell) -> float:
        return (1.0 if isinstance(cell.defense, HolderPruning) else 2.0) * (1.0 if cell.scope.value == "head" else 50.0)

    shown = show(scope, made_up("scope", steady({"head": head, "whole": whole}), seconds=seconds))
    assert words in shown.answer
    assert "2 times as long" in shown.answer
    assert "would be 100 times" in shown.answer
    line = shown.frame[(shown.frame["defense"] == "anp")].iloc[0]
    assert line["difference"] == pytest.approx(head - whole)
    assert (line["seconds_head"], line["seconds_whole"]) == (2.0, 100.0)


def test_a_curve_is_read_from_the_weakest_end_whatever_the_direction_of_the_dial() -> None:
    path = pd.DataFrame({"dial": [1.0, 5.0, 3.0], "ra": [0.9, 0.1, 0.3]})
    up = threshold.along_dial(path, 1.0, 5.0, False, "ra")
    assert up[[0, 50, 100]] == pytest.approx([0.9, 0.3, 0.1])
    assert up[25] == pytest.approx(0.6)
    assert threshold.along_dial(path, 1.0, 5.0, True, "ra") == pytest.approx(up[::-1])
    wider = threshold.along_dial(path, -3.0, 5.0, False, "ra")
    assert wider[:50] == pytest.approx(np.full(50, 0.9))  # nothing is known beyond the first point: it stays


@pytest.mark.parametrize("good", [True, False])
def test_threshold_reports_the_good_stretch_and_the_area(good: bool) -> None:
    def figures(cell: Cell, place: float) -> Triple:
        if cell.defense_label == "none":
            return undefended(cell)
        ra = 0.8 * place if cell.defense_label == "pruning" else 0.0
        return 0.97 - (0.0 if good else 0.5 * place), 0.95 - ra, ra

    shown = show(threshold, made_up("threshold", figures, keep=called("pruning", "anp", "random-pruning (as clp)")))
    line = shown.frame[shown.frame["defense"] == "pruning"].iloc[0]
    assert line["area"] == pytest.approx(0.4)
    assert (line["best"], line["default"]) == pytest.approx((0.8, 0.4))
    # ASR falls below one half where 0.95 - 0.8 place does: from 0.5625 on, that is at 44 of 101 places.
    assert line["window"] == pytest.approx(44 / 101 if good else 0.0)
    assert ("2 of 4 dials have" in shown.answer) if good else shown.answer.startswith("None of 4 dials have")
    assert "by 20.0 points of RA on average, and by 40.0 for pruning" in shown.answer


@pytest.mark.parametrize("turned", [True, False])
def test_selection_measures_the_gap_or_finds_none(turned: bool) -> None:
    def figures(cell: Cell, place: float) -> Triple:
        ra = 0.1 + (0.5 * place if turned else 0.0)
        return (0.97 - 0.08 * place, 0.9 - ra, ra) if cell.defense_label != "none" else undefended(cell)

    shown = show(selection, made_up("selection", figures, keep=called("pruning", "anp", "anp (500 steps)")))
    line = shown.frame[shown.frame["defense"] == "anp"].iloc[0]
    # The oracle turns the dial to 1; validation starts at the default, the place 0.5, which loses 4 points and stays.
    assert line["gap_default"] == pytest.approx(0.25 if turned else 0.0)
    assert line["gap_validation"] == pytest.approx(0.25 if turned else 0.0)
    assert ("above *default* for all 5 defenses, most for pruning" in shown.answer) is turned
    assert ("above *default* for none of 5 defenses" in shown.answer) is not turned
    assert "ASR of anp (head) by rule: validation" in shown.answer


@pytest.mark.parametrize("ahead", [True, False])
def test_budget_compares_with_training_from_scratch_on_the_same_images(ahead: bool) -> None:
    def figures(cell: Cell, place: float) -> Triple:
        share = cell.budget or 0.2
        ra = share * (2 if cell.defense.name != "training-from-scratch" else 1 if ahead else 3) + 0.001 * cell.scenario.seed
        return (0.97, 0.95 - ra, ra) if cell.defense_label != "none" else undefended(cell)

    why = "does not apply: too few"
    names = [f"{base}, budget {share} %" for base in ("anp", "training-from-scratch") for share in ("0.1", "1", "20")]
    source = made_up("budget", figures, keep=called(*names, "clp"), refuse=lambda cell: why if cell.budget == 0.001 else "")
    shown = show(budget, source)
    side = "for 1 of 1 defenses (anp (whole)), and below for none" if ahead else "for none of 1 defenses, and below for 1"
    assert "With 200 clean images (20 %), RA is significantly above training from scratch" in shown.answer
    assert f"on the same images {side}" in shown.answer
    assert f"Refused: {why}." in shown.answer
    assert "rises most for anp (whole), from 2.0 % to 40.0 %" in shown.answer.replace("2.1 %", "2.0 %").replace("40.1 %", "40.0 %")
    assert isinstance(shown.figure, Lines)
    anp = next(series for series in shown.figure.panels[0].series if series.label == "anp (whole)")
    assert anp.x == (10.0, 200.0)
    assert [label for label, _ in shown.figure.panels[0].flat] == ["clp (whole), no images"]
    refused = shown.frame[(shown.frame["defense"] == "anp") & (shown.frame["share"] == 0.001)].iloc[0]
    assert (refused["cells"], refused["reason"]) == ("0 of 4", why)


def rate_before(cell: Cell) -> Triple:
    asr = 0.9 if cell.scenario.plan.rate >= 0.02 and cell.scenario.attack_label.startswith("badnets") else 0.1
    return 0.97 - 0.1 * cell.scenario.plan.rate, asr, 0.05


@pytest.mark.parametrize(("slope", "words"), [
    (-3.0, "RA falls significantly for 1 of 1 defenses (clp"), (3.0, "and rises for 1 (clp"),
    (0.0, "RA falls significantly for none of 1 defenses and rises for none."),
])  # fmt: skip
def test_rate_says_from_where_an_attack_is_there_and_how_ra_moves(slope: float, words: str) -> None:
    def figures(cell: Cell, place: float) -> Triple:
        ra = 0.5 + slope * cell.scenario.plan.rate
        return (0.9, 0.95 - ra, ra) if cell.defense_label != "none" else rate_before(cell)

    shown = show(rate, made_up("rate", figures, rate_before, keep=called("clp")))
    assert "badnets implants in most seeds at 2 %, 5 %, 10 %; the highest rate costs 1.5 points of ACC" in shown.answer
    assert "wanet implants at no rate." in shown.answer
    assert words in shown.answer
    low = shown.frame[(shown.frame["attack"] == "badnets") & (shown.frame["rate"] == 0.01)].iloc[0]
    assert (low["implanted"], low["asr"]) == ("0 of 2", pytest.approx(0.1))
    assert math.isnan(low["ra clp (whole)"])


@pytest.mark.parametrize(("ra", "words"), [(0.9, "head is worth keeping there"), (0.1, "no defense improves on the features")])
def test_extractor_puts_the_best_head_beside_the_plainest_classifier(ra: float, words: str) -> None:
    keep = called("anp", "nearest-class-mean on clean, with labels", "nearest-class-mean on clean, no labels")
    shown = show(extractor, made_up("extractor", steady({"anp": ra}, other=0.5), keep=keep))
    assert words in shown.answer
    line = shown.frame[(shown.frame["victims"].str.contains("with labels")) & (shown.frame["attack"] == "badnets")].iloc[0]
    assert (line["best"], line["plainest"]) == ("anp (head)", "nearest-class-mean on clean, with labels")
    assert line["difference"] == pytest.approx(ra - 0.5)


def test_extractor_without_an_implanted_attack_says_so() -> None:
    source = made_up("extractor", before=lambda cell: (0.97, 0.1, 0.8), keep=called("anp"))
    assert "No attack implanted through given features" in show(extractor, source).answer


@pytest.mark.parametrize(("slope", "words"), [(-0.2, "falls significantly for 1 of 1 defenses (clp"), (0.2, "and rises for 1 (clp"),
                                              (0.0, "falls significantly for none of 1 defenses and rises for none")])  # fmt: skip
def test_adaptive_compares_with_strength_zero(slope: float, words: str) -> None:
    def figures(cell: Cell, place: float) -> Triple:
        assert isinstance(cell.scenario.attack, Adaptive)
        ra = 0.5 + slope * min(cell.scenario.attack.strength, 1)
        return (0.9, 0.95 - ra, ra) if cell.defense_label != "none" else undefended(cell)

    whole = made_up("adaptive", figures, keep=lambda cell: called("clp")(cell) and cell.scope.value == "whole")
    shown = show(adaptive, whole)
    assert words in shown.answer
    line = shown.frame[(shown.frame["attack"] == "rescaled") & (shown.frame["defense"] == "clp")].iloc[0]
    assert (line["base"], line["strong"], line["difference"]) == pytest.approx((0.5, 0.5 + slope, slope))
    assert line["strength"] == 1.0


def test_adaptive_leaves_out_strengths_that_do_not_implant() -> None:
    def before(cell: Cell) -> Triple:
        assert isinstance(cell.scenario.attack, Adaptive)
        return (0.97, 0.97, 0.02) if cell.scenario.attack.strength == 0 else (0.97, 0.3, 0.6)

    shown = show(adaptive, made_up("adaptive", before=before, keep=called("clp")))
    assert "flat-holder (not implanted at two strengths)" in shown.answer
    assert set(shown.frame["strength"]) == {0.0}


@pytest.mark.parametrize(("again", "words"), [(0.5, "they remove one trigger, not the weakness"),
                                              (0.0, "what they remove stays removed")])  # fmt: skip
def test_natural_tells_a_kept_trigger_from_one_found_again(again: float, words: str) -> None:
    shown = show(natural, made_up("natural", steady({"anp": 0.7}, other=0.2), keep=called("anp", "clp"), again=again))
    assert words in shown.answer
    assert "in 2 of 4 cases" in shown.answer
    line = shown.frame[shown.frame["defense"] == "anp"].iloc[0]
    assert line["gap"] == pytest.approx(again)


def test_performance_tells_losses_from_no_change() -> None:
    def figures(cell: Cell, place: float) -> Triple:
        lost = 0.03 + 0.01 * cell.scenario.seed if cell.defense_label == "anp" else 0.0  # within the tolerance
        return (0.97 - lost, 0.1, 0.8) if cell.defense_label != "none" else undefended(cell)

    shown = show(performance, made_up("quick", figures, keep=called("anp", "clp")))
    assert shown.answer.startswith("2 of 4 entries lose accuracy significantly: anp")
    assert "Of the 4 that take the mean ASR below 50 %, 2 do so without a significant loss: clp" in shown.answer
    idle = show(performance, made_up("quick", lambda cell, place: undefended(cell), keep=called("anp", "clp")))
    assert idle.answer.startswith("None of 4 entries lose accuracy")
    assert "None takes the mean ASR below 50 %" in idle.answer


@pytest.mark.parametrize(("ra", "words"), [(0.8, "for 1 of 1 entries, and"), (0.1, "for none of 1 entries, and")])
def test_size_counts_who_takes_asr_down_and_who_passes_training_from_scratch(ra: float, words: str) -> None:
    keep = called("pruning", "training-from-scratch")
    source = made_up("size", steady({"pruning": ra}, other=0.5), keep=lambda cell: keep(cell) and cell.scope.value == "whole")
    shown = show(size, source)
    assert words in shown.answer
    assert ("1 of 1 entries take" in shown.answer) is (ra > 0.5)


@pytest.mark.parametrize(("ra", "words"), [(0.9, "higher RA in 3 ("), (0.1, "higher RA in none and a lower one in 3")])
def test_controls_and_significance_pair_the_leader_with_controls(ra: float, words: str) -> None:
    plain = [f"{name} on {of}" for name in ("nearest-class-mean",) for of in ("poisoned, no labels", "clean, with labels")]
    keep = called("clp", "training-from-scratch", *plain)
    source = made_up("quick", steady({"clp": ra}, other=0.5), keep=keep)
    assert words in show(controls, source).answer
    told = show(significance, source).answer
    assert words in told
    assert "it takes 11 implanted scenarios, and there are" in told


def test_significance_reports_a_rank_test_where_there_are_enough_scenarios() -> None:
    keep = called("clp", "anp", "pruning", "training-from-scratch")
    source = made_up("quick", steady({"clp": 0.6, "anp": 0.4, "pruning": 0.2}), keep=keep)
    one = source.rows[source.rows["attack"] == "badnets"]
    one = one[one["backbone"] == one["backbone"].iloc[0]]
    rows = pd.concat([one.assign(attack=f"attack {number}") for number in range(12)], ignore_index=True)
    told = show(significance, dataclasses.replace(source, rows=rows)).answer
    assert "over 12 scenarios p = " in told


@pytest.mark.parametrize(("precision", "words"), [(0.5, "All 3 isolated sets"), (0.02, "None of 3 isolated sets")])
def test_detectors_are_put_beside_the_base_rate(precision: float, words: str) -> None:
    keep = called("abl", "dbd", "hid")
    shown = show(detectors, made_up("quick", keep=keep, precision=precision))
    assert shown.answer.startswith(words)
    assert set(shown.frame["precision"]) == {precision}
    assert shown.frame["base"].iloc[0] == pytest.approx(0.1)


def test_validity_counts_scenarios_and_claims_no_reference_it_has_not() -> None:
    def before(cell: Cell) -> Triple:
        return (0.97, 0.3, 0.6) if cell.scenario.frozen else undefended(cell)

    shown = show(validity, made_up("quick", before=before, keep=called()))
    assert "ASR is below 50 % for badnets on vgg11-bn-w8 on clean, with labels (ASR 30.0 %)" in shown.answer
    assert shown.answer.startswith("5 of 6 scenarios implanted, 1 not implanted.")
    assert set(shown.frame["verdict"]) == {"implanted", "not implanted"}
    assert "No published figure" in shown.answer
    assert "minus ASR on victims trained end to end: -67.0 points" in shown.answer
    source = made_up("quick", keep=called())
    rows = source.rows.assign(literature=["PASS", *["WARN"] * (len(source.rows) - 1)])
    told = show(validity, dataclasses.replace(source, rows=rows)).answer
    assert "published figures of the same protocol: PASS 1, WARN" in told
    assert show(validity, source).answer.startswith("6 of 6 scenarios implanted.")
    twins = dataclasses.replace(source, rows=source.rows.assign(asr_benign=0.9))
    assert "0 of 6 scenarios implanted, 6 adversarial" in show(validity, twins).answer
    assert "Adversarial, because the benign twin answers the trigger too: badnets on vgg11-bn-w8" in show(validity, twins).answer
    costly = show(validity, made_up("quick", keep=called(), twin=lambda cell: 0.999)).answer
    assert "costs ACC" not in costly.lower()
    dear = show(validity, made_up("quick", keep=called(), before=lambda cell: (0.88, 0.97, 0.02))).answer
    assert dear.startswith("6 of 6 scenarios implanted (6 of them cost acc).")
    assert "Costs ACC: badnets on vgg11-bn-w8" in dear


def test_benign_accuracy_is_one_number_or_the_rows_do_not_belong_together() -> None:
    source = made_up("quick", keep=called("clp"))
    assert show(benign, source).answer.startswith("All ")
    rows = source.rows.assign(acc_benign=source.rows["acc_benign"].where(source.rows["defense"] != "clp", 0.5))
    told = show(benign, dataclasses.replace(source, rows=rows)).answer
    assert told.startswith("Benign ACC differs")
    assert "Every row gives its poisoning rate." in told
    unrated = dataclasses.replace(source, rows=rows.assign(rate=math.nan))
    assert "rows lack a poisoning rate" in show(benign, unrated).answer


def test_replaced_compares_the_sizes() -> None:
    source = made_up("quick", keep=called("abl"))  # 1250 released, 250 of them held out, 1000 received
    assert "|D'| = |D| in all" in show(replaced, source).answer
    grown = dataclasses.replace(source, rows=source.rows.assign(train_images=1100))
    told = show(replaced, grown).answer
    assert told.startswith("The sizes differ. On digits, 1000 clean images are left to the attacker, who publishes 1100")
    with pytest.raises(Missing, match="manifest"):
        show(replaced, dataclasses.replace(source, manifest={}))


def test_robust_checks_that_asr_and_ra_share_their_images() -> None:
    source = made_up("quick", keep=called("clp"))
    assert "which holds in all" in show(robust, source).answer
    broken = dataclasses.replace(source, rows=source.rows.assign(ra=1.0))
    assert "which fails in " in show(robust, broken).answer


def test_pruned_states_units_and_schedules() -> None:
    shown = show(pruned, made_up("quick", keep=called("pruning", "dbd", "hid")))
    assert "of an unknown number" not in shown.answer
    assert "dbd (cpu; " in shown.answer
    line = shown.frame[shown.frame["defense"] == "pruning"].iloc[0]
    assert (line["units"], line["default"], line["default_share"]) == (40.0, 20.0, 0.5)
    assert "Cells in which it prunes nothing" not in shown.answer  # half of 40 everywhere
    assert (line["default_none"], line["cells"]) == (0, 12)
    source = made_up("quick", keep=called("pruning"))
    idle = dataclasses.replace(source, rows=source.rows.assign(pruned=(source.rows["selection"] == "oracle").astype(int)))
    told = show(pruned, idle).answer
    assert "Cells in which it prunes nothing: pruning (head) in 12 of 12, pruning (whole) in 12 of 12." in told
    unknown = dataclasses.replace(source, rows=source.rows.assign(units=0))
    assert "rows prune units of an unknown number" in show(pruned, unknown).answer


def test_text_stands_before_numbers_and_empty_columns_are_left_out() -> None:
    frame = pd.DataFrame({"a": [0.5], "b": ["x"], "c": [""], "d": [math.nan], "d_low": [math.nan], "d_high": [math.nan]})
    columns = (*evidence.share(a="A"), *evidence.text(b="B", c="C"), *evidence.difference(d="D"))
    exhibit = Exhibit("", "", "", "", SimpleNamespace(COLUMNS=columns))  # type: ignore[arg-type]
    assert table_markdown(exhibit, frame) == "| B | A |\n| :-- | --: |\n| x | 50.0 |\n"


def test_the_committed_page_asks_every_question() -> None:
    page = (ROOT / "results" / "EXHIBITS.md").read_text()
    for exhibit in EXHIBITS:
        assert f'<a id="{exhibit.name}"></a>' in page
        assert f"**{exhibit.question}**" in page


def elsewhere_rows(moved: float) -> Source:
    """A run of quick, and the same with the RA of clp moved at one seed."""
    source = made_up("quick", steady({"clp": 0.6, "anp": 0.4}), keep=called("clp", "anp", "training-from-scratch"))
    shift = np.where((source.rows["defense"] == "clp") & (source.rows["seed"] == 1), moved, 0.0)
    other = dataclasses.replace(source, name="quick-b", rows=source.rows.assign(ra=source.rows["ra"] + shift),
                                manifest={"arithmetic": {"processor": "b"}})  # fmt: skip
    return dataclasses.replace(source, elsewhere=(other,), manifest={"arithmetic": {"processor": "a"}})


@pytest.mark.parametrize(("moved", "inside"), [(0.0, True), (-0.4, False)])
def test_elsewhere_compares_single_cells_and_leaderboards_with_another_machine(moved: float, inside: bool) -> None:
    source = elsewhere_rows(moved)
    shown = show(elsewhere, source)
    assert set(shown.frame["run"]) == {"quick-b"}
    clp = shown.frame[shown.frame["defense"] == "clp"]
    assert set(clp["scope"]) == {"head", "whole"}
    values = [
        [line["ra"] for _, line in run.rows.iterrows()
         if (line["defense"], line["scope"], line["selection"]) == ("clp", "whole", "default") and line["attack"] != "none"]
        for run in (source, *source.elsewhere)
    ]  # fmt: skip
    by_hand = [abs(one - other) for one, other in zip(*values, strict=True)]
    line = clp[clp["scope"] == "whole"].iloc[0]
    assert line["cells"] == len(by_hand)
    assert line["median"] == pytest.approx(np.median(by_hand))
    assert line["largest"] == pytest.approx(max(by_hand)) == pytest.approx(abs(moved))
    assert set(shown.frame.loc[shown.frame["defense"] != "clp", "largest"]) == {0.0}
    assert set(clp["inside"]) == {"yes" if inside else "no"}
    total = len(shown.frame)
    counted = f"all {total}" if inside else f"{total - 2} of {total}"
    assert f"The mean RA of {counted} leaderboard entries lies within" in shown.answer
    assert ("acts like another seed" in shown.answer) is inside
    assert "quick-b ran with processor b, the first run with processor a." in shown.answer


def test_runs_elsewhere_have_the_same_settings_and_another_arithmetic(tmp_path: Path) -> None:
    source = made_up("quick", keep=called("clp"))
    for name, settings, processor in zip(("quick", "quick-b", "quick-same", "quick-older"), "ssst", "abab", strict=True):
        stored(dataclasses.replace(source, name=name), tmp_path)
        manifest = {"settings": settings, "arithmetic": {"processor": processor}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    found = source_of(tmp_path / "quick")
    assert found is not None
    assert [other.name for other in found.elsewhere] == ["quick-b"]
    with pytest.raises(evidence.NotRun, match="another kind of machine"):
        elsewhere.frame(source)


# -- the page ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue of four: lines, dots, no figure, and one that was not run."""
    names = {"robust-accuracy": "quick", "performance": "quick", "budget": "budget", "alpha": "alpha"}
    chosen = (dataclasses.replace(one, matrix=names[one.name]) for one in EXHIBITS if one.name in names)
    monkeypatch.setattr(exhibits, "EXHIBITS", tuple(chosen))


def run_results(results: Path) -> None:
    stored(made_up("quick", keep=called("clp", "anp")), results)
    names = [f"{base}, budget {share} %" for base in ("anp", "training-from-scratch") for share in ("1", "20")]
    stored(made_up("budget", keep=called(*names, "clp")), results)


@pytest.mark.usefixtures("few")
def test_the_page_says_what_was_not_run_and_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    run_results(tmp_path)
    written = write_exhibits(tmp_path)
    before = {path: path.read_bytes() for path in written}
    page = (tmp_path / "EXHIBITS.md").read_text()
    assert "Not run yet: `make benchmark MATRIX=alpha`" in page
    assert "| not run yet: `make benchmark MATRIX=alpha` |" in page
    for name in ("robust-accuracy.md", "robust-accuracy.tex", "performance.png", "performance.svg", "budget.png", "budget.csv"):
        assert (tmp_path / "exhibits" / name).is_file()
    for link in ("exhibits/budget.png", "exhibits/performance.csv", "quick/rows.csv"):
        assert f"({link})" in page
    assert not (tmp_path / "exhibits" / "alpha.md").exists()
    (tmp_path / "exhibits" / "gone.md").write_text("of an exhibit that is no more")
    ran = CliRunner().invoke(app, ["exhibits", "--results", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    assert {path: path.read_bytes() for path in written} == before
    assert not (tmp_path / "exhibits" / "gone.md").exists()


@pytest.mark.usefixtures("few")
def test_rows_that_cannot_answer_say_why_and_hostile_names_stay_text(tmp_path: Path) -> None:
    matrix = load_matrix(find_matrix("quick-all"))
    evil = "<script>|$x$ `b` [l](u)"
    cells = tuple(dataclasses.replace(cell, defense_label=evil if cell.defense_label == "clp" else cell.defense_label)
                  for cell in matrix.cells)  # fmt: skip
    source = made_up("quick", keep=called(evil), matrix=dataclasses.replace(matrix, cells=cells))
    stored(source, tmp_path)
    failed = dataclasses.replace(made_up("budget", keep=called("clp")), name="budget")
    stored(failed, tmp_path)
    write_exhibits(tmp_path)
    page = (tmp_path / "EXHIBITS.md").read_text()
    assert "The rows of [budget](budget/rows.csv) cannot answer this: it takes defenses with two clean budgets" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    latex = (tmp_path / "exhibits" / "performance.tex").read_text()
    assert r"\textless{}script" in latex
    assert "$x$" not in latex.replace(r"\$", "")


def test_no_results_is_one_clear_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["exhibits", "--results", str(tmp_path / "none")]).exit_code != 0
    assert source_of(tmp_path) is None


def test_figures_hold_what_the_table_holds() -> None:
    shown = show(scope, made_up("scope"))
    assert isinstance(shown.figure, Dots)
    drawn = {name.split(",")[0]: part for panel in shown.figure.panels[:1]
             for name, part in zip(panel.names, panel.series[0][1], strict=True)}  # fmt: skip
    first = shown.frame[(shown.frame["victims"] == "trained end to end") & (shown.frame["control"] == "")]
    first = first[first["pairs"] > 0]
    for _, line in first.iterrows():
        assert drawn[line["defense"]].mean == line["ra_head"]


def test_no_two_lines_of_a_figure_look_alike() -> None:
    """More entries than there are colours: those that share one differ in their strokes, in the legend too."""
    entries = [(f"d{number}", "whole") for number in range(20)]
    known = {entry: style.Look(f"#{number % 8:06x}", "o") for number, entry in enumerate(entries)}
    height = intervals.Interval(0.5, 0.4, 0.6)
    lines = tuple(figures.Series(" ".join(entry), (0.0, 1.0), (height, height), entry) for entry in entries)
    with render.style():
        drawn = render.sheet(Lines((figures.Panel("p", "x", "y", lines),), 1, ""), "t", known)
        looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in drawn.axes[0].lines}
        named = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in drawn.legends[0].get_lines()}
    assert len(looks) == 20
    assert named == looks


@pytest.mark.parametrize(
    ("ahead", "words"), [(0.1, "the pruning helps"), (-0.1, "the pruning harms"), (0.0, "no significant difference")]
)
def test_hid_is_put_beside_hid_without_its_pruning(ahead: float, words: str) -> None:
    source = made_up("quick", steady({"hid": 0.5 + ahead, "hid without pruning": 0.5}), keep=called("hid", "hid without pruning"))
    note = "2 rounds; pruned 0 and 3 of 1024 units; 600 of 1150 samples taken for clean"
    rows = source.rows.assign(note=[note if name == "hid" else "" for name in source.rows["defense"]])
    told = show(pruned, dataclasses.replace(source, rows=rows)).answer
    assert words in told
    assert "RA of hid minus RA of hid without pruning" in told
    assert "its Hölder step prunes nothing in 10 of 20 rounds." in told  # a victim on given features is not met


def test_defenses_that_found_no_more_poison_than_chance_are_named() -> None:
    source = made_up("quick", keep=called("abl", "dbd"), precision=0.02)
    told = show(detectors, source).answer
    assert "Cells marked *mechanism failed*" in told
    assert "abl (whole) in 10 of 10" in told


@pytest.mark.parametrize("better", [True, False])
def test_canaries_close_a_share_of_the_gap_or_none(better: bool) -> None:
    """By hand: the dial's places 0, .25, .5, .75, 1 have RA .1 to .5 (if better) and lose no accuracy; validation stays at the
    default,
    .5; the canaries' ASR falls along the dial, so they pick the last place, as the oracle does, or the worst one."""

    def figures(cell: Cell, place: float) -> Triple:
        ra = 0.1 + 0.4 * (place if better else 1 - place)
        return (0.97, 0.9 - ra, ra) if cell.defense_label != "none" else undefended(cell)

    source = made_up("quick", figures, keep=called("anp"))
    shown = show(canary, source)
    assert set(shown.frame["defense"]) == {"anp"}
    line = shown.frame.iloc[0]
    assert line["gap"] == pytest.approx(0.2)
    # The first canary ranks the untouched model best (its ASR was made to fall on), the second ranks all alike: ties to the
    # gentler.
    kept = 0.02
    assert line["ra_canary"] == pytest.approx(kept)
    assert line["closed"] == pytest.approx((kept - 0.3) / 0.2)
    assert "lower for 2" in shown.answer
    assert "canaries close -140 %" in shown.answer


def test_the_share_of_a_gap_is_a_ratio_of_means_and_nothing_where_there_is_no_gap() -> None:
    table = pd.DataFrame({
        "dataset": "d", "backbone": "b", "attack": ["x", "x", "y", "y"], "seed": [0, 1, 0, 1], "validation": [0.1, 0.3, 0.5, 0.5],
        "canary": [0.2, 0.4, 0.5, 0.6], "oracle": [0.5, 0.5, 0.5, 0.7],
    })  # fmt: skip
    found = canary.closed(table)
    gap, won = ((0.3 + 0.1) / 2, (0.1 + 0.05) / 2)
    assert found.mean == pytest.approx(won / gap)
    assert found.low < found.mean < found.high
    assert math.isnan(canary.closed(table.assign(oracle=table["validation"], canary=table["validation"])).mean)
