"""Data by name: images decoded once, kept in memory, known by their content.

Sources are scikit-learn's digits (the default), the releases torchvision can download, and folders or tar archives of images
(:mod:`benchmark.data.image_files` describes their layout). Where a folder has no train/ and test/ of its own, a fifth of every class is
drawn as the test set: stratified, the same draw on every machine.

Decoded images are kept in ``<cache>/decoded`` and checked by hash whenever they are read.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import PIL
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.data.image_files import DECODER_REVISION, Gathered, archive_key, listing_key, pixels, read
from benchmark.storage.files import held, replaced, sweep
from models.images import ImageSet, quantise
from models.room import limit
from models.spec import BadInput, Spec, canonical, check, digest, generator, nearest

__all__ = ["DATASETS", "Dataset", "DatasetSpec", "load", "mean_std", "split_budget", "split_validation"]

VARIABLE = "LEVELFIELD_DATA"
_ARCHIVE_SUFFIXES = (".tar", ".tar.xz", ".tar.gz")

@dataclass(frozen=True)
class Dataset:
    """A dataset in memory.

    Attributes:
        name: as in the rows, e.g. ``digits``, ``cifar10``, ``cifar10-q95``, ``folder:myset``.
        train, test: uint8 images of one shape; both know the same classes.
        class_names: one per label, in label order.
        fingerprint: sha256 (hex) over the fingerprints of train and test: what is in the images, not which files they came from.
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
        source: a name of :data:`DATASETS`, ``folder:PATH`` (folder or tar archive), or a bare NAME that stands in
            ``$LEVELFIELD_DATA`` as a folder NAME, or as NAME.tar, NAME.tar.xz, NAME.tar.gz.
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
        # It stands in rows.csv, which a spreadsheet may open.
        check(self, "source", self.source[0] not in "=+-@", "a name that is no formula, or folder:PATH")
        check(self, "train_limit", self.train_limit is None or self.train_limit >= 2, "at least 2 images, or left out for all")
        check(self, "test_limit", self.test_limit is None or self.test_limit >= 1, "at least 1 image, or left out for all")
        check(self, "size", self.size is None or 4 <= self.size <= 1024, "between 4 and 1024 pixels, or left out")


@dataclass(frozen=True)
class _Official:
    """A release that torchvision knows how to download.

    Attributes:
        loader: class in ``torchvision.datasets``. folder: what it keeps below its root.
        counts: images of train and test in the complete release: an interrupted unpacking is noticed.
        train, test: arguments that name the two parts. size: resize to it when the settings name none.
    """

    loader: str
    folder: str
    counts: tuple[int, int]
    train: Mapping[str, Any] = field(default_factory=lambda: {"train": True})
    test: Mapping[str, Any] = field(default_factory=lambda: {"train": False})
    size: int | None = None


_OFFICIAL = {
    "cifar10": _Official("CIFAR10", "cifar-10-batches-py", (50_000, 10_000)),
    "cifar100": _Official("CIFAR100", "cifar-100-python", (50_000, 10_000)),
    "gtsrb": _Official("GTSRB", "gtsrb", (26_640, 12_630), {"split": "train"}, {"split": "test"}, 32),
    "fashion-mnist": _Official("FashionMNIST", "FashionMNIST", (60_000, 10_000)),
    "imagenette": _Official(
        "Imagenette", "imagenette2-160", (9_469, 3_925), {"split": "train", "size": "160px"}, {"split": "val", "size": "160px"}, 64
    ),
}

