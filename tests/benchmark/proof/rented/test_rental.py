"""A rental ends in time, runs slices in order, and brings rows, utilisation and victims back."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from rich.console import Console
from typer.testing import CliRunner

from benchmark.proof.rented import rental
from benchmark.proof.rented.__main__ import app
from benchmark.proof.rented.carry import victims
from benchmark.proof.rented.rental import Deadline, Ended, Meter, Rental, Sample, attend, figures, run_slices, summary
from benchmark.run.session import cached_rows
from benchmark.settings.load import load_matrix
from benchmark.settings.slices import Slice
from benchmark.storage.rows import Row, read

ROOT = Path(__file__).parents[4]


class Clock:
    """A clock that is set, not waited for."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Working:
    """A process that needs ``seconds``, and ``after`` more when it is interrupted."""

    pid = 77

    def __init__(self, clock: Clock, seconds: float, after: float = 0.0, status: int = 0) -> None:
        self.clock, self.left, self.after, self.status = clock, seconds, after, status
        self.sent: list[int] = []

    def send(self, group: int, number: int) -> None:
        assert group == self.pid
        self.sent.append(number)
        self.left = self.after if number == signal.SIGINT else 0.0

    def wait(self, timeout: float | None = None) -> int:
        spent = self.left if timeout is None else min(self.left, timeout)
        self.clock.now += spent
        self.left -= spent
        if self.left > 0:
            raise subprocess.TimeoutExpired("slice", timeout or 0.0)
        return self.status


def test_time_left_is_counted_to_the_reserve() -> None:
    clock = Clock()
    deadline = Deadline(end=100.0, reserve=30.0, clock=clock)
    assert deadline.left() == 70
    clock.now = 99.0
    assert deadline.left() == 0


@pytest.mark.parametrize(
    ("seconds", "after", "status", "how", "sent", "ended"),
    [
        (50.0, 0.0, 0, "finished", [], 50.0),
        (50.0, 0.0, 2, "failed with exit status 2", [], 50.0),
        (71.0, 4.0, 130, "interrupted", [signal.SIGINT], 74.0),
        (71.0, 99.0, 0, "killed: it did not end when interrupted", [signal.SIGINT, signal.SIGKILL], 85.0),
    ],
)
def test_a_slice_is_stopped_in_time(seconds: float, after: float, status: int, how: str, sent: list[int], ended: float) -> None:
    clock = Clock()
    process = Working(clock, seconds, after, status)
    assert attend(process, Deadline(100.0, 30.0, clock), process.send) == how
    assert process.sent == sent
    assert clock.now == ended
    assert clock.now < 100


def test_an_interrupt_is_that_of_a_terminal() -> None:
    program = "import time\ntry:\n print(1, flush=True)\n time.sleep(600)\nexcept KeyboardInterrupt:\n raise SystemExit(130)"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, process_group=0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
    assert attend(process, Deadline(time.time() + 400.2, 400.0)) == "interrupted"
    assert process.returncode == 130


def test_slices_run_in_order_until_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lengths = {"one": 30.0, "empty": 1.0, "two": 25.0, "three": 1.0}
    todo = [Slice(name, () if name == "empty" else (0, 1)) for name in lengths]

    def run(part: Slice) -> Ended:
        clock.now += lengths[part.title]
        return Ended(part.title, "finished", len(part.cells), 2, lengths[part.title])

    deadline = Deadline(100.0, 30.0, clock)
    ended = run_slices(todo, deadline, lambda part: 15.5, run)
    assert [one.slice for one in ended] == ["one", "two"]  # 15 s are left for the third
    assert "not begun: three: 15 s are left, and its first cell takes about 16 s" in capsys.readouterr().out
    clock.now = 0
    assert [one.slice for one in run_slices(todo, deadline, lambda part: 15.0, run)] == ["one", "two", "three"]


@pytest.mark.parametrize("how", ["interrupted", "killed: it did not end when interrupted"])
def test_nothing_runs_after_a_slice_that_was_stopped(how: str) -> None:
    todo = [Slice("one", (0,)), Slice("two", (1,))]
    ended = run_slices(todo, Deadline(100.0, 30.0, Clock()), lambda part: 0.0, lambda part: Ended(part.title, how, 1, 0, 1.0))
    assert [one.slice for one in ended] == ["one"]


READING = """utilization.gpu [%], memory.used [MiB], power.draw [W]
97 %, 30211 MiB, 612.33 W
3 %, 9 MiB, [N/A]
"""


def test_utilisation_is_read_from_csv() -> None:
    busy, idle = figures(READING)
    assert busy == Sample(97.0, 30211.0, 612.33)
    assert (idle.busy, idle.memory) == (3.0, 9.0)
    assert math.isnan(idle.power)
    assert figures("") == []
    assert figures("NVIDIA-SMI has failed because it could not talk to the driver.\n") == []


def test_means_are_per_slice() -> None:
    meter = Meter(query=("no-such-program-here",))
    assert meter.missing
    meter.start()
    meter.join(20)
    assert not meter.found
    meter.found += [
        (5.0, "one", Sample(90, 100, 500)), (9.0, "one", Sample(70, 300, math.nan)), (14.0, "two", Sample(1, 2, 3)),
    ]  # fmt: skip
    assert meter.mean("one") == Sample(80, 200, 500)
    assert math.isnan(meter.mean("three").busy)
    assert meter.table().splitlines() == [
        "seconds,slice,utilisation_percent,memory_mib,power_w", "5.0,one,90,100,500", "9.0,one,70,300,nan", "14.0,two,1,2,3",
    ]  # fmt: skip
    text = summary([Ended("one", "finished", 5, 5, 61.4, 0.3456), Ended("none", "interrupted", 9, 4, 7.0)], meter, ["a note"])
    lines = text.splitlines()
    assert lines[2] == "| one | finished | 5 | 5 | 61 | 80 | 200 | 500 | 34.6% |"
    assert lines[3] == "| none | interrupted | 9 | 4 | 7 | - | - | - | - |"
    assert lines[-1] == "a note."
    assert {line.count("|") for line in lines[:4]} == {10}


