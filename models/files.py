"""Writing files so that they are whole or absent, and unchanged files stay untouched."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.spec import BadInput

__all__ = ["replaced", "write_bytes", "write_text"]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system has against a file, as a BadInput that names it."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise BadInput(f"{path}: cannot be written: {why}; free it and issue the same command again") from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place in one step when the block ends, and is gone when it raises.

    Raises:
        BadInput: as :func:`write_bytes`.
    """
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        os.close(handle)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> bool:
    """Replaces ``path`` by ``content`` in one step; True when anything changed.

    Raises:
        BadInput: the folder cannot be written, or the disk is full (named); the old file, if any, is left as it was.
    """
    with _named(path):
        if path.is_file() and path.read_bytes() == content:
            return False
    with replaced(path) as temporary:
        temporary.write_bytes(content)
    return True


def write_text(path: Path, content: str) -> bool:
    """As :func:`write_bytes`, for text (UTF-8)."""
    return write_bytes(path, content.encode())
