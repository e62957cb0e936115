"""What each defense costs in accuracy."""

from __future__ import annotations

import pandas as pd

from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots

COLUMNS = (*ev.ENTRY, *ev.text(role=""), *ev.difference(d_acc="dACC"), *ev.FIGURES)


def frame(source: ev.Source) -> pd.DataFrame:
    return ev.leaderboards(source.rows)


def figure(table: pd.DataFrame) -> Dots:
    return Dots((ev.board_panel(table, "ACC after minus ACC before", "points", {"dACC": "d_acc"}, signed=True),), ev.BARS)
