"""Whether recorded rows were made with the present versions of their methods."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from benchmark.settings.cells import Matrix, settings_hash
from benchmark.settings.load import load_matrix
from models.spec import BadInput

__all__ = ["STALE_WORDS", "matrix_of", "stale"]

STALE_WORDS = (
    "**These rows were made with earlier versions of some methods** and judged by the present rules. Running the matrix again "
    "makes them "
    "anew."
)


def matrix_of(folder: Path) -> Matrix:
    """The settings of a folder of results, as copied beside its rows; without cells where they name plug-ins.

    Plug-ins are code, and pages are drawn from anybody's rows: none is run for that.

    Raises:
        BadInput: they cannot be read.
    """
    path = folder / "matrix.toml"
    try:
        named = tomllib.loads(path.read_text(encoding="utf-8")).get("plugins")
    except (OSError, ValueError, RecursionError):
        named = None  # load_matrix says what is wrong
    return Matrix(path.stem, path, "", "", "", (), (), ()) if named else load_matrix(path)


def stale(folder: Path) -> bool:
    """Whether a method was revised since these results were made, so that the same settings would give other numbers.

    The hash of the settings includes every method's revision. False where there is nothing to compare.

    Raises:
        BadInput: the manifest cannot be read.
    """
    manifest, settings = folder / "manifest.json", folder / "matrix.toml"
    if not manifest.is_file() or not settings.is_file():
        return False
    try:
        written = json.loads(manifest.read_text(encoding="utf-8"))
        made = written.get("settings") if isinstance(written, dict) else None
    except ValueError as error:
        raise BadInput(f"{manifest}: cannot be read: {error}") from error
    matrix = matrix_of(folder)
    return bool(matrix.cells) and made != settings_hash(matrix)
