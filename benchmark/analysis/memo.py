"""Boards are asked for many times while one folder is drawn, and cost a tenth of a second each: results are kept by table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TypeVarTuple

import pandas as pd

__all__ = ["remembered"]

Given = TypeVarTuple("Given")
KEPT = 4
"""Tables whose results are kept, the newest."""


def remembered(function: Callable[[pd.DataFrame, *Given], pd.DataFrame]) -> Callable[[pd.DataFrame, *Given], pd.DataFrame]:
    """``function`` of a table and hashable values, computed once for each; every caller gets a copy.

    A table is recognised by identity, so it must not be changed in place afterwards; nothing in this package does that.
    """
    kept: list[tuple[pd.DataFrame, dict[Hashable, pd.DataFrame]]] = []

    @functools.wraps(function)
    def found(rows: pd.DataFrame, *given: *Given) -> pd.DataFrame:
        known = next((results for table, results in kept if table is rows), None)
        if known is None:
            known = {}
            kept.append((rows, known))
            del kept[:-KEPT]
        if given not in known:
            known[given] = function(rows, *given)
        return known[given].copy()

    return found
