"""Stages on several processes: dependencies, a worker that dies, a person's mistake that stops the run."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from benchmark.data.datasets import load
from benchmark.run import local as executors
from benchmark.run.keys import victim_key
from benchmark.run.local import Failure, Stage, run_stages
from benchmark.settings.load import load_matrix
from benchmark.storage.files import held
from benchmark.storage.store import Store
from models.spec import BadInput

MATRIX = """
title = "plug-ins that misbehave"
plugins = ["odd.py"]
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 100, test_limit = 40 }
recipe = { epochs = 0 }
backbone = [{ name = "vgg11-bn", width = 2, hidden = 8 }]
attack = [{ name = "badnets" }]
[[defense]]
name = "none"
[[defense]]
name = "dies-once"
tracks = ["model"]
"""
ODD = '''
"""A defense whose process dies the first time."""
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from defenses.base import Candidate, DefenderView, Defense, Knowledge

@dataclass(frozen=True)
class DiesOnce(Defense):
    """Exits without a word, unless it has been here before."""
    name: ClassVar[str] = "dies-once"

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        mark = Path(__file__).parent / "been-here"
        if not mark.exists():
            mark.touch()
            os._exit(9)
        yield Candidate(view.model)
'''


class Ear:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.finished_labels: list[str] = []
        self.notes: list[str] = []

    def started(self, worker: int, label: str) -> None:
        pass

    def finished(self, worker: int, label: str, kind: str) -> None:
        self.finished_labels.append(label)

    def put_back(self, worker: int) -> None:
        pass

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_stage_tried_again(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "m.toml").write_text(MATRIX)
    stages = [Stage("victim", 1, "victim"), Stage("cell", 1, "dies once", (0,)), Stage("cell", 0, "none", (0,))]
    ear = Ear()
    failures = run_stages(stages, tmp_path / "m.toml", tmp_path / "store", tmp_path / "cache", ear, 2)
    assert failures == []
    assert {"victim", "dies once", "none"} <= set(ear.finished_labels)
    assert ear.notes == ["a worker process died; its stages are tried again"]
    assert len(list((tmp_path / "store" / "defended").rglob("entry.json"))) == 2


WAITS = """
        deaths = Path(__file__).parent / "deaths"
        begun = time.monotonic()
        while not deaths.exists() or len(deaths.read_text()) < 3:
            assert time.monotonic() - begun < 400, "nobody died"
            time.sleep(0.05)
"""
DIES = """
        with (Path(__file__).parent / "deaths").open("a") as deaths:
            deaths.write("x")
        os._exit(9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("unheard", [False, True])
def test_a_death_counts_for_the_stage_whose_process_died_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unheard: bool
) -> None:
    """Also where the pool does not hear of it: it looks which processes there are, and then starts one more."""
    if unheard:
        start = ProcessPoolExecutor._adjust_process_count  # type: ignore[attr-defined]

        def late(pool: ProcessPoolExecutor) -> None:
            time.sleep(0.5)
            start(pool)

        monkeypatch.setattr(ProcessPoolExecutor, "_adjust_process_count", late)
    body = ODD[ODD.index("        mark =") : ODD.index("        yield")]
    named = ODD.replace("import os", "import os, time")
    (tmp_path / "odd.py").write_text(named.replace(body, DIES[1:]).replace("DiesOnce", "Dies").replace("dies-once", "dies"))
    (tmp_path / "other.py").write_text(named.replace(body, WAITS[1:]).replace("DiesOnce", "Waits").replace("dies-once", "waits"))
    settings = MATRIX.replace('"odd.py"', '"odd.py", "other.py"').replace("dies-once", "dies")
    (tmp_path / "m.toml").write_text(settings + '[[defense]]\nname = "waits"\ntracks = ["model"]\n')
    stages = [Stage("victim", 1, "victim"), Stage("cell", 2, "waits", (0,)), Stage("cell", 1, "dies", (0,))]
    ear = Ear()
    failures = run_stages(stages, tmp_path / "m.toml", tmp_path / "store", tmp_path / "cache", ear, 2)
    assert failures == [Failure(2, "its process died 3 times (out of memory?)")]
    assert (tmp_path / "deaths").read_text() == "xxx"
    assert "waits" in ear.finished_labels


