"""Every defense on the head and on the whole network, with seconds."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots
from defenses.holder_pruning import HolderPruning

COLUMNS = (
    *ev.text(victims="Victims", defense="Defense", control=""), *ev.interval(ra_head="RA, head", ra_whole="RA, whole"),
    *ev.difference(difference="RA, head - whole"), *ev.share(asr_head="ASR, head", asr_whole="ASR, whole"),
    *ev.share(acc_head="ACC, head", acc_whole="ACC, whole"),
    *ev.number(seconds_head="Seconds, head", seconds_whole="Seconds, whole"), *ev.count(pairs="Pairs"),
)  # fmt: skip


def frame(source: ev.Source) -> pd.DataFrame:
    cells = ev.judged_cells(source.rows)
    cells = cells.assign(victims=ev.victims_words(cells)).merge(source.timings[["cell", "seconds"]], on="cell", how="left")
    cells = cells[cells["defense"] != stats.UNDEFENDED]
    lines = []
    for (victims, defense), mine in cells.groupby(["victims", "defense"], sort=False):
        at = {name: mine[mine["scope"] == name] for name in ("head", "whole")}
        if at["head"].empty:
            continue
        line: dict[str, Any] = {"victims": victims, "defense": defense, "control": ev.control_words(mine)}
        for name, part in at.items():
            for metric in ("asr", "ra", "acc"):
                line |= ev.bounded(f"{metric}_{name}", ev.mean(part, metric))
            line[f"seconds_{name}"] = float(part["seconds"].median()) if len(part) else math.nan
        difference, pairs = ev.paired_gap(at["head"], at["whole"], "ra") if len(at["whole"]) else (ev.UNMEASURED, 0)
        lines.append({**line, **ev.bounded("difference", difference), "pairs": pairs})
    table = pd.DataFrame(lines)
    if table.empty or table[table["control"] == ""]["pairs"].sum() == 0:
        raise ev.Missing("no defense finished at both scopes on an implanted attack")
    table.attrs = {"seconds": _seconds(table[table["control"] == ""], set(source.labels(HolderPruning)))}
    return table


def _seconds(competing: pd.DataFrame, own: set[str]) -> tuple[float, float, float]:
    """The fastest Hölder pruning on the head, the slowest other defense on the head, the slowest defense of the whole network."""
    mine, rest = competing[competing["defense"].isin(own)], competing[~competing["defense"].isin(own)]
    parts = ((mine, "seconds_head"), (rest, "seconds_head"), (competing, "seconds_whole"))
    seconds = [part.groupby("defense")[name].mean() for part, name in parts]
    return float(seconds[0].min()), float(seconds[1].max()), float(seconds[2].max())


def _brief(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def figure(table: pd.DataFrame) -> Dots:
    def name(line: pd.Series) -> str:
        control = " (control)" if line["control"] else ""
        return f"{line['defense']}{control}, {_brief(line['seconds_head'])} / {_brief(line['seconds_whole'])} s"

    both = table[table["pairs"] > 0]
    panels = [
        ev.dot_panel(part, f"Victims {victims}", "RA in %", {"head": "ra_head", "whole": "ra_whole"}, name)
        for victims, part in both.groupby("victims", sort=False) if (part["control"] == "").any()
    ]  # fmt: skip
    return Dots(tuple(panels), "Seconds: head / whole, median over cells. Bars: 95 % intervals over seeds.")
