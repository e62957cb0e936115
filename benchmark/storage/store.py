"""A content-addressed store of stages: whole or absent, checked when read, never unpickled.

An entry is a folder ``<stage>/<key[:2]>/<key>`` with ``entry.json`` (what it is, what came out, the sha256 of every file and of
itself) and, where the stage has tensors, ``tensors.safetensors``. It is written into a temporary folder and renamed, so a killed
run leaves no half entry; of two runs that finish the same stage at once, the first to rename wins and both read the same. Runs
that share a store share its work: who computes a stage holds its lock (under ``locks``), and the others wait and then read it.
What a killed writer leaves (its temporary folder ``<stage>/<key[:2]>/.<key>-*``, its lock) goes when a store is opened, once
nobody can own it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from benchmark.storage.files import abandoned, held, insisting, why
from models.spec import BadInput, canonical

__all__ = ["Busy", "Entry", "Store", "sweep_store"]

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class Entry:
    """One stored stage: its outcome as JSON, its tensors by name."""

    outcome: dict[str, Any]
    tensors: dict[str, Tensor]


class Busy(Exception):
    """Another process is computing this stage; once that one is done, or dead, it can be asked for again."""


@contextmanager
def _told(root: Path) -> Iterator[None]:
    """Says in one line what the store's disk will not do."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{root}: the store cannot be written: {why(error)}; correct it and run the same command again") from error


def sweep_store(root: Path) -> None:
    """Removes what killed writers left: temporary folders, locks that nobody holds, empty places for damaged entries.

    All of it must be old (:func:`benchmark.storage.files.abandoned`), and a folder or lock is removed only while this process holds
    the same lock: whoever writes a stage holds it too. What cannot be removed is left.
    """
    with suppress(OSError, BadInput):
        for path in [path for path in root.glob("*/??/.*-*") if abandoned(path)]:
            key = path.name[1:].rpartition("-")[0]
            with held(root / "locks" / f"{path.parent.parent.name}-{key}", wait=False, surely=True) as mine:
                if mine:
                    shutil.rmtree(path, ignore_errors=True)
        for path in [path for path in root.glob("locks/*") if abandoned(path)]:
            with held(path, wait=False, surely=True):
                pass  # it is removed on the way out
        for path in [path for path in root.glob("damaged/*") if abandoned(path)]:
            with suppress(OSError):
                path.rmdir()  # those that hold an entry are kept for people


_swept_once = functools.cache(sweep_store)


