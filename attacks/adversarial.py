"""Adversarial perturbations, where an attack needs them: projected gradient ascent (Madry, Makelov, Schmidt, Tsipras and Vladu,
"Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv 1706.06083).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.backbone import Network
from models.training import default_device

__all__ = ["frozen", "pgd"]


def frozen(net: Network) -> Network:
    """A copy of ``net`` on the default device, in evaluation mode, its parameters without gradients."""
    return copy.deepcopy(net).to(default_device()).eval().requires_grad_(False)


def pgd(net: Network, images: Tensor, labels: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """Images moved to where ``net`` gives them their ``labels`` least: same shape, float in [0, 1].

    Ascent on the cross-entropy from the image itself: ``steps`` times x <- x + step * sign(gradient), held within ``eps`` of the
    image and in [0, 1].

    Args:
        net: as :func:`frozen` gives it.
        images: float (N, C, H, W) in [0, 1], on the device of ``net``.
        labels: int64 (N,), there too.
        eps: bound of the change per pixel.
        step: length of a step.
        steps: number of steps.
    """
    least, most = (images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0)
    moved = images
    for _ in range(steps):
        x = moved.detach().requires_grad_()
        # The sum, not the mean: an image's gradient must not shrink with the batch, least of all below what float32 holds.
        gradient = torch.autograd.grad(cross_entropy(net(x), labels, reduction="sum"), x)[0]
        moved = torch.minimum(torch.maximum(x.detach() + step * gradient.sign(), least), most)
    return moved
