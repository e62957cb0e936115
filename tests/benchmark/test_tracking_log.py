"""What is in an offline run file, read by a reader of our own: every row and every point of every curve comes back."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmark.present import cell_logs
from benchmark.storage.rows import Curve, Row, read
from benchmark.tracking import log_matrix

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="wandb is not installed")

RESULTS = Path(__file__).parents[2] / "results" / "cifar10-small"
BLOCK, HEADER = 32768, 7


def messages(path: Path) -> Iterator[Any]:
    """The records of a run's transaction log: W&B's seven bytes, then LevelDB's log format, each record a protobuf message.

    wandb ships the message classes and, since its core is written in Go, no reader of the file.
    """
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, parts = HEADER, b""
    while at < len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left  # a block's tail too short for a header is padding
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = pb.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(config, summary, history) of a run file, keys as they were logged."""
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []

    def pairs(items: Any) -> dict[str, Any]:
        return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

    for record in messages(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= pairs(record.run.config.update)
        elif kind == "summary":
            summary |= pairs(record.summary.update)
        elif kind == "history":
            history.append(pairs(record.history.item))
    return config, summary, history


def table(lines: list[dict[str, Any]], like: pd.DataFrame) -> pd.DataFrame:
    """Lines as a table of the columns and types of ``like``; what a line lacks was not measured."""
    whole = [{name: line.get(name, math.nan) for name in like.columns} for line in lines]
    return pd.DataFrame(whole).astype(like.dtypes.to_dict())


def sort(frame: pd.DataFrame, *by: str) -> pd.DataFrame:
    return frame.sort_values(list(by), kind="stable").reset_index(drop=True)


def test_every_row_and_every_curve_comes_back_from_the_offline_run_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    rows, curves = read(RESULTS / "rows.csv", Row), read(RESULTS / "curves.csv", Curve)
    # One victim, everything but the longest track: controls, refused cells, cells with a curve and without.
    rows = rows[(rows["seed"] == 0) & (rows["backbone"] == rows["backbone"].iloc[0]) & (rows["track"] != "model+clean")]
    curves = curves[curves["cell"].isin(rows["cell"])]
    cells = rows["cell"].nunique()
    assert cells > 10
    assert set(rows["status"]) == {"ok", "refused"}
    assert f"{cells} runs logged offline" in log_matrix("cifar10-small", cell_logs(rows, curves), {}, [], tmp_path)

    lines, points = [], []
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        config, summary, history = read_run(path)
        for selection in dict.fromkeys(key.split("/")[0] for key in summary if "/" in key and key[0] != "_"):
            own = {key.split("/", 1)[1]: value for key, value in summary.items() if key.startswith(f"{selection}/")}
            lines.append({**config, **own, "selection": selection})
        for step in history:
            points.append({**config, **{key.removeprefix("curve/"): value for key, value in step.items()}})
    assert {field.name for field in fields(Row)} == set(rows.columns)
    pd.testing.assert_frame_equal(
        sort(table(lines, rows), "cell", "selection"), sort(rows, "cell", "selection"), check_exact=True
    )  # fmt: skip
    pd.testing.assert_frame_equal(sort(table(points, curves), "cell"), sort(curves, "cell"), check_exact=True)


def test_the_reader_puts_records_longer_than_a_block_together(tmp_path: Path) -> None:
    record = pb.Record()
    record.run.display_name = "x" * 100_000
    data, content = record.SerializeToString(), b":W&B\xe1\xbe\x00"
    kinds = [2, 3, 3, 4]
    for kind in kinds:
        room = BLOCK - len(content) % BLOCK - HEADER
        piece, data = data[:room], data[room:]
        content += struct.pack("<IHB", 0, len(piece), kind) + piece
    assert not data
    path = tmp_path / "run.wandb"
    path.write_bytes(content)
    (found,) = messages(path)
    assert found == record
