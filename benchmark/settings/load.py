"""A matrix: TOML -> checked settings -> cells. Every number of a run stands in such a file; no flag sets one.

A matrix names one data set, backbones, a recipe, attacks, seeds, extractors, and defenses with the tracks and scopes they enter.
Its cells are the product. A table's keys beside ``name`` are the fields of that method's dataclass (units and ranges stand there);
keys the benchmark itself reads are listed in the ``*Table`` classes below. A defense's table may also name its ``tracks``,
``scopes``, ``label``, ``preset``, ``extractors``, ``backbones`` (labels of those it meets; by default all), and ``budgets``: clean
budgets it is met with, as shares of the training set, on the same victims, each a part of what ``clean_fraction`` holds out.
``candidates`` at the top of the file bounds how many models a defense may offer a cell over all settings of its knob, the same for
every defense; ``canary = true`` adds the rule that chooses by planted canaries (:mod:`benchmark.rules.canary`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark.settings.cells import Matrix
from benchmark.settings.expand import expand
from benchmark.settings.plugins import load_plugins
from benchmark.settings.schema import parsed
from models.spec import BadInput, nearest

__all__ = ["FOLDER", "find_matrix", "load_matrix", "matrix_names"]

FOLDER = Path(__file__).parent / "matrices"
MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_DOTS = 200
"""In a line, between two marks: far more than any key's, and than any sentence's."""
MAX_WORDS = 500
"""Letters of a complaint: it may quote a value, and values may be as long as the file."""


def matrix_names() -> list[str]:
    """The matrices that ship with the benchmark."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_matrix(name: str) -> Path:
    """A shipped matrix by name, or any ``.toml`` file by path.

    Raises:
        BadInput: no such matrix, with the nearest right name.
    """
    if name.endswith(".toml"):
        if Path(name).is_file():
            return Path(name)
        raise BadInput(f"{name}: no such matrix file{nearest(Path(name).stem, matrix_names())}")
    if name not in matrix_names():
        raise BadInput(f"unknown matrix {name!r}{nearest(name, matrix_names())}")
    return FOLDER / f"{name}.toml"


def load_matrix(path: Path, note: Callable[[str], None] = lambda line: None) -> Matrix:
    """Reads and checks a matrix file.

    Args:
        note: is told, in one line each, which plug-ins the file names, before they run.

    Raises:
        BadInput: not readable, not TOML, an unknown key or name, a wrong type or a number out of range; one line that names the
            file, the place, the value and the nearest right one.
    """
    if path.stem.startswith(".") or not path.stem.isprintable():  # it names the folder of results
        raise BadInput(f"{str(path)!r}: a matrix is called like its file, so {path.stem!r} cannot be one; rename the file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path}: larger than {MAX_BYTES // 2**20} MiB; no settings file is")
        settings = path.read_text(encoding="utf-8")
        if _dotted(settings) > MAX_DOTS:
            raise BadInput(f"{path}: a key of more than {MAX_DOTS} parts; no setting is nested as deep")
        raw = tomllib.loads(settings)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    except BadInput:
        raise
    except ValueError as error:  # tomllib's own, and Python's refusal to read numbers of thousands of digits
        raise BadInput(f"{path}: not TOML: {error}") from error
    _bounded(raw, path)
    try:
        table = parsed(raw)
    except BadInput as error:
        raise BadInput(f"{path}: {_short(str(error))}") from error
    if len(set(table.seeds)) != len(table.seeds):
        raise BadInput(f"{path}: seeds {table.seeds} name one seed twice")
    plugins, found = load_plugins(path, table.plugins, note)
    try:
        scenarios, cells = expand(table, found)
    except BadInput as error:
        raise BadInput(f"{path}: {_short(str(error))}") from error
    return Matrix(path.stem, path, table.title, table.about, settings, scenarios, cells, plugins)


def _short(text: str) -> str:
    return text if len(text) <= MAX_WORDS else f"{text[:MAX_WORDS]} ..."


def _dotted(settings: str) -> int:
    """The most dots between two marks of a line, so at least its longest key's; tomllib's time grows with their square."""
    lines = (line for line in settings.splitlines() if not line.lstrip().startswith("#"))
    return max((piece.count(".") for line in lines for piece in re.split(r"[={},\[\]]", line)), default=0)


def _bounded(raw: dict[str, Any], path: Path) -> None:
    """Refuses what no setting is, before anything tries to print it.

    Raises:
        BadInput: tables or lists within each other deeper than any setting, or whole numbers beyond 64 bits.
    """
    left: list[tuple[str, Any, int]] = [("", raw, 0)]
    while left:
        place, value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise BadInput(f"{path}: {_short(place.split('.')[0])!r} is nested more than {MAX_DEPTH} deep; no setting is")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise BadInput(f"{path}: {_short(place)!r} is a whole number of more than 64 bits")
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{place}.{key}" if place else str(key), item, depth + 1) for key, item in items]
