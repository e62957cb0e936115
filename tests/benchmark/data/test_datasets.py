"""Data by name: what is loaded, how it is split, and what is refused."""

from __future__ import annotations

import io
import lzma
import os
import struct
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.data import datasets, image_files, sources
from benchmark.data.datasets import Dataset, DatasetSpec, load, mean_std
from benchmark.data.decoded import Request, Whole
from benchmark.data.splits import split_budget, split_validation
from models.images import ImageSet
from models.spec import BadInput, digest


def picture(value: int, *, mode: str = "RGB", size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    """An image file whose pixels are told apart by ``value`` and by their place."""
    width, height = size
    ramp = (np.arange(width * height * 3) + value * 7) % 256
    pixels = ramp.astype(np.uint8).reshape(height, width, 3)
    out = io.BytesIO()
    grey = pixels[:, :, 0].astype(np.uint16) if mode == "I;16" else pixels[:, :, 0]
    (Image.fromarray(pixels) if mode == "RGB" else Image.fromarray(grey).convert(mode)).save(out, kind)
    return out.getvalue()


def pixels_of(value: int, size: tuple[int, int] = (8, 6)) -> np.ndarray:
    width, height = size
    return ((np.arange(width * height * 3) + value * 7) % 256).astype(np.uint8).reshape(height, width, 3).transpose(2, 0, 1)


def divided(train: int = 3, test: int = 1, classes: tuple[str, ...] = ("ant", "bee")) -> dict[str, bytes]:
    files = {}
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            for row in range(count):
                files[f"{part}/{name}/{row:03d}.png"] = picture(10 * label + row + 5 * (part == "test"))
    return files


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def tar(path: Path, files: dict[str, bytes], *, compression: str = "", extra: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra or []:
            archive.addfile(member, io.BytesIO(b"\0" * member.size) if member.size else None)
    return path


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$LEVELFIELD_DATA, an empty folder."""
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("LEVELFIELD_DATA", str(root))
    return root


@pytest.fixture
def get(tmp_path: Path) -> Callable[..., Dataset]:
    def get(source: str | Path, **settings: Any) -> Dataset:
        progress = settings.pop("progress", None)
        name = f"folder:{source}" if isinstance(source, Path) else source
        arguments = [progress] if progress else []
        return load(DatasetSpec(source=name, **settings), tmp_path / "cache", *arguments)

    return get


def refused(get: Callable[..., Dataset], source: str | Path, *words: str, **settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        get(source, **settings)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    return message


# -- digits --------------------------------------------------------------------------------------------------------------------


def test_digits_are_the_default_and_need_no_data(get: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEVELFIELD_DATA", raising=False)
    digits = get(DatasetSpec().source)
    assert (digits.name, len(digits.train), len(digits.test)) == ("digits", 1438, 359)
    assert digits.train.shape == digits.test.shape == (1, 16, 16)
    assert digits.class_names == tuple("0123456789")
    assert digits.fingerprint == digest(digits.train.fingerprint(), digits.test.fingerprint())
    assert get("digits").fingerprint == digits.fingerprint
    shares = torch.bincount(digits.test.labels) / torch.bincount(torch.cat([digits.train.labels, digits.test.labels]))
    assert float((shares - 0.2).abs().max()) < 0.006


def test_digits_pixels_are_scaled_then_interpolated(get: Callable[..., Dataset]) -> None:
    from sklearn.datasets import load_digits

    def enlarged(image: np.ndarray) -> np.ndarray:
        """Bilinear by hand, pixel centres aligned: output row r looks at input row (r + 0.5) / 2 - 0.5."""
        out = np.zeros((16, 16))
        for row in range(16):
            for column in range(16):
                y, x = min(max((row + 0.5) / 2 - 0.5, 0), 7), min(max((column + 0.5) / 2 - 0.5, 0), 7)
                top, left = int(y), int(x)
                below, right = min(top + 1, 7), min(left + 1, 7)
                a, b = y - top, x - left
                upper = (1 - b) * image[top, left] + b * image[top, right]
                out[row, column] = (1 - a) * upper + a * ((1 - b) * image[below, left] + b * image[below, right])
        return np.rint(out / 16 * 255).astype(np.uint8)

    raw, digits = load_digits(), get("digits")
    known = {image.tobytes() for image in torch.cat([digits.train.images, digits.test.images]).numpy()}
    assert all(enlarged(image).tobytes() in known for image in raw.images[:20])


def test_digits_at_another_size(get: Callable[..., Dataset]) -> None:
    assert get("digits", size=8).train.shape == (1, 8, 8)


# -- folders and archives ------------------------------------------------------------------------------------------------------


def test_folder_with_train_and_test(get: Callable[..., Dataset], tmp_path: Path) -> None:
    root = folder(tmp_path / "insects", divided() | {"train/notes.txt": b"", "README.md": b"", "train/ant/.hidden": b"x"})
    found = get(root)
    assert found.name == "folder:insects"
    assert found.class_names == ("ant", "bee")
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test.labels.tolist() == [0, 1]
    expected = [pixels_of(value) for value in (0, 1, 2, 10, 11, 12)]
    assert np.array_equal(found.train.images.numpy(), np.stack(expected))


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".tar.gz"])
def test_archives_hold_the_same_data_as_folders(get: Callable[..., Dataset], data: Path, suffix: str) -> None:
    files = dict(reversed(divided().items()))
    tar(data / f"insects{suffix}", {f"./wrapped/{name}": content for name, content in files.items()}, compression=suffix[5:])
    found = get("insects")
    assert found.name == "insects"
    assert found.fingerprint == get(folder(data / "plain", files)).fingerprint
    assert get(data / f"insects{suffix}").name == "folder:insects"
    assert sorted(path.name for path in data.iterdir()) == [f"insects{suffix}", "plain"]


def test_a_folder_stands_before_an_archive_of_the_same_name(get: Callable[..., Dataset], data: Path) -> None:
    tar(data / "twice.tar", divided(train=4))
    folder(data / "twice", divided(train=2))
    assert len(get("twice").train) == 4


def test_classes_alone_are_split_four_to_one(get: Callable[..., Dataset], tmp_path: Path) -> None:
    counts = {"ant": 10, "bee": 5, "cow": 1}
    files = {f"{name}/{row}.png": picture(row + 40 * label) for label, (name, n) in enumerate(counts.items()) for row in range(n)}
    found = get(folder(tmp_path / "flat", files))
    assert torch.bincount(found.test.labels, minlength=3).tolist() == [2, 1, 0]
    assert torch.bincount(found.train.labels, minlength=3).tolist() == [8, 4, 1]
    everything = torch.cat([found.train.images, found.test.images]).flatten(1).tolist()
    assert len({tuple(image) for image in everything}) == 16
    assert get(tar(tmp_path / "flat.tar", files)).fingerprint == found.fingerprint


def test_deeper_files_and_linked_folders_count(get: Callable[..., Dataset], tmp_path: Path) -> None:
    files = {"train/ant/images/a.png": picture(1), "test/ant/x/y/b.png": picture(2), "test/bee/c.png": picture(3)}
    root = folder(tmp_path / "deep", files)
    elsewhere = folder(tmp_path / "elsewhere", {"c.png": picture(4)})
    (root / "train" / "bee").symlink_to(elsewhere, target_is_directory=True)
    assert get(root).train.labels.tolist() == [0, 1]


def test_grey_sets_have_one_channel_and_mixed_ones_three(get: Callable[..., Dataset], tmp_path: Path) -> None:
    grey = {name: picture(row, mode="L") for row, name in enumerate(divided())}
    assert get(folder(tmp_path / "grey", grey)).train.shape == (1, 6, 8)
    mixed = get(folder(tmp_path / "mixed", grey | {"train/ant/000.png": picture(0)}))
    assert mixed.train.shape == mixed.test.shape == (3, 6, 8)
    assert torch.equal(mixed.train.images[1, 0], mixed.train.images[1, 2])


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)])
def test_all_kinds_of_eight_bits(get: Callable[..., Dataset], tmp_path: Path, mode: str, channels: int) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    files = {name.replace("png", kind.lower()): picture(row, mode=mode, kind=kind) for row, name in enumerate(divided())}
    assert get(folder(tmp_path / "set", files)).train.shape == (channels, 6, 8)


def test_palette_transparency_is_dropped(get: Callable[..., Dataset], tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(pixels_of(3).transpose(1, 2, 0)).quantize(8).save(out, "PNG", transparency=bytes([0, 128, 255]))
    files = divided() | {"train/ant/000.png": out.getvalue()}
    assert get(folder(tmp_path / "set", files)).train.shape == (3, 6, 8)


def test_size_resizes_everything(get: Callable[..., Dataset], tmp_path: Path) -> None:
    files = divided() | {"train/ant/000.png": picture(9, size=(20, 10))}
    found = get(folder(tmp_path / "set", files), size=16)
    assert found.train.shape == (3, 16, 16)
    by_hand = Image.fromarray(pixels_of(9, (20, 10)).transpose(1, 2, 0)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(found.train.images[0].numpy(), np.asarray(by_hand).transpose(2, 0, 1))


# -- the cache -----------------------------------------------------------------------------------------------------------------


def decoded(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "decoded").iterdir())


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources, "read", read)


@pytest.mark.parametrize("packed", [False, True])
def test_decoded_once(get: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    root = tar(tmp_path / "set.tar", divided()) if packed else folder(tmp_path / "set", divided())
    lines: list[str] = []
    first = get(root, progress=lines.append)
    assert "decoding" in lines[0]
    assert "6 + 2 images" in lines[-1]
    no_decoding(monkeypatch)
    lines.clear()
    again = get(root, progress=lines.append)
    assert (again.fingerprint, again.class_names, lines) == (first.fingerprint, first.class_names, [])
    again.train.images.zero_()
    assert get(root).fingerprint == first.fingerprint


def test_other_content_or_size_is_another_file(get: Callable[..., Dataset], tmp_path: Path) -> None:
    root = folder(tmp_path / "set", divided())
    first = get(root)
    assert get(root, size=16).train.shape == (3, 16, 16)
    folder(root, {"train/ant/000.png": picture(99)})
    assert get(root).fingerprint != first.fingerprint
    assert len(decoded(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "junk"])
def test_damaged_cache_is_decoded_again(get: Callable[..., Dataset], tmp_path: Path, damage: str) -> None:
    root = folder(tmp_path / "set", divided())
    first = get(root)
    (file,) = decoded(tmp_path)
    whole = file.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    file.write_bytes({"flip": flipped, "cut": whole[:-9], "empty": b"", "junk": b"{" * 50}[damage])
    lines: list[str] = []
    assert get(root, progress=lines.append).fingerprint == first.fingerprint
    assert str(file) in lines[0]
    assert "damaged" in lines[0]
    assert file.read_bytes() == whole


def test_damaged_class_names_are_noticed(get: Callable[..., Dataset], tmp_path: Path) -> None:
    root = folder(tmp_path / "set", divided())
    get(root)
    (file,) = decoded(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"ant", b"and"))
    assert get(root).class_names == ("ant", "bee")


def test_progress_counts_images(get: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "REPORT_EVERY", 4)
    lines: list[str] = []
    get(folder(tmp_path / "set", divided()), progress=lines.append)
    assert sum("4 images decoded" in line or "8 images decoded" in line for line in lines) == 2


# -- limits --------------------------------------------------------------------------------------------------------------------


def test_limits_are_balanced_nested_and_repeatable(get: Callable[..., Dataset]) -> None:
    small, large = get("digits", train_limit=100, test_limit=53), get("digits", train_limit=205)
    assert torch.bincount(small.train.labels).tolist() == [10] * 10
    counts = torch.bincount(small.test.labels)
    assert (int(counts.min()), int(counts.max()), int(counts.sum())) == (5, 6, 53)
    kept = {image.tobytes() for image in large.train.images.numpy()}
    assert all(image.tobytes() in kept for image in small.train.images.numpy())
    assert get("digits", train_limit=100, test_limit=53).fingerprint == small.fingerprint
    assert small.fingerprint != get("digits").fingerprint
    assert len(get("digits", train_limit=1438).train) == 1438


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_limit": 1439}, ("train_limit = 1439", "1438")),
        ({"train_limit": 9}, ("train_limit = 9", "10 (one per class)")),
        ({"test_limit": 360}, ("test_limit = 360", "359")),
        ({"train_limit": 1}, ("train_limit = 1", "at least 2")),
        ({"test_limit": 0}, ("test_limit = 0", "at least 1")),
        ({"size": 3}, ("size = 3", "between 4 and 1024")),
        ({"source": ""}, ("source",)),
        ({"source": "folder:"}, ("source",)),
        ({"source": "a\nb"}, ("source",)),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load(DatasetSpec(**settings), tmp_path)
    assert all(word in str(caught.value) for word in words)


# -- splits --------------------------------------------------------------------------------------------------------------------


def labelled(counts: list[int]) -> ImageSet:
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return ImageSet(torch.zeros((len(labels), 1, 2, 2), dtype=torch.uint8), labels, len(counts))


def filled(counts: list[int], total: int) -> list[int]:
    """One image of every class that has some left, class after class, until all are given out (sorted)."""
    given = [0] * len(counts)
    while sum(given) < total:
        lowest = min(have for have, limit in zip(given, counts, strict=True) if have < limit)
        given[next(c for c in range(len(counts)) if given[c] == lowest and given[c] < counts[c])] += 1
    return sorted(given)


@pytest.mark.parametrize("counts", [[50] * 10, [60, 7, 3, 30], [1, 1, 98]])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.1, 0.5])
def test_budget_is_balanced_disjoint_and_complete(counts: list[int], fraction: float) -> None:
    data = labelled(counts)
    attacker, budget = split_budget(data, fraction, 3)
    assert torch.equal(torch.cat([attacker, budget]).sort().values, torch.arange(len(data)))
    assert attacker.tolist() == sorted(attacker.tolist())
    assert budget.tolist() == sorted(budget.tolist())
    assert len(budget) == round(fraction * len(data))
    given = torch.bincount(data.labels[budget], minlength=len(counts)).tolist()
    assert sorted(given) == filled([n - 1 for n in counts], len(budget))
    assert set(data.labels[attacker].tolist()) == set(range(len(counts)))


def test_budget_depends_on_seed_and_labels_and_is_nested() -> None:
    data = labelled([40, 60])
    budget = split_budget(data, 0.1, 0)[1]
    again = ImageSet(torch.full_like(data.images, 9), data.labels, 2)
    assert torch.equal(split_budget(again, 0.1, 0)[1], budget)
    assert not torch.equal(split_budget(data, 0.1, 1)[1], budget)
    assert not torch.equal(split_budget(ImageSet(data.images, 1 - data.labels, 2), 0.1, 0)[1], budget)
    assert set(budget.tolist()) <= set(split_budget(data, 0.2, 0)[1].tolist())


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan"), 0.001, 0.995])
def test_budget_out_of_range(fraction: float) -> None:
    with pytest.raises(BadInput, match="fraction"):
        split_budget(labelled([50, 50]), fraction, 0)


def test_every_sample_is_as_likely() -> None:
    data = labelled([4, 4])
    times = torch.zeros(8)
    for seed in range(400):
        times[split_budget(data, 0.25, seed)[1]] += 1
    assert float((times / 400 - 0.25).abs().max()) < 0.08


@pytest.mark.parametrize("counts", [[25] * 10, [1, 1], [1] * 10, [2], [30, 10, 5]])
def test_validation_is_a_fifth_of_every_class(counts: list[int]) -> None:
    data = labelled(counts)
    fit, validation = split_validation(data, 0)
    assert torch.equal(torch.cat([fit, validation]).sort().values, torch.arange(len(data)))
    assert len(validation) == max(1, round(len(data) / 5))
    assert len(fit) > 0
    held = torch.bincount(data.labels[validation], minlength=len(counts))
    assert all(abs(int(h) - n / 5) <= 1 for h, n in zip(held, counts, strict=True))
    assert torch.equal(split_validation(data, 0)[1], validation)


def test_validation_of_next_to_nothing() -> None:
    assert [len(part) for part in split_validation(labelled([1]), 0)] == [1, 0]
    assert [len(part) for part in split_validation(labelled([0]), 0)] == [0, 0]
    assert [len(part) for part in split_validation(labelled([1, 1]), 0)] == [1, 1]


def test_mean_std_by_hand() -> None:
    images = torch.randint(0, 256, (50, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images[:, 2] = 51
    mean, std = mean_std(ImageSet(images, torch.zeros(50, dtype=torch.int64), 2))
    values = images.numpy().astype(np.float64) / 255
    assert mean == pytest.approx([values[:, c].mean() for c in range(3)], abs=1e-12)
    assert std == pytest.approx([values[:, 0].std(), values[:, 1].std(), 1e-3], abs=1e-12)


def test_mean_std_does_not_depend_on_order_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (5, 1, 2048, 2048), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(5, dtype=torch.int64)
    assert mean_std(ImageSet(images, labels, 2)) == mean_std(ImageSet(images.flip(0), labels, 2))
    with pytest.raises(ValueError, match="empty"):
        mean_std(ImageSet(images[:0], labels[:0], 2))


# -- what is refused -----------------------------------------------------------------------------------------------------------


def test_unknown_names(get: Callable[..., Dataset], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(data / "cifar10-q95.tar.xz", divided(), compression="xz")
    refused(get, "cifar10-q59", "'cifar10-q59'", "did you mean 'cifar10-q95'", f"LEVELFIELD_DATA = {data}")
    refused(get, "digit", "did you mean 'digits'")
    refused(get, "../secret", "folder:../secret")
    monkeypatch.delenv("LEVELFIELD_DATA")
    refused(get, "cifar10-q95", "LEVELFIELD_DATA is not set", "did you mean 'cifar10'", "folder:PATH")
    monkeypatch.setenv("LEVELFIELD_DATA", str(data / "nowhere"))
    refused(get, "cifar10-q95", "LEVELFIELD_DATA", "nowhere", "not a folder")


def test_missing_paths(get: Callable[..., Dataset], tmp_path: Path) -> None:
    folder(tmp_path / "insects", divided())
    refused(get, tmp_path / "insect", "no such folder or archive", "did you mean 'insects'")
    assert "there are" not in refused(get, tmp_path / "qqq", "no such folder or archive")
    refused(get, tmp_path / "no" / "such", "no such folder or archive")


FOLDERS: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "nothing": ({"readme.txt": b""}, ("holds no images", "train/CLASS/")),
    "one class": ({"ant/1.png": picture(1), "ant/2.png": picture(2)}, ("only one class", "'ant'")),
    "one image each": ({"ant/1.png": picture(1), "bee/2.png": picture(2)}, ("one image per class",)),
    "unknown test class": (divided() | {"test/bees/1.png": picture(1)}, ("'bees'", "not in train/", "did you mean 'bee'")),
    "no test": ({k: v for k, v in divided().items() if "test" not in k}, ("nothing in test/",)),
    "third part": (divided() | {"val/ant/1.png": picture(1)}, ("'val' is beside",)),
    "loose image": (divided() | {"train/1.png": picture(1)}, ("'train/1.png'", "outside a class folder")),
    "loose image, flat": ({"ant/1.png": picture(1), "2.png": picture(1)}, ("'2.png'", "outside a class folder")),
    "control character": (divided() | {"train/a\x1b[2J/1.png": picture(1)}, ("'a\\x1b[2J'", "rename")),
    "not an image": (divided() | {"train/ant/a.zip": b"PK"}, ("'train/ant/a.zip'", "not an image")),
    "no suffix": (divided() | {"train/ant/LICENSE": b""}, ("'train/ant/LICENSE'", "not an image")),
    "text as image": (divided() | {"train/ant/0.jpg": b"<html>"}, ("'train/ant/0.jpg'", "cannot be decoded", "not an image")),
    "empty image": (divided() | {"train/ant/0.jpg": b""}, ("'train/ant/0.jpg'", "cannot be decoded")),
    "cut png": (divided() | {"train/ant/0.png": picture(1)[:-40]}, ("'train/ant/0.png'", "cannot be decoded")),
    "cut jpeg": (divided() | {"test/ant/0.jpg": picture(1, kind="JPEG")[:-60]}, ("'test/ant/0.jpg'", "cannot be decoded")),
    "program as image": (divided() | {"test/ant/0.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, ("not an image",)),
    "16 bits": (divided() | {"train/ant/0.png": picture(1, mode="I;16")}, ("'train/ant/0.png'", "8 bits per channel")),
    "sizes differ": (
        divided() | {"train/bee/000.png": picture(1, size=(9, 9))},
        ("'train/bee/000.png' is 9 x 9", "8 x 6", "set 'size'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("packed", [False, True])
def test_refused_content(get: Callable[..., Dataset], tmp_path: Path, case: str, packed: bool) -> None:
    files, words = FOLDERS[case]
    refused(get, tar(tmp_path / "set.tar", files) if packed else folder(tmp_path / "set", files), *words)
    assert not (tmp_path / "cache" / "decoded").exists()


def test_empty_folders(get: Callable[..., Dataset], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(get, empty, "holds no images")
    root = folder(tmp_path / "set", divided())
    (root / "train" / "cow").mkdir()
    refused(get, root, "class folder 'train/cow' holds no images")
    member = tarfile.TarInfo("cow")
    member.type = tarfile.DIRTYPE
    files = {"ant/1.png": picture(1), "bee/1.png": picture(1)}
    refused(get, tar(tmp_path / "set.tar", files, extra=[member]), "class folder 'cow' holds no images")


def huge_png(width: int, height: int) -> bytes:
    """A PNG that says it is huge and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 5_001), (12_000, 12_000), (100_000, 100_000)])
