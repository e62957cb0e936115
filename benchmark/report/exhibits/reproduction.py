"""Does every defense do here what its publications print? Verdicts by the rule of :mod:`benchmark.analysis.reproduction`."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from benchmark.analysis import published, reproduction, stats
from benchmark.analysis.published import METRICS, Comparison, Printed
from benchmark.analysis.reproduction import Judged, Verdict
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Heat, HeatPanel, Key, Mark
from benchmark.report.style import wrapped
from benchmark.report.text import DASH, percent_text, plain

COLUMNS = (
    *ev.text(track="Track", defense="Defense", verdict="Verdict", claim="Claim of its paper", paper="Paper"),
    *ev.text(claimed="Figure of its own"),
    *ev.text(scenario="Nearest protocol", printed="Published there", sources="Sources"),
    *ev.share(acc_before="ACC, undefended", acc="ACC", asr_before="ASR, undefended", asr="ASR"),
    *ev.share(ra_before="RA, undefended", ra="RA"),
    *ev.text(good="As published or better", bad="Worse", undecided="Undecided", idle="Nothing changed", reason="Reason"),
)  # fmt: skip
_COLOURS = {reproduction.AS_PUBLISHED: "#92C5DE", reproduction.WORSE: "#F4A582", reproduction.UNDECIDED: "#C9C9C9",
            reproduction.NOT_COMPARED: "#F4F4F4"}  # fmt: skip
"""Of cells by state: blue and orange, which colour-blind readers distinguish too."""
_WORDS = ("as published or better", "worse than published", "undecided: the undefended model would pass too", "nothing published")


# -- the table -----------------------------------------------------------------------------------------------------------------


def _range(band: tuple[float, float]) -> str:
    low, high = map(percent_text, band)
    return low if low == high else f"{low}{DASH}{high}"


def _where(places: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], str]:
    """A scenario in words: its attack, with the network where several were run."""
    several = len({place[:2] for place in places}) > 1
    return {place: f"{place[2]} on {place[1]}" if several else place[2] for place in places}


def _comparison(mine: pd.DataFrame, place: tuple[str, str, str], known: list[Comparison], *, implanted: bool) -> Comparison:
    """The literature's figures of an entry in one scenario; without any where there are none."""
    first = mine.iloc[0]
    entry = (str(first["defense"]), str(first["scope"]))
    values = tuple({name: float(line[name]) for name in METRICS} for _, line in mine.iterrows())
    rate, selection = float(first["rate"]), str(first["selection"])
    nothing = Comparison(place, rate, entry, "defense", (), selection, values, (), implanted, False, "")
    return next((one for one in known if (one.place, one.entry) == (place, entry)), nothing)


def _by_entry(rows: pd.DataFrame, track: str) -> list[tuple[ev.Entry, list[Judged]]]:
    """Every competing entry of a track on whole networks that were trained end to end, with its finished scenarios."""
    table = rows[(rows["track"] == track) & (rows["selection"] == stats.headline(rows, track)) & (rows["features"] == "")]
    table = table[(table["scope"] == "whole") & (table["attack"] != stats.NO_ATTACK)]
    live, known = stats.scenarios(rows).set_index(stats.SCENARIO)["implanted"], published.comparisons(rows, track)
    found = []
    for entry in ev.competitors(table):
        mine = ev.of_entry(table, entry)
        mine, cells = mine[mine["status"] == "ok"], []
        for key, here in mine.groupby(stats.SCENARIO, sort=False):
            place = (str(key[0]), str(key[1]), str(key[2]))
            cells.append(reproduction.judged(_comparison(here, place, known, implanted=bool(live[place])), here))
        found.append((entry, cells))
    return found


def _shown(cells: list[Judged], claim: reproduction.Claim | None) -> Judged | None:
    """The scenario a line prints: that of the claim's own figure where it is compared, else the first one compared."""
    order = {state: place for place, state in enumerate(reproduction.STATES)}
    compared = sorted((one for one in cells if one.implanted), key=lambda one: max(1, order[one.state]))
    own = claim.figure.attack if claim and claim.figure else ""
    return next((one for one in compared if own and published.counterpart(one.attack, [own])), next(iter(compared), None))


