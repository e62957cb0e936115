"""Rows survive the round trip through their files, and bad files are named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmark.storage.rows import Row, Timing, frame, read, write
from models.spec import BadInput

AXES = {
    "matrix": "m", "dataset": "digits", "backbone": "b", "attack": "a, with comma", "rate": 0.1, "seed": 0, "track": "model",
    "scope": "whole", "defense": "nan", "cell": "0123456789ab",
}  # fmt: skip
ROW = Row(**AXES, target=0, label_mode="all-to-one", realised_rate=0.1, control=True, selection="default", status="ok",
          acc=1 / 3, asr=math.nan, implanted=True)  # fmt: skip


def test_round_trip_keeps_types_names_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert write(path, Row, [ROW]) is True
    table = read(path, Row)
    record = table.iloc[0]
    assert record["defense"] == "nan"  # a name, not a missing number
    assert record["attack"] == "a, with comma"
    assert record["acc"] == pytest.approx(1 / 3, abs=1e-6)
    assert math.isnan(record["asr"])
    assert bool(record["control"]) is True
    assert record["reason"] == ""
    assert table["cell"].dtype == frame([ROW])["cell"].dtype
    assert list(table.columns) == list(frame([ROW]).columns)


def test_writing_the_same_again_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path, Row, [ROW])
    before = path.stat().st_mtime_ns
    assert write(path, Row, [ROW]) is False
    assert path.stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_missing_file_column_and_nonsense(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read(tmp_path / "rows.csv", Row)
    write(tmp_path / "timings.csv", Timing, [Timing(**AXES, seconds=1, peak_mib=2, victim_seconds=3)])
    with pytest.raises(BadInput, match="column 'target' is missing"):
        read(tmp_path / "timings.csv", Row)
    path = tmp_path / "broken.csv"
    write(path, Row, [ROW])
    path.write_text(path.read_text().replace("0.1,0,model", "0.1,zero,model"))
    with pytest.raises(BadInput, match="not a rows file"):
        read(path, Row)


def test_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write(tmp_path / "file" / "rows.csv", Row, [ROW])
