"""Stages on several processes: dependencies, a worker that dies, a person's mistake that stops the run."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmark.data.datasets import load
from benchmark.run import local as executors
from benchmark.run.local import Failure, run_stages
from benchmark.run.plan import Plan, Stage
from benchmark.settings.load import load_matrix
from benchmark.storage.files import held
from benchmark.storage.store import Store
from models.progress import epoch_ended
from models.spec import BadInput, canonical

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


def planned(folder: Path, *wanted: str) -> tuple[list[Stage], Plan]:
    """The stages of the matrix ``m.toml`` whose labels begin so, in this order, and the plan."""
    matrix = load_matrix(folder / "m.toml")
    spec = matrix.scenarios[0].dataset
    plan = Plan(matrix, {canonical(spec): load(spec, folder / "cache").fingerprint})
    return [next(stage for stage in plan.stages.values() if stage.label.startswith(start)) for start in wanted], plan


VICTIM, TWIN = "train vgg11-bn-w2 / badnets", "train vgg11-bn-w2 / none"


def stage(label: str, *after: str) -> Stage:
    """A stage that is never run."""
    scenario: Any = None
    return Stage("victim", label, label, scenario, after=after)


NO_PLAN: Any = None


class Ear:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.finished_labels: list[str] = []
        self.notes: list[str] = []
        self.epochs: list[tuple[int, int]] = []

    def started(self, worker: int, label: str, kind: str) -> None:
        pass

    def epoch(self, worker: int, done: int, total: int) -> None:
        self.epochs.append((done, total))

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
    stages, plan = planned(tmp_path, VICTIM, "dies-once", "none")
    ear = Ear()
    failures = run_stages(stages, plan, tmp_path / "store", tmp_path / "cache", ear, 2)
    assert failures == []
    assert {stage.label for stage in stages} <= set(ear.finished_labels)
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
    stages, plan = planned(tmp_path, VICTIM, "waits", "dies")
    ear = Ear()
    failures = run_stages(stages, plan, tmp_path / "store", tmp_path / "cache", ear, 2)
    assert failures == [Failure(2, "its process died 3 times (out of memory?)")]
    assert (tmp_path / "deaths").read_text() == "xxx"
    assert stages[1].label in ear.finished_labels


SLEEPS = ODD.replace("DiesOnce", "Sleeps").replace("dies-once", "sleeps").replace("import os", "import os, time")


@pytest.mark.slow
def test_an_interrupt_ends_the_workers_too(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(SLEEPS.replace("os._exit(9)", "time.sleep(3600)"))
    (tmp_path / "m.toml").write_text(MATRIX.replace("dies-once", "sleeps"))
    seen: list[int] = []

    class Impatient(Ear):
        def started(self, worker: int, label: str, kind: str) -> None:
            if label.startswith("sleeps"):
                seen.append(worker)
                raise KeyboardInterrupt

    stages, plan = planned(tmp_path, VICTIM, "sleeps", "none")
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, plan, tmp_path / "store", tmp_path / "cache", Impatient(), 2)
    deadline = time.monotonic() + 300
    while any(child.pid in seen for child in multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert seen
    assert not [child for child in multiprocessing.active_children() if child.pid in seen]


def inline(monkeypatch: pytest.MonkeyPatch, work: object) -> None:
    monkeypatch.setattr(executors, "_begin", lambda *arguments, pooled: None)
    monkeypatch.setattr(executors, "work", work)


def test_what_waits_for_a_failed_stage_is_not_run_and_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def work(key: str) -> None:
        ran.append(key)
        if key == "a":
            raise executors.StageError("Diverged: no luck")

    inline(monkeypatch, work)
    stages = [stage("a"), stage("b"), stage("on a", "a"), stage("on b", "b", "cached")]
    failures = run_stages(stages, NO_PLAN, Path("s"), Path("c"), Ear(), 1)
    assert ran == ["a", "b", "on b"]
    assert failures == [Failure(0, "Diverged: no luck"), Failure(2, "Diverged: no luck")]


def test_what_another_run_computes_is_asked_for_again_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    slept: list[float] = []

    def work(key: str) -> bool:
        asked.append(key)
        return key == "a" and len(slept) < 2

    inline(monkeypatch, work)
    monkeypatch.setattr(executors.time, "sleep", slept.append)
    monkeypatch.setattr(executors.time, "monotonic", lambda: sum(slept))
    stages = [stage("a"), stage("b"), stage("on a", "a"), stage("on b", "b")]
    ear = Ear()
    assert run_stages(stages, NO_PLAN, Path("s"), Path("c"), ear, 1) == []
    # Not before the stage it waits for has finished, and the processor rests while there is nothing else to do.
    assert asked == ["a", "b", "on b", "a", "a", "on a"]
    assert slept == [executors.AGAIN] * 2
    assert len(ear.notes) == 1
    assert "another process" in ear.notes[0]


@pytest.mark.slow
def test_a_pool_takes_other_stages_first_and_then_reads_what_another_run_computed(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD.replace("os._exit(9)", "pass"))
    (tmp_path / "m.toml").write_text(MATRIX)
    stages, plan = planned(tmp_path, VICTIM, TWIN, "none")
    store, other_run = Store(tmp_path / "store"), ExitStack()
    other_run.enter_context(held(store.root / "locks" / f"victim-{stages[0].key}"))

    class Watching(Ear):
        def note(self, line: str) -> None:
            super().note(line)
            other_run.close()  # it gave up: the stage is free

    ear = Watching()
    victim, twin, none = (stage.label for stage in stages)
    assert run_stages(stages, plan, store.root, tmp_path / "cache", ear, 2) == []
    assert sorted(ear.finished_labels) == sorted([none, twin, victim])
    assert ear.finished_labels.index(victim) < ear.finished_labels.index(none)
    assert len(ear.notes) == 1
    assert store.read("victim", stages[0].key) is not None


def test_a_persons_mistake_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(key: str) -> None:
        raise BadInput("the disk is full")

    inline(monkeypatch, work)
    with pytest.raises(BadInput, match="disk is full"):
        run_stages([stage("a"), stage("b")], NO_PLAN, Path("s"), Path("c"), Ear(), 1)


def test_a_gpu_is_shared_by_a_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert executors.places() == executors.cores()
    monkeypatch.setattr(executors, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(executors, "cores", lambda: 16)
    assert executors.places() == executors.SHARING
    monkeypatch.setattr(executors, "cores", lambda: 2)
    assert executors.places() == 2


class Left(BaseException):
    """In place of a process that ended."""


def pretended(watcher: Ear, run: Callable[[Store, Path], None], *, pooled: bool = False) -> dict[str, Any]:
    """The state of a worker whose plan has one stage, ``a``, that does ``run``."""
    one = SimpleNamespace(kind="defended", label="a", run=run)
    plan = SimpleNamespace(stages={"a": one})
    return {"plan": plan, "store": None, "cache": None, "news": executors._Inline(watcher), "pooled": pooled}


def test_a_process_that_lost_its_gpu_fails_one_stage_and_takes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(store: Store, cache: Path) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def leave(status: int) -> None:
        raise Left

    monkeypatch.setattr(executors, "_device_lost", lambda: True)
    monkeypatch.setattr(executors.os, "_exit", leave)
    monkeypatch.setattr(executors, "state", pretended(Ear(), broken, pooled=True))
    with pytest.raises(executors.StageError, match="illegal memory access"):
        executors.work("a")
    with pytest.raises(Left):
        executors.work("a")
    monkeypatch.setattr(executors, "state", pretended(Ear(), broken))
    for _ in range(2):  # the only process there is goes on and reports
        with pytest.raises(executors.StageError):
            executors.work("a")


def test_a_watcher_hears_of_epochs_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(executors.time, "monotonic", lambda: clock[0])

    def train(store: Store, cache: Path) -> None:
        for number in range(1, 11):
            clock[0] += executors.EPOCHS / 2
            epoch_ended(number, 10)

    ear = Ear()
    monkeypatch.setattr(executors, "state", pretended(ear, train))
    assert not executors.work("a")
    assert ear.epochs == [(1, 10), (3, 10), (5, 10), (7, 10), (9, 10)]
    epoch_ended(1, 10)  # nobody hears of trainings outside a stage
    assert len(ear.epochs) == 5


def test_a_machine_without_gpu_has_none_to_lose() -> None:
    if not torch.cuda.is_available():
        assert not executors._device_lost()
