"""An entry: a defense in one file, run on the matrix of entries, with a card that says whose it is and what it was tuned on.

``<results>/entries/<name>/`` holds the rows of a run of that matrix (with the plug-in, its hash and the manifest, as every run) and
``card.json``. Whoever receives it computes a random tenth of its rows again (:func:`check`); the card then says so.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmark.analysis import stats
from benchmark.proof.verify import Checked, confirmed, verify
from benchmark.rules.tracks import TRACKS, Track
from benchmark.run.progress import notes
from benchmark.run.session import run_matrix
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.settings.plugins import load_plugins
from benchmark.storage.files import write_text
from benchmark.storage.rows import Row, read
from defenses.base import Defense
from models.spec import BadInput

__all__ = ["CARD", "ENTRIES", "SHARE", "Claim", "check", "enter", "narrowest", "read_card", "settings_of"]

ENTRIES, CARD = "entries", "card.json"
SHARE = 0.1
"""Of an entry's rows that are computed again."""
_FIELDS = ("authors", "paper", "licence", "tuned_on", "matrix", "source", "defenses", "status")


@dataclass(frozen=True)
class Claim:
    """What the authors say, in words: who they are, where the method is published, the licence of the file, and on which data,
    models and attacks its settings were chosen."""

    authors: str
    paper: str
    licence: str
    tuned_on: str


def narrowest(defense: type[Defense]) -> Track:
    """The track that grants what the defense needs, and least besides.

    Raises:
        BadInput: no track does.
    """
    needs = defense().needs
    able = [track for track in TRACKS if not needs & ~track.grants]
    if not able:
        raise BadInput(f"{defense.name}: needs {needs.words}; no track grants that ({', '.join(track.name for track in TRACKS)})")
    return min(able, key=lambda track: track.grants.value.bit_count())


def settings_of(matrix: Path, plugin: str, defenses: list[type[Defense]]) -> str:
    """The matrix with the plug-in's defenses in place of its own, and the undefended models.

    Raises:
        BadInput: the file has no line ``[[defense]]`` to begin with.
    """
    head, found, _ = matrix.read_text(encoding="utf-8").partition("\n[[defense]]\n")
    if not found:
        raise BadInput(f"{matrix}: has no [[defense]] table in whose place an entry could be put")
    names = [("none", ""), *((one.name, f'tracks = ["{narrowest(one).name}"]\n') for one in defenses)]
    tables = "".join(f'\n[[defense]]\nname = "{name}"\n{tracks}' for name, tracks in names)
    return f"plugins = {json.dumps([plugin])}\n{head}\n{tables}"


def enter(
    plugin: Path,
    claim: Claim,
    *,
    matrix: str,
    results: Path,
    cache: Path,
    console: Console,
    processes: int | None = None,
    only: str | None = None,
) -> Path:
    """Runs a plug-in's defenses on a matrix and files them; returns the entry's folder. Interrupted, it goes on where it was.

    Args:
        plugin: a Python file that defines one defense or several. claim: what its authors say of it.
        matrix: the matrix whose attacked models are defended.
        results: folder of results. cache: folder of the store. processes, only: see :func:`benchmark.run.session.run_matrix`.

    Raises:
        BadInput: the file's name is no name of an entry; it defines no defense, or a control; a statement is missing; a defense
            failed in every cell; or as :func:`benchmark.run.session.run_matrix`.
    """
    name = plugin.stem
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,60}", name):
        raise BadInput(f"{plugin.name!r}: an entry is called like its file: small letters, digits, '_' and '-'")
    for field, words in asdict(claim).items():
        if not words.strip():
            option = field.replace("_", "-")
            raise BadInput(f"--{option} is empty: an entry says who made it, where it is published, and what it was tuned on")
    if not plugin.is_file():
        raise BadInput(f"{plugin}: no such file")
    (_, digest), found = _loaded(plugin, console)
    path, folder = find_matrix(matrix), results / ENTRIES / name
    with tempfile.TemporaryDirectory(prefix="levelfield-entry-") as work:
        own = Path(work) / path.name
        shutil.copyfile(plugin, own.with_name(plugin.name))
        write_text(own, settings_of(path, plugin.name, found))
        outcome = run_matrix(
            load_matrix(own, notes(console)), results=folder, cache=cache, console=console, only=only, processes=processes
        )  # fmt: skip
    rows = read(outcome.folder / "rows.csv", Row)
    mine = rows[rows["defense"] != stats.UNDEFENDED]
    failed = mine[mine["status"] == "failed"]
    if len(failed) == len(mine):
        why = failed.iloc[0]["reason"] if len(failed) else "none was run"
        raise BadInput(f"{plugin.name}: failed in every cell, so nothing is entered: {why}")
    card = {
        "name": name, **asdict(claim), "matrix": path.stem, "source": {"file": plugin.name, "sha256": digest},
        "defenses": [_described(one) for one in found], "cells": int(mine["cell"].nunique()),
        "failed": int(failed["cell"].nunique()), "status": "reported",
    }  # fmt: skip
    write_text(folder / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return folder


def _loaded(plugin: Path, console: Console) -> tuple[tuple[str, str], list[type[Defense]]]:
    ((known,), found) = load_plugins(plugin.parent / "entry.toml", [plugin.name], notes(console))
    defenses: list[type[Defense]] = found[Defense]
    if not defenses:
        raise BadInput(f"{plugin.name}: defines no defense")
    controls = [one.name for one in defenses if one.control]
    if controls:
        raise BadInput(f"{plugin.name}: {controls[0]!r} is a control; controls belong to the suite, an entry competes")
    return known, defenses


def _described(defense: type[Defense]) -> dict[str, Any]:
    made = defense()
    return {
        "name": defense.name, "track": narrowest(defense).name, "needs": made.needs.words, "dial": made.dial_name,
        "settings": {key: value for key, value in made.spec().items() if key not in ("name", "revision")},
    }  # fmt: skip


def read_card(folder: Path) -> dict[str, Any]:
    """An entry's card.

    Raises:
        BadInput: it is missing or damaged.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in _FIELDS if name not in dict(card)]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: not an entry's card: {error}") from error
    if missing:
        raise BadInput(f"{path}: {missing[0]!r} is missing")
    if str(card["matrix"]) != Path(str(card["matrix"])).name:  # it names a folder beside the card
        raise BadInput(f"{path}: matrix {card['matrix']!r} is no name of a matrix")
    return dict(card)


def check(folder: Path, *, cache: Path, console: Console, draw: int = 0, processes: int | None = None) -> bool:
    """Computes a random tenth of an entry's rows again and writes the outcome into its card; whether they are confirmed.

    Raises:
        BadInput: the card or the files beside it are damaged, or do not agree.
    """
    card = read_card(folder)
    rows = read(folder / str(card["matrix"]) / "rows.csv", Row)
    mine = int((rows["defense"] != stats.UNDEFENDED).sum())
    own, sample = folder / str(card["matrix"]), max(1, math.ceil(SHARE * mine))
    found: list[Checked] = verify(own, sample=sample, draw=draw, cache=cache, console=console, processes=processes)
    good = confirmed(found)
    card["status"] = "reproduced" if good else "not reproduced"
    card["checked"] = {"rows": len(found), "identical": sum(one.verdict == "identical" for one in found), "draw": draw}
    write_text(folder / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return good