def test_the_meter_reads_in_the_background(tmp_path: Path) -> None:
    meter = Meter(0.01, (sys.executable, "-S", "-c", f"print({READING!r})"))
    meter.title = "mine"
    meter.start()
    until = time.monotonic() + 120
    while not meter.found and time.monotonic() < until:
        time.sleep(0.01)
    meter.ended.set()
    meter.join(20)
    assert meter.found[0][1:] == ("mine", Sample(97.0, 30211.0, 612.33))


TINY = """
title = "Tiny"
about = "For a test."
seeds = [0]
[dataset]
source = "digits"
clean_fraction = 0.2
train_limit = 200
test_limit = 50
[recipe]
epochs = 1
batch = 32
crop = 0
flip = false
[[backbone]]
name = "vgg11-bn"
width = 4
hidden = 0
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
"""


@pytest.mark.slow
def test_slices_are_normal_runs_and_the_next_call_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    matrix = load_matrix(tmp_path / "tiny.toml")
    begun = Rental(matrix, tmp_path / "work", Deadline(time.time() + 500, 100), processes=1)
    undefended = next(iter(begun.todo()))
    assert begun.needed(undefended) == rental.START
    ended = [begun.run(undefended)]
    assert (ended[0].how, ended[0].cells, ended[0].rows) == ("finished", 1, 1)
    assert len(begun.done()) == 1

    again = Rental(matrix, tmp_path / "work", Deadline(time.time() + 500, 100), processes=1)
    left = [part for part in again.todo() if part.cells]
    assert [part.only(matrix) for part in left] == ["seed=0,attack=badnets,defense=clp"]
    assert again.needed(left[0]) >= rental.START
    ended = run_slices(again.todo(), again.deadline, lambda part: 0.0, again.run)
    assert [(one.how, one.rows) for one in ended] == [("finished", 1)]
    rows = read(tmp_path / "work" / "runs" / "tiny" / "rows.csv", Row)
    assert set(rows["defense"]) == {"none", "clp"}
    folder = tmp_path / "work" / "runs" / "tiny"
    assert not (folder / "README.md").exists()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)  # as if a slice was killed before it could write its rows
    assert cached_rows(matrix, results=again.results, cache=again.cache, console=Console(quiet=True)) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not [part for part in again.todo() if part.cells]

    text = again.close(ended, ["throughput: none"], limit=40)
    assert "1 victims in half precision." in text
    (weights,) = again.about.glob("victims/*.safetensors")
    card = json.loads(weights.with_suffix(".json").read_text())
    key = again.plan.cells[0].victims[0]
    stored = again.store.read("victim", key)
    assert stored is not None
    half = safetensors.torch.load_file(weights)
    kept = {name.removeprefix("net."): value for name, value in stored.tensors.items() if name.startswith("net.")}
    assert half.keys() == kept.keys()
    assert all((half[name].float() - value.float()).abs().max() <= 1e-3 * value.float().abs().max() for name, value in kept.items())
    assert {value.element_size() for value in half.values() if value.is_floating_point()} == {2}
    assert card["scenario"]["attack"]["name"] == "badnets"
    assert card["measured"]["acc"] == stored.outcome["acc"]
    assert victims(again.plan, [0, 1], again.store, tmp_path / "none", limit=0.01) == (
        "0 victims in half precision, 1 left out: more than 0.01 MiB"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="packing lists the files of a git checkout")
def test_the_whole_way_on_a_cpu(tmp_path: Path) -> None:
    """Packs the smallest matrix and runs its script for half a minute; how far it gets depends on the machine."""
    packed, out = tmp_path / "pack", tmp_path / "out"
    done = CliRunner().invoke(app, ["pack", "--matrix", "smoke", "--out", str(packed), "--wheels", "none"])
    assert done.exit_code == 0, done.output
    assert [path.name for path in packed.iterdir()] == ["transfer-1"]
    command = ["bash", str(packed / "transfer-1" / "go.sh"), "--minutes", "0.5", "--out", "out", "--back", "15"]
    environment = {**os.environ, "PYTHON": sys.executable}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert ran.returncode == 0, ran.stderr
    with (tmp_path / "back.tar.gz").open("wb") as whole:
        for part in sorted(out.iterdir()):
            whole.write(part.read_bytes())
    shutil.unpack_archive(tmp_path / "back.tar.gz", tmp_path / "there", filter="data")
    table = (tmp_path / "there" / "rented-smoke" / "slices.md").read_text()
    assert table.startswith("| slice | ended |")
    assert "throughput" in table
    finished = [line for line in table.splitlines() if "| finished |" in line]
    assert bool(finished) <= (tmp_path / "there" / "smoke" / "rows.csv").is_file()

    part = packed / "transfer-1" / "code.tar.gz.000"
    part.write_bytes(part.read_bytes()[:-1])
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert ran.returncode == 2
    assert "transfer-1/code.tar.gz.000" in ran.stdout + ran.stderr


def test_a_wrong_matrix_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pack", "--matrix", "smok", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "did you mean 'smoke'?" in done.output
    assert not list(tmp_path.iterdir())
