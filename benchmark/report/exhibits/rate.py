"""Undefended ASR and loss of ACC against the poisoning rate, and the RA of every defense."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmark.analysis import intervals, stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Lines, Panel

COLUMNS = (
    *ev.text(attack="Attack"), *ev.share(rate="Rate"), *ev.text(implanted="Implanted"), *ev.interval(asr="ASR, undefended"),
    *ev.difference(loss="Loss of ACC to the benign twin"), *ev.share(**{"ra {}": "RA, {}"}),
)  # fmt: skip


def _rateless(labels: pd.Series) -> pd.Series:
    """Labels of attacks without their poisoning rate."""
    return labels.str.replace(r" [0-9.]+ %$", "", regex=True)


def frame(source: ev.Source) -> pd.DataFrame:
    before = ev.before_defense(source.rows).assign(kind=lambda rows: _rateless(rows["attack"]))
    if before.groupby("kind")["rate"].nunique().max() < 2:
        raise ev.Missing("it takes an attack at two poisoning rates or more")
    cells = ev.finished(ev.judged(source.rows)).assign(kind=lambda rows: _rateless(rows["attack"]))
    every = stats.entries(cells[cells["defense"] != stats.UNDEFENDED])
    lines = []
    for kind, mine in before.groupby("kind", sort=False):
        for value, here in mine.groupby("rate"):
            at = cells[(cells["kind"] == kind) & (cells["rate"] == value)]
            parts = {ev.entry_words(entry): ev.mean(ev.of_entry(at, entry), "ra") for entry in every}
            lines.append({
                "attack": kind, "rate": value, "implanted": ev.implanted_words(here), **ev.means_of(here, ("asr", "loss")),
                **{f"ra {words}": part.mean for words, part in parts.items()},
                **{key: item for words, part in parts.items() for key, item in ev.bounded(f"_{words}", part).items()},
                "_most": bool(here["implanted"].astype(bool).mean() > 0.5),
            })  # fmt: skip
    return ev.table_of(lines, changes=_changes(cells), entries=every)


def _changes(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Each defense's RA at the highest rate that implants minus that at the lowest, paired by seed."""
    changes = []
    for entry in ev.competitors(cells):
        differences = []
        for kind, mine in ev.of_entry(cells, entry).groupby("kind", sort=False):
            low, high = mine["rate"].min(), mine["rate"].max()
            if low < high:
                ends = [mine[mine["rate"] == value].assign(attack=kind).set_index(stats.WORLD)["ra"] for value in (high, low)]
                differences.append((ends[0] - ends[1]).dropna().to_list())
        if any(differences):
            changes.append({"defense": entry[0], "scope": entry[1], **ev.bounded("ra", intervals.interval(differences))})
    return changes


def figure(table: pd.DataFrame) -> Lines:
    kinds = {str(kind): part for kind, part in table.groupby("attack", sort=False)}
    panels = [
        Panel(f"Undefended: {words}", "poisoning rate", unit, tuple(ev.series(kind, part, "rate", name)
              for kind, part in kinds.items()), log=True, percent=True, signed=name == "loss")
        for words, unit, name in (("ASR", "%", "asr"), ("loss of ACC", "points", "loss"))
    ]  # fmt: skip
    for kind, part in kinds.items():
        words = {entry: ev.entry_words(entry) for entry in table.attrs["entries"]}
        series = tuple(ev.series(name, part, "rate", f"_{name}", about=entry) for entry, name in words.items())
        if part["_most"].any():
            panels.append(Panel(f"{kind}: RA, defended", "poisoning rate", "%", series, log=True, percent=True))
    note = "Undefended: all seeds. Defended: rates at which most seeds implant, those seeds. Bands: 95 % intervals over seeds."
    return Lines(tuple(panels), 3, note)
