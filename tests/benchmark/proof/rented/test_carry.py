"""What is carried to a rented machine: parts within the limit, the same bytes joined, damage refused by name."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from benchmark.proof.rented import carry
from benchmark.proof.rented.carry import CODE, IMAGES, MIB, SUMS, Wheels, cut, deliver, joined, pack, pins, unpacked, wheels
from benchmark.settings.load import FOLDER, load_matrix
from models.spec import BadInput, generator

ROOT = Path(__file__).parents[4]


def noise(size: int, *key: int) -> bytes:
    """Bytes that no compression makes smaller."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator("carry", *key)).numpy().tobytes()


def parted(folder: Path, content: bytes, limit: int, name: str = IMAGES) -> list[str]:
    """An archive in parts, one a transfer, with its list of parts; the paths of the parts."""
    folder.mkdir()
    (folder / name).write_bytes(content)
    paths = []
    for number, part in enumerate(cut(folder / name, limit), 1):
        (folder / f"transfer-{number}").mkdir()
        part.rename(folder / f"transfer-{number}" / part.name)
        paths.append(f"transfer-{number}/{part.name}")
    sums = [f"{hashlib.sha256((folder / path).read_bytes()).hexdigest()}  {path}\n" for path in paths]
    (folder / "transfer-1" / SUMS).write_text("".join(sums))
    return paths


@pytest.mark.parametrize(("size", "limit", "parts"), [(1, 10, 1), (10, 10, 1), (11, 10, 2), (95, 10, 10)])
def test_parts_are_within_the_limit_and_join_to_the_same_bytes(size: int, limit: int, parts: int, tmp_path: Path) -> None:
    content = noise(size)
    paths = parted(tmp_path / "pack", content, limit)
    assert len(paths) == parts
    assert all((tmp_path / "pack" / path).stat().st_size <= limit for path in paths)
    assert joined(tmp_path / "pack", IMAGES, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == content
    assert not joined(tmp_path / "pack", CODE, tmp_path / "none")


def test_a_damaged_part_is_refused_by_name(tmp_path: Path) -> None:
    paths = parted(tmp_path / "pack", noise(40), 10)
    part = tmp_path / "pack" / paths[2]
    content = bytearray(part.read_bytes())
    content[3] ^= 1
    part.write_bytes(content)
    with pytest.raises(BadInput, match=r"transfer-3/images\.tar\.002: damaged"):
        joined(tmp_path / "pack", IMAGES, tmp_path / "whole")
    part.unlink()
    with pytest.raises(BadInput, match=r"transfer-3/images\.tar\.002: cannot be read.*carry this part, too"):
        joined(tmp_path / "pack", IMAGES, tmp_path / "whole")


def test_a_list_of_parts_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="SHA256SUMS: cannot be read"):
        joined(tmp_path, IMAGES, tmp_path / "whole")
    parted(tmp_path / "pack", noise(4), 10)
    (tmp_path / "pack" / "transfer-1" / SUMS).write_text(f"{'0' * 64}  ../../secret\n")
    with pytest.raises(BadInput, match="is not a hash and a part"):
        joined(tmp_path / "pack", IMAGES, tmp_path / "whole")