DATASETS: dict[str, str] = {
    "digits": "scikit-learn's bundled handwritten digits, 16x16 grey, 10 classes, 1,438 / 359 images; no download (the default)",
    "cifar10": "CIFAR-10 (Krizhevsky 2009), 32x32, 10 classes, 50,000 / 10,000 images; downloaded",
    "cifar100": "CIFAR-100 (Krizhevsky 2009), 32x32, 100 classes, 50,000 / 10,000 images; downloaded",
    "gtsrb": "German traffic signs (Stallkamp et al. 2012), resized to 32x32, 43 classes, 26,640 / 12,630 images; downloaded",
    "fashion-mnist": "Fashion-MNIST (Xiao et al. 2017), 28x28 grey, 10 classes, 60,000 / 10,000 images; downloaded",
    "imagenette": "Imagenette, ten easy ImageNet classes, resized to 64x64, 9,469 / 3,925 images; downloaded",
    "tiny-imagenet": f"Tiny-ImageNet, 64x64, 200 classes: tiny-imagenet-200 unpacked in ${VARIABLE}",
    "folder:PATH": f"your own images, a folder or tar of train/CLASS/* and test/CLASS/*; a bare NAME is looked for in ${VARIABLE}",
}
"""Source names in the order in which they are listed, each with one line about it."""


@dataclass(frozen=True)
class _Whole:
    """All of a source, before limits."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]

    def content(self) -> str:
        return digest(self.train.fingerprint(), self.test.fingerprint(), self.class_names)


def _silent(_: str) -> None:
    """The default progress: none."""


def load(spec: DatasetSpec, cache: Path, progress: Callable[[str], None] = _silent) -> Dataset:
    """The dataset, from the cache where it has been decoded before.

    Args:
        spec: which data.
        cache: folder for decoded images and downloads, made when missing.
        progress: called with one line of text now and then while images are downloaded or decoded.

    Raises:
        BadInput: the source is missing, damaged, incomplete or not laid out as described above, or a limit is out of range; the
            message names the file or class and what to do.
    """
    source = spec.source
    if source == "digits":
        whole = _digits(spec.size or 16)
    elif source in _OFFICIAL:
        with held(cache / "locks" / f"release-{source}"):  # while one run downloads it, the others must not take it for damaged
            whole = _official(source, spec.size, cache, progress)
    else:
        whole = _stored(_locate(source, cache), source, spec.size, cache, progress)
    train = _limited(whole.train, spec, "train_limit", spec.train_limit)
    test = _limited(whole.test, spec, "test_limit", spec.test_limit)
    name = "folder:" + _stem(Path(source.removeprefix("folder:"))) if source.startswith("folder:") else source
    return Dataset(name, train, test, whole.class_names, digest(train.fingerprint(), test.fingerprint()))


# -- draws ---------------------------------------------------------------------------------------------------------------------


def _draw(labels: Tensor, total: int, source: torch.Generator, *, proportional: bool = False, keep_one: bool = False) -> Tensor:
    """Positions of ``total`` samples, sorted: equally many of each class as far as its size allows, or ``proportional`` to it.

    Every class is shuffled once and the classes take turns, so a smaller total is always a part of a larger one. ``keep_one``
    never takes the last sample of a class; fewer than ``total`` come back when nothing else is left.
    """
    _, group, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    shuffled = torch.randperm(len(labels), generator=source)
    turn = torch.randperm(len(counts), generator=source)
    position = shuffled[torch.argsort(group[shuffled], stable=True)]
    group = group[position]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[group]
    due = (rank + 0.5).double() / counts[group] if proportional else rank.double()
    order = torch.argsort(turn[group], stable=True)
    order = order[torch.argsort(due[order], stable=True)]
    if keep_one:
        order = order[(rank < counts[group] - 1)[order]]
    return position[order[:total]].sort().values


def _rest(size: int, index: Tensor) -> Tensor:
    """The positions in 0..size-1 that are not in ``index``, sorted."""
    left = torch.ones(size, dtype=torch.bool)
    left[index] = False
    return left.nonzero()[:, 0]


def _identity(data: ImageSet) -> str:
    """What the draws depend on: the labels in their order, and the number of classes."""
    return hashlib.sha256(repr(data.num_classes).encode() + data.labels.cpu().contiguous().numpy().tobytes()).hexdigest()


def _limited(data: ImageSet, spec: DatasetSpec, name: str, limit: int | None) -> ImageSet:
    if limit is None:
        return data
    lowest = len(torch.unique(data.labels))
    check(spec, name, lowest <= limit <= len(data), f"between {lowest} (one per class) and {len(data)} (all of {spec.source})")
    return data.subset(_draw(data.labels, limit, generator("dataset-limit", name, _identity(data))))


def split_budget(data: ImageSet, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits a training set into the attacker's part and the defender's clean budget.

    The budget holds ``round(fraction * N)`` samples, equally many of each class as far as its size allows; the attacker keeps at
    least one of every class. Depends on labels, fraction and seed alone, and a smaller budget is a part of a larger one with the
    same seed. Limitation: samples are drawn one by one, so near-duplicates such as the frames of one GTSRB track may land on both
    sides, which makes that clean budget a little less telling than its size says.

    Args:
        data: the training set, N samples.
        fraction: in [0, 1); 0 = no budget.
        seed: of the scenario.

    Returns:
        The attacker's index and the budget's index: int64, sorted, disjoint, together 0..N-1.

    Raises:
        BadInput: the fraction is out of range, so small that it gives no image, or so large that a class would have none left.
    """
    total = round(fraction * len(data)) if 0 <= fraction < 1 else -1
    if total < 0 or (total == 0 and fraction > 0):
        least = 1 / max(len(data), 1)
        raise BadInput(f"clean budget: fraction = {fraction!r} is out of range; it must be 0, or between {least:.2g} and 1")
    source = generator("clean-budget", _identity(data), seed)
    budget = _draw(data.labels.cpu(), total, source, keep_one=True)
    if len(budget) < total:
        raise BadInput(
            f"clean budget: fraction = {fraction!r} leaves a class without training images; at most {len(budget)} of {len(data)} "
            "can be set aside"
        )
    return _rest(len(data), budget), budget


