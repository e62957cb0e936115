"""What a person sees while a matrix runs: what is running, on which worker, and what remains."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["RunProgress"]


class RunProgress:
    """Two bars (victims, defense cells) and a line per worker; on a plain pipe, a line every few seconds instead.

    Use as a context manager around a run. ``victims`` and ``cells``: how many of each are still to be done.
    """

    PLAIN_EVERY = 15.0
    """Seconds between lines where the output is not a terminal."""

    def __init__(self, console: Console, victims: int, cells: int) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("[bold]{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self.totals = {"victim": victims, "cell": cells}
        self.counts = {"victim": 0, "cell": 0}
        self.tasks = {
            "victim": self.bars.add_task("attacked models", total=victims, left=""),
            "cell": self.bars.add_task("defense cells", total=cells, left=""),
        }
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

    def note(self, line: str) -> None:
        self.console.print(f"[yellow]note:[/] {line}", highlight=False)

    def _plain(self) -> None:
        if self.console.is_terminal or time.monotonic() - self.told < self.PLAIN_EVERY:
            return
        self.told = time.monotonic()
        running = "; ".join(label for label, _ in self.now.values())
        names = {"victim": "models", "cell": "cells"}
        done = ", ".join(f"{self.counts[kind]}/{self.totals[kind]} {name}" for kind, name in names.items())
        self.console.print(f"[{self.told - self.begun:5.0f} s] {done}; running: {running or 'none'}", highlight=False, markup=False)
