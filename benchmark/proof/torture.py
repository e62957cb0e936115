"""What a run loses when it is disturbed: ``python -m benchmark.proof.torture`` (``make torture``).

One undisturbed run of a small matrix is the reference. Then the same command is issued again and again, disturbed in one way each
time: it is killed, interrupted, given a full disk, no permission to write, or damaged files. At the end of each run-through the
command finishes undisturbed, and its rows.csv and curves.csv are compared with the reference: lines lost, doubled or changed, and
bytes. Any difference is a defect; the exit status is 1.

The moment of a kill is drawn from the seed: at any time, shortly after a stage began, or when a temporary file appears. The draws
repeat; the state of the machine at that moment does not. Commands are forks of one process that has imported everything, so that
kills hit the work and not the imports; ``--fresh`` starts an interpreter each time. Linux only.
"""

from __future__ import annotations

import os
import shlex
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmark.proof.faults import HEADER, Outcome, compare, csv_text, draw, merged, read_outcomes, table
from benchmark.proof.harness import OLD, Draws, Torture, age, leftovers
from benchmark.proof.strikes import FAULTS
from benchmark.settings.load import find_matrix
from models.files import write_text
from models.spec import BadInput, nearest

__all__ = ["main", "run_through"]

RESULTS = Path("results/proof")
SHARES = {"kill -9 of all its processes": 0.7, "kill -9 of the parent alone": 0.08, "kill -9 of a worker": 0.08,
          "kill -9 of one of two runs at once": 0.14}  # fmt: skip
"""Shares of the kills."""
TOGETHER = 50
"""Disturbances in one run-through, at most."""
SEVERAL = 3
"""Disturbances of every other fault in one run-through."""


def _plan(names: Sequence[str], kills: int, rounds: int) -> Iterator[tuple[str, int, int]]:
    """(fault, number of disturbances, number of run-throughs); -1 run-throughs = until the disturbances are reached."""
    total = sum(SHARES.get(name, 0.0) for name in names)
    for name in names:
        if name in SHARES:
            yield name, round(kills * SHARES[name] / total), -1
        else:
            yield name, SEVERAL, rounds


def main(
    executor: Annotated[str, typer.Option(help="Passed on to the runs: local or ray.")] = "local",
    kills: Annotated[int, typer.Option(min=0, help="How many kill -9 in all, divided among the kinds of kill.")] = 100,
    rounds: Annotated[int, typer.Option(min=0, help="Run-throughs of each other fault.")] = 2,
    fault: Annotated[list[str] | None, typer.Option(help="Only this fault, by name; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Stages at once where several processes work.")] = 2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start an interpreter for every command.")] = False,
    matrix: Annotated[str, typer.Option("--matrix", "-m", help="What is run.")] = "torture",
    work: Annotated[Path | None, typer.Option(help="Folder of the runs; a temporary one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of faults.csv and FAULTS.md: outcomes are merged into them.")] = RESULTS,
) -> None:
    """Disturbs a small run in many ways and counts the rows that it loses."""
    console = Console(soft_wrap=True)
    try:
        names = [*(fault or FAULTS)]
        for name in names:
            if name not in FAULTS:
                raise BadInput(f"unknown fault {name!r}{nearest(name, FAULTS)}")
        command = _command(executor, kills, rounds, fault or (), seed, processes, fresh, matrix)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and the runs would, too
        with tempfile.TemporaryDirectory(prefix="lf-", dir=work) as folder:
            os.environ["RAY_TMPDIR"] = folder  # removed with the rest; a short path, for its sockets
            torture = Torture(find_matrix(matrix), Path(folder), executor=executor, processes=processes, seed=seed, fresh=fresh)
            outcomes = list(_all(torture, names, kills, rounds, command, out, console))
    except BadInput as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    printed = Table(*HEADER, title="Faults")
    for line in table(outcomes):
        printed.add_row(*map(escape, line))
    console.print(printed)
    raise typer.Exit(int(any(one.lost or one.doubled or one.changed for one in outcomes)))


def _command(
    executor: str, kills: int, rounds: int, faults: Sequence[str], seed: int, processes: int, fresh: bool, matrix: str
) -> str:
    """The command line without the names of folders."""
    words = ["python", "-m", "benchmark.proof.torture", "--executor", executor]
    words += ["--kills", str(kills), "--rounds", str(rounds), "--seed", str(seed)]
    words += ["--processes", str(processes)] if processes != 2 else []
    words += ["--fresh"] if fresh else []
    words += ["--matrix", Path(matrix).name] if matrix != "torture" else []
    for name in faults:
        words += ["--fault", name]
    return shlex.join(words)


def run_through(torture: Torture, fault: str, number: int, kills: int, command: str) -> Outcome:
    """One run-through of a fault.

    Args:
        torture: the harness.
        fault: its name.
        number: of the run-through.
        kills: how many disturbances, at most; fewer where the run ends before.
        command: the command line of the harness, for the outcome.
    """
    torture.clear()
    try:
        struck, extra = FAULTS[fault](torture, Draws(torture.seed, fault, number), kills)
        difference = extra + compare(torture.reference, torture.results)
    finally:
        torture.stop()
    left = [path for path in leftovers(torture.here) if age(path) > OLD / 2]
    if left:
        torture.notes.append(f"{len(left)} temporary files or locks stayed behind")
    note = "; ".join(dict.fromkeys(note for note in torture.notes if note))
    return Outcome(torture.executor, fault, number, struck, difference.lost, difference.doubled, difference.changed, note, command)


def _all(
    torture: Torture, names: Sequence[str], kills: int, rounds: int, command: str, out: Path, console: Console
) -> Iterator[Outcome]:
    """Every run-through. The files are written after each, so that an interrupt loses none."""
    name_and_bar = TextColumn("[bold]{task.description:<54}"), BarColumn(bar_width=24)
    bars = Progress(*name_and_bar, MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    earlier = read_outcomes(out / "faults.csv")
    mine: list[Outcome] = []
    with bars:
        first = bars.add_task("the undisturbed run", total=1)
        try:
            torture.begin()
        finally:
            torture.stop()
        bars.update(first, completed=1)
        for name, strikes, times in _plan(names, kills, rounds):
            todo = times if times >= 0 else strikes
            bar = bars.add_task(name, total=todo)
            number = done = 0
            while done < todo:
                one = run_through(torture, name, number, strikes if times >= 0 else min(strikes - done, TOGETHER), command)
                mine.append(one)
                number += 1
                done += 1 if times >= 0 else max(one.kills, 1)
                bars.update(bar, completed=min(done, todo))
                _write(merged(earlier, mine, list(FAULTS)), out)
                _report(one, console)
                yield one


def _write(outcomes: Sequence[Outcome], out: Path) -> None:
    write_text(out / "faults.csv", csv_text(outcomes))
    write_text(out / "FAULTS.md", draw(outcomes))


def _report(one: Outcome, console: Console) -> None:
    """A line for a log; a terminal has its progress bars."""
    if not console.is_terminal:
        console.print(
            f"{one.fault}: round {one.round}, {one.kills} times: {one.lost} lost, {one.doubled} doubled, {one.changed} changed; "
            f"{one.note}",
            markup=False,
            highlight=False,
        )


if __name__ == "__main__":
    typer.run(main)
