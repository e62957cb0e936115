"""Writing files so that they are whole or absent, and unchanged files stay untouched."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from models.spec import BadInput

__all__ = ["write_bytes", "write_text"]


def write_bytes(path: Path, content: bytes) -> bool:
    """Replaces ``path`` by ``content`` in one step; True when anything changed.

    Raises:
        BadInput: the folder cannot be written, or the disk is full (named); the old file, if any, is left as it was.
    """
    try:
        if path.is_file() and path.read_bytes() == content:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
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
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise BadInput(f"{path}: cannot be written: {why}; free it and issue the same command again") from error
    return True


def write_text(path: Path, content: str) -> bool:
    """As :func:`write_bytes`, for text (UTF-8)."""
    return write_bytes(path, content.encode())
