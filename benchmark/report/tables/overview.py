"""One board over all matrices: ``results/board.html``, a line per scenario, entry and selection, each with its rows.

Nothing is averaged but the seeds of a scenario; means over scenarios and ranks are on the leaderboard of the matrix. The page
filters, sorts, links to what it shows, and saves that as CSV or JSON. It is one file and loads nothing.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.page import asset, document
from benchmark.report.text import plain
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON
from benchmark.storage.files import write_text
from benchmark.storage.rows import Row, read

__all__ = ["BOARD", "contents", "overview", "write_board"]

BOARD = "board.html"
"""The file's name, in the folder of all results."""
SHOWN = ("validation", "default", "oracle")
"""Selections on the board: the ranked one, the published setting, and the best in hindsight."""
KEY = ["matrix", *stats.SCENARIO, "rate", "track", *stats.ENTRY, "selection"]
_SHARES = ["acc", "asr", "ra"]


def overview(rows: pd.DataFrame) -> pd.DataFrame:
    """A matrix's rows, with the seeds of a scenario averaged.

    Args:
        rows: as :func:`benchmark.storage.rows.read` gives them, in the order of the file.

    Returns:
        ``KEY``; ``control``; ``implanted``: the scenario is; ``judged``: the selection is the one by which its track is ranked;
        ``acc``, ``asr``, ``ra`` in [0, 1], means over finished cells, NaN where none is; ``seeds`` of these; ``lines``: where the
        rows are in ``rows.csv``, the header being line 1; ``state``: what became of other cells, "" where all are finished.
    """
    judged = {track: stats.headline(rows, track) for track in dict.fromkeys(rows["track"])}
    gates = stats.scenarios(rows).set_index(stats.SCENARIO)["implanted"]
    numbered = rows.assign(line=range(2, len(rows) + 2))
    found = []
    for key, mine in numbered[numbered["selection"].isin(SHOWN)].groupby(KEY, sort=False):
        named: dict[str, Any] = dict(zip(KEY, key, strict=True))
        good = mine[mine["status"] == "ok"]
        if good.empty and (mine["reason"] == NOTHING_TO_VALIDATE_ON).all():
            continue  # a track without clean images has no such selection
        states = ", ".join(dict.fromkeys(mine["status"][mine["status"] != "ok"]))
        place = tuple(named[name] for name in stats.SCENARIO)
        found.append({
            **named, "control": bool(mine["control"].all()), "implanted": bool(gates[place]),
            "judged": named["selection"] == judged[named["track"]],
            **{name: float(good[name].mean()) for name in _SHARES}, "seeds": len(good), "lines": tuple(map(int, mine["line"])),
            "state": states,
        })  # fmt: skip
    return pd.DataFrame(found)


def contents(tables: Iterable[pd.DataFrame], titles: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows: every text once, and a list per line.

    Args:
        tables: :func:`overview` of every matrix. titles: of the matrices, by their names.
    """
    words: dict[str, int] = {}

    def number(value: object) -> int:
        return words.setdefault(plain(value), len(words))

    def share(value: float) -> float | None:
        return None if math.isnan(value) else round(value, 4) + 0.0

    texts = ["matrix", *stats.SCENARIO, "track", *stats.ENTRY, "selection", "state"]
    lines = [
        [[number(line[name]) for name in texts], float(line["rate"]), *(share(float(line[name])) for name in _SHARES),
         int(line["seeds"]), int(line["control"]) + 2 * int(line["implanted"]) + 4 * int(line["judged"]), list(line["lines"])]
        for table in tables for line in table.to_dict("records")
    ]  # fmt: skip
    return {"words": list(words), "texts": texts, "lines": lines, "titles": {name: plain(title) for name, title in titles.items()}}


def _title(folder: Path) -> str:
    try:
        return str(tomllib.loads((folder / "matrix.toml").read_text(encoding="utf-8"))["title"])
    except (OSError, ValueError, KeyError):
        return folder.name


def write_board(results: Path) -> Path:
    """Writes ``results/board.html`` from the rows of every matrix there, and returns its path; the same rows give the same bytes.

    Raises:
        BadInput: stored rows cannot be read, or the file cannot be written.
    """
    folders = [path.parent for path in sorted(results.glob("*/rows.csv"))]
    made = contents([overview(read(folder / "rows.csv", Row)) for folder in folders], {one.name: _title(one) for one in folders})
    page = document("board.html", "All results", made, {"script": asset("board.js")})
    write_text(results / BOARD, page)
    return results / BOARD
