"""Runs a matrix on a rented machine in slices until the time is up, and measures the GPU meanwhile."""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch
import typer
from rich.console import Console

from benchmark.data.datasets import load
from benchmark.proof.processes import ROOT
from benchmark.proof.rented.carry import victims
from benchmark.proof.throughput import flops, named_recipes, utilisation
from benchmark.run.plan import Plan
from benchmark.run.session import cached_rows
from benchmark.settings.cells import Matrix
from benchmark.settings.slices import TRAINS, Slice, kind_of, slices
from benchmark.storage.files import write_text
from benchmark.storage.rows import Row, Timing, read
from benchmark.storage.store import Store
from models.spec import canonical

__all__ = [
    "LEAST", "RESERVE", "Deadline", "Ended", "Meter", "Process", "Rental", "Sample", "attend", "figures", "run_slices", "summary",
]  # fmt: skip

SHARE = 0.12
"""Share of the minutes after which the measurement of throughput, which comes first, is ended."""
RESERVE = 0.05
"""Share of the minutes kept for the end, when rows and victims are written; at least :data:`LEAST` seconds."""
LEAST, START = 10.0, 15.0
"""Seconds of the reserve at least; seconds in which the processes of a slice load libraries and data."""
EVERY = 5.0
"""Seconds between two samples of the GPU."""
QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used,power.draw", "--format=csv")


# -- the deadline --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deadline:
    """When everything must be written.

    Attributes:
        end: seconds of ``clock``.
        reserve: seconds before it at which a running slice is interrupted.
        clock: gives the time.
    """

    end: float
    reserve: float
    clock: Callable[[], float] = time.time

    def left(self) -> float:
        """Seconds that a slice may still run."""
        return max(0.0, self.end - self.reserve - self.clock())


class Process(Protocol):
    """What :func:`attend` needs of a process that leads a process group."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...


def attend(process: Process, deadline: Deadline, send: Callable[[int, int], None] = os.killpg) -> str:
    """Waits for a slice and interrupts it in time, as Ctrl-C does; how it ended, in words.

    Args:
        process: the slice.
        deadline: when it must stop.
        send: sends a signal to a process group.
    """
    try:
        status = process.wait(timeout=deadline.left())
        return "finished" if status == 0 else f"failed with exit status {status}"
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        send(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=deadline.reserve / 2)
    except subprocess.TimeoutExpired:
        send(process.pid, signal.SIGKILL)
        process.wait()
        return "killed: it did not end when interrupted"
    return "interrupted"


@dataclass(frozen=True)
class Ended:
    """A slice that was run.

    Attributes:
        slice: its title.
        how: it ended, in words.
        cells: number of cells to run.
        rows: number of those that have rows now.
        seconds: of the clock.
        share: of the GPU's peak that the training of its victims reached, start included; NaN for no victims, or on a CPU.
    """

    slice: str
    how: str
    cells: int
    rows: int
    seconds: float
    share: float = math.nan


def run_slices(
    todo: Iterable[Slice], deadline: Deadline, needed: Callable[[Slice], float], run: Callable[[Slice], Ended]
) -> list[Ended]:
    """Runs slices until the time is up.

    Args:
        todo: the slices in order, each with the cells that have no rows yet.
        deadline: when to stop.
        needed: seconds within which the first cell of a slice can be finished; with less time left it is not begun.
        run: runs one.
    """
    ended: list[Ended] = []
    for part in todo:
        if not part.cells:
            continue
        if deadline.left() < (least := needed(part)):
            typer.echo(f"not begun: {part.title}: {deadline.left():.0f} s are left, and its first cell takes about {least:.0f} s")
            break
        ended.append(run(part))
        if ended[-1].how.startswith(("interrupted", "killed")):
            break
    return ended


# -- the GPU -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One reading of a GPU: busy in percent of the time since the last one, MiB in use, watts. NaN = not reported."""

    busy: float
    memory: float
    power: float


def figures(text: str) -> list[Sample]:
    """The samples in the output of :data:`QUERY`, one a GPU; lines that are none are ignored."""

    def number(field: str) -> float:
        try:
            return float(field.split()[0])
        except (ValueError, IndexError):
            return math.nan

    lines = [line for line in csv.reader(io.StringIO(text)) if len(line) == len(fields(Sample))]
    return [Sample(*map(number, line)) for line in lines if not line[0].startswith("utilization")]


