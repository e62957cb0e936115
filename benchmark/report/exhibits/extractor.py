"""Heads on features of every origin: do attacks implant, do defenses help, and is a plain classifier on the features better?"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import DotPanel, Dots

COLUMNS = (
    *ev.text(victims="Victims", attack="Attack", implanted="Implanted"), *ev.interval(acc="ACC"),
    *ev.difference(loss="Loss of ACC to the benign twin"), *ev.interval(asr="ASR"), *ev.text(best="Best defense of the head"),
    *ev.share(best_ra="RA, best defense"), *ev.text(plainest="Best plain classifier on the features"),
    *ev.share(plainest_ra="RA, plain classifier"), *ev.difference(difference="RA, difference"),
)  # fmt: skip


def _best(cells: pd.DataFrame, entries: list[ev.Entry]) -> tuple[ev.Entry, float] | None:
    """The entry of the highest mean RA."""
    means = {entry: ev.mean(ev.of_entry(cells, entry), "ra").mean for entry in entries}
    found = {entry: value for entry, value in means.items() if not math.isnan(value)}
    return max(found.items(), key=lambda item: item[1]) if found else None


def _line(at: pd.DataFrame, plain: list[ev.Entry]) -> tuple[dict[str, Any], list[int]]:
    """The best defense and the best plain classifier of one attack; on which side of up to two classifiers the defense is."""
    best = _best(at, ev.competitors(at))
    if best is None:
        return {}, []
    line: dict[str, Any] = {"best": ev.entry_words(best[0]), "best_ra": best[1]}
    gaps = {entry: ev.paired_gap(ev.of_entry(at, best[0]), ev.of_entry(at, entry), "ra")[0] for entry in plain}
    top = _best(at, plain)
    if top is not None:
        line |= {"plainest": top[0][0], "plainest_ra": top[1], **ev.bounded("difference", gaps[top[0]])}
    return line, [ev.verdict(gaps[entry]) for entry in plain[:2]]


def frame(source: ev.Source) -> pd.DataFrame:
    given = {cell.defense_label: cell.extractor_label for cell in source.matrix.cells if cell.extractor is not None}
    frozen = {s.backbone_label: s.frozen.label for s in source.matrix.scenarios if s.frozen}
    if not frozen:
        raise ev.Missing("it takes a victim on given features")
    every = ev.before_defense(source.rows).assign(victims=lambda rows: ev.victims_words(rows))
    live = ev.finished(ev.judged(source.rows))
    lines, sides, panels = [], [], []
    for (victims, backbone), worlds in every.groupby(["victims", "backbone"], sort=False):
        label = frozen.get(str(backbone), "")
        here = live[live["backbone"] == backbone]
        for attack, models in worlds.groupby("attack", sort=False):
            at = here[here["attack"] == attack]
            controls = stats.entries(at[at["control"].astype(bool)]) if label else []
            found, side = _line(at, [entry for entry in controls if given.get(entry[0]) == label])
            sides += side
            lines.append({"victims": victims, "attack": attack, "implanted": ev.implanted_words(models),
                          **ev.means_of(models, ("acc", "asr", "loss")), "best": "", "best_ra": math.nan, "plainest": "",
                          "plainest_ra": math.nan, **ev.bounded("difference", ev.UNMEASURED), **found})  # fmt: skip
        own = [entry for entry in stats.entries(here) if not given.get(entry[0]) or given[entry[0]] == label]
        if own:
            panels.append(_panel(here, own, str(victims)))
    return ev.table_of(lines, sides=sides, panels=panels)


def _panel(cells: pd.DataFrame, entries: list[ev.Entry], victims: str) -> DotPanel:
    parts = [(entry, ev.of_entry(cells, entry)) for entry in entries]
    board = pd.DataFrame([{"defense": entry[0], "scope": entry[1], "control": part["control"].any(), **ev.means_of(part)}
                          for entry, part in parts])  # fmt: skip
    worked = len(cells[stats.SCENARIO].drop_duplicates())
    title = f"Victims {victims}; {worked} attack{'s' * (worked != 1)} implanted"
    return ev.dot_panel(board, title, "%", {"RA": "ra", "ASR": "asr"})


def figure(table: pd.DataFrame) -> Dots | None:
    note = "Means over implanted attacked models; bars: 95 % intervals over seeds."
    return Dots(tuple(table.attrs["panels"]), note) if table.attrs["panels"] else None
