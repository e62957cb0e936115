"""Triggers made by a network: the same for an image whatever batch it comes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_fixed_batches"]


def in_fixed_batches(net: Callable[[Tensor], Tensor], images: Tensor, batch: int = 32) -> Tensor:
    """``net`` of float (N, C, H, W) in batches of one size, the last filled up with zeros; without gradients.

    Libraries add up a conv in another order for another number of images. ``net`` must treat samples separately: evaluation mode.
    """
    parts = []
    with torch.no_grad():
        for start in range(0, max(1, len(images)), batch):
            part = images[start : start + batch]
            full = images.new_zeros(batch, *images.shape[1:])  # also one memory layout, which decides on the order too
            full[: len(part)] = part
            parts.append(net(full)[: len(part)])
    return torch.cat(parts)
