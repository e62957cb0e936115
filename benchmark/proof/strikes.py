"""The faults of :mod:`benchmark.proof.torture`: kills, signals, full disks, missing permissions and damaged files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from benchmark.proof.faults import KEYS, Difference, compare
from benchmark.proof.harness import Draws, Moment, Torture, entries
from benchmark.proof.processes import Command, send, tree, workers_of
from benchmark.storage.rows import Curve, Row, Timing, read, write

__all__ = ["FAULTS", "Strike"]

PROMPT = 5.0
"""A run that ends within these seconds of a signal with status 0 had just finished."""
WORKERS = 5
"""How many workers of one command are killed at most."""
Struck = tuple[int, Difference]
"""How often the run was disturbed, and the differences seen meanwhile (those at the end are counted by the caller)."""
Strike = Callable[[Torture, Draws, int], Struck]
"""One run-through of a fault, disturbed up to so many times."""


def _killed(torture: Torture, draws: Draws, kills: int, strike: Callable[[Command], None], *, workers: bool = False) -> Struck:
    """Issues the command, disturbs it, ages its leftovers and repeats; at the end it runs undisturbed."""
    struck, wrong = 0, Difference()
    while struck < kills:
        command = torture.issue(torture.arguments(max(torture.processes, 2) if workers else torture.several(draws)))
        if not torture.due(command, torture.moment(draws)):
            if status := torture.end(command):
                torture.notes.append(f"before it was disturbed, it ended with status {status}: {torture.messages()}")
            break
        strike(command)
        struck += 1
        wrong += torture.so_far()
        torture.age()
    torture.finish()
    torture.notes.append(torture.messages())
    return struck, wrong


def _kill_all(torture: Torture, draws: Draws, kills: int) -> Struck:
    return _killed(torture, draws, kills, torture.kill)


def _kill_parent(torture: Torture, draws: Draws, kills: int) -> Struck:
    def strike(command: Command) -> None:
        workers = tree(command.pid)[1:]
        send([command.pid], signal.SIGKILL)
        torture.end(command)
        if draws.share() < 0.5:  # otherwise the next command starts while these workers still run
            torture.gone(workers)

    return _killed(torture, draws, kills, strike, workers=True)


def _kill_worker(torture: Torture, draws: Draws, kills: int) -> Struck:
    """The command continues; a stage whose process dies several times is given up until the command is issued again."""
    struck, left = 0, True
    while struck < kills and left:
        command = torture.issue(torture.arguments(max(torture.processes, 2)))
        left = False
        for _ in range(min(WORKERS, kills - struck)):
            if not torture.due(command, torture.moment(draws)):
                break
            if workers := workers_of(command.pid):
                send([draws.one(workers)], signal.SIGKILL)
                struck, left = struck + 1, True
        if status := torture.end(command):
            torture.notes.append(f"ended with status {status}: {torture.messages()}")
        torture.notes.append(torture.messages())
    torture.finish()
    return struck, Difference()


def _kill_one_of_two(torture: Torture, draws: Draws, kills: int) -> Struck:
    """The other run finishes, while its neighbour is killed and issued again."""
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
    torture.notes.append(torture.messages())
    return struck, wrong


def _signalled(number: signal.Signals, expected: tuple[int, ...], words: str) -> Strike:
    def strike(torture: Torture, draws: Draws, kills: int) -> Struck:
        struck, wrong = 0, Difference()
        while struck < kills:
            command = torture.issue(torture.arguments(torture.several(draws)))
            # A terminal sends Ctrl-C to the whole group. Before the first stage there would be nothing to resume.
            moment = Moment(draws.one(("stage", "write")), draws.whole(1, 12), draws.share())
            if not torture.due(command, moment):
                break
            everyone = tree(command.pid)
            os.killpg(command.pid, number)
            sent = time.monotonic()
            status = torture.end(command)
            done = not status and time.monotonic() - sent < PROMPT and compare(torture.reference, torture.results) == Difference()
            torture.gone(everyone)
            messages = torture.messages()
            struck += 1
            right = "it had just finished: " if done else "" if status in expected and words in messages else "not as it should: "
            torture.notes.append(f"{right}status {status}{messages and f': {messages}'}")
            wrong += torture.so_far()
            torture.age()
        torture.finish()
        torture.notes.append(torture.messages())
        return struck, wrong

    return strike


def _mounts() -> bool:
    """Whether a file system of a given size can be mounted here."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False)
        if tried.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return tried.returncode == 0