SLEEPS = ODD.replace("DiesOnce", "Sleeps").replace("dies-once", "sleeps").replace("import os", "import os, time")


@pytest.mark.slow
def test_an_interrupt_ends_the_workers_too(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(SLEEPS.replace("os._exit(9)", "time.sleep(3600)"))
    (tmp_path / "m.toml").write_text(MATRIX.replace("dies-once", "sleeps"))
    seen: list[int] = []

    class Impatient(Ear):
        def started(self, worker: int, label: str) -> None:
            if label == "sleeps":
                seen.append(worker)
                raise KeyboardInterrupt

    stages = [Stage("victim", 1, "victim"), Stage("cell", 1, "sleeps", (0,)), Stage("cell", 0, "none", (0,))]
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, tmp_path / "m.toml", tmp_path / "store", tmp_path / "cache", Impatient(), 2)
    deadline = time.monotonic() + 300
    while any(child.pid in seen for child in multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert seen
    assert not [child for child in multiprocessing.active_children() if child.pid in seen]


def inline(monkeypatch: pytest.MonkeyPatch, work: object) -> None:
    monkeypatch.setattr(executors, "enter", lambda *arguments: None)
    monkeypatch.setattr(executors, "work", work)


def test_what_waits_for_a_failed_stage_is_not_run_and_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def work(kind: str, number: int, label: str) -> None:
        ran.append(label)
        if label == "a":
            raise executors.StageError("Diverged: no luck")

    inline(monkeypatch, work)
    stages = [Stage("victim", 0, "a"), Stage("victim", 1, "b"), Stage("cell", 0, "on a", (0,)), Stage("cell", 1, "on b", (1,))]
    failures = run_stages(stages, Path("m"), Path("s"), Path("c"), Ear(), 1)
    assert ran == ["a", "b", "on b"]
    assert failures == [Failure(0, "Diverged: no luck"), Failure(2, "Diverged: no luck")]


def test_what_another_run_computes_is_asked_for_again_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    slept: list[float] = []

    def work(kind: str, number: int, label: str) -> bool:
        asked.append(label)
        return label == "a" and len(slept) < 2

    inline(monkeypatch, work)
    monkeypatch.setattr(executors.time, "sleep", slept.append)
    monkeypatch.setattr(executors.time, "monotonic", lambda: sum(slept))
    stages = [Stage("victim", 0, "a"), Stage("victim", 1, "b"), Stage("cell", 0, "on a", (0,)), Stage("cell", 1, "on b", (1,))]
    ear = Ear()
    assert run_stages(stages, Path("m"), Path("s"), Path("c"), ear, 1) == []
    # Not before its own stage stands, and the processor rests while there is nothing else to do.
    assert asked == ["a", "b", "on b", "a", "a", "on a"]
    assert slept == [executors.AGAIN] * 2
    assert len(ear.notes) == 1
    assert "another process" in ear.notes[0]


@pytest.mark.slow
def test_a_pool_takes_other_stages_first_and_then_reads_what_another_run_computed(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD.replace("os._exit(9)", "pass"))
    (tmp_path / "m.toml").write_text(MATRIX)
    matrix, store = load_matrix(tmp_path / "m.toml"), Store(tmp_path / "store")
    key = victim_key(executors.victims_of(matrix)[1], load(matrix.scenarios[0].dataset, tmp_path / "cache").fingerprint)
    other_run = ExitStack()
    other_run.enter_context(held(store.root / "locks" / f"victim-{key}"))

    class Watching(Ear):
        def note(self, line: str) -> None:
            super().note(line)
            other_run.close()  # it gave up: the stage is free

    ear = Watching()
    stages = [Stage("victim", 1, "victim"), Stage("victim", 0, "twin"), Stage("cell", 0, "none", (0,))]
    assert run_stages(stages, tmp_path / "m.toml", store.root, tmp_path / "cache", ear, 2) == []
    assert sorted(ear.finished_labels) == ["none", "twin", "victim"]
    assert ear.finished_labels.index("victim") < ear.finished_labels.index("none")
    assert len(ear.notes) == 1
    assert store.read("victim", key) is not None


def test_a_persons_mistake_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(kind: str, number: int, label: str) -> None:
        raise BadInput("the disk is full")

    inline(monkeypatch, work)
    with pytest.raises(BadInput, match="disk is full"):
        run_stages([Stage("victim", 0, "a"), Stage("victim", 1, "b")], Path("m"), Path("s"), Path("c"), Ear(), 1)


def test_a_gpu_is_shared_by_a_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert executors.places() == executors.cores()
    monkeypatch.setattr("models.training.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(executors, "cores", lambda: 16)
    assert executors.places() == executors.SHARING
    monkeypatch.setattr(executors, "cores", lambda: 2)
    assert executors.places() == 2


class Left(BaseException):
    """Stands for a process that ended."""


def test_a_process_that_lost_its_gpu_fails_one_stage_and_takes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str, number: int) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def leave(status: int) -> None:
        raise Left

    monkeypatch.setattr(executors, "_run", broken)
    monkeypatch.setattr(executors, "_device_lost", lambda: True)
    monkeypatch.setattr(executors.os, "_exit", leave)
    monkeypatch.setattr(executors, "state", {"news": executors._Inline(Ear()), "pooled": True})
    with pytest.raises(executors.StageError, match="illegal memory access"):
        executors.work("cell", 0, "a")
    with pytest.raises(Left):
        executors.work("cell", 1, "b")
    monkeypatch.setattr(executors, "state", {"news": executors._Inline(Ear()), "pooled": False})
    for label in ("a", "b"):  # the only process there is goes on and reports
        with pytest.raises(executors.StageError):
            executors.work("cell", 0, label)


def test_a_machine_without_gpu_has_none_to_lose() -> None:
    if not torch.cuda.is_available():
        assert not executors._device_lost()


def test_a_stage_computes_as_precisely_as_its_victims_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = MATRIX.replace('plugins = ["odd.py"]\n', "").replace('name = "dies-once"', 'name = "clp"')
    (tmp_path / "m.toml").write_text(text.replace("epochs = 0", 'epochs = 0, precision = "tf32"'))
    matrix, entered = load_matrix(tmp_path / "m.toml"), []

    @contextmanager
    def noted(precision: str) -> Iterator[None]:
        entered.append(precision)
        yield

    monkeypatch.setattr("models.training.arithmetic", noted)
    monkeypatch.setattr("benchmark.run.victim.run_victim", lambda *arguments: entered.append("victim"))
    monkeypatch.setattr("benchmark.run.defend.run_cell", lambda *arguments: entered.append("cell"))
    monkeypatch.setattr(executors, "state", {"matrix": matrix, "store": None, "cache": tmp_path})
    executors._run("victim", 0)
    executors._run("cell", 1)
    assert entered == ["tf32", "victim", "tf32", "cell"]


def test_victims_are_listed_once_benign_twins_first(tmp_path: Path) -> None:
    text = MATRIX.replace('plugins = ["odd.py"]\n', "").replace('name = "dies-once"', 'name = "clp"')
    (tmp_path / "m.toml").write_text(text.replace("seeds = [0]", "seeds = [0, 1]"))
    victims = executors.victims_of(load_matrix(tmp_path / "m.toml"))
    assert [(v.attack_label, v.seed) for v in victims] == [("none", 0), ("none", 1), ("badnets", 0), ("badnets", 1)]
