"""How the rows of a run compare with committed rows of the same matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from benchmark.analysis import intervals, stats
from benchmark.storage.rows import Row, read

__all__ = ["Comparison", "compare_rows", "comparison", "points_apart"]

METRICS = ("acc", "asr", "ra")
PAIRED = ["cell", "selection"]
"""What a row and its committed counterpart agree in. A cell's name follows from its settings and the images."""
ROUNDED = 1e-6
"""Rows have 6 decimals."""


@dataclass(frozen=True)
class Comparison:
    """Fresh rows against committed ones.

    Attributes:
        rows: fresh rows that have a committed counterpart.
        identical: those of them that are the same in every column.
        unknown: fresh rows without a counterpart: their settings or images are others.
        apart: for ``acc``, ``asr`` and ``ra`` the median and the largest distance in percentage points, over the rows that are not
            identical; NaN where none of them has the value.
        entries: defenses and controls of the leaderboards that were run whole and have a committed 95 % interval of RA.
        inside: those of them whose fresh mean RA lies inside it.
    """

    rows: int
    identical: int
    unknown: int
    apart: Mapping[str, tuple[float, float]]
    entries: int
    inside: int

    def lines(self, folder: Path) -> list[str]:
        """The comparison in plain lines; ``folder``: of the committed rows."""
        unknown = f"{self.unknown} rows have other settings or images than those in {folder}"
        if not self.rows:
            return [f"not compared: all {unknown}"]
        lines = [f"compared with {folder}: {self.identical} of {self.rows} rows are identical"]
        if self.identical < self.rows:
            apart = ", ".join(f"{name.upper()} {half:.1f} / {most:.1f}" for name, (half, most) in self.apart.items())
            lines.append(f"the other {self.rows - self.identical} differ by (median / at most, in points): {apart}")
        if self.entries:
            lines.append(f"{self.inside} of {self.entries} leaderboard entries: mean RA inside the committed 95 % interval")
        return [*lines, unknown] if self.unknown else lines


def points_apart(committed: Sequence[float], fresh: Sequence[float]) -> np.ndarray:
    """Absolute differences of two lists of shares in percentage points; pairs of which one is missing (NaN) are left out."""
    apart = 100 * np.abs(np.asarray(committed, np.float64) - np.asarray(fresh, np.float64))
    known: np.ndarray = apart[~np.isnan(apart)]
    return known


def comparison(folder: Path, committed: Path) -> Comparison:
    """Compares the rows.csv of two folders.

    Raises:
        BadInput: one of the files is missing or damaged.
    """
    return compare_rows(read(folder / "rows.csv", Row), read(committed / "rows.csv", Row))


def compare_rows(fresh: pd.DataFrame, committed: pd.DataFrame) -> Comparison:
    """Compares tables as :func:`benchmark.storage.rows.read` gives them; rows that only one of them has are left out."""
    tables = [table.drop_duplicates(PAIRED).set_index(PAIRED, drop=False) for table in (fresh, committed)]
    shared = tables[0].index.intersection(tables[1].index)
    here, there = (table.loc[shared].reset_index(drop=True) for table in tables)
    names = [f.name for f in fields(Row)]
    same = ((here[names] == there[names]) | (here[names].isna() & there[names].isna())).all(axis=1)
    apart = {}
    for name in METRICS:
        points = points_apart(there.loc[~same, name].to_list(), here.loc[~same, name].to_list())
        apart[name] = (float(np.median(points)), float(points.max())) if len(points) else (float("nan"), float("nan"))
    entries, inside = _inside(here, committed)
    return Comparison(len(shared), int(same.sum()), len(fresh) - len(shared), apart, entries, inside)


def _inside(fresh: pd.DataFrame, committed: pd.DataFrame) -> tuple[int, int]:
    """How many leaderboard entries have a committed interval of RA, and in how many of them the fresh mean lies inside it.

    Each entry counts once, in the first track that shows it, under the selection that the track is judged by. Means are taken over
    the scenarios that are implanted in the committed rows, so that both are means of the same thing; an entry that was run in part
    is left out.
    """
    committed = stats.implanted_worlds(committed)
    fresh = fresh[fresh["cell"].isin(set(committed["cell"]))]
    lacking = committed[~committed["cell"].isin(set(fresh["cell"]))]
    partial = set(lacking[[*stats.ENTRY, "track"]].itertuples(index=False, name=None))
    inside: dict[tuple[str, ...], bool] = {}
    for track in stats.tracks(committed):
        selection = stats.headline(committed, track)
        there, here = (_entries(table, track, selection) for table in (committed, fresh))
        for entry, groups in there.items():
            if entry in inside or entry in partial:
                continue
            interval = intervals.interval(groups)
            if not np.isnan(interval.low):
                mean = np.mean([np.mean(group) for group in here[entry]]) if entry in here else np.nan
                inside[entry] = bool(interval.low - ROUNDED <= mean <= interval.high + ROUNDED)
    return len(inside), sum(inside.values())


def _entries(rows: pd.DataFrame, track: str, selection: str) -> dict[tuple[str, ...], list[list[float]]]:
    """RA of every defense and control of a track, a list over seeds for each scenario; by (defense, scope, track of the rows)."""
    table = stats.field(rows, track)
    table = table[(table["selection"] == selection) & (table["role"] != "reference") & table["ra"].notna()]
    table = table[[*stats.ENTRY, "source", *stats.SCENARIO, "ra"]]
    return {
        tuple(map(str, entry)): [group["ra"].to_list() for _, group in mine.groupby(stats.SCENARIO, sort=False)]
        for entry, mine in table.groupby([*stats.ENTRY, "source"], sort=False)
    }
