"""Which defense beats fine-tuning with the same clean images, and which beats the untouched model?"""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmark.analysis import rank_tests, stats
from benchmark.analysis.intervals import Interval
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import DotPanel, Dots
from benchmark.rules.tracks import TRACKS
from defenses.base import Knowledge
from defenses.fine_tuning import FineTuning

AGAINST = {FineTuning.name: FineTuning.name, stats.UNDEFENDED: "the untouched model"}
"""Label of what entries are compared with, and its name in words."""
EQUAL = "not distinguishable"
_METRICS = ("ra", "asr", "acc")
COLUMNS = (
    *ev.text(against="Against"), *ev.ENTRY, *ev.text(verdict="Verdict by RA"),
    *ev.difference(ra="RA, difference", asr="ASR, difference", acc="ACC, difference"),
    *ev.count(scenarios="Scenarios", pairs="Pairs"), *ev.number(p="p of RA (Wilcoxon, Holm)"), *ev.text(idle="Nothing changed"),
)  # fmt: skip


def verdict_words(ra: Interval, p: float) -> str:
    """``beats``, ``loses to`` or ``not distinguishable``: by the 95 % interval of the difference in RA and the adjusted p, both."""
    return {1: "beats", -1: "loses to", 0: EQUAL}[ev.verdict(ra) if p < rank_tests.LEVEL else 0]


def _post_training(rows: pd.DataFrame) -> list[str]:
    """Tracks of the rows that are granted the attacked model."""
    granted = {track.name for track in TRACKS if Knowledge.MODEL in track.grants}
    return [track for track in stats.tracks(rows) if track in granted]


def _budgets(rows: pd.DataFrame) -> dict[ev.Entry, int]:
    """Clean labelled images of every entry, the largest number over its cells."""
    found = rows.groupby(stats.ENTRY, sort=False)["clean_images"].max()
    return {(str(entry[0]), str(entry[1])): int(images) for entry, images in found.items()}  # type: ignore[index]


def _lines(rows: pd.DataFrame, control: str) -> list[dict[str, Any]]:
    """Post-training entries on whole networks against one control; those with another number of clean images are left out."""
    budgets, cells, lines = _budgets(rows), ev.finished(ev.judged(rows)), []
    for track in _post_training(rows):
        found = rank_tests.paired(rows, track, control, metrics=_METRICS, scenarios=True)
        if found.empty:
            continue
        idle = ev.idle_words(cells[cells["track"] == track])
        allowed = {0, budgets[found["control"].iloc[0], "whole"]}
        for key, mine in found.groupby(stats.ENTRY, sort=False):
            entry = (str(key[0]), str(key[1]))
            if mine["pairs"].max() == 0 or (control != stats.UNDEFENDED and budgets[entry] not in allowed):
                continue
            by = {str(line["metric"]): line for _, line in mine.iterrows()}
            parts = {name: ev.interval_of(line, "difference") for name, line in by.items()}
            line: dict[str, Any] = {"against": AGAINST[control], "track": track, "defense": entry[0], "scope": entry[1]}
            for name in _METRICS:
                line |= ev.bounded(name, parts[name])
            lines.append(line | {"scenarios": int(by["ra"]["blocks"]), "pairs": int(by["ra"]["pairs"]),
                                 "p": float(by["ra"]["p_blocks"]), "idle": idle.get(entry, "")})  # fmt: skip
    for line, p in zip(lines, rank_tests.holm([line["p"] for line in lines]), strict=True):
        line["p"], line["verdict"] = p, verdict_words(ev.interval_of(line, "ra"), p)
    return lines


def frame(source: ev.Source) -> pd.DataFrame:
    rows = source.rows[source.rows["scope"] == "whole"]
    lines = [line for control in AGAINST for line in _lines(rows, control)]
    counts = {words: len([line for line in lines if line["against"] == words]) for words in AGAINST.values()}
    least = {words: rank_tests.blocks_needed(max(1, count)) for words, count in counts.items()}
    return ev.table_of(lines, "no defense finished beside fine-tuning on an implanted attack", needed=least)


def figure(table: pd.DataFrame) -> Dots:
    def panel(against: str, mine: pd.DataFrame) -> DotPanel:
        def name(line: pd.Series) -> str:
            return str(line["defense"] if line["verdict"] == EQUAL else f"{line['defense']}: {line['verdict']}")

        marks = {metric.upper(): metric for metric in _METRICS}
        return ev.dot_panel(mine, f"Difference to {against}", "points", marks, name, signed=True)

    panels = tuple(panel(str(against), mine) for against, mine in table.groupby("against", sort=False))
    note = ("Paired by attacked model; bars: 95 % intervals that resample scenarios. Names say which entries beat or lose to the "
            "other in RA; the rest cannot be distinguished from it.")  # fmt: skip
    return Dots(panels, note, len(panels), width=3.3)
