"""Triggers made by a network: the same for an image whatever batch it comes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["in_fixed_batches", "part", "prefixed"]


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


def prefixed(name: str, net: nn.Module) -> dict[str, Tensor]:
    """The state of a network for a file: its tensors as ``name.*``."""
    return {f"{name}.{key}": value for key, value in net.state_dict().items()}


def part(name: str, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`prefixed`: the tensors of ``kept`` called ``name.*``."""
    return {key.removeprefix(f"{name}."): value for key, value in kept.items() if key.startswith(f"{name}.")}
