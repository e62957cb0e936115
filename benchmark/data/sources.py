"""Where data come from: scikit-learn's digits (the default), releases that torchvision downloads, and a user's own images.

Folders and archives are laid out as :mod:`benchmark.data.image_files` describes. Where one has no train/ and test/ of its own, a
fifth of every class is drawn as the test set: stratified, the same draw on every machine.
"""

from __future__ import annotations

import difflib
import http.client
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmark.data.decoded import Request, Whole, cache_file, kept
from benchmark.data.image_files import Gathered, archive_key, listing_key, pixels, read
from benchmark.data.splits import fifth
from benchmark.storage.files import held
from models.images import ImageSet, quantise
from models.spec import BadInput, nearest

__all__ = ["DATASETS", "VARIABLE", "Release", "Source", "on_disk", "source_of", "stem"]

VARIABLE = "LEVELFIELD_DATA"
_ARCHIVE_SUFFIXES = (".tar", ".tar.xz", ".tar.gz")


@dataclass(frozen=True)
class Source:
    """A named data set.

    Attributes:
        name: in the settings and the rows.
        about: one line: what it is, its size, and where it comes from.
        load: gives all of its images, before any limit; raises :class:`BadInput` where they cannot be had.
    """

    name: str
    about: str
    load: Callable[[Request], Whole]


def source_of(name: str) -> Source:
    """The source of that name; any other name is one of the user's own sets."""
    return next((source for source in DATASETS if source.name == name), DATASETS[-1])


# -- digits --------------------------------------------------------------------------------------------------------------------


def _digits(request: Request) -> Whole:
    """8x8 images with values 0..16 (Alpaydin & Kaynak 1998), scaled to 0..255 and enlarged bilinearly."""
    from sklearn.datasets import load_digits

    raw, size = load_digits(), request.size or 16
    images = torch.from_numpy(raw.images).float()[:, None] / 16.0
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    everything = ImageSet(quantise(enlarged), torch.from_numpy(raw.target).long(), 10)
    train, test = fifth(everything, "digits-split", 359)
    return Whole(train, test, tuple(str(digit) for digit in range(10)))


# -- releases that torchvision knows -------------------------------------------------------------------------------------------

_BROKEN = (
    RuntimeError, OSError, EOFError, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error,
)  # fmt: skip
"""What torchvision and the libraries below it raise when a release is absent, cut off or cannot be downloaded."""


@dataclass(frozen=True)
class Release:
    """A release that torchvision can download; called with a request, it gives the images.

    Attributes:
        loader: class in ``torchvision.datasets``.
        folder: what it keeps below its root.
        counts: images of train and test in the complete release, so that an interrupted unpacking is noticed.
        train, test: arguments that name the two parts.
        size: resize to it where the settings name none; None = as they are.
    """

    loader: str
    folder: str
    counts: tuple[int, int]
    train: Mapping[str, Any] = field(default_factory=lambda: {"train": True})
    test: Mapping[str, Any] = field(default_factory=lambda: {"train": False})
    size: int | None = None

    def __call__(self, request: Request) -> Whole:
        """The images: from ``$LEVELFIELD_DATA`` or the cache where they are there, else downloaded.

        Raises:
            BadInput: the release can be neither found nor downloaded (says where to put it), or is incomplete.
        """
        # While one run downloads a release, another would take it for damaged.
        with held(request.cache / "locks" / f"release-{request.source}"):
            return self._found(request._replace(size=request.size or self.size))

    def _found(self, request: Request) -> Whole:
        root, source = _data_root(), request.source
        roots = [*([root] if root else []), request.cache / "data"]
        for place in roots:
            if (place / self.folder).is_dir():
                try:
                    return kept(self._file(place, request), request, lambda: self._decoded(place, request, download=False))  # noqa: B023 - called at once
                except _BROKEN as error:
                    request.progress(f"{source}: {place / self.folder} is not usable ({error})")
        target = next((place for place in roots[:-1] if os.access(place, os.W_OK)), roots[-1])
        request.progress(f"{source}: downloading to {target}")
        try:
            target.mkdir(parents=True, exist_ok=True)
            whole = self._decoded(target, request, download=True)
        except _BROKEN as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BadInput(
                f"{source}: cannot be downloaded ({reason[0]}); put the official release, unpacked as {self.folder}/, into {target}"
                + ("" if root else f", or set {VARIABLE} to the folder that holds it")
            ) from error
        return kept(self._file(target, request), request, lambda: whole)

    def _file(self, place: Path, request: Request) -> Path:
        return cache_file(request.cache, request.source, listing_key(place / self.folder), request.size)

    def _decoded(self, root: Path, request: Request, *, download: bool) -> Whole:
        import torchvision

        loader = getattr(torchvision.datasets, self.loader)
        parts = [loader(root=str(root), download=download, **arguments) for arguments in (self.train, self.test)]
        if (len(parts[0]), len(parts[1])) != self.counts:
            raise BadInput(
                f"{request.source}: {root / self.folder} holds {len(parts[0]):,} + {len(parts[1]):,} images instead of "
                f"{self.counts[0]:,} + {self.counts[1]:,}; remove it and try again"
            )
        gathered = Gathered(request.source, request.progress)
        labels: list[list[int]] = [[], []]
        for part, title in enumerate(("train", "test")):
            for index in range(len(parts[part])):
                image, label = parts[part][index]
                what = f"{title} image {index}"
                gathered.add(what, pixels(image, request.size, f"{request.source}: {what}"), what)
                labels[part].append(int(label))
        classes = getattr(parts[0], "classes", None) or [f"{label:05d}" for label in range(max(labels[0]) + 1)]
        class_names = tuple(str(name if isinstance(name, str) else name[0]) for name in classes)
        names, middle = list(gathered.arrays), len(labels[0])
        train, test = (
            ImageSet(gathered.stack(mine), torch.tensor(own, dtype=torch.int64), len(class_names))
            for mine, own in ((names[:middle], labels[0]), (names[middle:], labels[1]))
        )
        return Whole(train, test, class_names)


