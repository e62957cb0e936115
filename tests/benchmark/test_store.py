"""The store: whole or absent, checked when read, damaged entries named and set aside."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from benchmark.store import Store
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


def test_full_disk_is_one_clear_error_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: object, *rest: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
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
