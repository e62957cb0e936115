"""ACC, ASR and RA against the number of clean images."""

from __future__ import annotations

import math
import re

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Lines, Panel

COLUMNS = (
    *ev.DEFENSE, *ev.share(share="Budget"), *ev.count(images="Images"), *ev.text(cells="Cells"), *ev.FIGURES,
    *ev.difference(versus="RA - RA from scratch"), *ev.text(reason="Refused or failed"),
)  # fmt: skip
_BUDGET = re.compile(r"^(?P<base>.*), budget (?P<percent>[0-9.]+) %$")


def _budgeted(label: str) -> tuple[str, float]:
    """A defense's label without its budget, and the budget as a share; NaN without one."""
    found = _BUDGET.match(label)
    return (found["base"], float(found["percent"]) / 100) if found else (label, math.nan)


def frame(source: ev.Source) -> pd.DataFrame:
    rows = stats.implanted_worlds(ev.judged(source.rows))
    parts = [_budgeted(label) for label in rows["defense"]]
    rows = rows.assign(base=[base for base, _ in parts], share=[share for _, share in parts])
    if rows["share"].nunique() < 2:
        raise ev.Missing("it takes defenses with two clean budgets or more")
    good = rows[rows["status"] == "ok"]
    images = good[good["clean_images"] > 0].groupby("share")["clean_images"].max().to_dict()
    scratch = good[good["base"].str.startswith(stats.SCRATCH)]
    lines = []
    for (base, scope, share), mine in rows.groupby(["base", "scope", "share"], sort=False, dropna=False):
        if base == stats.UNDEFENDED:
            continue
        done = mine[mine["status"] == "ok"]
        reasons = dict.fromkeys(mine.loc[mine["status"] != "ok", "reason"])
        same = scratch[scratch["share"] == share]
        compared = len(done) and len(same) and not str(base).startswith(stats.SCRATCH)
        lines.append({"defense": base, "scope": scope, "control": ev.control_words(mine), "share": share,
                      "images": images.get(share, math.nan), "cells": f"{len(done)} of {len(mine)}", **ev.means_of(done),
                      **ev.bounded("versus", ev.paired_gap(done, same, "ra")[0] if compared else ev.UNMEASURED),
                      "reason": ", ".join(map(str, reasons))})  # fmt: skip
    table = pd.DataFrame(lines)
    if table.dropna(subset=["share", "images"]).empty:
        raise ev.Missing("no defense finished with a budget")
    return table


def figure(table: pd.DataFrame) -> Lines:
    given, free = table.dropna(subset=["share", "images"]).sort_values("share", kind="stable"), table[table["share"].isna()]
    groups = {entry: of for entry in stats.entries(table) if len(of := ev.of_entry(given, entry))}
    panels = []
    for name in ("ra", "asr", "acc"):
        series = tuple(ev.series(ev.entry_words(entry), mine, "images", name, control=bool((mine["control"] != "").any()))
                       for entry, mine in groups.items())  # fmt: skip
        flat = tuple((f"{line['defense']} ({line['scope']}), no images", float(line[name]))
                     for _, line in free.dropna(subset=[name]).iterrows())  # fmt: skip
        panels.append(Panel(name.upper(), "clean images", "%", series, log=True, flat=flat))
    return Lines(tuple(panels), 3, ev.BANDS)
