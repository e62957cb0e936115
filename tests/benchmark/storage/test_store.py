"""The store: whole or absent, checked when read, damaged entries named and set aside."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmark.storage.files import held, write_bytes
from benchmark.storage.store import Busy, Store, sweep_store
from models.files import ATTEMPTS
from models.spec import BadInput

KEY = "ab" + "0" * 62


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(tmp_path / "store", said.append)


def fill(store: Store) -> None:
    store.write("victim", KEY, {"name": "x"}, {"acc": 0.5, "none": None}, {"w": torch.arange(6.0).view(2, 3)})


def test_round_trip(store: Store) -> None:
    assert store.read("victim", KEY) is None
    fill(store)
    entry = store.read("victim", KEY)
    assert entry is not None
    assert entry.outcome == {"acc": 0.5, "none": None}
    assert torch.equal(entry.tensors["w"], torch.arange(6.0).view(2, 3))
    assert store.has("victim", KEY)
    assert not store.has("defended", KEY)


def test_the_first_writer_wins_and_nothing_is_left_behind(store: Store) -> None:
    fill(store)
    store.write("victim", KEY, {}, {"acc": 0.9})
    entry = store.read("victim", KEY)
    assert entry is not None
    assert entry.outcome["acc"] == 0.5
    assert [path.name for path in store.folder("victim", KEY).parent.iterdir()] == [KEY]


@pytest.mark.parametrize("file", ["entry.json", "tensors.safetensors"])
def test_a_flipped_byte_is_named_set_aside_and_recomputable(store: Store, said: list[str], file: str) -> None:
    fill(store)
    path = store.folder("victim", KEY) / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert store.read("victim", KEY) is None
    assert len(said) == 1
    assert f"victim/{KEY[:12]}" in said[0]
    assert "set aside" in said[0]
    assert len(list((store.root / "damaged").rglob("entry.json"))) == 1
    fill(store)
    assert store.read("victim", KEY) is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"content": 3, "sha256": "x"}', b"\xff\xfe"])
def test_nonsense_in_place_of_an_entry(store: Store, said: list[str], content: bytes) -> None:
    fill(store)
    (store.folder("victim", KEY) / "entry.json").write_bytes(content)
    assert store.read("victim", KEY) is None
    assert len(said) == 1


def test_an_entry_moved_to_another_key_is_refused(store: Store, said: list[str]) -> None:
    fill(store)
    other = "ab" + "1" * 62
    store.folder("victim", KEY).rename(store.folder("victim", other))
    assert store.read("victim", other) is None
    assert "another key" in said[0]


def test_missing_tensors_are_noticed(store: Store, said: list[str]) -> None:
    fill(store)
    (store.folder("victim", KEY) / "tensors.safetensors").unlink()
    assert store.read("victim", KEY) is None
    assert len(said) == 1


def test_a_folder_without_its_entry_does_not_stand_in_the_way_of_a_new_one(store: Store, said: list[str]) -> None:
    fill(store)
    (store.folder("victim", KEY) / "entry.json").unlink()
    assert store.read("victim", KEY) is None
    assert len(said) == 1
    fill(store)
    assert store.read("victim", KEY) is not None


def test_an_entry_that_cannot_be_read_is_one_clear_error_and_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)

    def bad(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", bad)
        with pytest.raises(BadInput, match=r"entry\.json: cannot be read: Input/output error"):
            store.read("victim", KEY)
    assert store.read("victim", KEY) is not None


def test_a_damaged_entry_that_cannot_be_set_aside_is_one_clear_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    (store.folder("victim", KEY) / "entry.json").write_text("{")
    (store.root / "damaged").write_text("a file where a folder should be")
    with pytest.raises(BadInput, match="the store cannot be written"):
        store.read("victim", KEY)


def test_full_disk_is_one_clear_error_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="the disk is full"):
        fill(store)
    monkeypatch.undo()
    assert store.read("victim", KEY) is None
    assert list(store.folder("victim", KEY).parent.iterdir()) == []


def test_entries_are_plain_json_for_people(store: Store) -> None:
    fill(store)
    content = json.loads((store.folder("victim", KEY) / "entry.json").read_text())["content"]
    assert content["stage"] == "victim"
    assert content["spec"] == {"name": "x"}


# -- runs that share a store ---------------------------------------------------------------------------------------------------

LOCK = f"victim-{KEY}"


def test_a_stage_that_stands_is_not_computed_again(store: Store) -> None:
    computed: list[int] = []

    def compute() -> None:
        computed.append(1)
        assert (store.root / "locks" / LOCK).exists()
        fill(store)

    store.once("victim", KEY, compute)
    store.once("victim", KEY, compute)
    assert computed == [1]
    assert list((store.root / "locks").iterdir()) == []


def test_a_stage_that_another_run_computes_is_waited_for_and_read(store: Store) -> None:
    waiter = threading.Thread(target=store.once, args=("victim", KEY, lambda: pytest.fail("computed twice")), daemon=True)
    with held(store.root / "locks" / LOCK):
        with pytest.raises(Busy):
            Store(store.root, patient=False).once("victim", KEY, lambda: fill(store))
        waiter.start()
        waiter.join(0.5)
        assert waiter.is_alive()
        fill(store)
    waiter.join(60)
    assert not waiter.is_alive()


def test_a_computation_that_fails_frees_its_stage(store: Store) -> None:
    def fails() -> None:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        store.once("victim", KEY, fails)
    Store(store.root, patient=False).once("victim", KEY, lambda: fill(store))
    assert store.has("victim", KEY)


def test_the_lock_of_a_killed_process_is_free_at_once(store: Store) -> None:
    path = store.root / "locks" / LOCK
    program = f"""
