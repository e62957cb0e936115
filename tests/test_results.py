"""What is committed under results/ is what the code would write."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from benchmark.rules.selection import TAU, Selection
from benchmark.storage.rows import Curve, Row, Timing, read

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "results").glob("*/rows.csv"))


def test_the_guide_names_every_column_and_no_other() -> None:
    table = (ROOT / "results" / "README.md").read_text().split("## Columns")[1]
    named = {name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {field.name for kind in (Row, Curve, Timing) for field in fields(kind)}


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_committed_rows_are_whole_and_consistent(folder: Path) -> None:
    rows, curves, timings = (read(folder / f"{name}.csv", kind) for name, kind in
                             (("rows", Row), ("curves", Curve), ("timings", Timing)))  # fmt: skip
    assert set(rows["matrix"]) == {folder.name}
    assert set(timings["cell"]) == set(rows["cell"])
    assert set(curves["cell"]) <= set(rows["cell"])
    rules = {how.value for how in Selection}
    assert set(rows["selection"]) in (rules, rules - {"canary"})
    assert (rows.groupby("cell")["selection"].nunique() == rows["selection"].nunique()).all()
    done = rows[rows["status"] == "ok"]
    assert (done["asr"] + done["ra"] <= 1 + 1e-6).all()
    assert done["acc"].between(0, 1).all()
    assert not (rows["status"] == "failed").any()
    # A chosen model is one of those offered.
    offered = set(zip(curves["cell"], curves["acc"], curves["asr"], strict=True))
    assert set(zip(done["cell"], done["acc"], done["asr"], strict=True)) <= offered


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_no_rule_beats_the_oracle_on_any_committed_cell(folder: Path) -> None:
    """The oracle is the candidate of highest test RA, the metric of the rankings: an upper bound by construction."""
    rows = read(folder / "rows.csv", Row)
    done = rows[(rows["status"] == "ok") & rows["ra"].notna()].pivot(index="cell", columns="selection", values="ra")
    assert len(done)
    for rule in done.columns:
        chosen = done[rule].dropna()  # a track may grant nothing to choose by
        assert (done.loc[chosen.index, "oracle"] >= chosen - 1e-9).all(), rule


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_a_ranked_choice_of_a_post_training_defense_is_within_the_tolerance_on_its_validation_images(folder: Path) -> None:
    rows = read(folder / "rows.csv", Row)
    edits = rows["used"].str.split(" + ", regex=False).map(lambda used: "model" in used)
    for rule in ("validation", "strongest", "canary"):
        chosen = rows[(rows["selection"] == rule) & (rows["status"] == "ok") & rows["val_loss"].notna() & edits]
        assert (chosen["val_loss"] <= TAU + 1e-6).all()
        assert (chosen.loc[chosen["kept"], "mark"] == "no change").all()
