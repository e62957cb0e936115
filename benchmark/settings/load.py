"""A matrix file -> checked settings -> cells. Every number of a run is in such a file; no command-line flag sets one.

A matrix names one data set, backbones, a recipe, attacks, seeds, extractors, and defenses with their tracks and scopes. Its cells
are the product. :mod:`benchmark.settings.schema` lists the keys that the benchmark reads; a table's other keys are the fields of
that method's dataclass, whose docstring gives units and ranges.
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
from benchmark.settings.schema import parse
from models.spec import BadInput, nearest

__all__ = ["FOLDER", "find_matrix", "load_matrix", "matrix_names"]

FOLDER = Path(__file__).parent / "matrices"
MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_DOTS = 200
"""Dots between two marks of a line: more than any key or sentence has."""
MAX_WORDS = 500
"""Characters of an error message: it may quote a value, and a value may be as long as the file."""


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
        path: the file; its name without the suffix is the matrix's name.
        note: called with one line for each plug-in that the file names, before the plug-in runs.

    Raises:
        BadInput: not readable, not TOML, an unknown key or name, a wrong type or a number out of range; one line that names the
            file, the table, the value and the nearest right one.
    """
    if path.stem.startswith(".") or not path.stem.isprintable():  # it becomes the name of a folder of results
        raise BadInput(f"{str(path)!r}: a matrix is called like its file, so {path.stem!r} cannot be one; rename the file")
    try:
        settings = _text(path)
        table = parse(_toml(settings))
        if len(set(table.seeds)) != len(table.seeds):
            raise BadInput(f"seeds {table.seeds} name one seed twice")
        plugins, found = load_plugins(path, table.plugins, note)
        scenarios, cells = expand(table, found)
    except BadInput as error:
        raise BadInput(f"{path}: {_short(str(error))}") from error
    return Matrix(path.stem, path, table.title, table.about, settings, scenarios, cells, plugins)


def _short(text: str) -> str:
    return text if len(text) <= MAX_WORDS else f"{text[:MAX_WORDS]} ..."


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"larger than {MAX_BYTES // 2**20} MiB; no settings file is")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read: {error}") from error


def _toml(settings: str) -> dict[str, Any]:
    """The tables of a file, refused where they are larger than any settings are.

    Raises:
        BadInput: not TOML, too long a key, too deep, or a whole number beyond 64 bits.
    """
    if _dotted(settings) > MAX_DOTS:
        raise BadInput(f"a key of more than {MAX_DOTS} parts; no setting is nested as deep")
    try:
        raw = tomllib.loads(settings)
    except RecursionError as error:
        raise BadInput(f"cannot be read: {error}") from error
    except ValueError as error:  # tomllib's own, and Python's refusal to read numbers of thousands of digits
        raise BadInput(f"not TOML: {error}") from error
    _bounded(raw)
    return raw


def _dotted(settings: str) -> int:
    """The most dots between two marks of a line, so at least its longest key's; tomllib's time grows with their square."""
    lines = (line for line in settings.splitlines() if not line.lstrip().startswith("#"))
    return max((piece.count(".") for line in lines for piece in re.split(r"[={},\[\]]", line)), default=0)


def _bounded(raw: dict[str, Any]) -> None:
    """Refuses values that would be too large to print.

    Raises:
        BadInput: tables or lists nested deeper than any setting, or a whole number beyond 64 bits.
    """
    left: list[tuple[str, Any, int]] = [("", raw, 0)]
    while left:
        place, value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise BadInput(f"{_short(place.split('.')[0])!r} is nested more than {MAX_DEPTH} deep; no setting is")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise BadInput(f"{_short(place)!r} is a whole number of more than 64 bits")
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{place}.{key}" if place else str(key), item, depth + 1) for key, item in items]
