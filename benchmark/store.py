"""A content-addressed store of stages: whole or absent, checked when read, never unpickled.

An entry is a folder ``<stage>/<key[:2]>/<key>`` with ``entry.json`` (what it is, what came out, the sha256 of every file and of
itself) and, where the stage has tensors, ``tensors.safetensors``. It is written into a temporary folder and renamed, so a killed
run leaves no half entry; of two runs that finish the same stage at once, the first to rename wins and both read the same.
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

from models.spec import BadInput, canonical

__all__ = ["Entry", "Store"]


@dataclass(frozen=True)
class Entry:
    """One stored stage: its outcome as JSON, its tensors by name."""

    outcome: dict[str, Any]
    tensors: dict[str, Tensor]


class Store:
    """Stages by key under ``root``; ``report`` is told, in one line each, of damaged entries that were set aside.

    Raises:
        BadInput: the folder cannot be made or written, or the disk is full; what is stored stays.
    """

    def __init__(self, root: Path, report: Callable[[str], None] = lambda line: None) -> None:
        self.root, self.report = root, report

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key[:2] / key

    def has(self, stage: str, key: str) -> bool:
        """Whether an entry exists (unchecked)."""
        return (self.folder(stage, key) / "entry.json").is_file()

    def read(self, stage: str, key: str, *, tensors: bool = True) -> Entry | None:
        """The entry, or None when it is absent or was damaged (then it has been set aside and is to be recomputed)."""
        folder = self.folder(stage, key)
        try:
            written = json.loads((folder / "entry.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            self._set_aside(folder, "entry.json is not readable")
            return None
        content = written.get("content") if isinstance(written, dict) else None
        if not isinstance(content, dict) or hashlib.sha256(canonical(content).encode()).hexdigest() != written.get("sha256"):
            self._set_aside(folder, "entry.json does not match its checksum")
            return None
        if content["key"] != key or content["stage"] != stage:
            self._set_aside(folder, "the entry belongs to another key")
            return None
        if not tensors or content["tensors"] is None:
            return Entry(content["outcome"], {})
        try:
            raw = (folder / "tensors.safetensors").read_bytes()
            if hashlib.sha256(raw).hexdigest() != content["tensors"]:
                self._set_aside(folder, "tensors.safetensors does not match its checksum")
                return None
            return Entry(content["outcome"], load(raw))
        except (FileNotFoundError, SafetensorError) as error:
            self._set_aside(folder, f"tensors.safetensors: {error}")
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

    def _set_aside(self, folder: Path, why: str) -> None:
        aside = self.root / "damaged"
        aside.mkdir(parents=True, exist_ok=True)
        spot = Path(tempfile.mkdtemp(dir=aside, prefix=f"{folder.name[:12]}-"))
        folder.rename(spot / folder.name)
        stage = folder.parent.parent.name
        self.report(f"damaged store entry {stage}/{folder.name[:12]} ({why}): set aside in {spot}, will be recomputed")
