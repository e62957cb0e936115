"""Attackers who know the defense, against the same attack at strength 0."""

from __future__ import annotations

from typing import Any

import pandas as pd

from attacks.adaptive import Adaptive
from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Lines, Panel, Series
from benchmark.report.words import gate_words

COLUMNS = (
    *ev.text(attack="Attack"), *ev.DEFENSE, *ev.interval(base="RA, strength 0"), *ev.number(strength="Strongest that implants"),
    *ev.interval(strong="RA there"), *ev.difference(difference="RA, difference", asr_difference="ASR, difference"),
    *ev.text(implanted="Implanted, by strength"),
)  # fmt: skip


def _line(at: dict[float, pd.DataFrame], strongest: float) -> dict[str, Any]:
    """One entry at strength 0 and at the strongest that implants; differences are missing where that is 0."""
    ends = [at[strength].assign(attack="") for strength in (strongest, 0.0)]
    gaps = {name: ev.paired_gap(ends[0], ends[1], name)[0] if strongest > 0 else ev.UNMEASURED for name in ("ra", "asr")}
    means = {"strong": ev.mean(at[strongest], "ra"), "base": ev.mean(at[0.0], "ra")}
    parts = {**means, "difference": gaps["ra"], "asr_difference": gaps["asr"]}
    return {"strength": strongest, **{key: value for name, part in parts.items() for key, value in ev.bounded(name, part).items()}}


def frame(source: ev.Source) -> pd.DataFrame:
    known = {s.attack_label: s.attack for s in source.matrix.scenarios if isinstance(s.attack, Adaptive)}
    if len({(attack.name, attack.strength) for attack in known.values()}) < 2:
        raise ev.Missing("it takes an adaptive attack at two strengths or more")
    every, cells = ev.before_defense(source.rows), ev.finished(ev.judged(source.rows))
    lines, works = [], {}
    for kind in dict.fromkeys(attack.name for attack in known.values()):
        labels = dict(sorted((attack.strength, label) for label, attack in known.items() if attack.name == kind))
        worlds = {strength: every[every["attack"] == label] for strength, label in labels.items()}
        works[kind] = [strength for strength, here in worlds.items() if here["implanted"].astype(bool).mean() > 0.5]
        counts = "; ".join(f"{strength:g}: {ev.implanted_words(here)}" for strength, here in worlds.items())
        mine = cells[cells["attack"].isin(labels.values())]
        for entry in stats.entries(mine):
            own = ev.of_entry(mine, entry)
            at = {0.0: own.iloc[:0]} | {strength: own[own["attack"] == label] for strength, label in labels.items()}
            met = [strength for strength, part in at.items() if len(part)]
            points = {f"_{name}": tuple(ev.mean(at[strength], name) for strength in met) for name in ("ra", "asr")}
            lines.append({"attack": kind, "defense": entry[0], "scope": entry[1], "control": ev.control_words(own),
                          "implanted": counts, **_line(at, max(met)), "_x": tuple(met), **points})  # fmt: skip
    return ev.table_of(lines, f"no adaptive attack implanted ({gate_words(source.rows)})", works=works)


def figure(table: pd.DataFrame) -> Lines:
    def panel(kind: str, name: str) -> Panel:
        mine = table[table["attack"] == kind]
        series = tuple(Series(ev.entry_words(entry), line["_x"], line[f"_{name}"], entry)
                       for entry, (_, line) in zip(stats.entries(mine), mine.iterrows(), strict=True))  # fmt: skip
        return Panel(f"{kind}: {name.upper()}", "strength", "%", series, even=True)

    kinds = list(table.attrs["works"])
    panels = tuple(panel(kind, name) for name in ("ra", "asr") for kind in kinds)
    return Lines(panels, len(kinds), "Strengths at which most seeds implant, those seeds. Bands: 95 % intervals over seeds.")