def test_huge_images_are_refused_before_decoding(get: Callable[..., Dataset], tmp_path: Path, size: tuple[int, int]) -> None:
    root = folder(tmp_path / "set", divided() | {"train/ant/0.png": huge_png(*size)})
    refused(get, root, "'train/ant/0.png'", "50 megapixels")


def test_huge_files_and_sets_are_refused(get: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, packed = folder(tmp_path / "set", divided()), tar(tmp_path / "set.tar", divided())
    monkeypatch.setattr(image_files, "MAX_SET_BYTES", 1000)
    refused(get, root, "GiB of pixels", "size")
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 20)
    refused(get, root, "000.png", "larger than")
    refused(get, packed, "000.png", "larger than")


def test_odd_things_in_folders(get: Callable[..., Dataset], tmp_path: Path) -> None:
    root = folder(tmp_path / "set", divided())
    (root / "train" / "ant" / "broken.png").symlink_to(tmp_path / "gone")
    refused(get, root, "broken.png", "broken link")
    (root / "train" / "ant" / "broken.png").unlink()
    os.mkfifo(root / "train" / "ant" / "pipe.png")
    refused(get, root, "pipe.png", "neither a file nor a folder")
    (root / "train" / "ant" / "pipe.png").unlink()
    (root / "train" / "ant" / "loop").symlink_to(root, target_is_directory=True)
    refused(get, root, "loop", "leads back")


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="the superuser may read everything")
def test_unreadable_things(get: Callable[..., Dataset], tmp_path: Path) -> None:
    root, packed = folder(tmp_path / "set", divided()), tar(tmp_path / "set.tar", divided())
    packed.chmod(0)
    refused(get, packed, "cannot be read")
    (root / "train" / "ant").chmod(0)
    refused(get, root, "cannot be read")
    (root / "train" / "ant").chmod(0o755)