import sys, time
from pathlib import Path
from benchmark.storage.files import held
with held(Path({str(path)!r})):
    print("held", flush=True)
    time.sleep(3600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with held(path, wait=False) as mine:
        assert not mine
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.exists(), "it was left behind, and must not matter"
    Store(store.root, patient=False).once("victim", KEY, lambda: fill(store))
    assert store.has("victim", KEY)
    assert not path.exists()


def unknown(descriptor: int, operation: int) -> None:
    """What ``flock`` says on a file system that knows no locks."""
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_without_locks_the_work_is_done_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", unknown)
    store.once("victim", KEY, lambda: fill(store))
    assert store.has("victim", KEY)


def test_a_folder_that_cannot_hold_locks_is_one_clear_error(store: Store) -> None:
    store.root.write_text("a file where the folder should be")
    with pytest.raises(BadInput, match="cannot be locked"):
        store.once("victim", KEY, lambda: fill(store))


def test_a_damaged_entry_is_set_aside_by_one_of_two_readers(store: Store, said: list[str]) -> None:
    fill(store)
    folder = store.folder("victim", KEY)
    (folder / "entry.json").write_text("{")
    seen = folder.stat().st_ino
    assert store.read("victim", KEY) is None
    store._set_aside(folder, seen, "the second to see the damage")
    fill(store)
    store._set_aside(folder, seen, "the second, late: a good one stands there by now")
    assert store.read("victim", KEY) is not None
    assert len(said) == 1


# -- what killed writers leave -------------------------------------------------------------------------------------------------


def left_behind(store: Store, hours: float) -> list[Path]:
    """What a writer leaves that is killed while it writes, so many hours ago."""
    half = store.root / "victim" / KEY[:2] / f".{KEY}-abcdefgh"
    half.mkdir(parents=True)
    (half / "tensors.safetensors").write_bytes(b"half of")
    lock = store.root / "locks" / LOCK
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    place = store.root / "damaged" / f"{KEY[:12]}-abcdefgh"
    place.mkdir(parents=True)
    then = time.time() - hours * 3600
    for path in (half, lock, place):
        os.utime(path, (then, then))
    return [half, lock, place]


def test_what_a_killed_writer_left_goes_when_the_store_is_opened(store: Store) -> None:
    fill(store)
    left = left_behind(store, 2)
    Store(store.root)  # this process has opened it before
    assert all(path.exists() for path in left)
    program = f"from pathlib import Path; from benchmark.storage.store import Store; Store(Path({str(store.root)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
    assert not any(path.exists() for path in left)
    assert store.read("victim", KEY) is not None


def test_what_may_have_a_living_owner_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    young = left_behind(store, 0.5)
    sweep_store(store.root)
    assert all(path.exists() for path in young)
    shutil.rmtree(store.root)
    half, lock, place = left_behind(store, 2)
    (place / KEY).mkdir()
    with held(lock):  # filelock leaves the age of a lock alone
        sweep_store(store.root)
        assert half.exists()
        assert lock.exists()
    monkeypatch.setattr("fcntl.flock", unknown)
    sweep_store(store.root)
    assert half.exists(), "without locks, nobody knows"
    monkeypatch.undo()
    sweep_store(store.root)
    assert not half.exists()
    assert (place / KEY).exists(), "a damaged entry is kept for people"


def test_a_store_that_cannot_be_written_is_not_swept_and_can_be_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    left_behind(store, 2)

    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.open", refused)
    sweep_store(store.root)
    monkeypatch.undo()
    assert store.read("victim", KEY) is not None


def test_a_writer_whose_folder_is_swept_writes_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[str] = []
    rename = Path.rename

    def raced(self: Path, target: Path) -> Path:
        if len(swept) < times:
            swept.append(self.name)
            shutil.rmtree(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", raced)
    times = ATTEMPTS - 1
    fill(store)
    assert len(swept) == times
    assert store.read("victim", KEY) is not None
    times, other = 99, "cd" + KEY[2:]
    with pytest.raises(BadInput, match="cannot be written"):
        store.write("victim", other, {}, {})
    assert list(store.folder("victim", other).parent.iterdir()) == []


def test_temporary_files_of_killed_writers_go_when_their_folder_is_written(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".rows.csv.abc.tmp", ".rows.csv.def.tmp", ".notes"))
    for path in (old, young, other):
        path.write_text("half of")
    for path in (old, other):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert write_bytes(tmp_path / "rows.csv", b"whole")
    assert not write_bytes(tmp_path / "rows.csv", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([young.name, other.name, "rows.csv"])


def test_a_file_that_is_swept_before_it_has_its_name_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[str] = []
    replace = Path.replace

    def raced(self: Path, target: Path) -> Path:
        if len(swept) < times:
            swept.append(self.name)
            self.unlink()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", raced)
    times = ATTEMPTS - 1
    assert write_bytes(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    times = 99
    with pytest.raises(BadInput, match="cannot be written"):
        write_bytes(tmp_path / "a", b"more")
    assert (tmp_path / "a").read_bytes() == b"whole"
