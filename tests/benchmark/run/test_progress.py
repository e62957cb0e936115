"""What a log says while a matrix runs."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from benchmark.run import progress
from benchmark.run.progress import RunProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the display sees; the time of day is 10:00 plus these."""
    now = [0.0]
    midnight = time.mktime((2026, 11, 30, 0, 0, 0, 0, 0, -1))
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.time, "time", lambda: midnight + 36_000 + now[0])
    return now


def display(**totals: int) -> RunProgress:
    return RunProgress(Console(file=io.StringIO(), width=200), totals)


def test_a_line_says_what_runs_epoch_by_epoch_and_when_it_ends(clock: list[float]) -> None:
    shown = display(victim=2, defended=3)
    assert shown.line() == "[    0 s] 0/2 attacked models, 0/3 defense cells; starting the worker processes"
    shown.started(7, "train a", "victim")
    clock[0] = 60
    assert "running: train a (60 s so far); time for attacked models and defense cells not known yet" in shown.line()
    shown.epoch(7, 2, 20)
    assert "running: train a (epoch 2 of 20, about 9 min left); about 19 min left for attacked models" in shown.line()
    clock[0] = 600
    shown.finished(7, "train a", "victim")
    shown.started(7, "train b", "victim")
    clock[0] = 1200
    shown.finished(7, "train b", "victim")
    shown.started(7, "c", "defended")
    clock[0] = 1500
    shown.finished(7, "c", "defended")
    shown.started(7, "d", "defended")
    shown.epoch(7, 9, 10)  # a defense may train again: its epochs tell nothing of its end
    clock[0] = 1560
    assert shown.line() == (
        "[ 1560 s] 2/2 attacked models, 1/3 defense cells; running: d (epoch 9 of 10, 60 s so far); about 9 min left, until 10:35"
    )


def test_stages_that_run_at_once_share_the_time(clock: list[float]) -> None:
    shown = display(defended=5)
    shown.started(1, "a", "defended")
    clock[0] = 100
    shown.finished(1, "a", "defended")
    for worker in (1, 2):
        shown.started(worker, "b", "defended")
    assert shown.left("defended") == 400
    assert "about 3 min left" in shown.line()
    shown.put_back(2)
    assert "about 7 min left, until 10:08" in shown.line()


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunProgress, "EVERY", 0.05)
    shown = display(victim=1)
    with shown:
        shown.started(1, "train a", "victim")
        deadline = time.monotonic() + 60
        while "running: train a" not in shown.console.file.getvalue() and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.01)
        shown.finished(1, "train a", "victim")
    lines = shown.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "running: train a" in lines[0]
    assert lines[-1].endswith("1/1 attacked models")
