"""Files that are whole or absent (written by :mod:`models.files`, where weights need it too), and locks between processes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from models.files import abandoned, insisting, replaced, sweep, why, write_bytes, write_text
from models.spec import BadInput

__all__ = ["abandoned", "held", "insisting", "replaced", "sweep", "why", "write_block", "write_bytes", "write_text"]

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""What a file system says that knows no locks."""


@contextmanager
def held(path: Path, *, wait: bool = True, surely: bool = False) -> Iterator[bool]:
    """Holds the lock ``path`` against every other process while the block runs; yields whether it is held.

    It is the kernel that keeps it, so it is free as soon as its owner is gone, however that one ended. The file is empty and is
    removed on the way out; one of a killed owner locks nothing. On a file system without locks nothing is held, and
    the block runs all the same: writers there are safe, but may do the same work twice.

    Args:
        wait: until the lock is free; otherwise the block runs at once, with False where another process has it.
        surely: whether the block gets False, too, on a file system without locks.

    Raises:
        BadInput: the folder cannot be made or written.
    """
    lock = FileLock(path, poll_interval=0.2, fallback_to_soft=False)
    free = True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout:
        free = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise BadInput(f"{path}: cannot be locked: {error.strerror or error}") from error
        free = not surely
    try:
        yield free
    finally:
        if lock.is_locked:
            with suppress(OSError):
                path.unlink()  # while it is held: whoever waits for it sees that it has no name any more, and makes a new one
            lock.release()


def write_block(page: Path, block: str, content: Callable[[], str]) -> bool:
    """Puts ``content()`` between the lines ``<!-- block:begin -->`` and ``<!-- block:end -->`` of a page; True when it changed.

    A page that does not exist or has no such lines stays as it is.
    """
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if begin not in text or end not in text:
        return False
    before, rest = text.split(begin, 1)
    return write_text(page, f"{before}{begin}\n{content()}{end}{rest.split(end, 1)[1]}")
