"""Decoded images, kept in ``<cache>/decoded`` and checked by their hash whenever they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import safetensors
import safetensors.torch
from torch import Tensor

from benchmark.data.image_files import DECODER_REVISION
from benchmark.storage.files import replaced, sweep
from models.images import ImageSet
from models.room import limit
from models.spec import canonical, digest

__all__ = ["Request", "Whole", "cache_file", "kept"]


class Request(NamedTuple):
    """What a source is asked for.

    Attributes:
        source: its name in the settings.
        size: resize to ``size`` x ``size`` pixels; None = the source's own size.
        cache: folder for decoded images and downloads.
        progress: called with a line of text now and then.
    """

    source: str
    size: int | None
    cache: Path
    progress: Callable[[str], None]


@dataclass(frozen=True)
class Whole:
    """All of a source, before limits."""

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]

    def content(self) -> str:
        return digest(self.train.fingerprint(), self.test.fingerprint(), self.class_names)


def kept(path: Path, request: Request, decode: Callable[[], Whole]) -> Whole:
    """The images in ``path``, or those of ``decode``, then saved there. A damaged file is reported and made again."""
    if path.is_file():
        sweep(path.parent)
        try:
            return _read(path)
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            request.progress(f"{request.source}: {path} is damaged ({error}); decoding again")
    whole = decode()
    tensors = {
        "train_images": whole.train.images, "train_labels": whole.train.labels,
        "test_images": whole.test.images, "test_labels": whole.test.labels,
    }  # fmt: skip
    # One entry, because safetensors writes several in no fixed order.
    metadata = {"set": canonical({"class_names": whole.class_names, "content": whole.content()})}
    with replaced(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)
    request.progress(f"{request.source}: {len(whole.train):,} + {len(whole.test):,} images decoded and kept")
    return whole


def _read(path: Path) -> Whole:
    """Images as :func:`kept` saves them.

    Raises:
        ValueError: the content differs from the recorded hash. KeyError, TypeError, OSError, SafetensorError: the file is damaged.
    """
    with safetensors.safe_open(path, framework="pt") as stored:
        metadata = json.loads(stored.metadata()["set"])
        tensors = {name: _own(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    names = tuple(metadata["class_names"])
    train = ImageSet(tensors["train_images"], tensors["train_labels"], len(names))
    test = ImageSet(tensors["test_images"], tensors["test_labels"], len(names))
    whole = Whole(train, test, names)
    if whole.content() != metadata["content"]:
        raise ValueError("its content does not match the recorded hash")
    return whole


def _own(mapped: Tensor) -> Tensor:
    """A copy, because a mapped tensor changes with its file. What may not fit into memory stays mapped: the file is only ever
    replaced, never written into."""
    return mapped if mapped.nbytes > limit() else mapped.clone()


def cache_file(cache: Path, *key: Any) -> Path:
    """Where images are kept that ``key`` (plain values) determines."""
    # Another Pillow may decode a JPEG to other pixels: those are other data, with another fingerprint.
    return cache / "decoded" / f"{digest(*key, DECODER_REVISION, PIL.__version__)}.safetensors"
