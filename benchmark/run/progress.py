"""What a person sees while a matrix runs: what is done, what is running, and when it will end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["RunProgress", "notes"]

STARTING = "starting the worker processes"


def notes(console: Console) -> Callable[[str], None]:
    """Returns a function that prints a line as a note."""

    def note(line: str) -> None:
        console.print(f"[yellow]note:[/] {escape(line)}", highlight=False)

    return note


@dataclass
class _Running:
    """A stage that a worker is running; ``done`` of ``total`` epochs of its training had ended at time ``reported``."""

    label: str
    kind: str
    since: float
    done: int = 0
    total: int = 0
    reported: float = 0.0

    def left(self) -> float | None:
        """Estimated seconds to its end; None where it is unknown. A defense may train several times, so its epochs do not count."""
        if not self.done or self.kind == "defended":
            return None
        return max((self.reported - self.since) / self.done * self.total - (time.monotonic() - self.since), 0.0)

    def words(self) -> str:
        """The label, and how far it is."""
        seconds, left = time.monotonic() - self.since, self.left()
        parts = [f"epoch {self.done} of {self.total}"] if self.done else []
        parts.append(f"{_duration(seconds)} so far" if left is None else f"about {_duration(left)} left")
        return f"{self.label} ({', '.join(parts)})"


class RunProgress:
    """On a terminal a bar per kind of stage and a line per worker, elsewhere a line of text every :data:`EVERY` seconds.

    Used as a context manager around a run.

    Args:
        console: where to print.
        totals: how many stages of each kind (``victim``, ``extractor``, ``defended``) are to be run; a kind with none has no bar.
    """

    EVERY = 30.0
    """Seconds between lines where the output is not a terminal."""

    WORDS: ClassVar[Mapping[str, str]] = {"victim": "attacked models", "extractor": "extractors", "defended": "defense cells"}

    def __init__(self, console: Console, totals: Mapping[str, int]) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("[bold]{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.totals = {kind: totals[kind] for kind in self.WORDS if totals.get(kind)}
        self.counts = dict.fromkeys(self.totals, 0)
        self.seconds = dict.fromkeys(self.totals, 0.0)
        """Of the finished stages of each kind, all together."""
        self.tasks = {kind: self.bars.add_task(self.WORDS[kind], total=total) for kind, total in self.totals.items()}
        self.now: dict[int, _Running] = {}
        self.live = Live(get_renderable=self._picture, console=console, refresh_per_second=4, transient=False)
        self.begun = time.monotonic()
        self._over = threading.Event()
        # A thread of its own: in a run of one process nothing else prints while a stage is running.
        self._printer = threading.Thread(target=self._print, daemon=True)

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:
            self.live.start()
        else:
            self._printer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.now.clear()
        self._over.set()
        if self.console.is_terminal:
            self.live.stop()
        else:
            self._printer.join()
            self.console.print(self.line(), highlight=False, markup=False)

    def started(self, worker: int, label: str, kind: str) -> None:
        self.now[worker] = _Running(label, kind, time.monotonic())

    def epoch(self, worker: int, done: int, total: int) -> None:
        if worker in self.now:
            stage = self.now[worker]
            stage.done, stage.total, stage.reported = done, total, time.monotonic()

    def finished(self, worker: int, label: str, kind: str) -> None:
        stage = self.now.pop(worker, None)
        self.counts[kind] += 1
        self.seconds[kind] += time.monotonic() - stage.since if stage else 0.0
        self.bars.update(self.tasks[kind], completed=self.counts[kind])

    def put_back(self, worker: int) -> None:
        self.now.pop(worker, None)

    def note(self, line: str) -> None:
        notes(self.console)(line)

    def line(self) -> str:
        """What is done, what is running and when it will end, as one line of text."""
        done = ", ".join(f"{self.counts[kind]}/{total} {self.WORDS[kind]}" for kind, total in self.totals.items())
        running = [stage.words() for stage in list(self.now.values())]
        parts = [f"[{time.monotonic() - self.begun:5.0f} s] {done}"]
        if running:
            parts += [f"running: {', '.join(running)}", self._end()]
        elif not any(self.counts.values()) and not self._over.is_set():
            parts.append(STARTING)
        return "; ".join(parts)

    def left(self, kind: str) -> float | None:
        """Estimated seconds of one process for the stages of a kind that have not finished; None while it is unknown."""
        running = [stage for stage in list(self.now.values()) if stage.kind == kind]
        known = [time.monotonic() - stage.since + left for stage in running if (left := stage.left()) is not None]
        if self.counts[kind]:
            mean = self.seconds[kind] / self.counts[kind]
        elif known:
            mean = sum(known) / len(known)
        else:
            return None
        waiting = self.totals[kind] - self.counts[kind] - len(running)
        rest = [max(mean - (time.monotonic() - stage.since), 0.0) if (left := stage.left()) is None else left for stage in running]
        return max(waiting, 0) * mean + sum(rest)

    def _end(self) -> str:
        """When the run will end, or, while one kind of stage is unknown, how long the others will take."""
        at_once = max(len(self.now), 1)
        left = {kind: self.left(kind) for kind, total in self.totals.items() if self.counts[kind] < total}
        known = {kind: seconds / at_once for kind, seconds in left.items() if seconds is not None}
        if len(known) == len(left):
            return f"about {_duration(sum(known.values()))} left{_clock(sum(known.values()))}"
        parts = [f"about {_duration(seconds)} left for {self.WORDS[kind]}" for kind, seconds in known.items()]
        unknown = " and ".join(self.WORDS[kind] for kind in left if kind not in known)
        return ", ".join([*parts, f"time for {unknown} not known yet"])

    def _picture(self) -> Group:
        running = list(self.now.values())
        names = [f"worker {place}" for place in range(1, len(running) + 1)] if len(running) > 1 else ["running"]
        words = [f"  {name}: {stage.words()}" for name, stage in zip(names, running, strict=False)]
        if running:
            words.append(f"  {self._end()}")
        elif not any(self.counts.values()):
            words = [f"  {STARTING} ..."]
        return Group(self.bars, *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in words))

    def _print(self) -> None:
        while not self._over.wait(self.EVERY):
            self.console.print(self.line(), highlight=False, markup=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _clock(seconds: float) -> str:
    """The time of day so many seconds from now, where that is not soon."""
    if seconds < 300:
        return ""
    day = "%a " if seconds > 43_200 else ""
    return time.strftime(f", until {day}%H:%M", time.localtime(time.time() + seconds))
