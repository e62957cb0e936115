"""Commands in process groups of their own, and the processes that they start. Linux only."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

__all__ = ["ROOT", "Command", "Forked", "Fresh", "send", "tree", "words", "workers_of"]

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("benchmark.run.session", "benchmark.run.defend", "benchmark.present", "benchmark.report.report", "ray")
"""Imported by the process that commands are forked from; modules that are not installed are ignored."""


def _parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        found[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
    return found


def tree(pid: int) -> list[int]:
    """A process and all processes that it started, itself first."""
    parents, tree = _parents(), [pid]
    for one in tree:
        tree += [child for child, parent in parents.items() if parent == one]
    return tree


def words(pid: int) -> str:
    """A process's command line; empty where it has none, or has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def workers_of(pid: int) -> list[int]:
    """The worker processes of a run, by their command lines: those of Python's spawn, or Ray's."""
    words = {one: words(one) for one in tree(pid)[1:]}
    return [one for one, text in words.items() if "spawn_main" in text or text.startswith("ray::")]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Command(Protocol):
    """An issued command, in a process group of its own."""

    pid: int

    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""


class Fresh:
    """A command in a new interpreter."""

    def __init__(self, program: str, arguments: Sequence[str], log: Path, prefix: Sequence[str] = ()) -> None:
        what = [program] if program.endswith(".py") else ["-m", program]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *what, *arguments],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0,
            )  # fmt: skip
        self.pid = self.process.pid

    def status(self) -> int | None:
        return self.process.poll()


class Forked:
    """A command forked from a process that has imported everything already."""

    def __init__(self, program: str, arguments: Sequence[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        self.process = context.Process(target=_issue, args=(program, [*arguments], str(log)))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        with suppress(ProcessLookupError):
            while self.status() is None and os.getpgid(self.pid) != self.pid:  # the group must exist before it can be killed
                time.sleep(0.001)

    def status(self) -> int | None:
        return self.process.exitcode


def _issue(program: str, arguments: list[str], log: str) -> None:
    """Runs ``python -m PROGRAM ARGUMENTS`` in the fork."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(log).open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
