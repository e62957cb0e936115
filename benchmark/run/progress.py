"""What a person sees while a matrix runs: what is running, on which worker, and what remains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import ClassVar

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["RunProgress", "notes"]


def notes(console: Console) -> Callable[[str], None]:
    """Prints what a person should know, a line each."""

    def note(line: str) -> None:
        console.print(f"[yellow]note:[/] {escape(line)}", highlight=False)

    return note


class RunProgress:
    """A bar per kind of stage and a line per worker; on a plain pipe, a line every few seconds instead.

    Use as a context manager around a run. ``totals``: how many stages of each kind (``victim``, ``extractor``, ``cell``) are still
    to be done; a kind with none has no bar.
    """

    PLAIN_EVERY = 15.0
    """Seconds between lines where the output is not a terminal."""

    WORDS: ClassVar[Mapping[str, str]] = {"victim": "attacked models", "extractor": "extractors", "cell": "defense cells"}

    def __init__(self, console: Console, totals: Mapping[str, int]) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("[bold]{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self.totals = {kind: totals[kind] for kind in self.WORDS if totals.get(kind)}
        self.counts = dict.fromkeys(self.totals, 0)
        self.tasks = {kind: self.bars.add_task(self.WORDS[kind], total=total, left="") for kind, total in self.totals.items()}
        self.now: dict[int, tuple[str, float]] = {}
        self.live = Live(get_renderable=self._picture, console=console, refresh_per_second=4, transient=False)
        self.begun = self.told = time.monotonic()

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.now.clear()
        if self.console.is_terminal:
            self.live.stop()

    def _picture(self) -> Group:
        lines = [
            Text(f"  worker {place}: {label}  ({time.monotonic() - since:.0f} s)", style="dim", no_wrap=True, overflow="ellipsis")
            for place, (label, since) in enumerate(self.now.values(), 1)
        ]
        if not self.now and not any(self.counts.values()):
            lines = [Text("  starting the worker processes ...", style="dim")]
        return Group(self.bars, *lines)

    def started(self, worker: int, label: str) -> None:
        self.now[worker] = (label, time.monotonic())
        self._plain()

    def finished(self, worker: int, label: str, kind: str) -> None:
        self.now.pop(worker, None)
        self.counts[kind] += 1
        elapsed = time.monotonic() - self.begun
        done, total = self.counts[kind], self.totals[kind]
        left = f"about {elapsed / done * (total - done):.0f} s left" if kind == "cell" and 3 < done < total else ""
        self.bars.update(self.tasks[kind], completed=done, left=left)
        self._plain()

    def put_back(self, worker: int) -> None:
        self.now.pop(worker, None)

    def note(self, line: str) -> None:
        notes(self.console)(line)

    def _plain(self) -> None:
        if self.console.is_terminal or time.monotonic() - self.told < self.PLAIN_EVERY:
            return
        self.told = time.monotonic()
        running = "; ".join(label for label, _ in self.now.values())
        done = ", ".join(f"{self.counts[kind]}/{total} {self.WORDS[kind]}" for kind, total in self.totals.items())
        self.console.print(f"[{self.told - self.begun:5.0f} s] {done}; running: {running or 'none'}", highlight=False, markup=False)
