"""Arrays of images, in memory or in a memory-mapped file.

Every array of a whole data set is made here (as decoded, the attacker's part, poisoned, padded for cropping). An array above
:func:`limit` is mapped from an unlinked temporary file below ``TMPDIR`` (which should not be a file system in memory), so that data
may be larger than memory. The file is freed with the array, however the process ends. Results do not depend on where images are
stored.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.files import why
from models.spec import BadInput

__all__ = ["VARIABLE", "copied", "limit", "room", "steps", "taken"]

VARIABLE = "LEVELFIELD_IN_MEMORY"
SHARE = 16
"""By default an array in memory takes at most one part in so many of the machine's memory; a few processes hold a few each."""
STEP = 8 * 2**20
"""Bytes copied at a time between arrays."""


def limit() -> int:
    """Bytes above which an array is stored in a file: ``LEVELFIELD_IN_MEMORY`` (MiB), or a sixteenth of the machine's memory.

    Raises:
        BadInput: the variable is not a whole number of MiB.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if given:
        if not (given.isascii() and given.isdigit()) or len(given) > 9:
            raise BadInput(f"{VARIABLE} = {given!r}: must be a whole number of MiB, e.g. 1024")
        return int(given) * 2**20
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // SHARE
    except (AttributeError, OSError, ValueError):  # unknown on this system
        return 2**30


def room(shape: Sequence[int], *, mapped: bool | None = None) -> Tensor:
    """A uint8 array of that shape, its content undefined.

    Args:
        shape: of the array.
        mapped: whether it is stored in a file; None = by its size.

    Raises:
        BadInput: the disk below ``TMPDIR`` has no room for it.
    """
    size = math.prod(shape)
    if not size or not (size > limit() if mapped is None else mapped):
        return torch.empty(tuple(shape), dtype=torch.uint8)
    folder = tempfile.gettempdir()
    try:
        handle, name = tempfile.mkstemp(prefix="levelfield-images-", dir=folder)
        try:
            # Writing to a mapped file on a full disk kills the process: its blocks are taken now.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.truncate(handle, size)
            return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).view(tuple(shape))
        finally:
            os.close(handle)
            Path(name).unlink()
    except OSError as error:
        raise BadInput(
            f"{folder}: no room for {size / 2**30:.2g} GiB of images: {why(error)}; set TMPDIR to a folder that has it, or "
            f"{VARIABLE} (MiB) to keep larger arrays in memory"
        ) from error


def _fits(images: Tensor, size: int) -> bool:
    """Whether an array of ``size`` bytes made of ``images`` is kept in memory; so are arrays on a GPU and of other types."""
    return images.device.type != "cpu" or images.dtype != torch.uint8 or size <= limit()


def steps(images: Tensor) -> int:
    """Images copied at a time."""
    return max(1, STEP // max(1, math.prod(images.shape[1:])))


def taken(images: Tensor, index: Tensor) -> Tensor:
    """``images[index]`` for uint8 images (N, ...) and int64 positions or a boolean mask; beyond the limit, in a file."""
    positions = index.nonzero().flatten() if index.dtype == torch.bool else index
    size = len(positions) * math.prod(images.shape[1:])
    if _fits(images, size):
        return images[index]
    found, step = room((len(positions), *images.shape[1:])), steps(images)
    for start in range(0, len(positions), step):
        torch.index_select(images, 0, positions[start : start + step], out=found[start : start + step])
    return found


def copied(images: Tensor) -> Tensor:
    """A copy of uint8 images; beyond the limit, in a file."""
    if _fits(images, images.numel()):
        return images.clone()
    return room(images.shape).copy_(images)
