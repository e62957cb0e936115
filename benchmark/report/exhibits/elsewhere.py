"""The same settings on another kind of machine: how far single cells move, and whether the leaderboards hold."""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots

COLUMNS = (
    *ev.text(run="Run"), *ev.ENTRY, *ev.text(control=""), *ev.count(cells="Cells"),
    *ev.share(median="Median difference of RA, single cells", largest="Largest difference of RA, single cells"),
    *ev.interval(ra="Mean RA", again="Mean RA elsewhere"), *ev.text(inside="Inside the first interval"),
)  # fmt: skip
_ENTRY = ["track", *stats.ENTRY]


def _beside(source: ev.Source, other: ev.Source) -> pd.DataFrame:
    """One line per leaderboard entry that both runs have; controls once."""
    board = ev.leaderboards(source.rows)
    means = ev.leaderboards(other.rows).rename(columns={"ra": "again", "ra_low": "again_low", "ra_high": "again_high"})
    table = board[board["role"] != "reference"].merge(means[[*_ENTRY, "again", "again_low", "again_high"]], on=_ENTRY)
    # A control may have been measured in another track than the one that shows it: its cells are there.
    cells = ev.judged_cells(source.rows).merge(ev.judged_cells(other.rows), on=[*_ENTRY, *stats.WORLD], suffixes=("", "_other"))
    moved = (cells["ra"] - cells["ra_other"]).abs().groupby([cells[name] for name in _ENTRY]).agg(["count", "median", "max"])
    moved = moved.reset_index().rename(columns={"track": "source", "count": "cells", "max": "largest"})
    table = table.drop(columns="cells").merge(moved, on=["source", *stats.ENTRY]).dropna(subset=["ra", "again"])
    inside = (table["ra_low"] <= table["again"]) & (table["again"] <= table["ra_high"])
    return table.assign(run=other.name, control=table["role"].where(table["role"] == "control", ""),
                        inside=inside.map({True: "yes", False: "no"}))  # fmt: skip


def _machines(source: ev.Source, other: ev.Source) -> tuple[str, str]:
    """In what the arithmetic of two runs differs: the first's and the other's, in words."""
    first, second = (run.manifest.get("arithmetic", {}) for run in (source, other))
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    one, two = (", ".join(f"{name} {run.get(name, 'not recorded')}" for name in names) for run in (first, second))
    return one, two


def frame(source: ev.Source) -> pd.DataFrame:
    if not source.elsewhere:
        raise ev.NotRun(f"run `{source.name}` on another kind of machine and keep its folder as `results/{source.name}-NAME`")
    table = pd.concat([_beside(source, other) for other in source.elsewhere], ignore_index=True)
    ends = [name + end for name in ("ra", "again") for end in ("", "_low", "_high")]
    table = table[["run", *_ENTRY, "control", "cells", "median", "largest", *ends, "inside"]]
    table.attrs = {"machines": {other.name: _machines(source, other) for other in source.elsewhere}}
    return table


def figure(table: pd.DataFrame) -> Dots:
    marks = {"mean RA": "ra", "mean RA elsewhere": "again", "largest difference of a single cell": "largest"}
    panels = [ev.dot_panel(part, f"Leaderboard entries, here and in {run}", "RA in %, differences in points", marks)
              for run, part in table.groupby("run", sort=False)]  # fmt: skip
    return Dots(tuple(panels), ev.BARS)
