"""A content-addressed store of stages: whole or absent, checked when read, never unpickled.

An entry is a folder ``<stage>/<key[:2]>/<key>`` with ``entry.json`` (what it is, what came out, the sha256 of every file and of
itself) and, where the stage has tensors, ``tensors.safetensors``. It is written into a temporary folder and renamed, so a killed
run leaves no half entry; of two runs that finish the same stage at once, the first to rename wins and both read the same. Runs
that share a store share its work: who computes a stage holds its lock (under ``locks``), and the others wait and then read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from benchmark.files import held
from models.spec import BadInput, canonical

__all__ = ["Busy", "Entry", "Store"]


@dataclass(frozen=True)
class Entry:
    """One stored stage: its outcome as JSON, its tensors by name."""

    outcome: dict[str, Any]
    tensors: dict[str, Tensor]


class Busy(Exception):
    """Another process is computing this stage; once that one is done, or dead, it can be asked for again."""


class Store:
    """Stages by key under ``root``.

    Args:
        report: is told, in one line each, of damaged entries that were set aside.
        patient: whether :meth:`once` waits for a stage that another process is computing, or raises :class:`Busy`.

    Raises:
        BadInput: the folder cannot be made or written, or the disk is full; what is stored stays.
    """

    def __init__(self, root: Path, report: Callable[[str], None] = lambda line: None, *, patient: bool = True) -> None:
        self.root, self.report, self.patient = root, report, patient

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key[:2] / key

    def has(self, stage: str, key: str) -> bool:
        """Whether an entry exists (unchecked)."""
        return (self.folder(stage, key) / "entry.json").is_file()

    def once(self, stage: str, key: str, compute: Callable[[], None]) -> None:
        """Has a stage computed and written by ``compute``, unless it stands or another process is at it.

        What ``compute`` asks for in turn may be waited for: stages stand on one another in one direction only, so no two processes
        can wait for each other.

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
        """The entry, or None when it is absent or was damaged (then it has been set aside and is to be recomputed)."""
        folder = self.folder(stage, key)
        try:
            seen = folder.stat().st_ino
            raw = (folder / "entry.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            written = json.loads(raw)
            content = written["content"]
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
        if not tensors or content["tensors"] is None:
            return Entry(content["outcome"], {})
        try:
            raw = (folder / "tensors.safetensors").read_bytes()
            if hashlib.sha256(raw).hexdigest() != content["tensors"]:
                self._set_aside(folder, seen, "tensors.safetensors does not match its checksum")
                return None
            return Entry(content["outcome"], load(raw))
        except (FileNotFoundError, SafetensorError) as error:
            self._set_aside(folder, seen, f"tensors.safetensors: {error}")
            return None

    def write(
        self, stage: str, key: str, spec: Any, outcome: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Stores a finished stage; ``spec`` is kept for people who look inside. Does nothing when the entry already stands."""
        folder = self.folder(stage, key)
        temporary: Path | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key[:12]}-"))
            checksum = None
            if tensors is not None:
                raw = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
                checksum = hashlib.sha256(raw).hexdigest()
                (temporary / "tensors.safetensors").write_bytes(raw)
            content = {"stage": stage, "key": key, "spec": spec, "outcome": dict(outcome), "tensors": checksum}
            text = json.dumps({"sha256": hashlib.sha256(canonical(content).encode()).hexdigest(), "content": content}, indent=1)
            (temporary / "entry.json").write_text(text + "\n")
            temporary.chmod(0o755)
            for written in temporary.iterdir():
                with written.open("rb") as handle:
                    os.fsync(handle.fileno())
            try:
                temporary.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise BadInput(f"{self.root}: the store cannot be written: {why}; mend it and issue the same command again") from error
        finally:
            if temporary is not None and temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)

    def _set_aside(self, folder: Path, seen: int, why: str) -> None:
        """Moves a damaged entry out of the way, if it is still the folder that was ``seen`` (its inode): another process may have
        set it aside before, and put a good one in its place."""
        aside = self.root / "damaged"
        aside.mkdir(parents=True, exist_ok=True)
        with held(self.root / "locks" / "damaged"):
            try:
                if folder.stat().st_ino != seen:
                    return
                spot = Path(tempfile.mkdtemp(dir=aside, prefix=f"{folder.name[:12]}-"))
                folder.rename(spot / folder.name)
            except FileNotFoundError:
                return
        stage = folder.parent.parent.name
        self.report(f"damaged store entry {stage}/{folder.name[:12]} ({why}): set aside in {spot}, will be recomputed")
