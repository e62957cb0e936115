"""The table and the picture of reproduction, on made-up rows of cifar10-cpu; the rule itself is tested with the analysis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmark.analysis import reproduction as rule
from benchmark.report.exhibits import reproduction
from benchmark.report.exhibits.evidence import Missing, Source
from benchmark.report.figures import Heat
from benchmark.report.render import draw
from benchmark.settings.cells import Cell
from tests.benchmark.report.exhibits.test_exhibits import called, made_up, show

Triple = tuple[float, float, float]
BEFORE = (0.90, 0.97, 0.02)
KEPT = ("badnets 10 %", "blended 10 %", "bpp", "adap-blend")


def given(asr: dict[tuple[str, str], float], *names: str, lost: float = 0.01, weak: str = "",
          refuse: Callable[[Cell], str] = lambda cell: "") -> Source:  # fmt: skip
    """Four attacks on the ResNet, and ``names``: ASR by (defense, attack), by default that of the victim.

    The rows are named as if the data were CIFAR-10's."""
    keep = called(*names)

    def before(cell: Cell) -> Triple:
        return (0.90, 0.2, 0.7) if cell.scenario.attack_label == weak else BEFORE

    def figures(cell: Cell, place: float) -> Triple:
        acc, own, ra = before(cell)
        if cell.defense_label == "none":
            return acc, own, ra
        return acc - lost, asr.get((cell.defense_label, cell.scenario.attack_label), own) + 0.01 * cell.scenario.seed, ra

    def wanted(cell: Cell) -> bool:
        return keep(cell) and cell.scenario.attack_label in KEPT and cell.scenario.backbone_label.startswith("resnet")

    source = made_up("cifar10-cpu", figures, before, refuse=refuse, twin=lambda cell: 0.91, keep=wanted)
    return dataclasses.replace(source, rows=source.rows.assign(dataset="cifar10-q95"))


def line(source: Source, defense: str) -> dict[str, object]:
    table = show(reproduction, source).frame
    return dict(table[table["defense"] == defense].iloc[0])


def test_every_verdict_is_in_the_table_with_what_it_rests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "reasons", list)  # whatever is on file
    # By the files: CLP at 10 % has 77.6 on BadNets, 99.7 on Blended, 2.2 on BPP; ANP 3.8, 57.4, 0.2; fine-tuning 1.7, 96.1, 2.5.
    source = given({("clp", "badnets 10 %"): 0.02, ("clp", "bpp"): 0.03, ("anp", "badnets 10 %"): 0.02, ("anp", "bpp"): 0.5,
                    ("anp", "blended 10 %"): 0.7, ("fine-tuning", "badnets 10 %"): 0.4, ("fine-tuning", "bpp"): 0.5},
                   "clp", "anp", "fine-tuning", "benign-salience")  # fmt: skip
    clp, anp, tuned, benign = (line(source, name) for name in ("clp", "anp", "fine-tuning", "benign-salience"))
    assert clp["verdict"] == "reproduced"
    assert (clp["good"], clp["bad"], clp["undecided"], clp["reason"]) == ("badnets 10 %, bpp", "", "blended 10 %", "")
    assert anp["verdict"] == "reproduced in part"
    assert (anp["good"], anp["bad"]) == ("badnets 10 %", "blended 10 % (ASR), bpp (ASR)")
    assert tuned["verdict"] == "not reproduced"
    assert tuned["reason"] == rule.NOT_SOUGHT
    assert benign["verdict"] == "not comparable (no published figure of an attack that was run)"
    assert anp["scenario"] == "badnets 10 %"
    assert (anp["asr_before"], anp["asr"], anp["acc"]) == pytest.approx((0.97, 0.025, 0.89))
    assert anp["printed"] == "ASR 0.7\N{EN DASH}3.8, loss of ACC 0.2\N{EN DASH}7.1"
    assert "FT-SAM, arXiv 2304.11823, Table 1" in str(anp["sources"])
    assert tuned["claimed"] == "badnets 10 %, preact-resnet18: ACC 90.3, ASR 1.7"
    assert "NeurIPS 2021" in str(anp["paper"])
    told = show(reproduction, source).answer
    assert "Of 4 entries, 1 reproduce their published figures on every scenario that is decided (clp), 1 in part (anp)" in told
    assert "1 not (fine-tuning), and 1 cannot be compared (benign-salience)." in told
    assert "largest published one plus 5 points" in told
    assert "largest published loss plus 2 points" in told
    assert "badnets 10 % 97.0 (93.8\N{EN DASH}100.0), 90.0 (85.7\N{EN DASH}91.8)" in told


