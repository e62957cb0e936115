"""Offline runs are read back through wandb's own command line: what a user of the runs sees is what is asserted."""

from __future__ import annotations

import builtins
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmark import tracking
from benchmark.tracking import CellLog, dashboard_command, log_matrix
from models.spec import BadInput

CELLS = [
    CellLog(
        key="0123456789ab",
        job_type="clp",
        name="badnets / resnet8 / s0 / clp",
        config={"attack": {"name": "badnets", "size": 3}, "seed": np.int64(0), "scope": "whole", "cover": None},
        summary={"validation": {"acc": 0.91, "asr": np.float64(0.25), "ra": math.nan}, "status": "ok"},
        curve=[
            {"dial": 0.0, "acc": 0.9, "asr": 1.0},
            {"dial": 0.5, "acc": 0.8, "asr": 0.2},
            {"dial": 1.0, "acc": 0.1, "asr": math.nan},
        ],
    ),
    CellLog("ba9876543210", "none", "badnets / resnet8 / s0 / none", config={}, summary={"default": {"acc": 0.95}}),
]


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every offline run under ``folder``, by name, as ``wandb leet inspect`` reports it; records by kind under ``records``."""
    found = {}
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines = subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        run = next(record["run"] for record in records if record["type"] == "run")
        summary: dict[str, Any] = {}
        for record in records:
            if record["type"] == "summary":
                summary.update(record["summary"]["update"])
        history = [record["history"]["item"] for record in records if record["type"] == "history"]
        ended = [record["exit"]["exit_code"] for record in records if record["type"] == "exit"]
        found[run["display_name"]] = {**run, "summary": summary, "history": history, "ended": ended, "folder": path}
    return found


def test_a_row_can_be_got_back_from_an_offline_run(tmp_path: Path) -> None:
    folder, calls = tmp_path / "runs", []
    picture = tmp_path / "heat.png"
    Image.new("RGB", (8, 8), (200, 10, 10)).save(picture)
    table = pd.DataFrame({"defense": ["clp", "none"], "acc": [0.91, math.nan], "implanted": [True, False]})

    said = log_matrix("tiny", CELLS, {"leaderboard": table}, [picture], folder, lambda done, total: calls.append((done, total)))

    assert "3 runs logged offline" in said
    assert "\n" not in said
    assert calls == [(1, 3), (2, 3), (3, 3)]
    back = runs(folder)
    assert set(back) == {cell.name for cell in CELLS} | {"tiny leaderboard"}
    clp = back[CELLS[0].name]
    assert (clp["run_group"], clp["job_type"], clp["project"], clp["ended"]) == ("tiny", "clp", "levelfield", [0])
    config = {name: value for name, value in clp["config"]["update"].items() if name != "_wandb"}
    attack = {"name": "badnets", "size": 3}
    assert config == {"matrix": "tiny", "cell": "0123456789ab", "attack": attack, "seed": 0, "scope": "whole"}
    row = {name: value for name, value in clp["summary"].items() if not name.startswith("_")}
    assert row == {"validation/acc": 0.91, "validation/asr": 0.25, "status": "ok"}
    curve = [{name: value for name, value in step.items() if not name.startswith("_")} for step in clp["history"]]
    assert curve == [
        {"curve/dial": 0, "curve/acc": 0.9, "curve/asr": 1},
        {"curve/dial": 0.5, "curve/acc": 0.8, "curve/asr": 0.2},
        {"curve/dial": 1, "curve/acc": 0.1},
    ]
    board = back["tiny leaderboard"]
    media = board["folder"] / "files" / "media"
    (stored,) = media.rglob("*.table.json")
    assert json.loads(stored.read_text()) == {
        "columns": ["defense", "acc", "implanted"],
        "data": [["clp", 0.91, True], ["none", None, False]],
    }
    (image,) = media.rglob("*.png")
    assert image.read_bytes() == picture.read_bytes()
    assert dashboard_command(folder) == [sys.executable, "-m", "wandb", "leet", str(folder / "wandb")]


def test_rows_are_told_apart_by_selection_and_repeat_nothing_of_the_config(tmp_path: Path) -> None:
    axes = {"defense": "clp", "seed": 0, "dial_name": "u"}
    rows = [{**axes, "selection": how, "acc": acc, "ra": math.nan} for how, acc in (("default", 0.5), ("oracle", 0.75))]
    curve = [{**axes, "dial": 3.0, "is_default": True, "acc": 0.5, "note": "words"}]
    log_matrix("tiny", [CellLog("c0", "clp", "one", {"defense": "clp", "seed": 0}, rows, curve)], {}, [], tmp_path)
    run = runs(tmp_path)["one"]
    assert {name: value for name, value in run["summary"].items() if not name.startswith("_")} == {
        "default/acc": 0.5,
        "default/dial_name": "u",
        "oracle/acc": 0.75,
        "oracle/dial_name": "u",
    }
    (point,) = run["history"]
    assert {name: value for name, value in point.items() if name.startswith("curve/")} == {
        "curve/dial": 3,
        "curve/is_default": True,
        "curve/acc": 0.5,
    }


def test_what_is_logged_is_not_logged_again_and_what_changed_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_matrix("tiny", CELLS, {}, [], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", _without_wandb)  # the second time is instant: wandb is not even imported
        assert log_matrix("tiny", CELLS, {}, [], tmp_path) == "W&B: all 2 runs are logged already"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    changed = CellLog(key=CELLS[1].key, job_type="none", name=CELLS[1].name, config={}, summary={"default": {"acc": 0.94}})
    assert "1 runs logged" in log_matrix("tiny", [CELLS[0], changed], {}, [], tmp_path)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3
    assert "2 runs logged" in log_matrix("other", CELLS, {}, [], tmp_path)


def test_a_damaged_record_or_deleted_runs_are_logged_again(tmp_path: Path) -> None:
    one = CELLS[1:]
    log_matrix("tiny", one, {}, [], tmp_path)
    record = tmp_path / ".logged" / "tiny.json"
    assert list(json.loads(record.read_text())["offline"]) == [CELLS[1].key]
    for damage in ("{", "[]", '{"offline": 3}'):
        record.write_text(damage)
        assert "1 runs logged" in log_matrix("tiny", one, {}, [], tmp_path)
    (tmp_path / "wandb").rename(tmp_path / "gone")
    assert "1 runs logged" in log_matrix("tiny", one, {}, [], tmp_path)


def _without_wandb(name: str, *args: Any, **kwargs: Any) -> Any:
    if name.split(".")[0] == "wandb":
        raise ImportError(name)
    return _IMPORT(name, *args, **kwargs)


_IMPORT = builtins.__import__


def test_disabled_unknown_and_missing_wandb_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", _without_wandb)
        assert log_matrix("tiny", CELLS, {}, [], tmp_path) == "W&B: skipped: wandb is not installed"
        patch.setenv("WANDB_MODE", "disabled")
        assert log_matrix("tiny", CELLS, {}, [], tmp_path) == "W&B: skipped: WANDB_MODE=disabled"
        patch.setenv("WANDB_MODE", "ofline")
        assert log_matrix("tiny", CELLS, {}, [], tmp_path).endswith("'ofline' is none of online, offline, disabled")
    assert list(tmp_path.iterdir()) == []


def test_online_without_a_login_asks_nobody_and_keeps_the_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    said = log_matrix("tiny", CELLS[1:], {}, [], tmp_path)
    assert "1 runs logged offline" in said
    assert "wandb login" in said
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert capfd.readouterr() == ("", "")


def test_a_failing_run_is_named_and_what_stands_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> dict[str, Any]:
        raise OSError("No space left on device")

    log_matrix("tiny", CELLS[:1], {}, [], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_settings", fails)
        said = log_matrix("tiny", CELLS, {}, [], tmp_path)
    assert "then: No space left on device; the same command logs the rest" in said
    assert "1 runs logged" in log_matrix("tiny", CELLS, {}, [], tmp_path)


def test_a_dashboard_without_runs_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no W&B runs here yet"):
        dashboard_command(tmp_path)


def test_a_dashboard_of_a_matrix_shows_its_present_runs_by_defense(tmp_path: Path) -> None:
    half = {"default": {"acc": 0.5}}
    cells = [CellLog(name, name, f"{name}/whole/badnets/0", config={}, summary=half) for name in ("clp", "anp")]
    log_matrix("tiny", cells, {"leaderboard": pd.DataFrame({"acc": [0.5]})}, [], tmp_path)
    log_matrix("other", cells[:1], {}, [], tmp_path)
    changed = CellLog("clp", "clp", cells[0].name, config={}, summary={"default": {"acc": 0.6}})
    log_matrix("tiny", [changed, cells[1]], {}, [], tmp_path)
    view = tmp_path / "by-defense" / "tiny"
    for _ in range(2):
        assert dashboard_command(tmp_path, "tiny")[-1] == str(view)
        links = sorted(path.name for path in view.iterdir())
        assert [name[: name.rindex("-")] for name in links] == [
            "run-20000101_000000-anp-whole-badnets-0", "run-20000101_000000-clp-whole-badnets-0",
            "run-20000101_000001-tiny-leaderboard",
        ]  # fmt: skip
        assert all((link / f"run-{link.name.split('-', 2)[2]}.wandb").is_file() for link in view.iterdir())  # as the view looks
    known = json.loads((tmp_path / ".logged" / "tiny.json").read_text())["offline"]
    assert f"run-20000101_000000-{known['clp']}" in links  # the present one; what it replaced stays among all runs
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 5
    with pytest.raises(BadInput, match="no W&B runs of the matrix 'absent'"):
        dashboard_command(tmp_path, "absent")
