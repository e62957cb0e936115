"""Rows in words: why a scenario counts, and why its candidate was chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmark.__main__ import app
from benchmark.report.explain import explain, pick
from benchmark.storage.rows import Curve, Row, frame
from models.spec import BadInput

KEY = {"matrix": "m", "dataset": "d", "backbone": "b", "attack": "blended", "rate": 0.1, "seed": 0, "track": "model+clean",
       "scope": "whole", "defense": "anp", "cell": "c1"}  # fmt: skip
ROW = Row(
    **KEY, target=0, label_mode="all-to-one", realised_rate=0.1, control=False, selection="validation", status="ok", acc=0.95,
    asr=0.1, ra=0.8, acc_undefended=0.97, asr_undefended=0.99, ra_undefended=0.01, acc_benign=0.98, asr_benign=0.02, effect=0.97,
    acc_loss=0.01, acc_loss_se=0.002, implanted=True, gate="implanted", knob=0.1, dial=0.35, pruned=12, units=100, val_acc=0.95,
    val_loss=0.017, val_loss_se=0.017, cost_epochs=12.0,
)  # fmt: skip
POINT = Curve(
    **KEY, dial_name="threshold", knob=0.4, dial=0.2, is_default=True, kept=False, strength=50, pruned=50, acc=0.1, asr=0.0,
    ra=0.1, val_acc=0.25, val_loss=0.714, val_loss_se=0.059, canary_asr=0.1, canary_loss=0.6,
)  # fmt: skip
KEPT = replace(POINT, knob=math.nan, dial=math.nan, is_default=False, kept=True, strength=0, val_loss=0.0, val_loss_se=0.0,
               canary_asr=0.97, canary_loss=0.0)  # fmt: skip
CURVES = frame([POINT, replace(POINT, knob=0.1, dial=0.35, is_default=False, val_loss=0.017, canary_asr=0.3), KEPT])


def told(*rows: Row, curves: pd.DataFrame = CURVES, only: str = "defense=anp") -> str:
    return "\n".join(explain(frame(list(rows)), curves, only))


def test_the_scenario_is_explained_by_its_figures() -> None:
    text = told(ROW)
    assert "implanted: ASR 99.0 (at least 50), 97.0 points above the benign twin's 2.0 (at least 50); one seed" in text
    assert "It counts." in text
    assert "It costs 1.0 points of ACC, with 95 % confidence more than 0.6." in text
    assert "It costs no ACC." in told(replace(ROW, acc_undefended=0.98))
    assert "It costs 1.0 points of ACC, which may be chance." in told(replace(ROW, acc_loss_se=0.02))


def test_a_scenario_that_does_not_count_says_why() -> None:
    twin = replace(ROW, asr_benign=0.9, effect=0.09, implanted=False)
    assert "adversarial: the trigger works on the benign twin, too: its ASR is 90.0, above 20" in told(twin)
    assert "never ranked" in told(twin)
    old = replace(ROW, asr_benign=math.nan, effect=math.nan)
    assert "the ASR of the benign twin was not measured" in told(old)
    costly = replace(ROW, acc_undefended=0.88)
    assert "implanted, costs ACC" in told(costly)


def test_the_choice_is_walked_through() -> None:
    text = told(ROW)
    assert "validation (ranked): The published default (dial 0.2, knob 0.4) loses +71.4 points (standard error 5.9)" in text
    assert "Weakened to another knob: dial 0.35, knob 0.1 loses +1.7 points (standard error 1.7)" in text
    same = replace(ROW, knob=0.4, dial=0.2)
    assert "within 4: it is chosen" in told(same)
    kept = replace(ROW, kept=True, knob=math.nan, dial=math.nan, mark="no change")
    assert "No weaker setting stays within 4, so the untouched model is kept." in told(kept)
    assert "Mark: no change." in told(kept)


def test_every_rule_has_words_of_its_own() -> None:
    words = {
        "default": "The published default: dial 0.35, knob 0.1.", "strongest": "The strongest of those within 4 points",
        "canary": "The mean ASR of the canaries falls from 97.0 to 30.0.", "oracle": "the highest RA of 3 candidates",
        "leaky": "the lowest ASR among those that keep 90 % of the ACC",
    }  # fmt: skip
    text = told(*(replace(ROW, selection=rule) for rule in words))
    for said in words.values():
        assert said in text
    refused = replace(ROW, status="refused", reason="the track grants no clean images to validate on")
    assert "refused: the track grants no clean images to validate on." in told(refused)
    assert "one model and nothing to choose" in told(ROW, curves=CURVES[:1])


def test_more_than_twenty_cells_are_counted() -> None:
    rows = [replace(ROW, seed=seed, cell=f"c{seed}") for seed in range(23)]
    paragraphs = list(explain(frame(rows), CURVES, "attack=blended"))
    assert len(paragraphs) == 21
    assert "and 3 more cells" in paragraphs[-1]


@pytest.mark.parametrize(
    ("only", "words"),
    [("attak=blended", "did you mean 'attack'"), ("attack=blendet", "did you mean 'blended'"), ("blended", "write axis=value"),
     ("attack=blended,seed=1", "--only seed=1: no such row")],
)  # fmt: skip
def test_wrong_filters_name_the_nearest(only: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        pick(frame([ROW]), only)


def test_show_explains_rows_of_a_folder(tmp_path: Path) -> None:
    from benchmark.storage.rows import Timing, write

    write(tmp_path / "m", [ROW], [POINT, KEPT], [Timing(**KEY, seconds=1.0, peak_mib=1.0, victim_seconds=1.0)])
    (tmp_path / "m" / "matrix.toml").write_text("")
    done = CliRunner().invoke(app, ["show", "-m", "m", "--only", "defense=anp", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "anp (whole), track model+clean, against blended on b, d, seed 0" in done.output
