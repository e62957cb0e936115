"""Atomic writes of files; a file whose content would not change is not written."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from models.spec import BadInput

__all__ = ["abandoned", "insisting", "replaced", "sweep", "why", "write_bytes", "write_text"]

LONG = 3600.0
"""Seconds after which a temporary file counts as abandoned. It is written within seconds, and the clocks of machines that share a
folder differ by less."""
ATTEMPTS = 3
"""Attempts of a write whose temporary file was removed meanwhile, because its process was suspended and it looked abandoned."""
T = TypeVar("T")


def why(error: OSError) -> str:
    """The reason of a failed write, for a message."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)


def insisting(write: Callable[[], T]) -> T:
    """Writes again, :data:`ATTEMPTS` times in all, where the temporary file or folder was removed meanwhile."""
    for _ in range(ATTEMPTS - 1):
        with suppress(FileNotFoundError):
            return write()
    return write()


def abandoned(path: Path) -> bool:
    """Whether a temporary file or folder is so old that its process must have ended; False where it does not exist."""
    try:
        return time.time() - path.lstat().st_mtime > LONG
    except OSError:
        return False


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns an error of the system into a BadInput that names the file."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {why(error)}; free it and issue the same command again") from error


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Removes temporary files of processes that were killed."""
    for old in folder.glob(".*.tmp"):
        if abandoned(old):
            with suppress(OSError):
                old.unlink()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write to, which becomes ``path`` in one step when the block ends, and is gone when the block raises.

    Raises:
        BadInput: as :func:`write_bytes`.
    """
    with _named(path):
        sweep(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as temporary:
            yield temporary


def write_bytes(path: Path, content: bytes) -> bool:
    """Replaces ``path`` by ``content`` in one step; True when anything changed. Temporary files of killed processes in its
    folder are removed.

    Raises:
        BadInput: the folder cannot be written, or the disk is full (named); the old file, if any, is left as it was.
    """
    with _named(path):
        sweep(path.parent)
        if path.is_file() and path.read_bytes() == content:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        insisting(lambda: _replace(path, content))
    return True


def _replace(path: Path, content: bytes) -> None:
    with _beside(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> bool:
    """As :func:`write_bytes`, for text (UTF-8)."""
    return write_bytes(path, content.encode())
