"""The harness of :mod:`benchmark.proof.torture`: issues a command, waits for a moment to disturb it, compares its files."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmark.proof.faults import Difference, compare
from benchmark.proof.processes import ROOT, Command, Forked, Fresh, send, tree, words
from models.spec import BadInput, generator

__all__ = ["OLD", "Draws", "Moment", "Torture", "age", "entries", "leftovers"]

LIMIT = 1200.0
"""Seconds until a command counts as hung, and its processes are killed."""
GRACE = 300.0
"""Seconds that processes may outlive a killed parent: a worker looks for its parent once its imports are done."""
ISSUES = 3
"""How often an undisturbed command that does not finish is issued."""
OLD = 7200.0
"""Seconds by which leftovers of killed writers are aged, so that the next run may sweep them as abandoned."""


@dataclass(frozen=True)
class Moment:
    """When to disturb a command.

    Attributes:
        kind: ``clock``: after the start; ``stage``: after the n-th stage began; ``write``: at the n-th temporary file or folder.
        count: n.
        seconds: the delay, for ``clock`` and ``stage``.
    """

    kind: Literal["clock", "stage", "write"]
    count: int
    seconds: float


class Watch:
    """Counts stages that began (by their locks) and writes (by their temporary files and folders)."""

    def __init__(self, cache: Path, results: Path) -> None:
        self.store, self.results = cache / "store", results
        self.locks: set[str] = set()
        self.written: set[str] = set()
        self.old = 0, 0
        self.old = self.look()

    def look(self) -> tuple[int, int]:
        """(stages, writes) since the first look, or since :meth:`again`."""
        locks = _names(self.store / "locks")
        self.locks |= set(locks)
        for name in locks:
            stage, _, key = name.partition("-")
            shard = f"{stage}/{key[:2]}"
            self.written |= {f"{shard}/{one}" for one in _names(self.store / shard) if one.startswith(".")}
        for folder in ("", "tables", "plots"):
            self.written |= {f"{folder}/{one}" for one in _names(self.results / folder) if one.endswith(".tmp")}
        return len(self.locks) - self.old[0], len(self.written) - self.old[1]

    def again(self) -> None:
        """Starts counting anew."""
        stages, writes = self.look()
        self.old = self.old[0] + stages, self.old[1] + writes


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - a few hundred times a second
    except (FileNotFoundError, NotADirectoryError):
        return []


class Draws:
    """The random draws of one run-through; they depend on seed, fault and round alone."""

    def __init__(self, *purpose: Any) -> None:
        self.source = generator("torture", *purpose)

    def whole(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (1,), generator=self.source))

    def share(self) -> float:
        return float(torch.rand(1, generator=self.source))

    def one(self, things: Sequence[Any]) -> Any:
        return things[self.whole(0, len(things) - 1)]


class Torture:
    """Issues the command, disturbs it and compares its files.

    Args:
        matrix: the settings file that is run.
        work: an empty folder for stores and results; everything in it may be removed.
        executor: an executor of ``benchmark run --executor``.
        processes: stages at once.
        seed: of every draw.
        fresh: whether to start an interpreter for every command.
        program: the module that is run, or a Python file.
    """

    def __init__(
        self,
        matrix: Path,
        work: Path,
        *,
        executor: str = "local",
        processes: int = 2,
        seed: int = 0,
        fresh: bool = False,
        program: str = "benchmark",
    ) -> None:
        self.matrix, self.work, self.program = matrix, work, program
        self.executor, self.processes, self.seed, self.fresh = executor, processes, seed, fresh
        # Always the same folder, because runs cache their drawings by path.
        self.here, self.kept, self.log = work / "run", work / "reference", work / "log.txt"
        self.issued: list[Command] = []
        self.notes: list[str] = []
        self.seconds = 0.0
        """Duration of the undisturbed run."""
        self.watch = Watch(self.cache, self.results)

    @property
    def cache(self) -> Path:
        return self.here / "cache"

    @property
    def store(self) -> Path:
        return self.cache / "store"

    @property
    def results(self) -> Path:
        return self.here / "results" / self.matrix.stem

    @property
    def reference(self) -> Path:
        return self.kept / "results" / self.matrix.stem

    def arguments(
        self, processes: int | None = None, matrix: Path | None = None, only: str = "", executor: str | None = None
    ) -> list[str]:
        return [
            "run", "--matrix", str(matrix or self.matrix), "--results", str(self.here / "results"), "--cache", str(self.cache),
            "--executor", executor or self.executor, "--processes", str(processes or self.processes), "--no-wandb",
            *(["--only", only] if only else []),
        ]  # fmt: skip

    def issue(self, arguments: Sequence[str], prefix: Sequence[str] = (), log: Path | None = None) -> Command:
        """Starts the command; its output goes to the log."""
        log = log or self.log
        self.watch = Watch(self.cache, self.results)  # before the command can do anything
        if self.fresh or prefix:
            command: Command = Fresh(self.program, arguments, log, prefix)
        else:
            command = Forked(self.program, arguments, log)
        self.issued.append(command)
        return command

    def end(self, command: Command) -> int:
        """Waits for a command and returns its exit status; a command that hangs is killed and noted."""
        deadline = time.monotonic() + LIMIT
        while (status := command.status()) is None:
            if time.monotonic() > deadline:
                self.notes.append(f"hung for {LIMIT:.0f} s")
                self.kill(command)
                return -signal.SIGKILL
            time.sleep(0.02)
        return status

    def kill(self, command: Command) -> None:
        """kill -9 of the command and everything it started."""
        everyone = tree(command.pid)
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        send(everyone, signal.SIGKILL)
        self.gone(everyone)
        while command.status() is None:
            time.sleep(0.005)

    def stop(self) -> None:
        """Kills every command that still runs."""
        for one in self.issued:
            if one.status() is None:
                self.kill(one)
        self.issued.clear()

    def gone(self, pids: Sequence[int]) -> None:
        """Waits until processes have ended; those that do not end are killed and noted."""
        deadline = time.monotonic() + GRACE
        while alive := [pid for pid in pids if words(pid)]:  # a zombie has no command line
            if time.monotonic() > deadline:
                self.notes.append(f"{len(alive)} processes lived on for {GRACE:.0f} s")
                send(alive, signal.SIGKILL)
                return
            time.sleep(0.02)

    def finish(self, arguments: Sequence[str] | None = None) -> int:
        """Issues the command, undisturbed, until it has finished; its exit status.

        One process is used, because workers would import everything first. It is issued several times because on a busy machine a
        new Ray may not start in time.
        """
        for _ in range(ISSUES):
            status = self.end(self.issue(arguments or self.arguments(1)))
            if not status:
                break
            self.notes.append(f"undisturbed, it ended with status {status}: {self.messages()}")
        return status

    def messages(self) -> str:
        """Notes, errors and exceptions in the log since the last call."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        self.log.write_text("")
        return "; ".join(dict.fromkeys(self.plain(line) for line in telling(text)))

    def plain(self, line: str) -> str:
        """A line without the parts that differ between two runs: paths, keys, names of temporary files."""
        line = line.replace(str(self.work), "").replace(str(ROOT), "")
        line = re.sub(r"\b[0-9a-f]{8,64}(?:-\w{8})?\b", "#", line.replace(";", ","))
        return " ".join(re.sub(r"(?<![\w.])/[^\s:,'\"]*/", "", line).split())

    def due(self, command: Command, moment: Moment) -> bool:
        """Waits for a moment of the command issued last; False when the command ended before it."""
        begun, reached = time.monotonic(), 0.0
        while command.status() is None:
            now = time.monotonic()
            stages, writes = self.watch.look()
            if moment.kind == "stage" and stages >= moment.count:
                reached = reached or now
            elif (moment.kind == "write" and writes >= moment.count) or now - begun > LIMIT:
                reached = now - moment.seconds
            elif moment.kind == "clock":
                reached = begun
            if reached and now - reached >= moment.seconds:
                self.watch.again()
                return True
            time.sleep(0.005)
        return False

    def moment(self, draws: Draws) -> Moment:
        kind = draws.one(("clock", "stage", "stage", "write", "write", "write"))
        count = draws.whole(1, 3)
        return Moment(kind, count, draws.share() * (self.seconds / 4 if kind == "clock" else 0.3))

    def several(self, draws: Draws) -> int:
        """The number of processes of a command: mostly one, which computes in the parent and starts at once; sometimes workers."""
        return self.processes if draws.share() < 0.1 else 1

    def begin(self) -> None:
        """Makes the reference: one undisturbed run in a new interpreter, always by the local executor.

        Raises:
            BadInput: it did not finish.
        """
        shutil.rmtree(self.here, ignore_errors=True)
        begun = time.monotonic()
        command = Fresh(self.program, self.arguments(1, executor="local"), self.log)
        self.issued.append(command)
        if self.end(command):
            raise BadInput(f"the undisturbed run failed: {self.messages() or self.log.read_text()[-500:]}")
        self.seconds = time.monotonic() - begun
        self.log.write_text("")
        self.here.rename(self.kept)

    def clear(self) -> None:
        """Forgets the last run-through."""
        self.notes.clear()
        self.log.write_text("")
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir()

    def age(self) -> None:
        """Makes leftovers of killed writers two hours old, because a run does not sweep files that may be in use."""
        for path in leftovers(self.here):
            then = time.time() - OLD
            for one in (path, *(path.iterdir() if path.is_dir() else ())):
                os.utime(one, (then, then))

    def so_far(self) -> Difference:
        """Compares the results of a killed run, which must be whole lines of the reference."""
        return compare(self.reference, self.results, part=True)

    def half(self, draws: Draws) -> None:
        """Copies the reference without about half of the defense runs and a fifth of the other stages in its store."""
        shutil.copytree(self.kept, self.here, dirs_exist_ok=True)
        for entry in entries(self.store):
            if draws.share() < (0.5 if entry.parent.parent.name == "defended" else 0.2):
                shutil.rmtree(entry)


def telling(text: str) -> Iterator[str]:
    """Lines that begin like a message, and the last line of every traceback."""
    tracing = False
    for raw in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines():
        line = raw.strip()
        if line.startswith("Traceback"):
            tracing = True
        elif tracing and line and not raw.startswith(" "):
            tracing = False
            yield f"Traceback: {line}"
        elif re.match(r"(?:note|error|interrupted|Aborted|Killed|Terminated)\b", line):
            yield line


def entries(store: Path) -> list[Path]:
    return sorted(path.parent for path in store.glob("*/??/*/entry.json"))


def leftovers(folder: Path) -> list[Path]:
    """Temporary folders and files of writers, and locks."""
    found = [*folder.rglob(".*.tmp"), *folder.glob("cache/store/*/??/.*-*"), *folder.glob("cache/store/locks/*")]
    return sorted(path for path in found if path.exists())


def age(path: Path) -> float:
    return time.time() - path.stat().st_mtime
