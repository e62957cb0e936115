"""Augmentations beyond crop and flip: batched, on tensors, each image by itself.

Each function takes the random numbers it uses, one row per image. A caller that gets them from :func:`models.spec.uniforms` with a
key made of (seed, epoch) and the samples' index augments every sample the same way in any batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

__all__ = ["VIEW_DRAWS", "blurred", "cutmix", "cutout", "hue_turned", "rotated_and_moved", "simclr_view"]

VIEW_DRAWS = 13
"""Uniforms per image that :func:`simclr_view` takes."""


def cutout(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """A square of ``size`` pixels a side set to 0 in every image (DeVries and Taylor, 2017, arXiv 1708.04552).

    Its centre is any pixel; the square is cut off at the edges of the image.

    Args:
        images: float (N, C, H, W) in [0, 1].
        draws: float (N, 2) in [0, 1), where the centre is.
        size: side of the square in pixels.
    """
    _, _, height, width = images.shape
    inside = []
    for position, length in enumerate((height, width)):
        start = (draws[:, position] * length).long() - size // 2
        offset = torch.arange(length, device=images.device) - start[:, None]
        inside.append((offset >= 0) & (offset < size))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def cutmix(images: Tensor, order: Tensor, draws: Tensor) -> tuple[Tensor, float]:
    """A box of every image filled from another one, the same box for the whole batch (CutMix: Yun et al., ICCV 2019, arXiv
    1905.04899; here with Beta(1, 1), the uniform distribution).

    The box has the image's proportions, any pixel as its centre, and is cut off at the edges.

    Args:
        images: float (N, C, H, W).
        order: int64 (N,); image i is filled from image ``order[i]``.
        draws: float (3,) in [0, 1): the share to keep, and where the centre is, across and down.

    Returns:
        The images, and the share of their pixels that is kept, counted after the box was cut off.
    """
    _, _, height, width = images.shape
    spans = []
    for position, length in ((draws[2], height), (draws[1], width)):
        centre, side = int(position * length), int(length * math.sqrt(1 - float(draws[0])))
        spans.append((max(0, centre - side // 2), min(length, centre + side // 2)))
    (top, bottom), (left, right) = spans
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def hue_turned(images: Tensor, turn: Tensor) -> Tensor:
    """Colour images float (N, 3, H, W) in [0, 1] with the hue of their HSV form turned by ``turn`` (N,), in whole turns."""
    value = images.amax(1)
    chroma = value - images.amin(1)
    red, green, blue = images.unbind(1)
    scale = chroma.clamp(min=1e-8)
    sector = torch.where(value == red, (green - blue) / scale % 6, (blue - red) / scale + 2)
    sector = torch.where((value == blue) & (value != red) & (value != green), (red - green) / scale + 4, sector)
    sector = sector + 6 * turn.view(-1, 1, 1)
    channels = []
    for corner in (5, 3, 1):
        k = (corner + sector) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def rotated_and_moved(images: Tensor, draws: Tensor) -> Tensor:
    """Every image turned by up to half a turn, then moved by up to a fifth of each side; what comes into view is 0.

    The pixels are those of the image, none is interpolated (nearest neighbour, whole pixels).

    Args:
        images: float (N, C, H, W).
        draws: float (N, 3) in [0, 1): angle, move across, move down.
    """
    _, _, height, width = images.shape
    u = 2 * draws.to(images.device) - 1
    cos, sin = torch.cos(math.pi * u[:, 0]), torch.sin(math.pi * u[:, 0])
    turn = torch.zeros((len(images), 2, 3), device=images.device)
    turn[:, 0, 0] = turn[:, 1, 1] = cos
    # Coordinates run from -1 to 1 along either side, so a turn of a rectangle has to count in pixels.
    turn[:, 0, 1], turn[:, 1, 0] = -sin * height / width, sin * width / height
    move = torch.zeros_like(turn)
    move[:, 0, 0] = move[:, 1, 1] = 1
    move[:, 0, 2] = -2 * torch.round(0.2 * width * u[:, 1]) / width
    move[:, 1, 2] = -2 * torch.round(0.2 * height * u[:, 2]) / height
    for change in (turn, move):
        grid = affine_grid(change, list(images.shape), align_corners=False)
        images = grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return images


def blurred(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of float (N, C, H, W) with a standard deviation of its own for each image, in pixels (N,); edges repeat.

    The kernel reaches ``radius`` pixels to each side.
    """
    size, channels, height, width = images.shape
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    x = pad(images, [radius] * 4, mode="replicate").reshape(1, size * channels, height + 2 * radius, width + 2 * radius)
    x = conv2d(x, kernel[:, None, :, None], groups=size * channels)
    x = conv2d(x, kernel[:, None, None, :], groups=size * channels)
    return x.view(images.shape)


