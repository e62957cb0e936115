"""Rows survive the round trip through their files, and bad files are named."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest

from benchmark.storage import rows as storage
from benchmark.storage.files import write_text
from benchmark.storage.rows import FILES, Curve, Row, Timing, frame, read, write
from models.spec import BadInput

AXES = {
    "matrix": "m", "dataset": "digits", "backbone": "b", "attack": "a, with comma", "rate": 0.1, "seed": 0, "track": "model",
    "scope": "whole", "defense": "nan", "cell": "0123456789ab",
}  # fmt: skip
ROW = Row(**AXES, target=0, label_mode="all-to-one", realised_rate=0.1, control=True, selection="default", status="ok",
          acc=1 / 3, asr=math.nan, implanted=True)  # fmt: skip


OTHER = dataclasses.replace(ROW, cell="ba9876543210", defense="clp", control=False, preset="cpu", acc=0.5)
CURVES = [Curve(**{**AXES, "defense": one.defense, "cell": one.cell}, dial_name="u", dial=3.0, is_default=True, strength=1.0,
                pruned=2, acc=0.5, asr=0.5, ra=0.5, val_acc=0.5) for one in (ROW, OTHER)]  # fmt: skip
TIMINGS = [Timing(**{**AXES, "defense": one.defense, "cell": one.cell}, seconds=1.0, peak_mib=2.0, victim_seconds=3.0)
           for one in (ROW, OTHER)]  # fmt: skip


def test_round_trip_keeps_types_names_and_gaps(tmp_path: Path) -> None:
    assert write(tmp_path, [ROW, OTHER], CURVES, TIMINGS) is True
    for name, records in (("rows", [ROW, OTHER]), ("curves", CURVES), ("timings", TIMINGS)):
        table = read(tmp_path / f"{name}.csv", type(records[0]))
        pd.testing.assert_frame_equal(table, frame(records), atol=1e-6)  # type: ignore[type-var]
    record = read(tmp_path / "rows.csv", Row).iloc[0]
    assert record["defense"] == "nan"  # a name, not a missing number
    assert record["attack"] == "a, with comma"
    assert math.isnan(record["asr"])
    assert bool(record["control"]) is True
    assert record["reason"] == ""


def test_what_a_scenario_shares_is_written_once(tmp_path: Path) -> None:
    write(tmp_path, [ROW, dataclasses.replace(ROW, selection="oracle"), OTHER], [], [])
    lines = {name: (tmp_path / name).read_text().splitlines()[1:] for name in FILES}
    assert [len(lines[name]) for name in FILES] == [1, 2, 3, 0, 0]
    assert not [line for line in lines["rows.csv"] if "digits" in line]


def test_writing_the_same_again_touches_nothing(tmp_path: Path) -> None:
    write(tmp_path, [ROW], [], TIMINGS[:1])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(before) == set(FILES)
    assert write(tmp_path, [ROW], [], TIMINGS[:1]) is False
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert write(tmp_path, [ROW], [], [dataclasses.replace(TIMINGS[0], seconds=9)]) is False  # seconds are not content
    assert write(tmp_path, [OTHER], [], []) is True
    assert len(read(tmp_path / "rows.csv", Row)) == 1


@pytest.mark.parametrize("files", range(10))
def test_files_can_be_joined_wherever_writing_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    old, new = [ROW], [dataclasses.replace(OTHER, gate="another"), dataclasses.replace(ROW, attack="sig", cell="c")]
    write(tmp_path, old, CURVES[:1], TIMINGS[:1])
    left = files

    def stops(path: Path, text: str) -> bool:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return write_text(path, text)

    monkeypatch.setattr(storage, "write_text", stops)
    with contextlib.suppress(KeyboardInterrupt):
        write(tmp_path, new, CURVES[1:], TIMINGS[1:])
    assert read(tmp_path / "rows.csv", Row)["attack"].tolist() in (["a, with comma"], ["a, with comma", "sig"])
    assert len(read(tmp_path / "curves.csv", Curve)) == len(read(tmp_path / "timings.csv", Timing)) == 1


def test_a_curve_of_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cell ba9876543210 has a curve and no row"):
        write(tmp_path, [ROW], CURVES, [])


def test_missing_files_columns_cells_and_nonsense(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    with pytest.raises(BadInput, match="no such file"):
        read(rows, Row)
    write(tmp_path, [ROW, OTHER], CURVES, TIMINGS)
    with pytest.raises(BadInput, match=r"timings.csv: column 'selection' is missing"):
        read(tmp_path / "timings.csv", Row)
    whole = {name: (tmp_path / name).read_text() for name in FILES}
    for name, text, words in (
        ("rows.csv", whole["rows.csv"].replace("0.333333", "a third"), "rows.csv: not a rows file"),
        ("rows.csv", whole["rows.csv"].replace(ROW.cell, "elsewhere"), r"rows.csv: cell 'elsewhere' is not in cells.csv"),
        ("cells.csv", whole["cells.csv"].replace(OTHER.cell, ROW.cell), f"cells.csv: cell '{ROW.cell}' is there twice"),
        ("scenarios.csv", whole["scenarios.csv"].splitlines()[0], r"cells.csv: scenario '\w+' is not in scenarios.csv"),
        ("scenarios.csv", whole["scenarios.csv"].replace("0.1,0,", "0.1,zero,"), "scenarios.csv: not a rows file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=words):
            read(rows, Row)
        (tmp_path / name).write_text(whole[name])
    (tmp_path / "cells.csv").unlink()
    with pytest.raises(BadInput, match=r"cells.csv: no such file"):
        read(rows, Row)


def test_files_from_before_a_column_existed_are_read_with_it_empty(tmp_path: Path) -> None:
    write(tmp_path, [ROW], [], [])
    path = tmp_path / "rows.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in storage.LATER:
        table.drop(columns=name).to_csv(path, index=False)
        assert math.isnan(read(path, Row).iloc[0][name])
    table.drop(columns="acc").to_csv(path, index=False)
    with pytest.raises(BadInput, match="column 'acc' is missing"):
        read(path, Row)


def test_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write(tmp_path / "file", [ROW], [], [])