def _line(track: str, entry: ev.Entry, cells: list[Judged], names: dict[tuple[str, str, str], str]) -> dict[str, Any]:
    known = reproduction.claims()
    claim = known.get(published.counterpart(entry[0], known) or "")
    verdict, shown = reproduction.judge(cells), _shown(cells, claim)
    line: dict[str, Any] = {
        "track": track, "defense": entry[0], "verdict": verdict.words + f" ({verdict.why})" * bool(verdict.why),
        "claim": claim.claim if claim else "no claim on file", "paper": f"{claim.paper}, {claim.place}" if claim else "",
        "claimed": _figure(claim.figure) if claim and claim.figure else "",
        "scenario": names[shown.place] if shown else "", "printed": "", "sources": "",
        **dict.fromkeys(("acc_before", "acc", "asr_before", "asr", "ra_before", "ra"), math.nan),
        "good": _names(verdict.good, names), "undecided": _names(verdict.undecided, names), "idle": _idle(cells),
        "bad": ", ".join(f"{names[one.place]} ({', '.join(one.worse)})" for one in verdict.bad),
        "reason": reproduction.reason_words(entry[0], verdict), "_cells": cells, "_verdict": verdict,
    }  # fmt: skip
    if shown is not None:
        line |= {f"{name}_before": shown.before[name] for name in METRICS} | {name: shown.after[name] for name in METRICS}
        if shown.printed:
            line |= {"printed": f"ASR {_range(shown.asr)}, loss of ACC {_range(shown.loss)}",
                     "sources": "; ".join(dict.fromkeys(figure.source for figure in shown.printed))}  # fmt: skip
    return line


def _figure(one: Printed) -> str:
    return f"{one.attack} {100 * one.rate:g} %, {one.backbone}: ACC {percent_text(one.acc)}, ASR {percent_text(one.asr)}"


def _idle(cells: list[Judged]) -> str:
    """In how many cells of implanted scenarios nothing was changed."""
    idle, of = sum(one.idle for one in cells if one.implanted), sum(one.seeds for one in cells if one.implanted)
    return f"no change in {idle} of {of}" if idle else ""


def _names(some: tuple[Judged, ...], names: dict[tuple[str, str, str], str]) -> str:
    return ", ".join(names[one.place] for one in some)


def _undefended(rows: pd.DataFrame) -> dict[tuple[str, str, str], tuple[dict[str, float], dict[str, tuple[float, float]]]]:
    """Implanted scenarios -> figures of the undefended models here, and the published bands (NaN: none)."""
    found = {}
    every = [one for track in stats.tracks(rows) for one in published.comparisons(rows, track)]
    known = {one.place: one for one in every if one.role == "reference"}
    worlds = ev.before_defense(stats.implanted_worlds(rows))
    for key, here in worlds[worlds["features"] == ""].groupby(stats.SCENARIO, sort=False):
        place = (str(key[0]), str(key[1]), str(key[2]))
        figures = reproduction.nearest(known[place].printed, place[1]) if place in known else []
        bands = {name: published.band(getattr(figure, name) for figure in figures) for name in METRICS}
        found[place] = ({name: float(here[name].mean()) for name in METRICS}, bands)
    return found


def frame(source: ev.Source) -> pd.DataFrame:
    ev.judged_cells(source.rows)
    before = _undefended(source.rows)
    names = _where(list(before))
    lines = [_line(track, entry, cells, {one.place: one.attack for one in cells} | names)
             for track in stats.tracks(source.rows) for entry, cells in _by_entry(source.rows, track)]  # fmt: skip
    beside = [(names[place], *(f"{percent_text(ours[name])} ({_range(theirs[name])})" for name in ("asr", "acc")))
              for place, (ours, theirs) in before.items() if not math.isnan(theirs["asr"][0])]  # fmt: skip
    verdicts = Counter(line["_verdict"].words for line in lines)
    return ev.table_of(lines, "no defense was run on a whole network", beside=beside, verdicts=dict(verdicts), before=before,
                       asr_tolerance=reproduction.ASR_TOLERANCE, loss_tolerance=reproduction.LOSS_TOLERANCE)  # fmt: skip


