"""What a stage costs, in samples sent through the full network.

Seconds depend on the machine and its neighbours; samples forward and backward do not. Every pass of a network's ``features`` is
tallied on all meters that are open, the backward pass when a gradient really reaches the features' output. Passes through the
head alone are not counted: they are below a percent of a full pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Cost", "metered", "tally", "tally_backward"]


@dataclass
class Cost:
    """Samples sent forward and backward through the full network."""

    forward: int = 0
    backward: int = 0

    def epochs(self, train_size: int) -> float:
        """Standard-epoch equivalents: 1 = forward and backward over the whole training set (a backward pass = two forwards)."""
        return (self.forward + 2 * self.backward) / (3 * train_size)


_open: list[Cost] = []


@contextmanager
def metered(cost: Cost | None = None) -> Iterator[Cost]:
    """Adds every pass made inside the block to ``cost`` (a new one by default). Meters nest."""
    meter = Cost() if cost is None else cost
    _open.append(meter)
    try:
        yield meter
    finally:
        # By identity: two meters that have counted the same are equal.
        del _open[max(position for position, other in enumerate(_open) if other is meter)]


def tally(batch: int, output: torch.Tensor) -> None:
    """Called by the network once per forward pass of ``batch`` samples whose features are ``output``."""
    if not _open:
        return
    meters = list(_open)
    for meter in meters:
        meter.forward += batch
    if output.requires_grad:

        def count(_: torch.Tensor) -> None:
            for meter in meters:
                meter.backward += batch

        output.register_hook(count)  # type: ignore[no-untyped-call]


def tally_backward(batch: int) -> None:
    """Counts a backward pass of ``batch`` samples that begins inside the features, where :func:`tally` does not see it.

    It counts as a whole pass, which is more than it costs.
    """
    for meter in _open:
        meter.backward += batch