def split_validation(budget: ImageSet, seed: int) -> tuple[Tensor, Tensor]:
    """Splits a clean budget of N samples into what a defense works with and what its dial is chosen on.

    One fifth is the validation part (at least one sample, and never all, once N >= 2), each class in proportion to its size.

    Returns:
        The defense's index and the validation index: int64, sorted, disjoint, together 0..N-1.
    """
    size = len(budget)
    total = min(max(round(size / 5), 1), size - 1) if size >= 2 else 0
    source = generator("validation-split", _identity(budget), seed)
    validation = _draw(budget.labels.cpu(), total, source, proportional=True)
    return _rest(size, validation), validation


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


# -- where a source is ---------------------------------------------------------------------------------------------------------


def _stem(path: Path) -> str:
    """The last part of a path, without the suffix of an archive."""
    name = Path(os.path.abspath(path)).name  # noqa: PTH100 - "." and ".." have no name of their own; links keep theirs
    for suffix in sorted(_ARCHIVE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _data_root() -> Path | None:
    """The folder that ``$LEVELFIELD_DATA`` names, or None when it is not set.

    Raises:
        BadInput: it names something that is not a folder.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    root = Path(text).expanduser()
    if not root.is_dir():
        raise BadInput(f"{VARIABLE} = {text!r} is not a folder; set it to the folder that holds your data, or unset it")
    return root


def _names_in(folder: Path) -> list[str]:
    """What could be a dataset in ``folder``: folders and archives, by the name one would write."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    usable = (e for e in entries if not e.name.startswith(".") and (e.is_dir() or e.name.lower().endswith(_ARCHIVE_SUFFIXES)))
    return list(dict.fromkeys(_stem(entry) for entry in usable))


def _locate(source: str, cache: Path) -> Path:
    """The folder or archive of a source.

    Raises:
        BadInput: there is none; names where it was looked for and the nearest name that exists.
    """
    if source.startswith("folder:"):
        path = Path(source.removeprefix("folder:")).expanduser()
        if not path.exists():
            beside = [name for name in _names_in(path.parent) if difflib.get_close_matches(_stem(path), [name], cutoff=0.5)]
            raise BadInput(f"{source}: no such folder or archive{nearest(_stem(path), beside) if beside else ''}")
        return path
    if source in (".", "..") or "/" in source or "\\" in source:
        raise BadInput(f"dataset {source!r} is not a bare name; write 'folder:{source}' for a path")
    root = _data_root()
    names, roots = [source], [root] if root else []
    if source == "tiny-imagenet":
        names, roots = ["tiny-imagenet-200", source], [*roots, cache / "data"]
    for folder in roots:
        for name in names:
            for candidate in (folder / name, *(folder / f"{name}{suffix}" for suffix in _ARCHIVE_SUFFIXES)):
                if candidate.is_dir() if candidate.name == name else candidate.is_file():
                    return candidate
    if source == "tiny-imagenet":
        places = " or ".join(str(folder) for folder in roots)
        unset = "" if root else f"{VARIABLE} is not set; "
        raise BadInput(f"tiny-imagenet: no folder tiny-imagenet-200; {unset}unpack tiny-imagenet-200.zip in {places}")
    known = [name for name in DATASETS if ":" not in name]
    if root is None:
        raise BadInput(
            f"unknown dataset {source!r}{nearest(source, known)}; {VARIABLE} is not set: set it to the folder that holds "
            f"{source}, or write folder:PATH"
        )
    raise BadInput(f"unknown dataset {source!r}: neither {source} nor {source}.tar(.xz, .gz) is in {VARIABLE} = {root}"
                   f"{nearest(source, [*_names_in(root), *known])}")  # fmt: skip


# -- decoded once --------------------------------------------------------------------------------------------------------------


def _kept(path: Path, source: str, progress: Callable[[str], None], decode: Callable[[], _Whole]) -> _Whole:
    """What ``decode`` gives, kept in ``path``; a damaged file is named and made again."""
    if path.is_file():
        sweep(path.parent)
        try:
            return _read(path)
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            progress(f"{source}: {path} is damaged ({error}); decoding again")
    whole = decode()
    tensors = {
        "train_images": whole.train.images, "train_labels": whole.train.labels,
        "test_images": whole.test.images, "test_labels": whole.test.labels,
    }  # fmt: skip
    # One entry, because safetensors writes several in no fixed order.
    metadata = {"set": canonical({"class_names": whole.class_names, "content": whole.content()})}
    with replaced(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)
    progress(f"{source}: {len(whole.train):,} + {len(whole.test):,} images decoded and kept")
    return whole


def _read(path: Path) -> _Whole:
    """A kept set.

    Raises:
        ValueError: the content is not what was written. KeyError, TypeError, OSError, SafetensorError: not even its form is.
    """
    with safetensors.safe_open(path, framework="pt") as stored:
        metadata = json.loads(stored.metadata()["set"])
        tensors = {name: _own(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    names = tuple(metadata["class_names"])
    train = ImageSet(tensors["train_images"], tensors["train_labels"], len(names))
    test = ImageSet(tensors["test_images"], tensors["test_labels"], len(names))
    whole = _Whole(train, test, names)
    if whole.content() != metadata["content"]:
        raise ValueError("its content does not match the recorded hash")
    return whole


def _own(mapped: Tensor) -> Tensor:
    """A copy, because what is mapped from a file changes with the file; what may not fit into memory stays mapped (nobody here
    writes into the file: another one takes its place)."""
    return mapped if mapped.nbytes > limit() else mapped.clone()


def _cache_file(cache: Path, *key: Any) -> Path:
    # Another Pillow may decode a JPEG to other pixels: those are other data, with another fingerprint.
    return cache / "decoded" / f"{digest(*key, DECODER_REVISION, PIL.__version__)}.safetensors"


def _stored(path: Path, source: str, size: int | None, cache: Path, progress: Callable[[str], None]) -> _Whole:
    """A folder or archive of images."""
    if not (path.is_dir() or path.is_file()):
        raise BadInput(f"{source}: {path} is neither a folder nor a tar archive")
    tiny = source == "tiny-imagenet" and (path / "val" / "val_annotations.txt").is_file()

    def decode() -> _Whole:
        found = read(path, source, size, progress, tiny_imagenet=tiny)
        if found.test is not None:
            return _Whole(found.train, found.test, found.class_names)
        train, test = _fifth(found.train, "folder-split", max(1, round(len(found.train) / 5)))
        if not len(test):
            raise BadInput(f"{path}: one image per class cannot be split into train and test; add images")
        return _Whole(train, test, found.class_names)

    key = listing_key(path) if path.is_dir() else archive_key(path)
    return _kept(_cache_file(cache, key, size, tiny), source, progress, decode)


def _fifth(everything: ImageSet, purpose: str, count: int) -> tuple[ImageSet, ImageSet]:
    """Train and a stratified test part of ``count`` images; every class stays in train."""
    source = generator(purpose, _identity(everything))
    test = _draw(everything.labels, count, source, proportional=True, keep_one=True)
    return everything.subset(_rest(len(everything), test)), everything.subset(test)


# -- named sources -------------------------------------------------------------------------------------------------------------


def _digits(size: int) -> _Whole:
    """8x8 images with values 0..16 (Alpaydin & Kaynak 1998), scaled to 0..255 and enlarged bilinearly."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 16.0
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    everything = ImageSet(quantise(enlarged), torch.from_numpy(raw.target).long(), 10)
    train, test = _fifth(everything, "digits-split", 359)
    return _Whole(train, test, tuple(str(digit) for digit in range(10)))


_Broken = (
    RuntimeError, OSError, EOFError, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error,
)  # fmt: skip
"""What torchvision and the libraries below it raise when a release is absent, cut off or cannot be downloaded."""


def _official(source: str, size: int | None, cache: Path, progress: Callable[[str], None]) -> _Whole:
    """A release that torchvision knows: used where it lies, else downloaded.

    Raises:
        BadInput: it can be neither found nor downloaded (says where to put it), or is incomplete.
    """
    release, root = _OFFICIAL[source], _data_root()
    roots = [*([root] if root else []), cache / "data"]
    wanted = size or release.size
    for folder in roots:
        if (folder / release.folder).is_dir():
            file = _cache_file(cache, source, listing_key(folder / release.folder), wanted)
            try:
                return _kept(file, source, progress, lambda: _from_torchvision(source, folder, wanted, progress, download=False))  # noqa: B023 - called at once
            except _Broken as error:
                progress(f"{source}: {folder / release.folder} is not usable ({error})")
    target = next((folder for folder in roots[:-1] if os.access(folder, os.W_OK)), roots[-1])
    progress(f"{source}: downloading to {target}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        whole = _from_torchvision(source, target, wanted, progress, download=True)
    except _Broken as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"{source}: cannot be downloaded ({reason[0]}); put the official release, unpacked as {release.folder}/, into {target}"
            + ("" if root else f", or set {VARIABLE} to the folder that holds it")
        ) from error
    return _kept(_cache_file(cache, source, listing_key(target / release.folder), wanted), source, progress, lambda: whole)


def _from_torchvision(source: str, root: Path, size: int | None, progress: Callable[[str], None], *, download: bool) -> _Whole:
    import torchvision

    release = _OFFICIAL[source]
    loader = getattr(torchvision.datasets, release.loader)
    parts = [loader(root=str(root), download=download, **arguments) for arguments in (release.train, release.test)]
    if (len(parts[0]), len(parts[1])) != release.counts:
        raise BadInput(
            f"{source}: {root / release.folder} holds {len(parts[0]):,} + {len(parts[1]):,} images instead of "
            f"{release.counts[0]:,} + {release.counts[1]:,}; remove it and try again"
        )
    gathered = Gathered(source, progress)
    labels: list[list[int]] = [[], []]
    for part, title in enumerate(("train", "test")):
        for index in range(len(parts[part])):
            image, label = parts[part][index]
            what = f"{title} image {index}"
            gathered.add(what, pixels(image, size, f"{source}: {what}"), what)
            labels[part].append(int(label))
    classes = getattr(parts[0], "classes", None)
    if classes is None:
        classes = [f"{label:05d}" for label in range(max(labels[0]) + 1)]
    class_names = tuple(str(name if isinstance(name, str) else name[0]) for name in classes)
    names = list(gathered.arrays)
    middle = len(labels[0])
    train = ImageSet(gathered.stack(names[:middle]), torch.tensor(labels[0], dtype=torch.int64), len(class_names))
    test = ImageSet(gathered.stack(names[middle:]), torch.tensor(labels[1], dtype=torch.int64), len(class_names))
    return _Whole(train, test, class_names)