def _full_disk(torture: Torture, draws: Draws, kills: int) -> Struck:
    """A small file system, then a larger one; where none can be mounted, a limit on the size of files."""
    whole = sum(path.stat().st_size for path in torture.kept.rglob("*") if path.is_file())
    if not _mounts():
        largest = max(path.stat().st_size for path in torture.kept.rglob("*.safetensors"))
        prefix = ["prlimit", f"--fsize={int(largest * (0.1 + 0.8 * draws.share()))}"]
        status = torture.end(torture.issue(torture.arguments(), prefix))
        torture.notes.append(f"no file system may be mounted here, so files were limited: status {status}: {torture.messages()}")
        wrong = torture.so_far()
        torture.finish()
        return 1, wrong
    size = int(whole * (0.2 + 0.9 * draws.share()) / 1024)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(torture.here)], check=True)
    try:
        status = torture.end(torture.issue(torture.arguments(torture.several(draws))))
        torture.notes.append(f"status {status}: {torture.messages()}" if status else "")
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
        # The superuser may write anywhere without these capabilities dropped.
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
        with _writable(folder, not before) as forbid:
            command = torture.issue(torture.arguments(torture.several(draws)), prefix)
            if not before and torture.due(command, Moment("stage", draws.whole(1, 4), 0.1)):
                forbid()
            status = torture.end(command)
            torture.notes.append(f"status {status}: {torture.messages()}")
            wrong = torture.so_far()
        torture.finish()
        return 1, wrong

    return strike


@contextmanager
def _writable(folder: Path, at_first: bool) -> Iterator[Callable[[], None]]:
    """Makes all folders under ``folder`` read-only, at once or when the returned function is called; undone at the end."""

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
    """Damages entries of a store that is half full."""

    def strike(torture: Torture, draws: Draws, kills: int) -> Struck:
        torture.half(draws)
        files = [path for entry in entries(torture.store) for path in sorted(entry.iterdir())]
        struck = {draws.whole(0, len(files) - 1) for _ in range(kills)}
        for place in sorted(struck):
            harm(files[place], draws)
        torture.finish()
        torture.notes.append(torture.messages())
        return len(struck), Difference()

    return strike


def _harmed_results(harm: Harm, *, part: bool) -> Strike:
    """Damages result files before a run of the whole matrix, or of a part of it, which keeps the other lines."""

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
            torture.notes.append(f"status {status}: {torture.messages()}" if status else "")
            if status == 0:
                wrong = compare(torture.reference, torture.results)
            elif any((torture.results / name).read_bytes() != content for name, content in before.items()):
                torture.notes.append("it refused a file, but changed one")
        torture.finish()
        torture.notes.append(torture.messages())
        return kills, wrong

    return strike


def _left_behind(torture: Torture, draws: Draws, kills: int) -> Struck:
    """Leftovers of killed writers, in every folder in which they write."""
    torture.half(draws)
    cached = entries(torture.store)
    left = []
    for number in range(kills):
        entry = draws.one(cached)
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
    swept = f"{len(stayed)} of {len(left)} stayed behind" if stayed else "all swept by the next run"
    torture.notes += [swept, torture.messages()]
    return len(left), Difference()


def _diverges(torture: Torture, draws: Draws, kills: int) -> Struck:
    """Adds an attack whose victims diverge in training: its rows fail with the reason, all other rows stay the same."""
    folder = torture.work / "diverging"
    folder.mkdir(exist_ok=True)
    settings = torture.matrix.read_text(encoding="utf-8")
    first = tomllib.loads(settings)["attack"][0]["name"]
    recipe = f'{{ lr = 10.0, weight_decay = {0.5 + 0.5 * draws.share():.3f}, epochs = 30, schedule = "constant" }}'
    diverging = folder / torture.matrix.name
    diverging.write_text(f'{settings}\n[[attack]]\nname = "{first}"\nlabel = "diverges"\nrecipe = {recipe}\n')
    if torture.finish(torture.arguments(1, matrix=diverging)):
        return 1, Difference()
    torture.messages()
    rows = read(torture.results / "rows.csv", Row)
    tables = rows, read(torture.results / "curves.csv", Curve), read(torture.results / "timings.csv", Timing)
    rows = rows[rows["attack"] == "diverges"]
    mine = list(zip(rows["status"], rows["reason"], strict=True))
    torture.notes += [f"{status}: {torture.plain(reason)}" for status, reason in mine]
    odd = sum(status != "failed" or "diverged" not in reason for status, reason in mine)
    kept: list[list[Any]] = [table[table["attack"] != "diverges"].to_dict("records") for table in tables]
    write(torture.results, [Row(**one) for one in kept[0]], [Curve(**one) for one in kept[1]], [Timing(**one) for one in kept[2]])
    return 1, Difference(lost=int(not mine), changed=odd)


FAULTS: Mapping[str, Strike] = {
    "kill -9 of all its processes": _kill_all,
    "kill -9 of the parent alone": _kill_parent,
    "kill -9 of a worker": _kill_worker,
    "kill -9 of one of two runs at once": _kill_one_of_two,
    "Ctrl-C": _signalled(signal.SIGINT, (130,), "issue the same command again"),
    # During a training Lightning handles SIGTERM like an interrupt.
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
"""Faults by name, in the order of the table."""
