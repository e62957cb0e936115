"""A trigger searched for on a benign model: kept, and found again on the defended model."""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots
from benchmark.rules.metrics import IMPLANTED_ASR

COLUMNS = (
    *ev.text(attack="Attack"), *ev.DEFENSE, *ev.interval(acc="ACC", asr="ASR, trigger kept", asr_recraft="ASR, found again"),
    *ev.difference(gap="Difference"), *ev.share(ra="RA, kept", ra_recraft="RA, found again"),
)  # fmt: skip


def frame(source: ev.Source) -> pd.DataFrame:
    cells = ev.judged(source.rows)
    # Nobody poisoned these models, so the effect is 0 by definition: what counts here is that the trigger works.
    cells = cells[(cells["status"] == "ok") & cells["asr_recraft"].notna() & (cells["asr_undefended"] >= IMPLANTED_ASR)]
    lines, models = [], []
    for attack, worlds in ev.before_defense(source.rows).groupby("attack", sort=False):
        working = int((worlds["asr"] >= IMPLANTED_ASR).sum())
        models.append({"attack": attack, "models": len(worlds), "asr": ev.mean(worlds, "asr"), "working": working})
        mine = cells[cells["attack"] == attack].assign(gap=lambda rows: rows["asr_recraft"] - rows["asr"])
        for entry in stats.entries(mine):
            own = ev.of_entry(mine, entry)
            lines.append({"attack": attack, "defense": entry[0], "scope": entry[1], "control": ev.control_words(own),
                          **ev.means_of(own, ("acc", "asr", "ra", "asr_recraft", "ra_recraft", "gap"))})  # fmt: skip
    return ev.table_of(lines, "no trigger that is computed on the model works", attacks=models)


def figure(table: pd.DataFrame) -> Dots:
    series = {"trigger kept": "asr", "found again": "asr_recraft"}
    panels = [ev.dot_panel(part, str(attack), "ASR in %", series) for attack, part in table.groupby("attack", sort=False)]
    return Dots(tuple(panels), ev.BARS)