# -- the picture ---------------------------------------------------------------------------------------------------------------


def _colour(state: str) -> float:
    """The middle of a state's step on the scale from 0 to 100."""
    return 100 * (list(_COLOURS).index(state) + 0.5) / len(_COLOURS)


def _text(one: Judged) -> str:
    """Ours above the published band's upper ends: ASR and loss of ACC."""
    ours = f"{percent_text(one.after['asr'])} | {percent_text(one.before['acc'] - one.after['acc'])}"
    if one.state == reproduction.NOT_COMPARED:
        return ours
    return f"{ours}\n\N{LESS-THAN OR EQUAL TO} {percent_text(one.asr[1])} | {percent_text(one.loss[1])}"


def _whole(band: tuple[float, float]) -> str:
    """A band in whole percent."""
    return DASH.join(dict.fromkeys(f"{100 * end:.0f}" for end in band))


def _name(line: pd.Series) -> str:
    verdict: Verdict = line["_verdict"]
    count = "" if verdict.why else f": {len(verdict.good)} of {len(verdict.good) + len(verdict.bad)}"
    return f"{wrapped(plain(line['defense']), 30, 1)}\n{verdict.words}{count}"


def _panel(table: pd.DataFrame, network: tuple[str, str], width: int) -> HeatPanel:
    """Entries that were run on a network down, its attacks across, ``width`` columns; the undefended models first."""
    before = {place[2]: parts for place, parts in table.attrs["before"].items() if place[:2] == network}
    attacks = list(before)
    table = table[[any(one.place[:2] == network and one.attack in before for one in cells) for cells in table["_cells"]]]
    shape = (len(table) + 1, width)
    values, texts = np.full(shape, math.nan), np.full(shape, "", dtype=object)
    for column, (ours, theirs) in enumerate(before.values()):
        values[0, column] = _colour(reproduction.NOT_COMPARED)
        published_too = not math.isnan(theirs["asr"][0])
        texts[0, column] = f"{percent_text(ours['asr'])} | {percent_text(ours['acc'])}" + (
            "\n" + " | ".join(_whole(theirs[name]) for name in ("asr", "acc")) if published_too else "")  # fmt: skip
    for row, (_, line) in enumerate(table.iterrows(), 1):
        for one in line["_cells"]:
            if one.place[:2] == network and one.attack in before:
                column = attacks.index(one.attack)
                values[row, column] = _colour(one.state)
                texts[row, column] = _text(one)
    names = ("undefended: ASR | ACC\nand as published", *(_name(line) for _, line in table.iterrows()))
    heads = tuple(wrapped(plain(name), 12, 3) for name in attacks)
    return HeatPanel(network[1], heads + ("",) * (width - len(heads)), names, values, texts)


def figure(table: pd.DataFrame) -> Heat:
    networks = list(dict.fromkeys(place[:2] for place in table.attrs["before"]))
    width = max(sum(place[:2] == network for place in table.attrs["before"]) for network in networks)
    panels = tuple(_panel(table, network, width) for network in networks)
    key: Key = tuple((words, Mark(colour, kind="band")) for words, colour in zip(_WORDS, _COLOURS.values(), strict=True))
    note = ("Each cell: ASR | loss of ACC in %, means over seeds; below it the largest published ones of the nearest protocol. "
            f"Worse: more than {100 * reproduction.ASR_TOLERANCE:g} points above the largest published ASR, or more than "
            f"{100 * reproduction.LOSS_TOLERANCE:g} above the largest loss. Networks are narrower than the published ones. "
            "Counts: scenarios as published, of those that are decided.")  # fmt: skip
    return Heat(panels, 1, note, tuple(_COLOURS.values()), rules=(1,), key=key, cell=(0.86, 0.42))
