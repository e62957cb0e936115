"""Images in folders and tar archives, decoded in memory.

Layout: ``train/CLASS/*`` and ``test/CLASS/*``, or ``CLASS/*`` alone. Classes and files are in the order of their names. Files
below a class folder may lie deeper. Hidden files and ``.txt``, ``.csv``, ``.md`` are skipped; anything else that is not an image is
an error. An archive may wrap everything in one folder. Archives are read in memory: nothing is ever extracted to disk.

Pixels: 8-bit; transparency is dropped, EXIF orientation ignored, of an animation the first frame is taken. A set whose files are
all grey-scale has one channel; one colour file makes it RGB, and its grey images are repeated over the channels. ``size`` squeezes
the whole image to a square (bilinear, as Pillow does it), without a crop.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from models.images import ImageSet
from models.room import limit, room
from models.spec import BadInput, nearest

__all__ = ["Found", "Gathered", "archive_key", "listing_key", "pixels", "read"]

DECODER_REVISION = 1
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 256 * 2**20
MAX_SET_BYTES = 256 * 2**30
"""Pixels of a set. They need not fit into memory (:mod:`models.room`), only on the disk."""
MAX_RATIO = 20
MAX_UNPACKED = 8 * 2**30
"""An archive may unpack to MAX_RATIO times its size, or to MAX_UNPACKED bytes if that is more: images are packed already."""
CHUNK = 64 * 2**20
"""Bytes of file taken at a time for decoded images that do not fit into memory."""
MAX_MEMBERS = 2_000_000
MAX_DEPTH = 64
REPORT_EVERY = 5000

_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_SKIPPED_SUFFIXES = frozenset({".txt", ".csv", ".md"})
# Named, so that Pillow never tries formats that start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
_EIGHT_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


@dataclass(frozen=True)
class Found:
    """The images of a folder or archive; without train/ and test/, ``train`` holds everything and ``test`` is None."""

    train: ImageSet
    test: ImageSet | None
    class_names: tuple[str, ...]


def read(root: Path, source: str, size: int | None, progress: Callable[[str], None], *, tiny_imagenet: bool = False) -> Found:
    """Reads and decodes all images of a folder or tar archive in the layout above.

    Args:
        root: folder or archive.
        source: the name of the set in messages.
        size: resize to ``size`` x ``size`` pixels; None = as they are.
        progress: called with a line of text now and then.
        tiny_imagenet: the folder has the official layout of Tiny-ImageNet.

    Raises:
        BadInput: a file, member or class is wrong; names it and what to do.
    """
    wrapped = not root.is_dir()
    entries = _archive(root) if wrapped else _tiny_imagenet(root) if tiny_imagenet else _folder(root)
    progress(f"{source}: decoding {root}")
    gathered, folders = Gathered(source, progress), []
    with warnings.catch_warnings():
        # Refused below, at a lower bound than the one Pillow warns at.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for name, read in entries:
            what = f"{root.name}: {name!r}"
            suffix = PurePosixPath(name).suffix.lower()
            if read is None:
                folders.append(name)
            elif suffix in _IMAGE_SUFFIXES:
                if name in gathered.arrays:
                    raise BadInput(f"{what} is there twice; pack the archive again")
                gathered.add(name, _image(read(), size, what), what)
            elif suffix not in _SKIPPED_SUFFIXES:
                raise BadInput(f"{what} is not an image ({', '.join(sorted(_IMAGE_SUFFIXES))}); remove it")
    return _arrange(gathered, folders, root, wrapped)


# -- reading files -------------------------------------------------------------------------------------------------------------

_Entry = tuple[str, Callable[[], bytes] | None]
"""Name relative to the root, with slashes, and how to read it; None = a folder."""


def _walk(root: Path) -> Iterator[tuple[str, Path | None]]:
    """Everything visible below ``root``, sorted: (relative name, path), path None for a folder. Links are followed.

    Raises:
        BadInput: a folder cannot be read, contains itself through a link, or holds something that is neither file nor folder.
    """

    def below(folder: Path, prefix: str, above: frozenset[Path]) -> Iterator[tuple[str, Path | None]]:
        if len(above) >= MAX_DEPTH:
            raise BadInput(f"{root}: folders lie more than {MAX_DEPTH} deep within each other; move the images up")
        real = folder.resolve()
        if real in above:
            raise BadInput(f"{folder}: a link leads back to a folder above it; remove the link")
        try:
            entries = [(e, e.is_dir(), e.is_file()) for e in sorted(folder.iterdir()) if not e.name.startswith(".")]
        except OSError as error:
            raise BadInput(f"{folder}: cannot be read: {error.strerror or error}") from error
        for entry, is_folder, is_file in entries:
            name = prefix + entry.name
            if is_folder:
                yield name, None
                yield from below(entry, f"{name}/", above | {real})
            elif is_file:
                yield name, entry
            else:
                raise BadInput(f"{str(entry)!r} is neither a file nor a folder (a broken link or a device); remove it")

    return below(root, "", frozenset())


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise BadInput(f"{str(path)!r} is larger than {MAX_FILE_BYTES // 2**20} MiB; remove it or save it smaller")
            return path.read_bytes()
        except OSError as error:
            raise BadInput(f"{str(path)!r} cannot be read: {error.strerror or error}") from error

    return read


def _folder(root: Path) -> Iterator[_Entry]:
    for name, path in _walk(root):
        yield name, _reader(path) if path else None


def _tiny_imagenet(root: Path) -> Iterator[_Entry]:
    """The official layout: the labels of ``val`` are in a file, and ``test``, which has none, is left out.

    Raises:
        BadInput: a line of val_annotations.txt is not ``file<TAB>class<TAB>...``.
    """
    for name, path in _walk(root / "train"):
        yield f"train/{name}", _reader(path) if path else None
    annotations = root / "val" / "val_annotations.txt"
    for number, line in enumerate(annotations.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        columns = line.split("\t")
        if len(columns) < 2 or "/" in columns[0] + columns[1]:
            raise BadInput(f"{annotations}: line {number} does not start with file<TAB>class; unpack the archive again")
        yield f"test/{columns[1]}/{columns[0]}", _reader(root / "val" / "images" / columns[0])


def _archive(path: Path) -> Iterator[_Entry]:
    """The members of a tar archive, in one pass: each must be read before the next one is asked for.

    Raises:
        BadInput: the archive is damaged, cut off, unpacks to far more than it is, or holds links, devices, absolute names or names
            with ``..``.
    """
    with _whole(path), path.open("rb") as file, _unpacked(file, path) as content, tarfile.open(None, "r:", content) as archive:
        for number, member in enumerate(archive):
            if number >= MAX_MEMBERS:
                raise BadInput(f"{path}: more than {MAX_MEMBERS:,} members; leave out what is no image")
            parts = PurePosixPath(member.name).parts
            if member.name.startswith("/") or ".." in parts:
                raise BadInput(f"{path}: member {member.name!r} points outside the archive; pack it again with relative names")
            if not (member.isdir() or member.isfile()):
                raise BadInput(f"{path}: member {member.name!r} is a link or a device; pack plain files and folders")
            if member.size < 0:  # the reader would go backwards, and on for ever
                raise BadInput(f"{path}: member {member.name!r} claims {member.size} bytes; pack it again")
            if member.size > MAX_FILE_BYTES:
                raise BadInput(f"{path}: member {member.name!r} is larger than {MAX_FILE_BYTES // 2**20} MiB; leave it out")
            if parts and not any(part.startswith(".") for part in parts):
                yield "/".join(parts), None if member.isdir() else _member_reader(path, archive, member)
        # tarfile takes a cut or broken header for the end; the real end is a block of zeros. Reading on checks the checksums.
        content.seek(archive.offset)
        end = content.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise EOFError("the end-of-archive mark is missing")
        while content.read(2**20):
            pass


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turns everything that reading a damaged archive raises into one BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
        raise BadInput(f"{path}: not a whole tar archive (plain, .xz or .gz): {error}; copy or pack it again") from error


class _Bounded(io.BufferedReader):
    """Reads an archive's content, up to ``limit`` bytes, and never more than one file's worth at once, whatever headers claim."""

    def __init__(self, raw: Any, path: Path, limit: int) -> None:
        super().__init__(raw, 2**20)
        self.path, self.limit = path, limit

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_FILE_BYTES + tarfile.BLOCKSIZE:
            raise BadInput(f"{self.path}: not a whole tar archive: a header claims a size out of range; copy or pack it again")
        content = super().read(size)
        if self.tell() > self.limit:
            raise BadInput(f"{self.path}: unpacks to more than {self.limit / 2**30:.3g} GiB; leave out what is no image")
        return content


def _unpacked(file: BinaryIO, path: Path) -> _Bounded:
    magic = file.read(6)
    most = max(MAX_RATIO * file.seek(0, io.SEEK_END), MAX_UNPACKED)
    file.seek(0)
    raw: Any = file
    if magic == b"\xfd7zXZ\0":
        raw = lzma.open(file)  # noqa: SIM115 - closed by the reader around it
    elif magic[:2] == b"\x1f\x8b":
        raw = gzip.open(file)  # noqa: SIM115
    return _Bounded(raw, path, most)


def _member_reader(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        with _whole(path):
            content = archive.extractfile(member)
            assert content is not None
            return content.read()

    return read


def listing_key(folder: Path) -> str:
    """sha256 (hex) over relative names, sizes and times of change of everything below a folder."""
    content = hashlib.sha256()
    for name, path in _walk(folder):
        if path is not None:
            status = path.stat()
            content.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="backslashreplace"))
        else:
            content.update(f"{name}/\n".encode(errors="backslashreplace"))
    return content.hexdigest()


def archive_key(path: Path) -> str:
    """sha256 (hex) of the archive's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error