def test_a_defense_that_changed_nothing_reproduces_nothing() -> None:
    source = given({}, "clp", "anp", lost=0.0)
    rows = source.rows.assign(mark=np.where(source.rows["defense"] == "clp", "no change", ""))
    idle = dataclasses.replace(source, rows=rows)
    clp = line(idle, "clp")
    assert clp["verdict"] == "not comparable (nothing was changed in any cell)"
    assert clp["idle"] == "no change in 8 of 8"
    assert clp["reason"] == ""
    assert line(idle, "anp")["verdict"] == "not reproduced"


def test_lost_accuracy_is_worse_too_and_attacks_that_did_not_implant_are_neither() -> None:
    lossy = line(given({("clp", name): 0.0 for name in KEPT}, "clp", lost=0.2), "clp")
    assert lossy["bad"] == "badnets 10 % (ACC), blended 10 % (ACC), bpp (ACC)"
    weak = given({("clp", name): 0.0 for name in KEPT}, "clp", weak="bpp")
    shown = show(reproduction, weak)
    assert line(weak, "clp")["good"] == "badnets 10 %"
    assert isinstance(shown.figure, Heat)
    assert not any("bpp" in name for name in shown.figure.panels[0].columns)
    with pytest.raises(Missing, match="no attack implanted"):
        reproduction.frame(made_up("cifar10-cpu", before=lambda cell: (0.9, 0.2, 0.7), keep=called("clp")))


def test_what_did_not_finish_says_so() -> None:
    source = given({}, "clp", "anp", refuse=lambda cell: "no" if cell.defense_label == "anp" else "")
    anp = line(source, "anp")
    assert anp["verdict"] == "not comparable (no cell finished)"
    assert math.isnan(float(str(anp["asr"])))


def test_the_picture_has_a_row_per_entry_and_a_column_per_attack(tmp_path: Path) -> None:
    source = given({("clp", "badnets 10 %"): 0.02, ("anp", "badnets 10 %"): 0.4}, "clp", "anp")
    shown = show(reproduction, source)
    assert isinstance(shown.figure, Heat)
    (panel,) = shown.figure.panels
    assert [name.split("\n")[0] for name in panel.names] == ["undefended: ASR | ACC", "clp", "anp"]
    assert panel.names[1].split("\n")[1] == "reproduced in part: 1 of 2"  # worse on BPP, undecided on Blended
    assert [name.replace("\n", " ") for name in panel.columns] == list(KEPT)
    states = {state: 100 * (place + 0.5) / 4 for place, state in enumerate(rule.STATES)}
    clp, anp = (dict(zip(panel.columns, panel.values[row], strict=True)) for row in (1, 2))
    first, last = panel.columns[0], panel.columns[-1]
    assert (clp[first], anp[first], anp[last]) == (states[rule.AS_PUBLISHED], states[rule.WORSE], states[rule.NOT_COMPARED])
    assert panel.texts[1, 0] == "2.5 | 1.0\n\N{LESS-THAN OR EQUAL TO} 77.6 | 1.2"
    assert panel.texts[2, 3].startswith("97.5 | ")
    assert "\n" not in panel.texts[2, 3]
    written = draw(shown.figure, "Reproduction", tmp_path / "reproduction")
    assert written[0].read_bytes()[:4] == b"\x89PNG"
    again = draw(shown.figure, "Reproduction", tmp_path / "again")
    assert again[0].read_bytes() == written[0].read_bytes()


def test_networks_have_a_panel_each_and_cells_of_equal_width() -> None:
    source = given({("clp", "badnets 10 %"): 0.02}, "clp")
    rows = source.rows
    other = rows[rows["attack"] == "badnets 10 %"].assign(backbone="vgg11-bn-w16")
    shown = show(reproduction, dataclasses.replace(source, rows=pd.concat([rows, other], ignore_index=True)))
    assert isinstance(shown.figure, Heat)
    wide, narrow = shown.figure.panels
    assert (wide.values.shape, narrow.columns[1:]) == (narrow.values.shape, ("", "", ""))
    assert np.isnan(narrow.values[:, 1:]).all()
    assert "badnets 10 % on vgg11-bn-w16" in str(shown.frame["bad"].iloc[0]) + str(shown.frame["good"].iloc[0])
