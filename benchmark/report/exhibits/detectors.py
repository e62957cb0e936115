"""Of the training samples that defenses isolate, how many are poisoned, against the base rate."""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots

COLUMNS = (
    *ev.ENTRY, *ev.number(isolated="Isolated samples"), *ev.interval(precision="Precision", recall="Recall", auroc="AUROC"),
    *ev.share(base="Base rate"), *ev.difference(above="Precision - base rate"), *ev.count(failed="Mechanism failed", cells="Cells"),
)  # fmt: skip


def frame(source: ev.Source) -> pd.DataFrame:
    parts = [found.assign(track=track) for track in stats.tracks(source.rows) if len(found := stats.detectors(source.rows, track))]
    sets = pd.concat([source.rows.iloc[:0], *parts], ignore_index=True)
    sets = sets[sets["implanted"].astype(bool)]
    rows = ev.finished(source.rows)
    rows = rows[rows["selection"] == "default"]
    lines = []
    for start, mine in ev.by_entry(sets):
        own = rows[(rows[list(start)] == list(start.values())).all(axis=1)]
        own = own.assign(above=own["precision"] - own["realised_rate"])
        lines.append({**start, "isolated": float(mine["isolated"].mean()),
                      **ev.means_of(own, ("precision", "recall", "auroc", "above")), "base": ev.mean(own, "realised_rate").mean,
                      "failed": int((own["mark"] == "mechanism failed").sum()), "cells": len(own)})  # fmt: skip
    return ev.table_of(lines, "no defense isolated training samples")


def figure(table: pd.DataFrame) -> Dots:
    series = {"precision": "precision", "recall": "recall", "base rate": "base"}
    return Dots((ev.dot_panel(table, "Isolated training samples", "%", series),), "Default selection.")