class Store:
    """Stages by key under ``root``; opening one sweeps it, the first time in a process.

    Args:
        report: called with one line for each of the damaged entries that were set aside.
        patient: whether :meth:`once` waits for a stage that another process is computing, or raises :class:`Busy`.

    Raises:
        BadInput: the folder cannot be made or written, or the disk is full; what is stored stays.
    """

    def __init__(self, root: Path, report: Callable[[str], None] = lambda line: None, *, patient: bool = True) -> None:
        self.root, self.report, self.patient = root, report, patient
        _swept_once(root)

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key[:2] / key

    def has(self, stage: str, key: str) -> bool:
        """Whether an entry exists (unchecked)."""
        return (self.folder(stage, key) / "entry.json").is_file()

    def once(self, stage: str, key: str, compute: Callable[[], None]) -> None:
        """Computes and writes a stage with ``compute``, unless it is cached or locked by another process.

        ``compute`` may wait for other stages: stages depend on each other in one direction only, so no two processes can wait for
        each other.

        Raises:
            Busy: another process is computing it, and this store is not patient.
        """
        if self.read(stage, key, tensors=False) is not None:
            return
        with held(self.root / "locks" / f"{stage}-{key}", wait=self.patient) as mine:
            if not mine:
                raise Busy(f"{stage}/{key[:12]}")
            if self.read(stage, key, tensors=False) is None:
                compute()

    def read(self, stage: str, key: str, *, tensors: bool = True) -> Entry | None:
        """The entry, or None when it is absent or was damaged (then it has been set aside and is to be recomputed).

        Raises:
            BadInput: it is there and this process may not read it, or not set it aside.
        """
        folder = self.folder(stage, key)
        try:
            seen = folder.stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BadInput(f"{folder}: cannot be read: {error.strerror or error}") from error
        try:
            raw = (folder / "entry.json").read_bytes()
        except _ABSENT as error:  # left there, a folder without it would block every new entry
            self._set_aside(folder, seen, f"entry.json: {error.strerror}")
            return None
        except OSError as error:
            raise BadInput(f"{folder / 'entry.json'}: cannot be read: {error.strerror or error}") from error
        content = self._content(raw, folder, seen, stage, key)
        if content is None:
            return None
        if not tensors or content["tensors"] is None:
            return Entry(content["outcome"], {})
        try:
            raw = (folder / "tensors.safetensors").read_bytes()
            if hashlib.sha256(raw).hexdigest() != content["tensors"]:
                self._set_aside(folder, seen, "tensors.safetensors does not match its checksum")
                return None
            return Entry(content["outcome"], load(raw))
        except (*_ABSENT, SafetensorError) as error:
            self._set_aside(folder, seen, f"tensors.safetensors: {getattr(error, 'strerror', None) or error}")
            return None
        except OSError as error:
            raise BadInput(f"{folder / 'tensors.safetensors'}: cannot be read: {error.strerror or error}") from error

    def _content(self, raw: bytes, folder: Path, seen: int, stage: str, key: str) -> dict[str, Any] | None:
        """What entry.json holds; None where it is damaged, and then the entry has been set aside."""
        try:
            written = json.loads(raw)
            content: dict[str, Any] = written["content"]
            matches = hashlib.sha256(canonical(content).encode()).hexdigest() == written["sha256"]
            belongs = (content["key"], content["stage"]) == (key, stage)
        except (ValueError, TypeError, KeyError, RecursionError):
            self._set_aside(folder, seen, "entry.json is not readable")
            return None
        if not matches:
            self._set_aside(folder, seen, "entry.json does not match its checksum")
            return None
        if not belongs:
            self._set_aside(folder, seen, "the entry belongs to another key")
            return None
        return content

    def write(
        self, stage: str, key: str, spec: Any, outcome: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Stores a finished stage; ``spec`` is kept for people who look inside. Does nothing when the stage is cached."""
        raw = None
        if tensors is not None:
            raw = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        checksum = None if raw is None else hashlib.sha256(raw).hexdigest()
        content = {"stage": stage, "key": key, "spec": spec, "outcome": dict(outcome), "tensors": checksum}
        text = json.dumps({"sha256": hashlib.sha256(canonical(content).encode()).hexdigest(), "content": content}, indent=1)
        files = {"entry.json": f"{text}\n".encode()} | ({} if raw is None else {"tensors.safetensors": raw})
        with _told(self.root):
            insisting(lambda: self._place(self.folder(stage, key), files))  # where locks do not reach, it may be swept

    def _place(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Writes the files beside ``folder`` and renames them into it, unless it exists by then."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            for name, content in files.items():
                with (temporary / name).open("wb") as out:
                    out.write(content)
                    out.flush()
                    os.fsync(out.fileno())
            temporary.chmod(0o755)
            try:
                temporary.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _set_aside(self, folder: Path, seen: int, why: str) -> None:
        """Moves a damaged entry out of the way, if it is still the folder that was ``seen`` (its inode): another process may have
        set it aside before, and put a good one in its place."""
        aside = self.root / "damaged"
        with _told(self.root), held(self.root / "locks" / "damaged"):
            aside.mkdir(parents=True, exist_ok=True)
            try:
                if folder.stat().st_ino != seen:
                    return
            except FileNotFoundError:
                return
            spot = Path(tempfile.mkdtemp(dir=aside, prefix=f"{folder.name[:12]}-"))
            folder.rename(spot / folder.name)
        stage = folder.parent.parent.name
        self.report(f"damaged store entry {stage}/{folder.name[:12]} ({why}): set aside in {spot}, will be recomputed")
