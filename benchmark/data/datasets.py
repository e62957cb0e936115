"""Data sets by name: images in memory, known by their content.

:mod:`benchmark.data.sources` lists where they come from, :mod:`benchmark.data.splits` how they are divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from benchmark.data.decoded import Request, Whole
from benchmark.data.sources import source_of, stem
from benchmark.data.splits import draw, identity
from models.images import ImageSet
from models.spec import Spec, check, digest, generator

__all__ = ["Dataset", "DatasetSpec", "load", "load_original", "mean_std"]

ORIGINALS = {"cifar10-q95": "cifar10"}
"""Re-encoded copies of releases (JPEG, quality 95, a folder of images for each class), and what they are copies of."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: as in the rows, e.g. ``digits``, ``cifar10``, ``cifar10-q95``, ``folder:myset``.
        train, test: uint8 images of one shape; both know the same classes.
        class_names: one per label, in label order.
        fingerprint: sha256 (hex) over the fingerprints of train and test: of the pixels and labels, not of the files.
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class DatasetSpec(Spec):
    """Which data.

    Attributes:
        source: a name of :data:`benchmark.data.sources.DATASETS`, ``folder:PATH`` (folder or tar archive), or a bare NAME: a folder
            NAME, or NAME.tar, NAME.tar.xz, NAME.tar.gz, in ``$LEVELFIELD_DATA``.
        train_limit, test_limit: keep that many images, as many of each class as its files allow (the same ones on every machine; a
            smaller limit keeps a part of what a larger one keeps); None = all.
        size: resize to ``size`` x ``size`` pixels, needed when images of a folder differ in size; None = as they are (``digits``
            16, ``gtsrb`` 32, ``imagenette`` 64).
    """

    name: ClassVar[str] = "dataset"

    source: str = "digits"
    train_limit: int | None = None
    test_limit: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        path = self.source.removeprefix("folder:")
        check(self, "source", bool(path) and path.isprintable(), "a name, or folder:PATH")
        # It is in rows.csv, which a spreadsheet may open.
        check(self, "source", self.source[0] not in "=+-@", "a name that is no formula, or folder:PATH")
        check(self, "train_limit", self.train_limit is None or self.train_limit >= 2, "at least 2 images, or left out for all")
        check(self, "test_limit", self.test_limit is None or self.test_limit >= 1, "at least 1 image, or left out for all")
        check(self, "size", self.size is None or 4 <= self.size <= 1024, "between 4 and 1024 pixels, or left out")


def _silent(_: str) -> None:
    """The default progress: none."""


def load(spec: DatasetSpec, cache: Path, progress: Callable[[str], None] = _silent) -> Dataset:
    """The data set, from the cache where it has been decoded before.

    Args:
        spec: which data.
        cache: folder for decoded images and downloads, made when missing.
        progress: called with one line of text now and then while images are downloaded or decoded.

    Raises:
        BadInput: the source is missing, damaged, incomplete or not laid out as :mod:`benchmark.data.image_files` describes, or a
            limit is out of range; the message names the file or class and what to do.
    """
    whole = source_of(spec.source).load(Request(spec.source, spec.size, cache, progress))
    own = spec.source.startswith("folder:")
    name = f"folder:{stem(Path(spec.source.removeprefix('folder:')))}" if own else spec.source
    return _dataset(spec, whole, name)


def load_original(spec: DatasetSpec, cache: Path, progress: Callable[[str], None] = _silent) -> Dataset | None:
    """The release that ``spec`` names a re-encoded copy of, in the order of the copy; None where it names none.

    A folder of classes is read class by class, so the release is sorted by class, and each class keeps its order. Every split then
    takes the same images; their pixels are those before the encoding.

    Raises:
        BadInput: as :func:`load`.
    """
    original = ORIGINALS.get(spec.source)
    if original is None:
        return None
    whole = source_of(original).load(Request(original, spec.size, cache, progress))
    train, test = (part.subset(torch.argsort(part.labels, stable=True)) for part in (whole.train, whole.test))
    return _dataset(spec, Whole(train, test, whole.class_names), original)


def _dataset(spec: DatasetSpec, whole: Whole, name: str) -> Dataset:
    """Images within the limits of ``spec``."""
    train = _limited(whole.train, spec, "train_limit", spec.train_limit)
    test = _limited(whole.test, spec, "test_limit", spec.test_limit)
    return Dataset(name, train, test, whole.class_names, digest(train.fingerprint(), test.fingerprint()))


def _limited(data: ImageSet, spec: DatasetSpec, name: str, limit: int | None) -> ImageSet:
    if limit is None:
        return data
    lowest = len(torch.unique(data.labels))
    check(spec, name, lowest <= limit <= len(data), f"between {lowest} (one per class) and {len(data)} (all of {spec.source})")
    return data.subset(draw(data.labels, limit, generator("dataset-limit", name, identity(data))))


def mean_std(data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of every channel, in [0, 1]; a std below 0.001 is given as 0.001.

    Counted over the 256 values a pixel can have: exact, whatever the order, and in bounded memory.

    Raises:
        ValueError: the set is empty.
    """
    if not len(data):
        raise ValueError("an empty set has no mean")
    values = torch.arange(256, dtype=torch.float64) / 255.0
    means, stds = [], []
    step = max(1, 2**24 // (data.shape[1] * data.shape[2]))
    for channel in range(data.shape[0]):
        counts = torch.zeros(256, dtype=torch.float64)
        for start in range(0, len(data), step):
            counts += torch.bincount(data.images[start : start + step, channel].reshape(-1).cpu(), minlength=256)
        share = counts / counts.sum()
        mean = (share * values).sum()
        means.append(float(mean))
        stds.append(max(float((share * (values - mean) ** 2).sum().sqrt()), 1e-3))
    return tuple(means), tuple(stds)
