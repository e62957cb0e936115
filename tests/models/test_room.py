"""Images that do not fit into memory: the same images, in a file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from attacks.badnets import BadNets
from attacks.base import Plan, poison, poison_test
from benchmark.data.datasets import DatasetSpec, load
from models.images import Batches, ImageSet
from models.room import copied, limit, room, taken
from models.spec import BadInput

ROOT = Path(__file__).resolve().parents[2]


def mapped(images: torch.Tensor) -> bool:
    """Whether the array lies in one of the files."""
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "levelfield-images-" in line]
    inside = [tuple(int(end, 16) for end in span[0].split("-")) for span in spans]
    return any(low <= images.data_ptr() < high for low, high in inside)


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc on this system")


def some(size: int = 300, seed: int = 0) -> ImageSet:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 20, 24), generator=draw).to(torch.uint8)
    return ImageSet(images, torch.randint(0, 10, (size,), generator=draw), 10)


@needs_proc
def test_what_is_in_files_is_what_would_be_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data, index = some(), torch.randperm(300, generator=torch.Generator().manual_seed(1))[:200]
    mask = data.labels > 4
    plan, attack = Plan(target=1, rate=0.3), BadNets()
    crafted = attack.craft(data, plan, 0)

    def everything() -> list[torch.Tensor]:
        poisoned = poison(data, attack, crafted, plan, 0)
        batches = [list(Batches(poisoned.visible, 64, 3, crop=crop, flip=True)) for crop in (0, 2)]
        return [
            data.subset(index).images, data.subset(mask).images, copied(data.images), taken(data.images, index),
            poisoned.visible.images, poison_test(data, crafted, plan).images,
            *(part for epoch in batches for batch in epoch for part in batch),
        ]  # fmt: skip

    monkeypatch.setenv("LEVELFIELD_IN_MEMORY", "100")
    small = everything()
    assert not any(mapped(one) for one in small)
    monkeypatch.setenv("LEVELFIELD_IN_MEMORY", "0")
    large = everything()
    assert all(mapped(one) for one in large[:6])
    assert len(small) == len(large)
    assert all(torch.equal(one, other) for one, other in zip(small, large, strict=True))
    assert [one.stride() for one in small] == [one.stride() for one in large]
    assert list(tmp_path.iterdir()) == []  # the files have no name: they go with their owner


def test_steps_of_a_copy_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    import models.room

    data, index = some(), torch.arange(299, -1, -1)
    whole = [one[0] for one in Batches(data, 50, 0, crop=3)]
    monkeypatch.setenv("LEVELFIELD_IN_MEMORY", "0")
    monkeypatch.setattr(models.room, "STEP", 7 * 3 * 20 * 24)
    assert torch.equal(taken(data.images, index), data.images.flip(0))
    assert all(torch.equal(one[0], other) for one, other in zip(Batches(data, 50, 0, crop=3), whole, strict=True))


@needs_proc
def test_a_decoded_set_beyond_the_limit_is_the_same_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for number in range(5):
                grey = name == "a"
                pixels = draw.integers(0, 256, (24, 30) if grey else (24, 30, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{number}.png")
    spec = DatasetSpec(source=f"folder:{tmp_path / 'set'}")
    here = load(spec, tmp_path / "small")
    monkeypatch.setenv("LEVELFIELD_IN_MEMORY", "0")
    decoded, kept = load(spec, tmp_path / "large"), load(spec, tmp_path / "large")
    assert mapped(decoded.train.images)
    assert here.fingerprint == decoded.fingerprint == kept.fingerprint
    assert torch.equal(here.train.images, kept.train.images)
    # Read again, it is the kept file itself that is mapped.
    file = str(next((tmp_path / "large" / "decoded").iterdir()))
    assert file in Path("/proc/self/maps").read_text()


LIMITED = """
import re, resource, sys
from pathlib import Path
from benchmark.data.datasets import DatasetSpec, load, mean_std
from benchmark.data.splits import split_budget
from attacks.badnets import BadNets
from attacks.base import Plan, poison, poison_test
from models.images import Batches

def own():  # memory that belongs to this process alone
    return int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

source, cache, room = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) * 2**20
spec = DatasetSpec(source=source)
load(DatasetSpec(source="digits"), cache)  # what libraries keep for themselves
before = own()
_, most = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (before + room, most))
load(spec, cache)
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
data = load(spec, cache)  # the kept file is mapped in a way that counts, though its pages are the file's
resource.setrlimit(resource.RLIMIT_DATA, (max(own(), before) + room, most))
attacker, budget = split_budget(data.train, 0.05, 0)
train = data.train.subset(attacker)
mean_std(train)
attack, plan = BadNets(), Plan(target=0, rate=0.02)
crafted = attack.craft(train, plan, 0)
poisoned = poison(train, attack, crafted, plan, 0)
triggered = poison_test(data.test, crafted, plan)
seen = sum(len(labels) for _, labels, _ in Batches(poisoned.visible, 8, 0, crop=4, flip=True))
print(poisoned.visible.images.numel() // 2**20, seen)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind are Linux's")
def test_a_set_larger_than_what_a_process_may_have_is_decoded_poisoned_and_batched(tmp_path: Path) -> None:
    """80 MiB of images in a process that may take 48 MiB more; without files it does not even decode them."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (128, 512, 3), dtype=np.uint8)
    for part, count in (("train", 240), ("test", 12)):
        for name in ("a", "b"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.roll(noise, number, axis=1)[:, :].repeat(2, axis=0)[:256, :256]
                PIL.Image.fromarray(pixels + np.uint8(number)).save(tmp_path / "set" / part / name / f"{number}.bmp")
    command = [sys.executable, "-c", LIMITED, f"folder:{tmp_path / 'set'}"]

    def run(cache: str, in_memory: str) -> subprocess.CompletedProcess[str]:
        # What is freed goes back to the system at once: what the allocator keeps for later differs from run to run.
        heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        env = os.environ | heap | {"LEVELFIELD_IN_MEMORY": in_memory, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, str(tmp_path / cache), "48"], env=env, capture_output=True, text=True, timeout=600)

    done = run("files", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["85", "456"]
    assert run("memory", "4096").returncode != 0


@pytest.mark.parametrize("said", ["much", "-1", "1.5", "9" * 30])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("LEVELFIELD_IN_MEMORY", said)
    with pytest.raises(BadInput, match="LEVELFIELD_IN_MEMORY"):
        limit()


def test_without_a_setting_it_is_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEVELFIELD_IN_MEMORY", raising=False)
    assert 2**20 < limit() < 2**45


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files cannot be allocated here")
def test_a_full_disk_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BadInput, match=r"no room for .* GiB of images: the disk is full; set TMPDIR"):
        room((10, 10), mapped=True)
    assert list(tmp_path.iterdir()) == []
