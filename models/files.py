"""Writing files so that they are whole or absent, and unchanged files stay untouched."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from models.spec import BadInput

__all__ = ["abandoned", "write_bytes", "write_text"]

LONG = 3600.0
"""Seconds after which a temporary file has no living writer: one is written within seconds. Clocks of machines that share a folder
differ by less."""
ATTEMPTS = 3
"""How often a file is written when somebody takes it for abandoned meanwhile, because its writer was asleep, say."""


def abandoned(path: Path) -> bool:
    """Whether a temporary file or folder is so old that its writer must be gone; False where it is gone itself."""
    try:
        return time.time() - path.lstat().st_mtime > LONG
    except OSError:
        return False


def write_bytes(path: Path, content: bytes) -> bool:
    """Replaces ``path`` by ``content`` in one step; True when anything changed. Temporary files that killed writers left in its
    folder are removed.

    Raises:
        BadInput: the folder cannot be written, or the disk is full (named); the old file, if any, is left as it was.
    """
    try:
        for old in path.parent.glob(".*.tmp"):
            if abandoned(old):
                with suppress(OSError):
                    old.unlink()
        if path.is_file() and path.read_bytes() == content:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(ATTEMPTS - 1):
            with suppress(FileNotFoundError):
                return _replace(path, content)
        return _replace(path, content)
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise BadInput(f"{path}: cannot be written: {why}; free it and issue the same command again") from error


def _replace(path: Path, content: bytes) -> bool:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def write_text(path: Path, content: str) -> bool:
    """As :func:`write_bytes`, for text (UTF-8)."""
    return write_bytes(path, content.encode())