# -- a user's own images -------------------------------------------------------------------------------------------------------


def stem(path: Path) -> str:
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
    """The folders and archives in ``folder`` that could be data sets, by the name that settings would use."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    usable = (e for e in entries if not e.name.startswith(".") and (e.is_dir() or e.name.lower().endswith(_ARCHIVE_SUFFIXES)))
    return list(dict.fromkeys(stem(entry) for entry in usable))


def _search(names: Sequence[str], roots: Sequence[Path]) -> Path | None:
    """The first folder NAME or archive NAME.tar, NAME.tar.xz, NAME.tar.gz below ``roots``."""
    for root in roots:
        for name in names:
            if (root / name).is_dir():
                return root / name
            for suffix in _ARCHIVE_SUFFIXES:
                if (root / f"{name}{suffix}").is_file():
                    return root / f"{name}{suffix}"
    return None


def _tiny_imagenet(request: Request) -> Whole:
    """Tiny-ImageNet as it is published, or as a folder or archive of classes.

    Raises:
        BadInput: it is not there; names where to unpack it.
    """
    root = _data_root()
    roots = [*([root] if root else []), request.cache / "data"]
    path = _search(["tiny-imagenet-200", request.source], roots)
    if path is None:
        places = " or ".join(str(place) for place in roots)
        unset = "" if root else f"{VARIABLE} is not set; "
        raise BadInput(f"tiny-imagenet: no folder tiny-imagenet-200; {unset}unpack tiny-imagenet-200.zip in {places}")
    return _stored(path, request, tiny=(path / "val" / "val_annotations.txt").is_file())


def _own(request: Request) -> Whole:
    """``folder:PATH``, or a bare NAME in ``$LEVELFIELD_DATA``."""
    path = _given_path(request.source) if request.source.startswith("folder:") else _named_path(request.source)
    return _stored(path, request)


def _given_path(source: str) -> Path:
    """The folder or archive of ``folder:PATH``.

    Raises:
        BadInput: there is none, with the nearest name beside it.
    """
    path = Path(source.removeprefix("folder:")).expanduser()
    if not path.exists():
        beside = [name for name in _names_in(path.parent) if difflib.get_close_matches(stem(path), [name], cutoff=0.5)]
        raise BadInput(f"{source}: no such folder or archive{nearest(stem(path), beside) if beside else ''}")
    return path


def _named_path(source: str) -> Path:
    """The folder or archive of a bare NAME.

    Raises:
        BadInput: there is none; names where it was looked for and the nearest name that exists.
    """
    if source in (".", "..") or "/" in source or "\\" in source:
        raise BadInput(f"dataset {source!r} is not a bare name; write 'folder:{source}' for a path")
    known = [known.name for known in DATASETS if ":" not in known.name]
    root = _data_root()
    if root is None:
        raise BadInput(
            f"unknown dataset {source!r}{nearest(source, known)}; {VARIABLE} is not set: set it to the folder that holds "
            f"{source}, or write folder:PATH"
        )
    path = _search([source], [root])
    if path is None:
        raise BadInput(f"unknown dataset {source!r}: neither {source} nor {source}.tar(.xz, .gz) is in {VARIABLE} = {root}"
                       f"{nearest(source, [*_names_in(root), *known])}")  # fmt: skip
    return path


def on_disk(source: str, cache: Path) -> Path | None:
    """The folder or archive with the images of a source on this machine; None for ``digits``, which come with scikit-learn.

    Raises:
        BadInput: they are not here; names what is missing.
    """
    known = source_of(source).load
    if known is _digits:
        return None
    if known is _own:
        return _given_path(source) if source.startswith("folder:") else _named_path(source)
    names = [known.folder] if isinstance(known, Release) else ["tiny-imagenet-200", source]
    root = _data_root()
    found = _search(names, [*([root] if root else []), cache / "data"])
    if found is None:
        raise BadInput(f"{source}: no {names[0]} in {VARIABLE} or {cache / 'data'}; run a matrix on it here first, or put it there")
    return found


def _stored(path: Path, request: Request, *, tiny: bool = False) -> Whole:
    """A folder or archive of images; ``tiny``: in the layout of Tiny-ImageNet."""
    if not (path.is_dir() or path.is_file()):
        raise BadInput(f"{request.source}: {path} is neither a folder nor a tar archive")

    def decode() -> Whole:
        found = read(path, request.source, request.size, request.progress, tiny_imagenet=tiny)
        if found.test is not None:
            return Whole(found.train, found.test, found.class_names)
        train, test = fifth(found.train, "folder-split", max(1, round(len(found.train) / 5)))
        if not len(test):
            raise BadInput(f"{path}: one image per class cannot be split into train and test; add images")
        return Whole(train, test, found.class_names)

    key = listing_key(path) if path.is_dir() else archive_key(path)
    return kept(cache_file(request.cache, key, request.size, tiny), request, decode)


DATASETS: tuple[Source, ...] = (
    Source(
        "digits",
        "scikit-learn's bundled handwritten digits, 16x16 grey, 10 classes, 1,438 / 359 images; no download (the default)",
        _digits,
    ),
    Source(
        "cifar10",
        "CIFAR-10 (Krizhevsky 2009), 32x32, 10 classes, 50,000 / 10,000 images; downloaded",
        Release("CIFAR10", "cifar-10-batches-py", (50_000, 10_000)),
    ),
    Source(
        "cifar100",
        "CIFAR-100 (Krizhevsky 2009), 32x32, 100 classes, 50,000 / 10,000 images; downloaded",
        Release("CIFAR100", "cifar-100-python", (50_000, 10_000)),
    ),
    Source(
        "gtsrb",
        "German traffic signs (Stallkamp et al. 2012), resized to 32x32, 43 classes, 26,640 / 12,630 images; downloaded",
        Release("GTSRB", "gtsrb", (26_640, 12_630), {"split": "train"}, {"split": "test"}, 32),
    ),
    Source(
        "fashion-mnist",
        "Fashion-MNIST (Xiao et al. 2017), 28x28 grey, 10 classes, 60,000 / 10,000 images; downloaded",
        Release("FashionMNIST", "FashionMNIST", (60_000, 10_000)),
    ),
    Source(
        "imagenette",
        "Imagenette, ten easy ImageNet classes, resized to 64x64, 9,469 / 3,925 images; downloaded",
        Release(
            "Imagenette", "imagenette2-160", (9_469, 3_925),
            {"split": "train", "size": "160px"}, {"split": "val", "size": "160px"}, 64,
        ),
    ),
    Source("tiny-imagenet", f"Tiny-ImageNet, 64x64, 200 classes: tiny-imagenet-200 unpacked in ${VARIABLE}", _tiny_imagenet),
    Source(
        "folder:PATH",
        f"your own images, a folder or tar of train/CLASS/* and test/CLASS/*; a bare NAME is looked for in ${VARIABLE}",
        _own,
    ),
)  # fmt: skip
"""In the order in which they are listed; the last one takes every name that no other has."""
