"""What is lost when a run is disturbed: ``python -m benchmark.proof.torture`` (``make torture``).

One undisturbed run of a small matrix is the reference. Then the same command is issued again and again, every time disturbed in one
way: killed, interrupted, starved of disk or of permission, met with damaged files. At the end of each run-through, when the command
has finished undisturbed, rows.csv and curves.csv are compared with the reference: lines lost, lines doubled, lines changed, and the
bytes. Any of them is a defect, and the exit status is 1.

A kill falls at a moment drawn from the seed: at any time, soon after some stage began, or the instant a writer's temporary file is
seen. The draws repeat; what the machine does at that moment does not. Commands begin as forks of one process that has imported
everything, so that kills fall on the work and not on seconds of imports; ``--fresh`` starts an interpreter each time. Linux only.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmark.proof.faults import (
    HEADER,
    KEYS,
    Difference,
    Outcome,
    compare,
    csv_text,
    draw,
    lines_of,
    merged,
    read_outcomes,
    table,
)
from benchmark.settings.load import find_matrix
from models.files import write_text
from models.spec import BadInput, generator, nearest

__all__ = ["FAULTS", "Strike", "Torture", "main"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("results")
PRELOADED = ("benchmark.run.session", "benchmark.present", "benchmark.report.report", "benchmark.report.page", "benchmark.report.charts", "benchmark.proof.faults")
"""What commands are forked from has imported these."""
LIMIT = 1200.0
"""Seconds until a command counts as hung, and its processes are killed."""
GRACE = 300.0
"""Seconds that processes may outlive the one that was killed: a worker looks for its parent once it has imported everything."""
ISSUES = 3
"""How often an undisturbed command is issued that does not finish."""
PROMPT = 5.0
"""Seconds within which a run that had finished when it was interrupted is gone."""
OLD = 7200.0
"""Seconds by which what a killed writer left is aged, so that the next run may take it for abandoned."""


# -- commands, and the processes they start --------------------------------------------------------------------------------------


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


def _tree(pid: int) -> list[int]:
    """A process and all it started, itself first."""
    parents, tree = _parents(), [pid]
    for one in tree:
        tree += [child for child, parent in parents.items() if parent == one]
    return tree


def _words(pid: int) -> str:
    """A process's command line; empty where it has none, or has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _workers(pid: int) -> list[int]:
    """The worker processes of a run, by what they call themselves: Python's spawned ones, or Ray's."""
    words = {one: _words(one) for one in _tree(pid)[1:]}
    return [one for one, text in words.items() if "spawn_main" in text or text.startswith("ray::")]


def _send(pids: Iterable[int], number: signal.Signals) -> None:
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


class _Fresh:
    """A command in an interpreter of its own."""

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


class _Forked:
    """The same, forked from a process that has imported everything already."""

    def __init__(self, program: str, arguments: Sequence[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, "ray"])  # what is not installed is passed over
        self.process = context.Process(target=_issue, args=(program, [*arguments], str(log)))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        with suppress(ProcessLookupError):
            while self.status() is None and os.getpgid(self.pid) != self.pid:  # the group is there before anybody kills it
                time.sleep(0.001)

    def status(self) -> int | None:
        return self.process.exitcode


def _issue(program: str, arguments: list[str], log: str) -> None:
    """In the fork: becomes ``python -m PROGRAM ARGUMENTS``."""
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


