"""Labelled images, and their batches with random crop and flip."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.room import limit, room, steps, taken
from models.spec import derive_seed

__all__ = ["Batches", "BeforeAugment", "ImageSet", "quantise", "to_float"]

BeforeAugment = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Attacker-side hook: (images float (N, C, H, W) in [0, 1], labels (N,), index (N,), epoch) -> (images, labels)."""


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [0, 1], any shape."""
    return images.to(torch.float32).div_(255.0)


def quantise(images: Tensor) -> Tensor:
    """float in [0, 1] -> uint8, clipped and rounded to nearest: what an image file can hold."""
    return images.clamp(0.0, 1.0).mul(255.0).round_().to(torch.uint8)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), in 0..num_classes-1.
        num_classes: how many classes there are, present in ``labels`` or not.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise TypeError(f"images must be uint8 (N, C, H, W), not {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            raise TypeError(f"labels must be int64 ({len(self.images)},), not {self.labels.dtype} {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def subset(self, index: Tensor) -> ImageSet:
        """The samples at ``index`` (int64 positions or a boolean mask), in that order."""
        return ImageSet(taken(self.images, index), self.labels[index], self.num_classes)

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.num_classes)

    def fingerprint(self) -> str:
        """sha256 (hex) over shape, labels and pixels: two sets with the same fingerprint are the same data."""
        content = hashlib.sha256(repr((tuple(self.images.shape), self.num_classes)).encode())
        content.update(self.labels.cpu().contiguous().view(-1).numpy().data)
        content.update(self.images.cpu().contiguous().view(-1).numpy().data)  # no copy: it may be larger than memory
        return content.hexdigest()


class Batches:
    """One training set as shuffled, augmented batches; iterating again gives the next epoch.

    Each batch is ``(images, labels, index)``: float32 (B, C, H, W) in [0, 1] in channels_last, int64 (B,), int64 (B,).
    Every draw is keyed by (seed, epoch, sample), never by worker or batch, so results do not depend on how work is spread.
    Random crop (zero padding ``crop`` on every side) and horizontal flip are folded into one gather of pixels, about five times
    faster than cropping image by image.

    Args:
        data: the training set.
        batch: samples per batch; a leftover batch of a single sample is dropped (batch norm cannot normalise it).
        seed: of shuffling and augmentation.
        crop: pixels of zero padding for the random crop; 0 = no crop.
        flip: mirror half of the samples.
        drop_last: drop every incomplete batch, as long as one complete batch exists.
        before_augment: attacker-side hook on raw images; what it returns is quantised to uint8, then cropped and flipped (slower).
        views: how often each image is shown, each time with its own crop and flip: images come as (views * B, C, H, W), all first
            views before all second ones, while labels and index stay (B,).
    """

    def __init__(
        self,
        data: ImageSet,
        batch: int,
        seed: int,
        *,
        crop: int = 0,
        flip: bool = False,
        drop_last: bool = False,
        before_augment: BeforeAugment | None = None,
        views: int = 1,
    ) -> None:
        self.data, self.batch, self.seed, self.crop, self.flip = data, batch, seed, crop, flip
        self.before_augment, self.views = before_augment, views
        self.epoch = 0
        size = len(data)
        full, rest = divmod(size, batch)
        self._steps = full + (1 if rest > 1 and not (drop_last and full) else 0)
        self._pixels = None if before_augment else self._flat(data.images)

    def __len__(self) -> int:
        return self._steps

    def _flat(self, images: Tensor) -> Tensor:
        """Zero-padded images as rows of pixels: (N * Hp * Wp, C) uint8."""
        size, channels, height, width = images.shape
        shape = (size, height + 2 * self.crop, width + 2 * self.crop, channels)
        if images.device.type == "cpu" and math.prod(shape) > limit():
            rows = room(shape)
            step = steps(images)
            for start in range(0, size, step):
                part = slice(start, start + step)
                rows[part] = self._padded(images[part])
            return rows.view(-1, channels)
        return self._padded(images).contiguous().view(-1, channels)

    def _padded(self, images: Tensor) -> Tensor:
        """(N, Hp, Wp, C)"""
        padded = torch.nn.functional.pad(images, [self.crop] * 4) if self.crop else images
        return padded.permute(0, 2, 3, 1)

    def _gather(self, pixels: Tensor, row: Tensor, move: Tensor) -> Tensor:
        """Crops and flips: ``row`` (B,) picks the image in ``pixels``, ``move`` (B, 3) holds [top, left, flip]."""
        channels, height, width = self.data.shape
        device = pixels.device
        padded_h, padded_w = height + 2 * self.crop, width + 2 * self.crop
        across = torch.arange(width, device=device)
        columns = torch.where(move[:, 2:3] > 0, width - 1 - across, across) + move[:, 1:2]
        rows = (row * padded_h + move[:, 0])[:, None] + torch.arange(height, device=device)
        index = (rows * padded_w)[:, :, None] + columns[:, None, :]
        picked = torch.index_select(pixels, 0, index.view(-1))
        return to_float(picked.view(len(row), height, width, channels)).permute(0, 3, 1, 2)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        draw = torch.Generator()
        draw.manual_seed(derive_seed(self.seed, "epoch", self.epoch))
        size, device = len(self.data), self.data.images.device
        order = torch.randperm(size, generator=draw)
        moves = torch.zeros((self.views, size, 3), dtype=torch.int64)
        for move in moves:
            if self.crop:
                move[:, :2] = torch.randint(0, 2 * self.crop + 1, (size, 2), generator=draw)
            if self.flip:
                move[:, 2] = torch.randint(0, 2, (size,), generator=draw)
        order, moves = order.to(device), moves.to(device)
        epoch, self.epoch = self.epoch, self.epoch + 1
        for step in range(self._steps):
            index = order[step * self.batch : (step + 1) * self.batch]
            labels = self.data.labels[index]
            pixels, row = self._pixels, index
            if pixels is None:
                assert self.before_augment is not None
                images, labels = self.before_augment(to_float(self.data.images[index]), labels, index, epoch)
                pixels, row = self._flat(quantise(images)), torch.arange(len(index), device=device)
            seen = [self._gather(pixels, row, move[index]) for move in moves]
            yield seen[0] if self.views == 1 else torch.cat(seen), labels, index
