"""Rank tests where there are enough scenarios, and every leader against every control."""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import rank_tests, stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.exhibits.controls import COLUMNS, against, figure

__all__ = ["COLUMNS", "figure", "frame"]


def frame(source: ev.Source) -> pd.DataFrame:
    table = against(source, lambda label: True)
    tests = []
    for track in stats.tracks(source.rows):
        test = rank_tests.significance(source.rows, track, stats.headline(source.rows, track))
        if test is not None:
            apart = sum(p < rank_tests.LEVEL for _, _, p in test.pairs)
            tests.append({"track": track, "blocks": test.blocks, "p": test.friedman, "apart": apart, "pairs": len(test.pairs)})
    table.attrs = {"tests": tests, "least": rank_tests.MIN_BLOCKS, "blocks": int(stats.scenarios(source.rows)["implanted"].sum()),
                   "seeds": source.rows["seed"].nunique(), "against": "a control"}  # fmt: skip
    return table