# -- moments ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When to strike: ``clock`` seconds after the start, ``stage``: seconds after the n-th stage began, ``write``: at the n-th
    temporary file or folder that is seen."""

    kind: Literal["clock", "stage", "write"]
    count: int
    seconds: float


class _Watch:
    """Sees stages begin (by their locks) and writers at work (by their temporary files and folders)."""

    def __init__(self, cache: Path, results: Path) -> None:
        self.store, self.results = cache / "store", results
        self.locks: set[str] = set()
        self.written: set[str] = set()
        self.old = 0, 0
        self.old = self.look()

    def look(self) -> tuple[int, int]:
        """How many of each there have been since the first look."""
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
        """Counts from here on."""
        stages, writes = self.look()
        self.old = self.old[0] + stages, self.old[1] + writes


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - a few hundred times a second
    except (FileNotFoundError, NotADirectoryError):
        return []


# -- the harness -----------------------------------------------------------------------------------------------------------------


class Draws:
    """The draws of one run-through; they depend on seed, fault and round alone."""

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
    """Issues the command, disturbs it, compares.

    Args:
        matrix: the settings file that is run.
        work: an empty folder for stores and results; everything in it may be removed.
        executor: ``local`` or what else ``benchmark run --executor`` knows.
        processes: stages at once.
        fresh: start an interpreter for every command.
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
        # Always the same place, because what has been drawn is remembered by place.
        self.here, self.kept, self.log = work / "run", work / "reference", work / "log.txt"
        self.issued: list[Command] = []
        self.notes: list[str] = []
        self.seconds = 0.0
        """What the undisturbed run takes."""
        self.watch = _Watch(self.cache, self.results)

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
        """Starts the command; what it says goes to the log."""
        log = log or self.log
        self.watch = _Watch(self.cache, self.results)  # before it can do anything
        if self.fresh or prefix:
            command: Command = _Fresh(self.program, arguments, log, prefix)
        else:
            command = _Forked(self.program, arguments, log)
        self.issued.append(command)
        return command

    def end(self, command: Command) -> int:
        """Waits for a command and returns its exit status; one that hangs is killed, and that is noted."""
        deadline = time.monotonic() + LIMIT
        while (status := command.status()) is None:
            if time.monotonic() > deadline:
                self.notes.append(f"hung: nothing came for {LIMIT:.0f} s")
                self.kill(command)
                return -signal.SIGKILL
            time.sleep(0.02)
        return status

    def kill(self, command: Command) -> None:
        """kill -9 of everything the command started."""
        everyone = _tree(command.pid)
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        _send(everyone, signal.SIGKILL)
        self.gone(everyone)
        while command.status() is None:
            time.sleep(0.005)

    def stop(self) -> None:
        """Ends what still runs."""
        for one in self.issued:
            if one.status() is None:
                self.kill(one)
        self.issued.clear()

    def gone(self, pids: Sequence[int]) -> None:
        """Waits until processes have ended; those that live on are killed, and that is noted."""
        deadline = time.monotonic() + GRACE
        while alive := [pid for pid in pids if _words(pid)]:  # a zombie has no words
            if time.monotonic() > deadline:
                self.notes.append(f"{len(alive)} processes lived on for {GRACE:.0f} s")
                _send(alive, signal.SIGKILL)
                return
            time.sleep(0.02)

    def finish(self, arguments: Sequence[str] | None = None) -> int:
        """Issues the command until it has finished, undisturbed; the exit status. One process will do: workers would import
        everything first. On a machine that is very busy a Ray of its own may not come up in time, and says so."""
        for _ in range(ISSUES):
            status = self.end(self.issue(arguments or self.arguments(1)))
            if not status:
                break
            self.notes.append(f"undisturbed, it ended with status {status}: {self.said()}")
        return status

    def said(self) -> str:
        """The lines of the log since the last look that a person would look for."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        self.log.write_text("")
        return "; ".join(dict.fromkeys(self.plain(line) for line in _telling(text)))

    def plain(self, line: str) -> str:
        """A line without what differs between two runs: places, keys, names of temporary files."""
        line = line.replace(str(self.work), "").replace(str(ROOT), "")
        line = re.sub(r"\b[0-9a-f]{8,64}(?:-\w{8})?\b", "#", line.replace(";", ","))
        return " ".join(re.sub(r"(?<![\w.])/[^\s:,'\"]*/", "", line).split())

    def due(self, command: Command, moment: Moment) -> bool:
        """Waits for a moment of the command issued last; False when the command ended before that came."""
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
        """How many processes a command gets: mostly one, which computes in the parent itself and is there at once; now and then
        workers beside it."""
        return self.processes if draws.share() < 0.1 else 1

    def begin(self) -> None:
        """The reference: once, undisturbed, in an interpreter of its own, by the local executor whatever the others run on.

        Raises:
            BadInput: even that did not finish.
        """
        shutil.rmtree(self.here, ignore_errors=True)
        begun = time.monotonic()
        command = _Fresh(self.program, self.arguments(1, executor="local"), self.log)
        self.issued.append(command)
        if self.end(command):
            raise BadInput(f"the undisturbed run failed: {self.said() or self.log.read_text()[-500:]}")
        self.seconds = time.monotonic() - begun
        self.log.write_text("")
        self.here.rename(self.kept)

    def run(self, fault: str, number: int, kills: int, command: str) -> Outcome:
        """One run-through of a fault with up to ``kills`` disturbances.

        Returns:
            What came out, with as many disturbances as there was time for.
        """
        self.notes.clear()
        self.log.write_text("")
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir()
        try:
            struck, extra = FAULTS[fault](self, Draws(self.seed, fault, number), kills)
            difference = extra + compare(self.reference, self.results)
        finally:
            self.stop()
        left = [path for path in _leftovers(self.here) if _age(path) > OLD / 2]
        if left:
            self.notes.append(f"{len(left)} temporary files or locks stayed behind")
        note = "; ".join(dict.fromkeys(note for note in self.notes if note))
        return Outcome(self.executor, fault, number, struck, difference.lost, difference.doubled, difference.changed, note, command)

    def age(self) -> None:
        """Makes what killed writers left two hours old: a run sweeps nothing that could be somebody's."""
        for path in _leftovers(self.here):
            then = time.time() - OLD
            for one in (path, *(path.iterdir() if path.is_dir() else ())):
                os.utime(one, (then, then))

    def so_far(self) -> Difference:
        """What a run that was killed left in the result folder must be whole lines of the reference."""
        return compare(self.reference, self.results, part=True)

    def half(self, draws: Draws) -> None:
        """A store in which about half of the cells, and some of what they stand on, are still to be computed; rows as they were."""
        shutil.copytree(self.kept, self.here, dirs_exist_ok=True)
        for entry in _entries(self.store):
            if draws.share() < (0.5 if entry.parent.parent.name == "defended" else 0.2):
                shutil.rmtree(entry)


