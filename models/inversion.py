"""Trigger inversion: the search for a pattern that sends images to a class (Wang, Yao, Shan, Li, Viswanath, Zheng and Zhao, "Neural
Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019).

What is searched are tensors of any real numbers, which tanh brings into their range. One loop serves attack and defense: they
differ in the loss, in the batches, and in how the weight of the mask's size changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["After", "Loss", "descend", "patched", "squashed"]

Loss = Callable[[Tensor, Tensor, list[Tensor], float], Tensor]
"""(images float (B, C, H, W) in [0, 1], targets (B,), what is searched, weight of the mask's size) -> scalar."""
After = Callable[[int, list[Tensor], float], float | None]
"""(number of steps done, what is searched, weight of the mask's size) -> the next weight; None ends the search."""


def squashed(z: Tensor) -> Tensor:
    """(tanh z + 1) / 2: any real numbers to (0, 1), same shape."""
    return (torch.tanh(z) + 1) / 2


def patched(images: Tensor, z_mask: Tensor, z_pattern: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    """x + m (p - x) with m = kept (tanh z_mask + 1) / 2 and p = (tanh z_pattern + 1) / 2.

    Args:
        images: float (N, C, H, W) in [0, 1].
        z_mask: float (1, H, W).
        z_pattern: float (C, H, W).
        kept: float (1, H, W), 0 where the mask was cut and 1 elsewhere; 1 = nowhere.
    """
    mask, pattern = kept * squashed(z_mask), squashed(z_pattern)
    return images + mask * (pattern - images)


def descend(
    loss: Loss,
    batches: Iterable[tuple[Tensor, Tensor]],
    z: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight: float = 0.0,
    after: After | None = None,
) -> list[Tensor]:
    """``z`` after one step of Adam per batch; its own loop, since the training loop trains networks.

    Args:
        loss: what is lowered.
        batches: (images float (B, C, H, W) in [0, 1], targets int64 (B,)) of every step, on the device of ``z``.
        z: what is searched, at the start; not changed.
        lr: of Adam.
        betas: of Adam.
        weight: of the mask's size, at the start.
        after: called after every step; None = the weight stays.
    """
    z = [tensor.clone().requires_grad_() for tensor in z]
    optimizer = torch.optim.Adam(z, lr=lr, betas=betas)
    for step, (images, targets) in enumerate(batches, 1):
        value = loss(images, targets, z, weight)
        for tensor, gradient in zip(z, torch.autograd.grad(value, z), strict=True):
            tensor.grad = gradient
        optimizer.step()
        if after is not None:
            following = after(step, [tensor.detach() for tensor in z], weight)
            if following is None:
                break
            weight = following
    return [tensor.detach() for tensor in z]
