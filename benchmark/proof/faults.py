"""Run-throughs of :mod:`benchmark.proof.torture` as lines of a file, and the page drawn from them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmark.report.text import markdown
from benchmark.storage.rows import FILES
from models.spec import BadInput

__all__ = [
    "HEADER", "KEYS", "Difference", "Outcome", "compare", "csv_text", "draw", "lines_of", "merged", "read_outcomes", "table",
]  # fmt: skip

KEYS: Mapping[str, tuple[str, ...]] = {
    "scenarios.csv": ("scenario",), "cells.csv": ("cell",), "rows.csv": ("cell", "selection"), "curves.csv": ("cell",),
    "timings.csv": ("cell",),
}  # fmt: skip
"""The key columns of each file. Seconds differ between any two runs, so of timings.csv only the keys are compared."""
REPEATED = FILES[:-1]
"""The files that must be identical byte by byte."""


@dataclass(frozen=True)
class Difference:
    """Lines of the three files, compared with the reference."""

    lost: int = 0
    doubled: int = 0
    """Lines that the reference lacks, or has fewer times."""
    changed: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.lost + other.lost, self.doubled + other.doubled, self.changed + other.changed)


def lines_of(path: Path, key: tuple[str, ...]) -> dict[tuple[Any, ...], tuple[str, ...]]:
    """Every line by its key and, where several lines have the same key, its number among them."""
    if not path.is_file():
        return {}
    found: dict[tuple[Any, ...], tuple[str, ...]] = {}
    seen: Counter[tuple[str, ...]] = Counter()
    with path.open(newline="", encoding="utf-8", errors="replace") as handle:
        for line in csv.DictReader(handle):
            about = tuple(str(line.get(name)) for name in key)
            found[(*about, seen[about])] = tuple(str(value) for value in line.values())
            seen[about] += 1
    return found


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def compare(reference: Path, found: Path, *, part: bool = False) -> Difference:
    """How the files of one result folder differ from another's.

    Args:
        part: whether ``found`` may lack lines: it was written by a run that did not finish.
    """
    total = Difference()
    for name, key in KEYS.items():
        right, mine = lines_of(reference / name, key), lines_of(found / name, key)
        both = right.keys() & mine.keys()
        changed = sum(right[about] != mine[about] for about in both) if name in REPEATED else 0
        one = Difference(0 if part else len(right.keys() - both), len(mine.keys() - both), changed)
        if one == Difference() and not part and name in REPEATED:  # the same lines in another order, say
            one = Difference(changed=int(_content(reference / name) != _content(found / name)))
        total += one
    return total


@dataclass(frozen=True)
class Outcome:
    """One run-through: number of disturbances, differences of its files at the end, messages of the command."""

    executor: str
    fault: str
    round: int
    kills: int
    """Number of disturbances; for damage, of damaged files."""
    lost: int
    doubled: int
    changed: int
    note: str
    command: str
    """The command line of the harness, without folders."""


def read_outcomes(path: Path) -> list[Outcome]:
    """The outcomes of earlier invocations; none where the file is missing.

    Raises:
        BadInput: a line is not an outcome.
    """
    if not path.is_file():
        return []
    outcomes = []
    with path.open(newline="", encoding="utf-8", errors="replace") as handle:
        lines = csv.DictReader(handle)
        for number, line in enumerate(lines, 2):
            try:
                values: dict[str, Any] = {f.name: int(line[f.name]) if f.type == "int" else line[f.name] for f in fields(Outcome)}
                outcomes.append(Outcome(**values))
            except (KeyError, ValueError, TypeError) as error:
                raise BadInput(f"{path}, line {number}: not an outcome of the fault harness: {error}") from error
    return outcomes


def merged(old: Iterable[Outcome], new: Iterable[Outcome], faults: Sequence[str]) -> list[Outcome]:
    """Outcomes of several invocations in the order of ``faults``; a repeated run-through replaces the earlier one."""
    by_place = {(one.command, one.executor, one.fault, one.round): one for one in (*old, *new)}
    order = {name: place for place, name in enumerate(faults)}

    def place(one: Outcome) -> tuple[Any, ...]:
        return order.get(one.fault, len(order)), one.fault, one.executor, one.command, one.round

    return sorted(by_place.values(), key=place)


def csv_text(outcomes: Iterable[Outcome]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([f.name for f in fields(Outcome)])
    writer.writerows(asdict(one).values() for one in outcomes)
    return out.getvalue()


HEADER = ("fault", "executor", "run-throughs", "times", "lost", "doubled", "changed", "messages of the command")


def table(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """One line per fault and executor, with the three most frequent messages."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.fault, one.executor), []).append(one)
    lines = []
    for (fault, executor), group in groups.items():
        messages = Counter(note for one in group for note in one.note.split("; ") if note)
        sums = (sum(getattr(one, name) for one in group) for name in ("kills", "lost", "doubled", "changed"))
        words = "; ".join(note for note, _ in sorted(messages.items(), key=lambda item: (-item[1], item[0]))[:3])
        lines.append((fault, executor, str(len(group)), *(str(number) for number in sums), words))
    return lines


def draw(outcomes: Sequence[Outcome]) -> str:
    """The page FAULTS.md."""
    total = sum((Difference(one.lost, one.doubled, one.changed) for one in outcomes), Difference())
    times = sum(one.kills for one in outcomes)
    kills = sum(one.kills for one in outcomes if one.fault.startswith("kill"))
    found = f"{total.lost} rows lost, {total.doubled} doubled, {total.changed} changed"
    lines = [
        "# Faults\n\n",
        "A small run with every kind of stage (`benchmark/settings/matrices/torture.toml`) is disturbed and issued again until\n",
        "it finishes. Its `rows.csv` and `curves.csv` are then compared with those of an undisturbed run, line by line and byte\n",
        "by byte.\n\n",
        f"**In {len(outcomes)} run-throughs, disturbed {times} times ({kills} of them by kill -9): {found}.**\n\n",
    ]
    right = (":--", ":--", "--:", "--:", "--:", "--:", "--:", ":--")
    lines += [f"| {' | '.join(line)} |\n" for line in (HEADER, right)]
    lines += [f"| {' | '.join(markdown(cell) for cell in line)} |\n" for line in table(outcomes)]
    lines.append("\nEvery run-through is a line of [faults.csv](faults.csv). Drawn by\n\n```bash\n")
    lines += [f"{command}\n" for command in dict.fromkeys(one.command for one in outcomes)]
    return "".join([*lines, "```\n"])