def _telling(text: str) -> Iterator[str]:
    """Lines that begin like a message, and the last line of a traceback."""
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


def _entries(store: Path) -> list[Path]:
    return sorted(path.parent for path in store.glob("*/??/*/entry.json"))


def _leftovers(folder: Path) -> list[Path]:
    """Temporary folders and files of writers, and locks."""
    found = [*folder.rglob(".*.tmp"), *folder.glob("cache/store/*/??/.*-*"), *folder.glob("cache/store/locks/*")]
    return sorted(path for path in found if path.exists())


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


# -- faults ----------------------------------------------------------------------------------------------------------------------

Struck = tuple[int, Difference]
"""How often the run was disturbed, and what was wrong meanwhile (what is wrong at the end is found by whoever asked)."""

Strike = Callable[[Torture, Draws, int], Struck]
"""One run-through of a fault, disturbed up to so many times."""


def _killed(torture: Torture, draws: Draws, kills: int, strike: Callable[[Command], None], *, workers: bool = False) -> Struck:
    """Issues (with workers, or mostly without), strikes, ages what was left, and so on; in the end, undisturbed."""
    struck, wrong = 0, Difference()
    while struck < kills:
        command = torture.issue(torture.arguments(max(torture.processes, 2) if workers else torture.several(draws)))
        if not torture.due(command, torture.moment(draws)):
            if status := torture.end(command):
                torture.notes.append(f"before it was disturbed, it ended with status {status}: {torture.said()}")
            break
        strike(command)
        struck += 1
        wrong += torture.so_far()
        torture.age()
    torture.finish()
    torture.notes.append(torture.said())
    return struck, wrong


def _kill_all(torture: Torture, draws: Draws, kills: int) -> Struck:
    return _killed(torture, draws, kills, torture.kill)


def _kill_parent(torture: Torture, draws: Draws, kills: int) -> Struck:
    def strike(command: Command) -> None:
        workers = _tree(command.pid)[1:]
        _send([command.pid], signal.SIGKILL)
        torture.end(command)
        if draws.share() < 0.5:  # else the next command meets workers that have not noticed yet
            torture.gone(workers)

    return _killed(torture, draws, kills, strike, workers=True)


