"""How many units every pruning defense removed, and how the semi-supervised ones were trained."""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd

from benchmark.analysis import intervals
from benchmark.report.exhibits import evidence as ev
from defenses.hid import HID

figure = ev.no_figure
COLUMNS = (
    *ev.ENTRY, *ev.text(control=""), *ev.number(units="Units in scope", default="Pruned, default"),
    *ev.interval(default_share="Share, default"), *ev.number(validation="Pruned, validation"),
    *ev.interval(validation_share="Share, validation"), *ev.count(cells="Cells", default_none="Nothing pruned, default"),
    *ev.count(validation_none="Nothing pruned, validation"), *ev.text(preset="Preset"),
)  # fmt: skip


def frame(source: ev.Source) -> pd.DataFrame:
    cells = ev.finished(source.rows)
    pruners = set(cells.loc[cells["pruned"] > 0, "defense"])
    pruners |= {cell.defense_label for cell in source.matrix.cells if cell.defense.writer is not None}
    lines = []
    for start, mine in ev.by_entry(cells[cells["defense"].isin(pruners)]):
        line = {**start, "control": ev.control_words(mine), "units": float(mine["units"].mean())}
        for name in ("default", "validation"):
            part = mine[mine["selection"] == name].assign(share=lambda rows: rows["pruned"] / rows["units"])
            line |= ev.bounded(f"{name}_share", ev.mean(part, "share"))
            line[name] = float(part["pruned"].mean()) if len(part) else math.nan
            line[f"{name}_none"] = int((part["pruned"] == 0).sum()) if len(part) else math.nan
        lines.append({**line, "cells": mine["cell"].nunique(), "preset": " / ".join(dict.fromkeys(mine["preset"]))})
    semi = {cell.defense_label: cell.preset for cell in source.matrix.cells if hasattr(cell.defense, "semi_epochs")}
    unknown = int(((cells["pruned"] > 0) & (cells["units"] == 0)).sum())
    return ev.table_of(lines, "no defense pruned anything", unknown=unknown, semi=semi, **_hid(source, cells))


def _hid(source: ev.Source, cells: pd.DataFrame) -> dict[str, Any]:
    """HID beside HID without its pruning step, paired, and in how many rounds that step pruned nothing."""
    known = source.labels(HID)
    mine = cells[cells["selection"] == "default"]
    whole, bare = ([label for label, hid in known.items() if (hid.rule == "none") is without][:1] for without in (False, True))
    one, other = (mine[mine["defense"].isin(labels)] for labels in (whole, bare))
    counts = [int(part) for note in one["note"] for found in re.findall(r"pruned ([0-9, and]+) of", note)
              for part in re.findall(r"[0-9]+", found)]  # fmt: skip
    gap: tuple[intervals.Interval, int] | None = None if one.empty or other.empty else ev.paired_gap(one, other, "ra")
    return {"hid": gap, "hid_names": (*whole, *bare), "rounds": len(counts), "idle_rounds": counts.count(0)}
