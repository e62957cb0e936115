"""A matrix on a machine rented by the minute, without a network: ``python -m benchmark.proof.rented pack``, there ``go.sh``.

``pack`` writes what is to be carried (:mod:`benchmark.proof.carry`). ``go`` runs the matrix there in slices, the most telling
first, each as a normal run with ``--only``. It stops by itself in time, with the rows of every finished cell, the throughput of
the machine, the GPU's utilisation and some of the victims. Cells that have rows are not run again, so the next rental goes on.
"""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer
from rich.console import Console

from benchmark.data.datasets import load
from benchmark.data.sources import VARIABLE
from benchmark.proof.carry import IMAGES, LIMIT, MIB, Part, Wheels, deliver, unpacked, victims
from benchmark.proof.carry import pack as packed_parts
from benchmark.proof.processes import ROOT
from benchmark.proof.throughput import flops, named_recipes, utilisation
from benchmark.run.plan import Plan
from benchmark.run.session import cached_rows
from benchmark.settings.cells import Matrix
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.settings.slices import Slice, kind_of, slices
from benchmark.storage.files import write_text
from benchmark.storage.rows import Row, Timing, read
from benchmark.storage.store import Store
from models.spec import BadInput, canonical

__all__ = ["Deadline", "Ended", "Meter", "Rental", "Sample", "attend", "figures", "go", "pack", "run_slices", "summary"]

SHARE = 0.12
"""Share of the minutes after which the measurement of throughput, which comes first, is ended."""
RESERVE = 0.05
"""Share of the minutes kept for the end, when rows and victims are written; at least :data:`LEAST` seconds."""
LEAST, START = 10.0, 15.0
"""Seconds of the reserve at least; seconds in which the processes of a slice load libraries and data."""
EVERY = 5.0
"""Seconds between two samples of the GPU."""
QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used,power.draw", "--format=csv")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)


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
        process.wait(timeout=deadline.reserve / 3)
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
        """Seconds until the first cell of a slice is finished: the start, and medians of the cells and victims so far."""
        path = self.results / self.matrix.name / "timings.csv"
        if not path.is_file():
            return START
        known = read(path, Timing)
        mine = [self.plan.cells[position] for position in part.cells]
        trains = any(not self.store.has("victim", key) for stage in mine for key in stage.victims)
        trains = trains or any(kind_of(self.matrix.cells[position]) > 1 for position in part.cells)
        columns = ["seconds", "victim_seconds"] if trains else ["seconds"]
        medians = [float(known[column].median()) for column in columns]
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


MatrixOption = Annotated[str, typer.Option("--matrix", "-m", help="A shipped matrix by name, or a .toml file in the checkout.")]


@contextmanager
def _errors() -> Iterator[None]:
    """A BadInput is one line and exit status 2."""
    try:
        yield
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def pack(
    matrix: MatrixOption = "cifar10-fast",
    out: Annotated[Path, typer.Option(help="Folder of the transfers.")] = Path("build/rented"),
    limit: Annotated[int, typer.Option(min=1, help="MiB of a transfer.")] = LIMIT,
    python: Annotated[str, typer.Option(help="Version of the rented machine's Python, for the wheels.")] = "3.12",
    wheels: Annotated[str, typer.Option(help="download, none, or a folder of wheels.")] = "download",
    cache: Annotated[Path, typer.Option(help="Where downloaded data sets are.")] = Path(".cache"),
) -> None:
    """Write everything to carry to a rented machine, in folders of one transfer each."""
    with _errors():
        folder = None if wheels == "download" else Path(wheels)
        wanted = None if wheels == "none" else Wheels(python, folder)
        transfers, notes = packed_parts(load_matrix(find_matrix(matrix)), out, limit=limit, wanted=wanted, cache=cache)
        for name, parts in transfers.items():
            typer.echo(f"{out / name}: {_mib(parts)}: {', '.join(f'{Path(part.path).name} {_mib([part])}' for part in parts)}")
        for note in notes:
            typer.echo(note)
        typer.echo(f"carry all of {out}; there: bash {out / 'transfer-1' / 'go.sh'} --minutes 14 --out OUT")


def _mib(parts: Iterable[Part]) -> str:
    return f"{sum(part.size for part in parts) / MIB:.1f} MiB"


@app.command()
def go(
    matrix: MatrixOption,
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes from the start of go.sh to the end of everything.")] = 14.0,
    out: Annotated[Path, typer.Option(help="Folder for what is to be carried back.")] = Path("out"),
    packed: Annotated[Path, typer.Option(help="The folder with the transfers.")] = Path("build/rented"),
    caller: Annotated[Path, typer.Option(help="The folder that --out is relative to.")] = Path(),
    begun: Annotated[float, typer.Option(help="When the minutes began, in seconds since 1970; 0 = now.")] = 0.0,
    reserve: Annotated[float, typer.Option(min=0, help="Seconds kept for the end; 0 = 5 % of the time, at least 10.")] = 0.0,
    weights: Annotated[float, typer.Option(min=0, help="MiB of victims that come back.")] = 40.0,
    back: Annotated[int, typer.Option(min=0, help="Send one archive back in parts of so many MiB; 0 = plain files.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Stages at once; 0 = as in a run.")] = 0,
) -> None:
    """Run a packed matrix for some minutes, the most telling slices first."""
    with _errors():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and the slices would, too
        deadline = Deadline((begun or time.time()) + 60 * minutes, reserve or max(LEAST, 60 * minutes * RESERVE))
        packed, out = packed.resolve(), caller / out
        if unpacked(packed, IMAGES, packed / "work" / "data"):
            os.environ[VARIABLE] = str(packed / "work" / "data")
        rental = Rental(load_matrix(find_matrix(matrix), typer.echo), packed / "work", deadline, processes)
        rental.meter.start()
        notes = [rental.throughput(minutes)]

        def run(part: Slice) -> Ended:
            ended = rental.run(part)
            deliver(rental.results, out, back)
            return ended

        ended = run_slices(rental.todo(), deadline, rental.needed, run)
        text = rental.close(ended, notes, weights)
        deliver(rental.results, out, back)
        typer.echo(f"{text}\n{out}: everything to carry back; {deadline.end - time.time():.0f} s of the time are left")


if __name__ == "__main__":
    app()
