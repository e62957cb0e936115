"""The zoo: one file of weights per victim, each with a card. A file is checked against its card before anything is read from it.

``NAME.safetensors`` holds the network (``net.*``, float16) and what its trigger cannot be computed from again (``trigger.*``);
``NAME.json``, the card, says what the victim is and what was measured on it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from benchmark.storage.files import write_bytes, write_text
from models.spec import BadInput, nearest

__all__ = ["LIMIT", "VARIABLE", "Card", "by_key", "closed", "home", "names", "packed", "part", "read_card", "size_of", "write"]

VARIABLE = "LEVELFIELD_ZOO"
"""Names another folder; empty = no victim is taken from a zoo."""
LIMIT = 12_000_000
"""Bytes that all files of weights of a zoo may have together: it is part of the repository."""
_FIELDS: Mapping[str, type] = {
    "attack_label": str, "backbone_label": str, "dataset": dict, "key": str, "licence": str, "manifest": dict, "measured": dict,
    "revision": int, "scenario": dict, "sha256": str, "training": dict, "trigger": str,
}  # fmt: skip
_COSTS = ("seconds", "samples_forward", "samples_backward", "train_size")
"""Numbers of a card's ``training`` that the rows of a run need."""
_MOST = 2**20
"""Bytes of the largest card that is read."""


@dataclass(frozen=True)
class Card:
    """A card as it was read.

    Attributes:
        name: of the victim.
        path: of the card.
        content: its fields; README.md of the zoo explains them.
    """

    name: str
    path: Path
    content: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        """The file of weights."""
        return self.path.with_suffix(".safetensors")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, after its content was checked.

        Raises:
            BadInput: the file is missing, or is not the one that the card describes.
        """
        try:
            content = self.weights.read_bytes()
        except OSError as error:
            raise BadInput(f"{self.weights}: cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(content).hexdigest() != self.content["sha256"]:
            raise BadInput(
                f"{self.weights}: damaged, or not the file of its card: its sha256 is not the one in {self.path.name}; "
                "nothing of it was used"
            )
        try:
            found: dict[str, Tensor] = load(content)
        except SafetensorError as error:
            raise BadInput(f"{self.weights}: not a safetensors file: {error}") from error
        return found


def home() -> Path:
    """The folder of the zoo: ``$LEVELFIELD_ZOO``, or ``results/zoo`` of this project."""
    given = os.environ.get(VARIABLE, "")
    return Path(given) if given else Path(__file__).parents[2] / "results" / "zoo"


@contextmanager
def closed() -> Iterator[None]:
    """Inside, this process and those that it starts find no victim by its key: they train."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def names(folder: Path) -> list[str]:
    """The victims of a zoo, by name."""
    return sorted(path.stem for path in folder.glob("*.json"))


def read_card(folder: Path, name: str) -> Card:
    """The card of a victim.

    Raises:
        BadInput: there is no such victim (with the nearest name), or its card is not one.
    """
    path = folder / f"{name}.json"
    if name not in names(folder):
        raise BadInput(f"{folder}: no victim {name!r} there{nearest(name, names(folder))}")
    try:
        if path.stat().st_size > _MOST:
            raise BadInput(f"{path}: larger than {_MOST // 2**20} MiB; no card is")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: cannot be read: {error}") from error
    for field, kind in _FIELDS.items():
        if not isinstance(content, dict) or not isinstance(content.get(field), kind):
            raise BadInput(f"{path}: not a card of the zoo: {field!r} is missing, or is no {kind.__name__}")
    if odd := [cost for cost in _COSTS if not isinstance(content["training"].get(cost), int | float)]:
        raise BadInput(f"{path}: not a card of the zoo: training: {odd[0]!r} is missing, or is no number")
    return Card(name, path, content)


def by_key(key: str, report: Callable[[str], None] = lambda line: None, folder: Path | None = None) -> Card | None:
    """The card of the victim with this key; None where the zoo has none, or is closed.

    Args:
        key: of the victim.
        report: called with one line for each card that cannot be read.
        folder: of the zoo; None = :func:`home`, unless it is closed.
    """
    if folder is None and os.environ.get(VARIABLE) == "":
        return None
    folder = folder or home()
    for name in names(folder):
        try:
            card = read_card(folder, name)
        except BadInput as error:
            report(f"left out: {error}")
            continue
        if card.content["key"] == key:
            return card
    return None


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors called ``prefix.*``, without the prefix."""
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """A file of weights; equal tensors give equal bytes."""
    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def size_of(folder: Path, new: Mapping[str, int]) -> int:
    """Bytes of all files of weights in ``folder`` once those of ``new`` (bytes by name) are there."""
    kept = (path for path in folder.glob("*.safetensors") if path.stem not in new)
    return sum(path.stat().st_size for path in kept) + sum(new.values())


def write(folder: Path, name: str, content: Mapping[str, Any], weights: bytes) -> None:
    """Writes a victim's file and its card, to which the file's sha256 is added.

    Raises:
        BadInput: the folder cannot be written.
    """
    card = {**content, "sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    write_bytes(folder / f"{name}.safetensors", weights)
    write_text(folder / f"{name}.json", json.dumps(card, indent=1, sort_keys=True, allow_nan=False) + "\n")
