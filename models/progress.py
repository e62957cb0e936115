"""Who hears of the epochs of a training while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["epoch_ended", "hearing"]

_listeners: list[Callable[[int, int], None]] = []


@contextmanager
def hearing(listener: Callable[[int, int], None]) -> Iterator[None]:
    """Inside, ``listener`` is called after every epoch of every training of this process.

    Args:
        listener: takes the number of epochs that have ended, and that of all epochs of the training.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def epoch_ended(done: int, total: int) -> None:
    """Called by the training loop after epoch ``done`` (1 = the first) of ``total``."""
    for listener in _listeners:
        listener(done, total)