def test_unpacking_leaves_whole_folders_only(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "one.bin").write_bytes(noise(5000))
    with tarfile.open(tmp_path / "made.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    paths = parted(tmp_path / "pack", (tmp_path / "made.tar").read_bytes(), 4096)
    good = (tmp_path / "pack" / paths[-1]).read_bytes()
    (tmp_path / "pack" / paths[-1]).write_bytes(b"?")
    with pytest.raises(BadInput, match="damaged"):
        unpacked(tmp_path / "pack", IMAGES, tmp_path / "work" / "data")
    assert not list((tmp_path / "work").iterdir())
    (tmp_path / "pack" / paths[-1]).write_bytes(good)
    assert unpacked(tmp_path / "pack", IMAGES, tmp_path / "work" / "data")
    assert (tmp_path / "work" / "data" / "set" / "one.bin").read_bytes() == noise(5000)
    assert not unpacked(tmp_path / "pack", CODE, tmp_path / "work" / "code")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small git checkout with a matrix on images of 3 MiB, which are in ``LEVELFIELD_DATA``."""
    root = tmp_path / "checkout"
    (root / "results" / "mine").mkdir(parents=True)
    settings = (FOLDER / "smoke.toml").read_text().replace('source = "digits"', 'source = "flowers"')
    (root / "mine.toml").write_text(settings)
    (root / "code.py").write_text("a = 1\n")
    (root / "hidden.toml").write_text(settings)
    (root / ".gitignore").write_text("hidden.toml\n/runs/\n")
    (root / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    for name in ("rows.csv", "cells.csv", "README.md"):
        (root / "results" / "mine" / name).write_text("text\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    images = tmp_path / "data" / "flowers"
    images.mkdir(parents=True)
    for number in range(3):
        (images / f"{number}.bin").write_bytes(noise(MIB, number))
    monkeypatch.setenv("LEVELFIELD_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(carry, "ROOT", root)
    return root


def test_what_is_packed_fits_its_transfers_and_comes_out_whole(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    transfers, notes = pack(load_matrix(checkout / "mine.toml"), out, limit=1, wanted=None, cache=tmp_path / "cache")
    assert len(transfers) == 4
    for name, parts in transfers.items():
        files = list((out / name).iterdir())
        assert sum(file.stat().st_size for file in files) <= MIB
        assert {part.path for part in parts} == {f"{name}/{file.name}" for file in files if file.name not in ("go.sh", SUMS)}
    assert notes == [f"the rows in {checkout / 'results' / 'mine'} are packed: what they hold is not run again"]
    assert unpacked(out, IMAGES, tmp_path / "data-there")
    for number in range(3):
        assert (tmp_path / "data-there" / "flowers" / f"{number}.bin").read_bytes() == noise(MIB, number)
    assert unpacked(out, CODE, tmp_path / "code-there")
    there = tmp_path / "code-there"
    files = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    own = (".gitignore", "code.py", "constraints.txt", "mine.toml", "runs/mine/cells.csv", "runs/mine/rows.csv")
    assert files == {f"checkout/{name}" for name in own}
    script = (out / "transfer-1" / "go.sh").read_text()
    assert "go --matrix 'mine.toml'" in script
    subprocess.run(["bash", "-n", str(out / "transfer-1" / "go.sh")], check=True)
    checked = subprocess.run(["sha256sum", "--check", "--quiet", f"transfer-1/{SUMS}"], cwd=out, check=False)
    assert checked.returncode == 0


def test_your_own_rows_are_packed_before_the_committed_ones(checkout: Path, tmp_path: Path) -> None:
    (checkout / "runs" / "mine").mkdir(parents=True)
    (checkout / "runs" / "mine" / "rows.csv").write_text("newer\n")
    pack(load_matrix(checkout / "mine.toml"), tmp_path / "pack", limit=60, wanted=None, cache=tmp_path)
    assert unpacked(tmp_path / "pack", CODE, tmp_path / "there")
    assert (tmp_path / "there" / "checkout" / "runs" / "mine" / "rows.csv").read_text() == "newer\n"


def test_what_cannot_be_packed_is_named(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def packing(name: str) -> None:
        pack(load_matrix(checkout / name), tmp_path / "pack", limit=60, wanted=None, cache=tmp_path)

    with pytest.raises(BadInput, match=r"hidden\.toml: not carried: .* or git ignores it"):
        packing("hidden.toml")
    (checkout / "path.toml").write_text((checkout / "mine.toml").read_text().replace('"flowers"', '"folder:flowers"'))
    with pytest.raises(BadInput, match="'folder:flowers': a path here is none there"):
        packing("path.toml")
    (checkout / "known.toml").write_text((checkout / "mine.toml").read_text().replace('"flowers"', '"cifar10"'))
    with pytest.raises(BadInput, match="cifar10: no cifar-10-batches-py in LEVELFIELD_DATA"):
        packing("known.toml")
    monkeypatch.delenv("LEVELFIELD_DATA")
    with pytest.raises(BadInput, match="LEVELFIELD_DATA is not set"):
        packing("mine.toml")


def test_wheels_are_those_of_the_tested_versions() -> None:
    found = pins((ROOT / "constraints.txt").read_text())
    assert [line.partition("==")[0] for line in found] == [
        "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions",
    ]  # fmt: skip
    assert set(found) <= set((ROOT / "constraints.txt").read_text().splitlines())


def test_wheels_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def refused(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", refused)
    note = wheels(Wheels("3.13"), tmp_path / "wheels", ROOT)
    assert "no matching distribution" in note
    assert "pydantic_core==" in note
    assert "for Python 3.13" in note
    assert commands[0][commands[0].index("--python-version") + 1] == "3.13"


def test_wheels_that_were_brought_are_taken(tmp_path: Path) -> None:
    (tmp_path / "brought").mkdir()
    assert "holds no wheel" in wheels(Wheels(folder=tmp_path / "brought"), tmp_path / "none", ROOT)
    (tmp_path / "brought" / "one.whl").write_bytes(b"wheel")
    assert wheels(Wheels(folder=tmp_path / "brought"), tmp_path / "wheels", ROOT) == ""
    assert (tmp_path / "wheels" / "one.whl").read_bytes() == b"wheel"


def test_what_comes_back_in_parts_joins_to_the_same_files(tmp_path: Path) -> None:
    results, out = tmp_path / "runs", tmp_path / "out"
    (results / "mine").mkdir(parents=True)
    (results / "mine" / "rows.csv").write_bytes(noise(5 * MIB // 2))
    for _ in range(2):  # the second call replaces the parts of the first
        deliver(results, out, 1)
    parts = sorted(out.iterdir())
    assert [part.name for part in parts] == [f"back.tar.gz.{number:03}" for number in range(3)]
    (tmp_path / "whole").write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(tmp_path / "whole") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    assert (tmp_path / "there" / "mine" / "rows.csv").read_bytes() == noise(5 * MIB // 2)
    deliver(results, tmp_path / "plain", 0)
    assert (tmp_path / "plain" / "mine" / "rows.csv").read_bytes() == noise(5 * MIB // 2)
