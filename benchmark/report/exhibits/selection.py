"""RA under every rule of selection, and how far below the oracle each stays."""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots
from benchmark.report.words import SELECTION_WORDS
from defenses.anp import ANP

COLUMNS = (
    *ev.ENTRY, *ev.text(control=""), *ev.interval(**{f"ra_{name}": f"RA, {name}" for name in stats.SELECTIONS}),
    *ev.share(**{f"asr_{name}": f"ASR, {name}" for name in stats.SELECTIONS}),
    *ev.difference(**{f"gap_{name}": f"RA, oracle - {name}" for name in stats.SELECTIONS}), *ev.count(models="Models"),
)  # fmt: skip


def cells_with_a_dial(source: ev.Source) -> pd.DataFrame:
    """Finished rows, under every selection, of the cells whose defense has a dial, on implanted scenarios.

    Raises:
        Missing: there is none.
    """
    table = ev.finished(source.rows)
    table = table[table["cell"].isin(source.rows.loc[source.rows["dial"].notna(), "cell"])]
    if table.empty:
        raise ev.Missing("no defense with a dial finished on an implanted attack")
    return table


def frame(source: ev.Source) -> pd.DataFrame:
    cells = cells_with_a_dial(source)
    present = [name for name in stats.SELECTIONS if name in set(cells["selection"])]
    rules = [name for name in present if name not in stats.HINDSIGHT]
    lines = []
    for start, mine in ev.by_entry(cells):
        by = {name: mine[mine["selection"] == name] for name in present}
        if by["oracle"].empty:
            continue
        line = {**start, "control": ev.control_words(mine)}
        for name, part in by.items():
            line |= ev.bounded(f"ra_{name}", ev.mean(part, "ra")) | {f"asr_{name}": ev.mean(part, "asr").mean}
        for name in rules:
            line |= ev.bounded(f"gap_{name}", ev.paired_gap(by["oracle"], by[name], "ra")[0])
        lines.append({**line, "models": len(mine.drop_duplicates(stats.WORLD))})
    meaning = "; ".join(SELECTION_WORDS[name] for name in present)
    return ev.table_of(lines, rules=rules, present=present, anp=sorted(source.labels(ANP)), meaning=meaning)


def figure(table: pd.DataFrame) -> Dots:
    series = {name: f"ra_{name}" for name in table.attrs["present"]}
    note = "Bars: 95 % intervals over seeds. Oracle and leaky choose with the test set."
    return Dots((ev.dot_panel(table, "RA by rule of selection", "RA in %", series),), note)