def simclr_view(images: Tensor, draws: Tensor, flip: bool, blur: float) -> Tensor:
    """One SimCLR view of every image, float (N, C, H, W) in [0, 1] -> the same (Chen et al., ICML 2020, arXiv 2002.05709, App. A).

    In this order: random crop of 0.2 to 1 of the area, at aspect ratios from 3/4 to 4/3, resized back; mirrored with probability
    1/2 where ``flip``; with probability 0.8 brightness and contrast, of colour images also saturation, times a factor in 0.6 to
    1.4, and hue turned by up to a tenth; colour images turn grey with probability 0.2; with probability ``blur`` a blur of 0.1 to 2
    pixels of a 32-pixel side. The strengths are those DBD trains with (Huang et al., ICLR 2022, arXiv 2202.03423, authors' code);
    cropping is bilinear, not bicubic, and the crop always fits.

    Args:
        images: float (N, C, H, W) in [0, 1].
        draws: float (N, VIEW_DRAWS) in [0, 1).
        flip: whether views may be mirrored.
        blur: share of the views that are blurred.
    """
    u = draws.to(images.device)
    area, ratio = 0.2 + 0.8 * u[:, 0], torch.exp(math.log(4 / 3) * (2 * u[:, 1] - 1))
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    move = torch.zeros((len(images), 2, 3), device=images.device)
    move[:, 0, 0] = torch.where((u[:, 2] < 0.5) & flip, -wide, wide)
    move[:, 1, 1] = high
    move[:, 0, 2], move[:, 1, 2] = (2 * u[:, 3] - 1) * (1 - wide), (2 * u[:, 4] - 1) * (1 - high)
    x = grid_sample(images, affine_grid(move, list(images.shape), align_corners=False), padding_mode="border", align_corners=False)
    jitter = (u[:, 5] < 0.8).view(-1, 1, 1, 1)

    def blend(x: Tensor, other: Tensor | float, draw: Tensor) -> Tensor:
        factor = torch.where(jitter, 0.6 + 0.8 * draw.view(-1, 1, 1, 1), 1.0)
        return (factor * x + (1 - factor) * other).clamp(0, 1)

    def grey(x: Tensor) -> Tensor:
        weights = torch.tensor([0.299, 0.587, 0.114], device=x.device) if x.shape[1] == 3 else torch.ones(1, device=x.device)
        return (x * weights.view(1, -1, 1, 1)).sum(1, keepdim=True)

    colour = images.shape[1] == 3
    x = blend(x, 0.0, u[:, 6])
    x = blend(x, (grey(x) if colour else x).mean((1, 2, 3), keepdim=True), u[:, 7])
    if colour:
        x = blend(x, grey(x), u[:, 8])
        x = torch.where(jitter, hue_turned(x, 0.2 * u[:, 9] - 0.1), x)
        x = torch.where((u[:, 10] < 0.2).view(-1, 1, 1, 1), grey(x).expand_as(x), x)
    chosen = torch.nonzero(u[:, 11] < blur).flatten()
    if len(chosen):
        scale = min(images.shape[2:]) / 32
        x[chosen] = blurred(x[chosen], scale * (0.1 + 1.9 * u[chosen, 12]), max(1, math.ceil(6 * scale)))
    return x.contiguous(memory_format=torch.channels_last)