# -- decoding ------------------------------------------------------------------------------------------------------------------


def pixels(image: Image.Image, size: int | None, what: str) -> np.ndarray:
    """uint8 (H, W) for grey-scale files, (H, W, 3) for all others."""
    if image.width * image.height > MAX_PIXELS:
        found = f"{image.width} x {image.height} pixels, more than {MAX_PIXELS // 10**6} megapixels"
        raise BadInput(f"{what} has {found}; remove it or save it smaller")
    if image.mode not in _EIGHT_BIT:
        raise BadInput(f"{what} has pixels of kind {image.mode!r}; save it with 8 bits per channel")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _image(content: bytes, size: int | None, what: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            return pixels(image, size, what)
    except BadInput:
        raise
    except Image.DecompressionBombError as error:
        raise BadInput(f"{what} has more than {MAX_PIXELS // 10**6} megapixels; remove it or save it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error) as error:
        reason = "it is not an image" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
        raise BadInput(f"{what} cannot be decoded: {reason}; replace or remove it") from error


class Gathered:
    """Images by name, of one size, while they are being decoded."""

    def __init__(self, source: str, progress: Callable[[str], None]) -> None:
        self.source, self.progress = source, progress
        self.arrays: dict[str, np.ndarray] = {}
        self.first = ""
        self.bytes = 0
        self.left: np.ndarray = np.empty(0, dtype=np.uint8)

    def add(self, name: str, array: np.ndarray, what: str) -> None:
        if not self.arrays:
            self.first = what
        height, width = next(iter(self.arrays.values()), array).shape[:2]
        if array.shape[:2] != (height, width):
            raise BadInput(
                f"{self.source}: images differ in size: {self.first} is {width} x {height}, {what} is {array.shape[1]} x "
                f"{array.shape[0]} pixels; set 'size', e.g. size = {32 if min(height, width) < 64 else 64}, to resize all of them"
            )
        self.bytes += 3 * height * width
        self.arrays[name] = array if self.bytes <= limit() else self._mapped(array)
        if self.bytes > MAX_SET_BYTES:
            most = f"{MAX_SET_BYTES / 2**30:.3g} GiB of pixels"
            raise BadInput(f"{self.source}: more than {most}; set a smaller 'size', or use fewer images")
        if len(self.arrays) % REPORT_EVERY == 0:
            self.progress(f"{self.source}: {len(self.arrays):,} images decoded")

    def _mapped(self, array: np.ndarray) -> np.ndarray:
        """A copy in a file: what is decoded beyond the limit need not fit into memory."""
        if self.left.size < array.nbytes:
            self.left = room((max(CHUNK, array.nbytes),), mapped=True).numpy()
        spot, self.left = self.left[: array.nbytes].reshape(array.shape), self.left[array.nbytes :]
        spot[...] = array
        return spot

    def stack(self, names: list[str]) -> Tensor:
        """uint8 (N, C, H, W), C = 3 when any image of the whole set is in colour."""
        height, width = next(iter(self.arrays.values())).shape[:2]
        channels = 3 if any(array.ndim == 3 for array in self.arrays.values()) else 1
        found = room((len(names), channels, height, width))
        stacked = found.numpy()
        for row, name in enumerate(names):
            array = self.arrays[name]
            stacked[row] = array.transpose(2, 0, 1) if array.ndim == 3 else array
        return found


_Paths = dict[str, tuple[str, ...]]
"""The parts of an image's path below the root, by the image's name."""
_Members = dict[tuple[str, ...], list[str]]
"""Names of images by class folder: (class,) or (train or test, class)."""
_PARTS = {"train", "test"}


def _arrange(gathered: Gathered, folders: list[str], root: Path, wrapped: bool) -> Found:
    """Images by name -> train, test and the class names."""
    paths = {name: PurePosixPath(name).parts for name in sorted(gathered.arrays)}
    below = [PurePosixPath(name).parts for name in folders]
    if wrapped:
        paths, below = _unwrapped(paths, below)
    if not paths:
        raise BadInput(f"{root}: holds no images; put them in train/CLASS/ and test/CLASS/")
    divided = _divided(paths, below, root)
    members = _members(paths, below, 2 if divided else 1, root)
    classes = _classes(members, divided, root)

    def part(*prefix: str) -> ImageSet:
        chosen = [(label, name) for label, c in enumerate(classes) for name in members.get((*prefix, c), [])]
        labels = torch.tensor([label for label, _ in chosen], dtype=torch.int64)
        return ImageSet(gathered.stack([name for _, name in chosen]), labels, len(classes))

    return Found(part("train"), part("test"), classes) if divided else Found(part(), None, classes)


def _unwrapped(paths: _Paths, below: list[tuple[str, ...]]) -> tuple[_Paths, list[tuple[str, ...]]]:
    """The paths without the one folder that an archive may wrap everything in."""
    tops = {path[0] for path in paths.values()}
    if len(tops) != 1 or tops & _PARTS or any(len(path) < 3 for path in paths.values()):
        return paths, below
    return {name: path[1:] for name, path in paths.items()}, [path[1:] for path in below if path[0] in tops]


def _divided(paths: _Paths, below: list[tuple[str, ...]], root: Path) -> bool:
    """Whether the images are divided into train/ and test/.

    Raises:
        BadInput: there is one of the two, or something beside them.
    """
    tops = {path[0] for path in paths.values()}
    if not {path[0] for path in [*paths.values(), *below] if path} & _PARTS:
        return False
    if tops != _PARTS:
        missing, extra = sorted(_PARTS - tops), sorted(tops - _PARTS)
        advice = f"nothing in {missing[0]}/; both parts need images" if missing else "move or remove it"
        raise BadInput(f"{root}: {f'{extra[0]!r} is beside train/ and test/; ' if extra else ''}{advice}")
    return True


def _members(paths: _Paths, below: list[tuple[str, ...]], depth: int, root: Path) -> _Members:
    """The images of every class folder.

    Raises:
        BadInput: an image outside the class folders, or a class folder without images or with a name that cannot be printed.
    """
    members: _Members = {path[:depth]: [] for path in below if len(path) == depth}
    for name, path in paths.items():
        if len(path) <= depth:
            raise BadInput(f"{root}: {name!r} lies outside a class folder; move it into one")
        members.setdefault(path[:depth], []).append(name)
    for owner, names in members.items():
        if not owner[-1].isprintable():
            raise BadInput(f"{root}: class name {owner[-1]!r} has characters that cannot be printed; rename the folder")
        if not names:
            raise BadInput(f"{root}: class folder {'/'.join(owner)!r} holds no images; fill or remove it")
    return members


def _classes(members: _Members, divided: bool, root: Path) -> tuple[str, ...]:
    """The names of the classes, in label order.

    Raises:
        BadInput: test/ has a class that train/ has not, or there is one class only.
    """
    classes = tuple(sorted({owner[-1] for owner in members if not divided or owner[0] == "train"}))
    for owner in members:
        if owner[-1] not in classes:
            raise BadInput(f"{root}: class {owner[-1]!r} of test/ is not in train/{nearest(owner[-1], classes)}")
    if len(classes) < 2:
        raise BadInput(f"{root}: only one class ({classes[0]!r}); a classifier needs at least two")
    return classes