class Meter(threading.Thread):
    """Reads the GPU's utilisation in the background; ``title`` is the slice that a reading counts for."""

    def __init__(self, every: float = EVERY, query: Sequence[str] = QUERY) -> None:
        super().__init__(daemon=True)
        self.every, self.query = every, query
        self.missing = shutil.which(query[0]) is None
        self.title = "start"
        self.found: list[tuple[float, str, Sample]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        begun = time.monotonic()
        while not self.missing and not self.ended.wait(self.every):
            with suppress(OSError, subprocess.TimeoutExpired):
                done = subprocess.run(self.query, capture_output=True, text=True, timeout=10, check=False)
                self.found += [(time.monotonic() - begun, self.title, one) for one in figures(done.stdout)]

    def mean(self, title: str) -> Sample:
        """Means over the samples of a slice; NaN without samples."""
        mine = [asdict(one) for _, name, one in self.found if name == title]
        known = {field.name: [one[field.name] for one in mine if not math.isnan(one[field.name])] for field in fields(Sample)}
        return Sample(**{name: statistics.fmean(values) if values else math.nan for name, values in known.items()})

    def table(self) -> str:
        """Every sample as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["seconds", "slice", "utilisation_percent", "memory_mib", "power_w"])
        writer.writerows([f"{at:.1f}", title, one.busy, one.memory, one.power] for at, title, one in self.found)
        return out.getvalue()


# -- what comes back -----------------------------------------------------------------------------------------------------------


def summary(ended: Sequence[Ended], meter: Meter, notes: Sequence[str]) -> str:
    """A table of the slices as Markdown, notes below."""

    def figure(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    header = ("slice", "ended", "cells", "with rows", "seconds", "GPU busy [%]", "memory [MiB]", "power [W]", "share of peak")
    lines = [header, ("---", "---", *["---:"] * (len(header) - 2))]
    for one in ended:
        mean = meter.mean(one.slice)
        measured = (figure(mean.busy, ".0f"), figure(mean.memory, ",.0f"), figure(mean.power, ".0f"), figure(one.share, ".1%"))
        lines.append((one.slice, one.how, str(one.cells), str(one.rows), f"{one.seconds:.0f}", *measured))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "".join(f"\n{note}.\n" for note in notes)


# -- a rental ------------------------------------------------------------------------------------------------------------------


class Rental:
    """The run of a matrix on a rented machine.

    Args:
        matrix: the loaded matrix.
        work: folder of this machine's store, decoded images and rows; it may be that of an earlier call.
        deadline: when to stop.
        processes: stages at once; 0 = as many as a run takes by itself.
    """

    def __init__(self, matrix: Matrix, work: Path, deadline: Deadline, processes: int) -> None:
        self.matrix, self.deadline, self.processes = matrix, deadline, processes
        self.cache, self.results = work / "cache", work / "runs"
        self.meter, self.store = Meter(), Store(self.cache / "store", typer.echo)
        carried = ROOT / "runs" / matrix.name
        if not self.results.is_dir() and carried.is_dir():
            shutil.copytree(carried, self.results / matrix.name)
        specs = {canonical(scenario.dataset): scenario.dataset for scenario in matrix.scenarios}
        self.plan = Plan(matrix, {text: load(spec, self.cache, typer.echo).fingerprint for text, spec in specs.items()})
        self.order = slices(matrix)

    @property
    def about(self) -> Path:
        """Folder of what is not rows: throughput, utilisation, the table of slices, victims."""
        return self.results / f"rented-{self.matrix.name}"

    def start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A command of this checkout, in a process group of its own."""
        return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, process_group=0)

    def done(self) -> set[str]:
        """Names of the cells that have rows, other than those of a failure."""
        path = self.results / self.matrix.name / "rows.csv"
        if not path.is_file():
            return set()
        rows = read(path, Row)
        return set(rows["cell"][rows["status"] != "failed"])

    def todo(self) -> Iterable[Slice]:
        """The slices, each with the cells that have no rows when it is about to be run."""
        for part in self.order:
            done = self.done()
            yield replace(part, cells=tuple(position for position in part.cells if self.plan.cells[position].name not in done))

    def needed(self, part: Slice) -> float:
        """Seconds until the first cell of a slice is finished: the start, and medians over the cells so far, of
        the same defenses if there are any."""
        path = self.results / self.matrix.name / "timings.csv"
        if not path.is_file():
            return START
        known = read(path, Timing)
        mine = [self.plan.cells[position] for position in part.cells]
        trains = any(not self.store.has("victim", key) for stage in mine for key in stage.victims)
        trains = trains or any(kind_of(self.matrix.cells[position]) >= TRAINS for position in part.cells)
        columns = ["seconds", "victim_seconds"] if trains else ["seconds"]
        same = known[known["defense"].isin({self.matrix.cells[position].defense_label for position in part.cells})]
        medians = [float((same if len(same) else known)[column].median()) for column in columns]
        return START + sum(value for value in medians if not math.isnan(value))

    def run(self, part: Slice) -> Ended:
        """Runs a slice until it has ended or must be stopped."""
        typer.echo(f"slice: {part.title}: {len(part.cells)} cells, {self.deadline.left():.0f} s left")
        self.meter.title = part.title
        keys = {key for position in part.cells for key in self.plan.cells[position].victims}
        before = {key for key in keys if self.store.has("victim", key)}
        begun = time.monotonic()
        process = self.start(
            "benchmark", "run", "--matrix", str(self.matrix.path.resolve()), "--only", part.only(self.matrix), "--no-draw",
            "--processes", str(self.processes), "--results", str(self.results), "--cache", str(self.cache),
        )  # fmt: skip
        how, seconds = attend(process, self.deadline), time.monotonic() - begun
        if how.startswith("killed"):  # an interrupted run writes these rows itself
            only, quiet = part.only(self.matrix), Console(quiet=True)
            cached_rows(self.matrix, results=self.results, cache=self.cache, console=quiet, only=only)
        done = self.done()
        rows = sum(self.plan.cells[position].name in done for position in part.cells)
        return Ended(part.title, how, len(part.cells), rows, seconds, self._share(keys - before, seconds))

    def _share(self, keys: Iterable[str], seconds: float) -> float:
        """Share of the peak that the training of these victims took of the GPU over ``seconds``; NaN for none, or without a GPU."""
        if not torch.cuda.is_available():
            return math.nan
        shares, device = [], torch.cuda.get_device_name()
        for key in keys:
            scenario, entry = self.plan.stages[key].scenario, self.store.read("victim", key, tensors=False)
            if entry is None or "samples_backward" not in entry.outcome:
                continue
            data = load(scenario.dataset, self.cache).train
            net = scenario.backbone.build(data.num_classes, data.shape, [0.5] * data.shape[0], [0.25] * data.shape[0], 0)
            rate = entry.outcome["samples_backward"] / seconds
            shares.append(utilisation(rate, flops(net, data.shape), device, scenario.recipe.precision))
        return sum(shares) if shares else math.nan

    def throughput(self, minutes: float) -> str:
        """Measures training speed, within :data:`SHARE` of the time; a note for the summary."""
        path, scenario = self.about / "throughput.md", self.matrix.scenarios[0]
        if path.is_file():
            return "throughput.md: measured in an earlier call"
        self.meter.title = "throughput"
        arguments = ["--backbone", scenario.backbone.name, "--rounds", "1", "--out", str(path)]
        if torch.cuda.is_available():
            names = [name for name, recipe in named_recipes().items() if recipe == scenario.recipe] or ["fast"]
            arguments += ["--recipe", names[0]]
        else:
            arguments += ["--images", "256"]
        process, limit = self.start("benchmark.proof.throughput", *arguments), 60 * minutes * SHARE
        # Killed where it takes too long: it has nothing to write, and an interrupt prints where it was.
        how = attend(process, Deadline(time.time() + limit + LEAST, LEAST), lambda group, _: os.killpg(group, signal.SIGKILL))
        return "throughput.md: the speed of training" if path.is_file() else f"no throughput: {how}, limit {limit:.0f} s"

    def close(self, ended: Sequence[Ended], notes: Sequence[str], limit: float) -> str:
        """Writes victims and summary; returns the summary."""
        self.meter.ended.set()
        positions = [position for part in self.order for position in part.cells]
        notes = [*notes, victims(self.plan, positions, self.store, self.about / "victims", limit)]
        if self.meter.missing:
            notes.append("no GPU utilisation: nvidia-smi is not on this machine")
        else:
            write_text(self.about / "utilisation.csv", self.meter.table())
        text = summary(ended, self.meter, notes)
        write_text(self.about / "slices.md", text)
        return text