def _kill_worker(torture: Torture, draws: Draws, kills: int) -> Struck:
    """The command goes on by itself; a stage whose process dies several times is given up, until the command is issued again."""
    struck, left = 0, True
    while struck < kills and left:
        command = torture.issue(torture.arguments(max(torture.processes, 2)))
        left = False
        for _ in range(min(WORKERS, kills - struck)):
            if not torture.due(command, torture.moment(draws)):
                break
            if workers := _workers(command.pid):
                _send([draws.one(workers)], signal.SIGKILL)
                struck, left = struck + 1, True
        if status := torture.end(command):
            torture.notes.append(f"ended with status {status}: {torture.said()}")
        torture.notes.append(torture.said())
    torture.finish()
    return struck, Difference()


def _kill_one_of_two(torture: Torture, draws: Draws, kills: int) -> Struck:
    """The other one finishes, while its neighbour is killed and issued again."""
    struck, wrong = 0, Difference()
    left = torture.issue(torture.arguments(1))
    while struck < kills and left.status() is None:
        neighbour = torture.issue(torture.arguments(1), log=torture.work / "neighbour.txt")
        if not torture.due(neighbour, torture.moment(draws)):
            break
        torture.kill(neighbour)
        struck += 1
        wrong += torture.so_far()
    if status := torture.end(left):
        torture.notes.append(f"its neighbour killed, it ended with status {status}")
    wrong += compare(torture.reference, torture.results)
    torture.age()
    torture.finish()
    torture.notes.append(torture.said())
    return struck, wrong


def _signalled(number: signal.Signals, expected: tuple[int, ...], words: str) -> Strike:
    def strike(torture: Torture, draws: Draws, kills: int) -> Struck:
        struck, wrong = 0, Difference()
        while struck < kills:
            command = torture.issue(torture.arguments(torture.several(draws)))
            # A terminal sends Ctrl-C to the whole group; not before the run has begun: then there is nothing to go on from.
            moment = Moment(draws.one(("stage", "write")), draws.whole(1, 12), draws.share())
            if not torture.due(command, moment):
                break
            everyone = _tree(command.pid)
            os.killpg(command.pid, number)
            sent = time.monotonic()
            status = torture.end(command)
            done = not status and time.monotonic() - sent < PROMPT and compare(torture.reference, torture.results) == Difference()
            torture.gone(everyone)
            said = torture.said()
            struck += 1
            right = "it had just finished: " if done else "" if status in expected and words in said else "not as it should: "
            torture.notes.append(f"{right}status {status}{said and f': {said}'}")
            wrong += torture.so_far()
            torture.age()
        torture.finish()
        torture.notes.append(torture.said())
        return struck, wrong

    return strike