@pytest.mark.parametrize("name", ["/etc/ant/1.png", "../ant/1.png", "train/../../1.png"])
def test_members_that_point_outside(get: Callable[..., Dataset], tmp_path: Path, name: str) -> None:
    refused(get, tar(tmp_path / "set.tar", divided() | {name: picture(1)}), repr(name), "outside the archive")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files(get: Callable[..., Dataset], tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("train/ant/odd.png")
    member.type, member.linkname = kind, "/etc/hostname"
    refused(get, tar(tmp_path / "set.tar", divided(), extra=[member]), "'train/ant/odd.png'", "link or a device")


def test_the_same_member_twice(get: Callable[..., Dataset], tmp_path: Path) -> None:
    member = tarfile.TarInfo("train/ant/000.png")
    member.size = 10
    with tarfile.open(tar(tmp_path / "set.tar", divided()), "a") as archive:
        archive.addfile(member, io.BytesIO(b"\0" * 10))
    refused(get, tmp_path / "set.tar", "'train/ant/000.png'", "twice")


@pytest.mark.parametrize("compression", ["", "xz", "gz"])
def test_an_archive_cut_anywhere_is_refused(get: Callable[..., Dataset], tmp_path: Path, compression: str) -> None:
    path = tar(tmp_path / "set.tar", divided(), compression=compression)
    whole = path.read_bytes()
    content = len(whole) if compression else max(i for i, b in enumerate(whole) if b) + 1
    for keep in sorted({0, 3, content // 3, content // 2, content // 512 * 512, content - 20, content - 1}):
        path.write_bytes(whole[:keep])
        refused(get, path, str(path), "not a whole tar archive")


@pytest.mark.parametrize("compression", ["", "xz", "gz"])
def test_a_flipped_byte_is_noticed(get: Callable[..., Dataset], tmp_path: Path, compression: str) -> None:
    path = tar(tmp_path / "set.tar", divided(), compression=compression)
    whole = bytearray(path.read_bytes())
    header = whole.find(b"train/bee/001.png") if not compression else len(whole) // 2
    whole[header] ^= 0x55
    path.write_bytes(bytes(whole))
    refused(get, path)


def test_what_is_no_archive(get: Callable[..., Dataset], tmp_path: Path) -> None:
    for content in (b"PK\x03\x04 a zip file" * 100, b"text", lzma.compress(b"text" * 1000)):
        (tmp_path / "set.tar.xz").write_bytes(content)
        refused(get, tmp_path / "set.tar.xz", "not a whole tar archive")
    refused(get, Path("/dev/null"), "neither a folder nor a tar archive")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BadInput, match="cannot be written"):
        load(DatasetSpec(source=f"folder:{folder(tmp_path / 'set', divided())}"), tmp_path / "cache")


# -- releases that torchvision knows -------------------------------------------------------------------------------------------


class Release:
    """Stands in for a class of torchvision.datasets: ``online`` says whether a download works."""

    folder, online, mode, image_size, train_count = "cifar-10-batches-py", True, "RGB", (8, 8), 6
    classes: Any = ("plane", "car")
    calls: list[tuple[str, bool]] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, root: str, download: bool, train: bool | None = None, split: str = "", size: str = "") -> None:
        self.calls.append((root, download))
        self.train = split == "train" if train is None else train
        path = Path(root) / self.folder
        if not path.is_dir():
            if not download:
                raise RuntimeError("Dataset not found")
            if not self.online:
                raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")
            folder(path, {"data": b"1"})

    def __len__(self) -> int:
        return self.train_count if self.train else 4

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if (Path(self.calls[-1][0]) / self.folder / "broken").exists():
            raise OSError("image file is truncated")
        with Image.open(io.BytesIO(picture(index + 50 * self.train, mode=self.mode, size=self.image_size))) as image:
            return image.copy(), index % 2


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> type[Release]:
    class Fake(Release):
        calls: list[tuple[str, bool]] = []  # noqa: RUF012

    releases = [source for source in sources.DATASETS if isinstance(source.load, sources.Release)]
    names = {source.load.loader: Fake for source in releases}
    module = SimpleNamespace(datasets=SimpleNamespace(**names))
    monkeypatch.setitem(sys.modules, "torchvision", module)  # type: ignore[arg-type]
    small = [replace(source, load=replace(source.load, counts=(6, 4))) for source in releases]
    monkeypatch.setattr(sources, "DATASETS", (*small, sources.DATASETS[-1]))
    monkeypatch.delenv("LEVELFIELD_DATA", raising=False)
    return Fake


def test_downloaded_once_into_the_cache(get: Callable[..., Dataset], release: type[Release], tmp_path: Path) -> None:
    lines: list[str] = []
    found = get("cifar10", progress=lines.append)
    assert (found.name, len(found.train), len(found.test), found.class_names) == ("cifar10", 6, 4, ("plane", "car"))
    assert found.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert np.array_equal(found.train.images[3].numpy(), pixels_of(53, (8, 8)))
    assert release.calls == [(str(tmp_path / "cache" / "data"), True)] * 2
    assert "downloading" in lines[0]
    assert get("cifar10").fingerprint == found.fingerprint
    assert len(release.calls) == 2


def test_a_release_at_hand_is_used_without_download(get: Callable[..., Dataset], release: type[Release], data: Path) -> None:
    folder(data / "cifar-10-batches-py", {"data": b"1"})
    get("cifar10")
    assert release.calls == [(str(data), False)] * 2


def test_downloads_go_where_the_data_is(get: Callable[..., Dataset], release: type[Release], data: Path) -> None:
    get("cifar10")
    assert release.calls == [(str(data), True)] * 2


def test_sizes_and_class_names_of_releases(get: Callable[..., Dataset], release: type[Release]) -> None:
    release.folder, release.classes, release.image_size = "imagenette2-160", [("tench", "Tinca tinca"), ("church",)], (20, 30)
    imagenette = get("imagenette")
    assert (imagenette.train.shape, imagenette.class_names) == ((3, 64, 64), ("tench", "church"))
    assert get("imagenette", size=16).train.shape == (3, 16, 16)
    release.folder, release.classes = "gtsrb", None
    gtsrb = get("gtsrb")
    assert (gtsrb.train.shape, gtsrb.class_names) == ((3, 32, 32), ("00000", "00001"))
    release.folder, release.mode, release.classes = "FashionMNIST", "L", ["shirt", "bag"]
    assert get("fashion-mnist").train.shape == (1, 30, 20)


def test_failed_downloads(get: Callable[..., Dataset], release: type[Release], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release.online = False
    refused(get, "cifar10", "cannot be downloaded", "name resolution", "cifar-10-batches-py", str(data))
    monkeypatch.delenv("LEVELFIELD_DATA")
    refused(get, "cifar10", "cannot be downloaded", "LEVELFIELD_DATA", "cache/data")


def test_broken_and_incomplete_releases(get: Callable[..., Dataset], release: type[Release], data: Path) -> None:
    lines: list[str] = []
    folder(data / "cifar-10-batches-py", {"broken": b""})
    refused(get, "cifar10", "image file is truncated", "put the official release", progress=lines.append)
    assert "not usable" in lines[0]
    (data / "cifar-10-batches-py" / "broken").unlink()
    release.train_count = 5
    refused(get, "cifar10", "5 + 4 images instead of 6 + 4", "remove it and try again")


# -- Tiny-ImageNet -------------------------------------------------------------------------------------------------------------


def tiny(root: Path, annotations: bytes = b"v0.JPEG\tn02\t0\t0\t1\t1\nv1.JPEG\tn01\t0\t0\t1\t1\n") -> Path:
    return folder(
        root / "tiny-imagenet-200",
        {
            "train/n01/images/a.JPEG": picture(1, kind="JPEG"), "train/n01/n01_boxes.txt": b"",
            "train/n02/images/b.JPEG": picture(2, kind="JPEG"), "train/n02/n02_boxes.txt": b"",
            "val/images/v0.JPEG": picture(3, kind="JPEG", mode="L"), "val/images/v1.JPEG": picture(4, kind="JPEG"),
            "val/val_annotations.txt": annotations, "test/images/t.JPEG": b"unlabelled", "wnids.txt": b"n01\nn02\n",
        },
    )  # fmt: skip


def test_tiny_imagenet_as_published(get: Callable[..., Dataset], data: Path) -> None:
    tiny(data)
    found = get("tiny-imagenet")
    assert (found.name, found.class_names, found.train.shape) == ("tiny-imagenet", ("n01", "n02"), (3, 6, 8))
    assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 1]
    assert torch.equal(found.test.images[1, 0], found.test.images[1, 1])
    assert not torch.equal(found.test.images[0, 0], found.test.images[0, 1])


def test_tiny_imagenet_in_class_folders(get: Callable[..., Dataset], data: Path) -> None:
    tar(data / "tiny-imagenet.tar", divided())
    assert get("tiny-imagenet").class_names == ("ant", "bee")


def test_tiny_imagenet_refused(get: Callable[..., Dataset], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(get, "tiny-imagenet", "unpack tiny-imagenet-200.zip", str(data))
    tiny(data, b"v0.JPEG n02\n")
    refused(get, "tiny-imagenet", "val_annotations.txt", "line 1")
    tiny(data, b"gone.JPEG\tn02\n")
    refused(get, "tiny-imagenet", "gone.JPEG", "cannot be read")
    tiny(data, b"v0.JPEG\tn03\nv1.JPEG\tn01\n")
    refused(get, "tiny-imagenet", "'n03'", "not in train/")
    monkeypatch.delenv("LEVELFIELD_DATA")
    refused(get, "tiny-imagenet", "LEVELFIELD_DATA is not set")


def test_every_name_is_listed_once_with_a_line_about_it() -> None:
    names = [source.name for source in sources.DATASETS]
    assert len(set(names)) == len(names)
    assert names[-1] == "folder:PATH", "it takes every other name"
    assert all(source.about and "\n" not in source.about for source in sources.DATASETS)


def test_a_source_is_one_function_and_one_entry(get: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    def stripes(request: Request) -> Whole:
        images = torch.arange(16, dtype=torch.uint8).repeat(8, 1, 16, 1)
        part = ImageSet(images[:, :, : request.size, : request.size], torch.arange(8) % 2, 2)
        return Whole(part, part.subset(torch.arange(2)), ("even", "odd"))

    monkeypatch.setattr(sources, "DATASETS", (sources.Source("stripes", "stripes, two classes", stripes), *sources.DATASETS))
    found = get("stripes", size=8, train_limit=4)
    assert (found.name, found.train.shape, len(found.train), len(found.test)) == ("stripes", (1, 8, 8), 4, 2)


def test_the_original_of_a_copy_holds_the_same_images_in_the_same_order(
    get: Callable[..., Dataset], release: type[Release], data: Path, tmp_path: Path
) -> None:
    """A copy as it is made: a folder for each class, images numbered in the release's order."""
    original = get("cifar10")
    for part, images in (("train", original.train), ("test", original.test)):
        seen: Counter[int] = Counter()
        for image, label in zip(images.images, images.labels.tolist(), strict=True):
            path = data / "cifar10-q95" / part / f"{label}" / f"{seen[label]:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            seen[label] += 1
    for limits in ({}, {"train_limit": 4, "test_limit": 2}):
        copy = get("cifar10-q95", **limits)
        found = datasets.load_original(DatasetSpec("cifar10-q95", **limits), tmp_path / "cache")
        assert found is not None
        assert found.name == "cifar10"
        assert found.fingerprint == copy.fingerprint
    assert datasets.load_original(DatasetSpec("cifar10"), tmp_path / "cache") is None