def _mounts() -> bool:
    """Whether a file system of a given size can be had here."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False)
        if tried.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return tried.returncode == 0


def _full_disk(torture: Torture, draws: Draws, kills: int) -> Struck:
    """A small file system, then a larger one; where none can be mounted, a limit to the size of a file."""
    whole = sum(path.stat().st_size for path in torture.kept.rglob("*") if path.is_file())
    if not _mounts():
        largest = max(path.stat().st_size for path in torture.kept.rglob("*.safetensors"))
        prefix = ["prlimit", f"--fsize={int(largest * (0.1 + 0.8 * draws.share()))}"]
        status = torture.end(torture.issue(torture.arguments(), prefix))
        torture.notes.append(f"no file system may be mounted here, so files were limited: status {status}: {torture.said()}")
        wrong = torture.so_far()
        torture.finish()
        return 1, wrong
    size = int(whole * (0.2 + 0.9 * draws.share()) / 1024)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(torture.here)], check=True)
    try:
        status = torture.end(torture.issue(torture.arguments(torture.several(draws))))
        torture.notes.append(f"status {status}: {torture.said()}" if status else "")
        wrong = torture.so_far()
        torture.age()
        subprocess.run(["mount", "-o", f"remount,size={whole // 256}k", str(torture.here)], check=True)
        torture.finish()
        wrong += compare(torture.reference, torture.results)
        saved = torture.work / "saved"
        shutil.copytree(torture.here, saved)
    finally:
        subprocess.run(["umount", "--lazy", str(torture.here)], check=True)
    torture.here.rmdir()
    saved.rename(torture.here)
    return int(status != 0), wrong


def _forbidden(where: Literal["store", "results"]) -> Strike:
    def strike(torture: Torture, draws: Draws, kills: int) -> Struck:
        """Before the run begins, or in mid-run."""
        torture.half(draws)
        folder = torture.store if where == "store" else torture.results
        before = draws.share() < 0.5
        # The superuser may write anywhere, unless that power is given up first.
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
        with _writable(folder, not before) as forbid:
            command = torture.issue(torture.arguments(torture.several(draws)), prefix)
            if not before and torture.due(command, Moment("stage", draws.whole(1, 4), 0.1)):
                forbid()
            status = torture.end(command)
            torture.notes.append(f"status {status}: {torture.said()}")
            wrong = torture.so_far()
        torture.finish()
        return 1, wrong

    return strike


@contextmanager
def _writable(folder: Path, at_first: bool) -> Iterator[Callable[[], None]]:
    """Takes the permission to write away from all folders under ``folder``, now or when told; gives it back in the end."""

    def every(mode: int) -> None:
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(mode)

    if not at_first:
        every(0o555)
    try:
        yield lambda: every(0o555)
    finally:
        every(0o755)


def _flip(path: Path, draws: Draws) -> None:
    raw = bytearray(path.read_bytes())
    raw[draws.whole(0, len(raw) - 1)] ^= 1 << draws.whole(0, 7)
    path.write_bytes(raw)


def _cut(path: Path, draws: Draws) -> None:
    path.write_bytes(path.read_bytes()[: draws.whole(0, path.stat().st_size - 1)])


def _drop(path: Path, draws: Draws) -> None:
    path.unlink()


Harm = Callable[[Path, Draws], None]


def _harmed(harm: Harm) -> Strike:
    """Entries of a store that is half full."""

    def strike(torture: Torture, draws: Draws, kills: int) -> Struck:
        torture.half(draws)
        files = [path for entry in _entries(torture.store) for path in sorted(entry.iterdir())]
        struck = {draws.whole(0, len(files) - 1) for _ in range(kills)}
        for place in sorted(struck):
            harm(files[place], draws)
        torture.finish()
        torture.notes.append(torture.said())
        return len(struck), Difference()

    return strike


def _harmed_results(harm: Harm, *, part: bool) -> Strike:
    """Files of results, met by a run of the whole matrix, or of the part of it that writes the other lines."""

    def strike(torture: Torture, draws: Draws, kills: int) -> Struck:
        shutil.copytree(torture.kept, torture.here, dirs_exist_ok=True)
        names = [name for name in KEYS if not part or name != "timings.csv"] * kills
        before = {}
        for name in names[:kills]:
            harm(torture.results / name, draws)
            before[name] = (torture.results / name).read_bytes() if (torture.results / name).exists() else None
        wrong = Difference()
        if part:
            status = torture.end(torture.issue(torture.arguments(1, only=f"seed={draws.whole(0, 1)}")))
            torture.notes.append(f"status {status}: {torture.said()}" if status else "")
            if status == 0:
                wrong = compare(torture.reference, torture.results)
            elif any((torture.results / name).read_bytes() != content for name, content in before.items()):
                torture.notes.append("it refused a file, and changed one all the same")
        torture.finish()
        torture.notes.append(torture.said())
        return kills, wrong

    return strike


def _left_behind(torture: Torture, draws: Draws, kills: int) -> Struck:
    """What writers leave that are killed while they write, in every place where one may be killed."""
    torture.half(draws)
    entries = _entries(torture.store)
    left = []
    for number in range(kills):
        entry = draws.one(entries)
        stage = entry.parent.parent.name
        half = entry.parent / f".{entry.name}-left{number}"
        half.mkdir()
        (half / "tensors.safetensors").write_bytes(bytes(draws.whole(0, 999)))
        locks = torture.store / "locks"
        locks.mkdir(exist_ok=True)
        (locks / f"{stage}-{entry.name}").touch()
        file = torture.results / draws.one(("", "tables", "plots")) / f".rows.csv.left{number}.tmp"
        file.write_text("matrix,data")
        left += [half, file, locks / f"{stage}-{entry.name}"]
    torture.age()
    torture.finish()
    stayed = [path for path in left if path.exists()]
    said = f"{len(stayed)} of {len(left)} stayed behind" if stayed else "all swept by the next run"
    torture.notes += [said, torture.said()]
    return len(left), Difference()


def _diverges(torture: Torture, draws: Draws, kills: int) -> Struck:
    """One attack more, whose victims are trained so that their weights explode: its rows fail with their reason, the others do not
    move."""
    folder = torture.work / "diverging"
    folder.mkdir(exist_ok=True)
    settings = torture.matrix.read_text(encoding="utf-8")
    first = tomllib.loads(settings)["attack"][0]["name"]
    recipe = f'{{ lr = 10.0, weight_decay = {0.5 + 0.5 * draws.share():.3f}, epochs = 30, schedule = "constant" }}'
    diverging = folder / torture.matrix.name
    diverging.write_text(f'{settings}\n[[attack]]\nname = "{first}"\nlabel = "diverges"\nrecipe = {recipe}\n')
    if torture.finish(torture.arguments(1, matrix=diverging)):
        return 1, Difference()
    torture.said()
    rows = lines_of(torture.results / "rows.csv", ("attack", "status", "reason", "cell", "selection"))
    mine = [(status, reason) for attack, status, reason, *_ in rows if attack == "diverges"]
    torture.notes += [f"{status}: {torture.plain(reason)}" for status, reason in mine]
    odd = sum(status != "failed" or "diverged" not in reason for status, reason in mine)
    for name in KEYS:
        lines = (torture.results / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (torture.results / name).write_text("".join(line for line in lines if ",diverges," not in line), encoding="utf-8")
    return 1, Difference(lost=int(not mine), changed=odd)


FAULTS: Mapping[str, Strike] = {
    "kill -9 of all its processes": _kill_all,
    "kill -9 of the parent alone": _kill_parent,
    "kill -9 of a worker": _kill_worker,
    "kill -9 of one of two runs at once": _kill_one_of_two,
    "Ctrl-C": _signalled(signal.SIGINT, (130,), "issue the same command again"),
    # In a training, Lightning takes SIGTERM for an interrupt.
    "SIGTERM": _signalled(signal.SIGTERM, (-signal.SIGTERM, 143, 130), ""),
    "a full disk": _full_disk,
    "no permission to write the store": _forbidden("store"),
    "no permission to write the results": _forbidden("results"),
    "flipped bits in store entries": _harmed(_flip),
    "store entries cut short": _harmed(_cut),
    "files of store entries deleted": _harmed(_drop),
    "a flipped bit in the results": _harmed_results(_flip, part=False),
    "results cut short": _harmed_results(_cut, part=False),
    "results deleted": _harmed_results(_drop, part=False),
    "a flipped bit in the results, then a part of the matrix": _harmed_results(_flip, part=True),
    "results cut short, then a part of the matrix": _harmed_results(_cut, part=True),
    "what killed writers left": _left_behind,
    "a training that diverges": _diverges,
}
"""By name, in the order of the table."""
SHARES = {"kill -9 of all its processes": 0.7, "kill -9 of the parent alone": 0.08, "kill -9 of a worker": 0.08,
          "kill -9 of one of two runs at once": 0.14}  # fmt: skip
"""How the kills that were asked for are divided."""
WORKERS = 5
"""At most so many workers of one command are killed."""
TOGETHER = 50
"""At most so many strikes fall into one run-through."""
SEVERAL = 3
"""Strikes of the other faults in one run-through."""


def _plan(names: Sequence[str], kills: int, rounds: int) -> Iterator[tuple[str, int, int]]:
    """Fault, number of the run-through, strikes still wanted."""
    total = sum(SHARES.get(name, 0.0) for name in names)
    for name in names:
        if name in SHARES:
            yield name, round(kills * SHARES[name] / total), -1
        else:
            yield name, SEVERAL, rounds


def main(
    executor: Annotated[str, typer.Option(help="Passed on to the runs: local or ray.")] = "local",
    kills: Annotated[int, typer.Option(min=0, help="How many kill -9 in all, divided among their kinds.")] = 100,
    rounds: Annotated[int, typer.Option(min=0, help="Run-throughs of each other fault.")] = 2,
    fault: Annotated[list[str] | None, typer.Option(help="This fault alone, by name; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Stages at once where several processes work.")] = 2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start an interpreter for every command.")] = False,
    matrix: Annotated[str, typer.Option("--matrix", "-m", help="What is run.")] = "torture",
    work: Annotated[Path | None, typer.Option(help="Where stores are made and spoilt; a temporary folder unless named.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of faults.csv and FAULTS.md: outcomes are merged into those there.")] = RESULTS,
) -> None:
    """Kills, starves and damages a small run, over and over, and counts what it loses."""
    console = Console(soft_wrap=True)
    try:
        names = [*(fault or FAULTS)]
        for name in names:
            if name not in FAULTS:
                raise BadInput(f"unknown fault {name!r}{nearest(name, FAULTS)}")
        told = _told(executor, kills, rounds, fault or (), seed, processes, fresh, matrix)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would the runs
        with tempfile.TemporaryDirectory(prefix="lf-", dir=work) as folder:
            os.environ["RAY_TMPDIR"] = folder  # what a killed Ray leaves goes with the rest; short, for its sockets
            torture = Torture(find_matrix(matrix), Path(folder), executor=executor, processes=processes, seed=seed, fresh=fresh)
            outcomes = list(_all(torture, names, kills, rounds, told, out, console))
    except BadInput as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    printed = Table(*HEADER, title="Faults")
    for line in table(outcomes):
        printed.add_row(*map(escape, line))
    console.print(printed)
    raise typer.Exit(int(any(one.lost or one.doubled or one.changed for one in outcomes)))


def _told(
    executor: str, kills: int, rounds: int, faults: Sequence[str], seed: int, processes: int, fresh: bool, matrix: str
) -> str:
    """The command line as others may issue it; it names no place."""
    words = ["python", "-m", "benchmark.proof.torture", "--executor", executor]
    words += ["--kills", str(kills), "--rounds", str(rounds), "--seed", str(seed)]
    words += ["--processes", str(processes)] if processes != 2 else []
    words += ["--fresh"] if fresh else []
    words += ["--matrix", Path(matrix).name] if matrix != "torture" else []
    for name in faults:
        words += ["--fault", name]
    return shlex.join(words)


def _all(
    torture: Torture, names: Sequence[str], kills: int, rounds: int, told: str, out: Path, console: Console
) -> Iterator[Outcome]:
    """Every run-through; files are written after each, so that a stop loses none."""
    name_and_bar = TextColumn("[bold]{task.description:<54}"), BarColumn(bar_width=24)
    bars = Progress(*name_and_bar, MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    earlier = read_outcomes(out / "faults.csv")
    mine: list[Outcome] = []
    plan = list(_plan(names, kills, rounds))
    with bars:
        first = bars.add_task("the undisturbed run", total=1)
        try:
            torture.begin()
        finally:
            torture.stop()
        bars.update(first, completed=1)
        for name, strikes, times in plan:
            todo = times if times >= 0 else strikes
            bar = bars.add_task(name, total=todo)
            number = done = 0
            while done < todo:
                wanted = strikes if times >= 0 else min(strikes - done, TOGETHER)
                one = torture.run(name, number, wanted, told)
                mine.append(one)
                number += 1
                done += 1 if times >= 0 else max(one.kills, 1)
                bars.update(bar, completed=min(done, todo))
                together = merged(earlier, mine, list(FAULTS))
                write_text(out / "faults.csv", csv_text(together))
                write_text(out / "FAULTS.md", draw(together))
                if not console.is_terminal:
                    console.print(f"{name}: round {one.round}, {one.kills} times: {one.lost} lost, {one.doubled} doubled, "
                                  f"{one.changed} changed; {one.note}", markup=False, highlight=False)  # fmt: skip
                yield one


if __name__ == "__main__":
    typer.run(main)
