"""Rows -> what :mod:`benchmark.report.page` shows, as JSON: every figure with its text, every text once.

Every figure is computed by :mod:`benchmark.analysis.stats`; the page's script averages, ranks and rounds nothing.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmark.analysis import intervals, stats
from benchmark.report import words
from benchmark.report.style import looks
from benchmark.report.tables import boards
from benchmark.report.text import DASH, number_text, percent_text, plain, signed_percent
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON

__all__ = ["Picture", "contents"]

_SHARES = {"acc": False, "asr": False, "ra": False, "d_acc": True}
"""The metrics with a column of their own, and whether they are differences."""

Json = dict[str, Any]
Facts = list[tuple[str, str]]
"""(name, text); those with an empty text are left out of the page."""
Place = tuple[str, ...]
Entry = tuple[str, str]


class Picture(NamedTuple):
    """A trigger. ``image``: PNG, clean images above triggered ones above their ``difference``, which says how it is amplified."""

    attack: str
    difference: str
    image: bytes


class _Words:
    """Texts by number, each kept once; everything that enters is made plain."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, value: object) -> int:
        return self.numbers.setdefault(plain(value), len(self.numbers))

    def facts(self, pairs: Iterable[tuple[str, str]]) -> list[int]:
        """(name, text) pairs as a flat list of numbers, without those whose text is empty."""
        return [number for name, text in pairs if text for number in (self(name), self(text))]


# -- figures: [value, text, interval or spread in words], or None where there is no value ----------------------------------------


def _figure(value: float, text: str, *more: str) -> list[Any] | None:
    """The value has the 6 decimals of rows.csv and no negative zero."""
    return None if math.isnan(value) else [float(f"{value:.6f}") + 0.0, text, *more]


def _share(line: Any, name: str, *, signed: bool = False) -> list[Any] | None:
    """A leaderboard's share in percent with its interval; none where a scenario has one seed."""
    mean, low, high = (float(line[column]) for column in (name, f"{name}_low", f"{name}_high"))
    bounds = "" if math.isnan(low) else f"[{percent_text(low, signed=signed)}, {percent_text(high, signed=signed)}]"
    return _figure(mean, percent_text(mean, signed=signed), bounds)


def _spread(values: Iterable[float], *, signed: bool = False) -> list[Any] | None:
    """A share over the seeds of one scenario, with their sample deviation."""
    found = [float(value) for value in values if not math.isnan(value)]
    mean, deviation = float(np.mean(found)) if found else math.nan, intervals.spread(found)
    return _figure(mean, percent_text(mean, signed=signed), "" if math.isnan(deviation) else f"±{100 * deviation:.1f}")


def _count(value: float) -> list[Any] | None:
    return _figure(value, number_text(value))


def _words_of(figure: list[Any] | None) -> str:
    return DASH if figure is None else " ".join(part for part in figure[1:] if part)


def _known(value: float, text: str = "{}", form: Any = percent_text) -> str:
    """A number in a text; empty where there is no number."""
    return "" if math.isnan(value) else text.format(form(float(value)))


def _clock(clock: Mapping[Any, Any] | None) -> str:
    """Seconds and memory of :class:`benchmark.storage.rows.Timing`."""
    if clock is None:
        return ""
    return f"{number_text(float(clock['seconds']))} s; {number_text(float(clock['peak_mib']))} MiB, on the machine that ran it"


_POINTS = "{} points"


def _with_deltas(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(d_acc=rows["acc"] - rows["acc_undefended"], d_asr=rows["asr"] - rows["asr_undefended"])


def _joined(lines: Iterable[Mapping[Any, Any]], name: str, between: str = "; ") -> str:
    return words.distinct((line[name] for line in lines), between)


# -- the parts of the page -----------------------------------------------------------------------------------------------------


class _Matrix(NamedTuple):
    """What all parts share: the rows, and the numbers by which the page calls tracks, entries, scenarios and cells."""

    rows: pd.DataFrame
    texts: _Words
    tracks: dict[str, int]
    entries: dict[Entry, int]
    scenarios: dict[Place, int]
    implanted: dict[Place, bool]
    cells: dict[str, int]

    @classmethod
    def of(cls, rows: pd.DataFrame) -> _Matrix:
        """Numbers in matrix order."""
        gates = {tuple(line[stats.SCENARIO]): bool(line["implanted"]) for _, line in stats.scenarios(rows).iterrows()}
        orders = (stats.tracks(rows), stats.entries(rows), rows[stats.SCENARIO].itertuples(index=False, name=None))
        tracks, entries, scenarios = ({name: number for number, name in enumerate(dict.fromkeys(order))} for order in orders)
        cells = {cell: number for number, cell in enumerate(dict.fromkeys(rows["cell"]))}
        return cls(rows, _Words(), tracks, entries, scenarios, gates, cells)  # type: ignore[arg-type]

    def head(self, track: str, selection: str, line: Any) -> Json:
        """Which line of which board this is."""
        entry = (line["defense"], line["scope"])
        return {"t": self.tracks[track], "s": selection, "e": self.entries[entry], "role": str(line["role"])}


def _scenarios(matrix: _Matrix, found: Sequence[Picture], shared: Mapping[str, str]) -> list[Json]:
    """Every scenario with its gate and its undefended models: means over all seeds, implanted or not, and their spread."""
    rows, texts = matrix.rows, matrix.texts
    gates = {tuple(line[stats.SCENARIO]): words.state_words(line) for _, line in stats.scenarios(rows).iterrows()}
    worlds, drawn = rows.drop_duplicates(stats.WORLD), {one.attack: number for number, one in reversed(list(enumerate(found)))}
    lines = []
    for place in matrix.scenarios:
        mine = worlds[(worlds[stats.SCENARIO] == list(place)).all(axis=1)]
        lines.append({
            **dict(zip("dba", map(texts, place), strict=True)), "implanted": matrix.implanted.get(place, False),
            "state": texts(gates.get(place, "no attack")), "picture": drawn.get(shared.get(place[2], place[2])),
            "rate": texts(f"{100 * float(mine['rate'].iloc[0]):g} %"),
            "undefended": {name: _spread(mine[f"{name}_undefended"]) for name in ("acc", "asr", "ra")},
            "benign": _spread(mine["acc_benign"]),
        })  # fmt: skip
    return lines


def _given(rows: pd.DataFrame, track: str, selection: str) -> dict[Entry, Facts]:
    """What each entry of a track's field was given, in texts."""
    return {
        (line["defense"], line["scope"]): [
            *boards.given(line).items(), ("Cost, of which extractor", _known(line["extractor_epochs"], form=number_text)),
        ]
        for _, line in stats.given(rows, track, selection).iterrows()
    }  # fmt: skip


def _gaps(rows: pd.DataFrame, track: str) -> dict[Entry, Facts]:
    """RA that the oracle would have reached beyond each way of choosing, in points."""
    return {
        (line["defense"], line["scope"]): [
            (f"RA below the oracle's, {name}", f"{_words_of(_share(line, f'gap_{name}', signed=True))} points")
            for name in stats.SELECTIONS if f"gap_{name}" in line
        ]
        for _, line in stats.selection_gaps(rows, track).iterrows()
    }  # fmt: skip


def _means(matrix: _Matrix, timings: pd.DataFrame) -> list[Json]:
    """The leaderboards, line by line: means over implanted scenarios as :func:`benchmark.analysis.stats.leaderboard` gives them."""
    rows, texts, lines = matrix.rows, matrix.texts, []
    clocks = stats.timing_summary(rows, timings).set_index(["track", *stats.ENTRY]).to_dict("index")
    counted = words.gate_words(rows)
    for track in matrix.tracks:
        gaps, table = _gaps(rows, track), stats.field(rows, track)
        for selection in stats.selections(rows, track):
            given = _given(rows, track, selection)
            notes = table[table["selection"] == selection].groupby(stats.ENTRY)["note"].agg(partial(words.distinct, between="; "))
            for _, line in stats.leaderboard(rows, track, selection).iterrows():
                entry = (line["defense"], line["scope"])
                facts = [
                    ("Selection", words.SELECTION_WORDS.get(selection, selection)), *given.get(entry, []),
                    ("Measured in track", line["source"] if line["source"] != track else ""), ("Marks", words.mark_words(line)),
                    ("Pruned / units", words.units_text(line)),
                    ("dASR", f"{_words_of(_share(line, 'd_asr', signed=True))} points" if line["cells_ok"] else ""),
                    ("DER", _words_of(_share(line, "der")) if line["cells_ok"] else ""), *gaps.get(entry, []),
                    ("Seconds, median; peak memory", _clock(clocks.get((line["source"], *entry)))), ("Note", str(notes[entry])),
                    ("Not in the means", line["reasons"]), ("Gate", counted),
                ]  # fmt: skip
                lines.append({
                    **matrix.head(track, selection, line), "place": int(line["place"]),
                    "rank": _figure(line["rank"], f"{line['rank']:.2f}"),
                    **{name: _share(line, name, signed=signed) for name, signed in _SHARES.items()},
                    "cost": _count(float(line["cost_epochs"])), "ok": int(line["cells_ok"]), "of": int(line["cells"]),
                    "missing": texts(line["missing"]), "facts": texts.facts(facts),
                })  # fmt: skip
    return lines


def _records(table: pd.DataFrame) -> list[Json]:
    return [{str(name): value for name, value in line.items()} for line in table.to_dict("records")]


def _places(matrix: _Matrix) -> list[Json]:
    """Every entry in every scenario: means over the seeds that count there, their spread, and the rank by RA inside the scenario.

    The leaderboards' means are the means of these over implanted scenarios; the others are in no mean.
    """
    rows, lines = _with_deltas(matrix.rows), []
    # Only what ranks are made of: copying a table with all columns takes several times as long.
    gate = ["implanted", "asr_undefended", "asr_benign", "acc_undefended", "acc_benign", "acc_loss_se"]
    narrow = rows[[*stats.WORLD, *stats.ENTRY, "track", "selection", "control", "status", *gate, stats.RANK_KEY]]
    within = {place: narrow[(narrow[stats.SCENARIO] == list(place)).all(axis=1)] for place in matrix.scenarios}
    for track in matrix.tracks:
        table = stats.field(rows, track)
        for selection in stats.selections(rows, track):
            found: dict[Place, dict[Entry, list[Json]]] = {}
            for line in _records(table[table["selection"] == selection]):
                place = tuple(line[name] for name in stats.SCENARIO)
                found.setdefault(place, {}).setdefault((line["defense"], line["scope"]), []).append(line)
            for place in (place for place in matrix.scenarios if place in found):
                ranked = matrix.implanted.get(place, False) and selection not in stats.HINDSIGHT
                ranks = stats.average_ranks(within[place], track, selection) if ranked else {}
                lines += [matrix.head(track, selection, every[0]) | _place(matrix, track, place, every, ranks.get(entry, math.nan))
                          for entry, every in found[place].items()]  # fmt: skip
    return lines


def _place(matrix: _Matrix, track: str, place: Place, every: list[Json], rank: float) -> Json:
    """One entry in one scenario; ``every``: its rows there, one per seed."""
    good, bad = ([line for line in every if (line["status"] == "ok") is done] for done in (True, False))
    first, reasons = every[0], [f"{line['status']}: {line['reason'] or 'no reason recorded'}" for line in bad]
    # Where every seed has the same texts, once is enough.
    gates = {str(line["gate"]) for line in every}
    each = words.distinct((f"seed {line['seed']}: {line['gate']}" for line in every if line["gate"]), "; ")

    def mean(name: str, of: list[Json] = good) -> float:
        return float(np.mean([line[name] for line in of])) if of else math.nan

    facts = [
        ("Preset", _joined(every, "preset", " or ")),
        ("Pruned / units", words.units_text({"pruned": mean("pruned"), "units": mean("units")})), ("Marks", _marks(good)),
        ("Measured in track", first["source"] if first["source"] != track else ""), ("Note", _joined(every, "note")),
        ("Poisoning rate", f"{100 * first['rate']:g} % nominal, {percent_text(mean('realised_rate', every))} % realised"),
        ("Features of the victim", first["features"]), ("Not in the means", words.distinct(reasons, "; ")),
        ("Gate", gates.pop() if len(gates) == 1 else each),
    ]  # fmt: skip
    return {
        "p": matrix.scenarios[place], "rank": _figure(rank, f"{rank:g}"),
        **{name: _spread([line[name] for line in good], signed=signed) for name, signed in _SHARES.items()},
        "cost": _count(mean("cost_epochs")), "ok": len(good), "of": len(every),
        "missing": matrix.texts(_joined(bad, "status", " / ")), "facts": matrix.texts.facts(facts),
        "cells": [matrix.cells[line["cell"]] for line in every],
    }  # fmt: skip


def _mark(line: Json) -> str:
    return "kept untouched" if line["kept"] else str(line["mark"])


def _marks(lines: Sequence[Json]) -> str:
    """In how many of some finished cells a mark was recorded."""
    found = Counter(mark for line in lines if (mark := _mark(line)))
    return ", ".join(f"{mark} in {count} of {len(lines)}" for mark, count in found.items())


def _cell_facts(line: Json, dial: str, clock: Any) -> Facts:
    """The settings and everything measured of one cell under one selection, in texts."""
    done = line["status"] == "ok"
    undefended = " / ".join(percent_text(float(line[f"{name}_undefended"])) for name in ("acc", "asr", "ra"))
    found = {name: f"{percent_text(line[name])} %" for name in ("precision", "recall", "auroc")}
    isolated = f"{line['isolated']}; precision {found['precision']}, recall {found['recall']}, AUROC {found['auroc']}"
    return [
        ("Selection", words.SELECTION_WORDS.get(line["selection"], line["selection"])),
        ("Not measured", "" if done else f"{line['status']}: {line['reason'] or 'no reason recorded'}"),
        ("Preset", line["preset"]), ("Dial", _known(line["dial"], f"{dial or 'dial'}: {{}}", number_text)),
        ("Knob", _known(line["knob"], form=number_text)), ("Mark", _mark(line)),
        ("Pruned / units", words.units_text(line) if done else ""),
        ("ACC on held-out clean images", _known(line["val_acc"], "{} %")),
        ("Loss on them, with its standard error",
         _known(line["val_loss"], f"{{}} ± {percent_text(line['val_loss_se'])} points", signed_percent)),
        ("dASR", _known(line["d_asr"], _POINTS, signed_percent)), ("DER", _known(line["der"])),
        ("ASR / RA, trigger computed again", _known(line["asr_recraft"], f"{{}} / {percent_text(line['ra_recraft'])}")),
        ("Used of what it was granted", line["used"]),
        ("Clean labelled images", str(line["clean_images"] or "")), ("Training images", str(line["train_images"] or "")),
        ("Newly trained", "yes" if line["trained_anew"] else ""),
        ("Extractor", line["extractor"] and line["extractor"] + _known(line["extractor_epochs"], ", {} epochs", number_text)),
        ("Features of the victim", line["features"]), ("Isolated set", isolated if line["isolated"] else ""),
        ("Undefended ACC / ASR / RA", undefended), ("ACC of the benign twin", _known(line["acc_benign"])),
        ("ASR of the benign twin", _known(line["asr_benign"])),
        ("Poisoning rate", f"{100 * line['rate']:g} % nominal, {percent_text(line['realised_rate'])} % realised"),
        ("Labels", words.target_words(line)), ("Note", line["note"]), ("Gate", line["gate"]),
        ("Seconds; peak memory", _clock(clock)), ("Cell", line["cell"]),
    ]  # fmt: skip


def _curve(candidates: Sequence[Json], texts: _Words) -> Json | None:
    """A cell's dial as [dial, ACC, ASR, RA] points in its order, at the published setting of its knob; None where it has no two
    positions."""
    published = next((line["knob"] for line in candidates if line["is_default"]), math.nan)
    mine = [line for line in candidates if line["knob"] == published or math.isnan(published)]
    good = sorted((line for line in mine if math.isfinite(line["dial"])), key=lambda line: float(line["dial"]))
    if len({line["dial"] for line in good}) < 2:
        return None
    points = [[float(f"{line['dial']:.6g}"), *(float(f"{line[name]:.4f}") for name in ("acc", "asr", "ra"))] for line in good]
    return {"name": texts(good[0]["dial_name"] or "dial"), "points": points}


def _by_cell(table: pd.DataFrame) -> dict[str, list[Json]]:
    """The lines of each cell, in order."""
    found: dict[str, list[Json]] = {}
    for line in _records(table):
        found.setdefault(str(line["cell"]), []).append(line)
    return found


def _cells(matrix: _Matrix, curves: pd.DataFrame, timings: pd.DataFrame) -> list[Json]:
    """Every cell: what all its selections share, then what each of them measured."""
    texts, lines, dials = matrix.texts, [], _by_cell(curves)
    clocks = timings.drop_duplicates("cell").set_index("cell").to_dict("index")
    for cell, mine in _by_cell(_with_deltas(matrix.rows)).items():
        candidates = dials.get(cell, [])
        dial = str(candidates[0]["dial_name"]) if candidates else ""
        facts = [_cell_facts(line, dial, clocks.get(cell)) for line in mine]
        common = [pair for pair in facts[0] if all(pair in pairs for pairs in facts)]
        by = {}
        for line, pairs in zip(mine, facts, strict=True):
            done = line["status"] == "ok"
            by[str(line["selection"])] = {
                **{name: _figure(line[name], percent_text(line[name], signed=signed), "") for name, signed in _SHARES.items()},
                "cost": _count(float(line["cost_epochs"])), "ok": int(done), "of": 1,
                "missing": texts("" if done else line["status"]),
                "facts": texts.facts(pair for pair in pairs if pair not in common),
                **({} if math.isnan(line["dial"]) else {"dial": float(f"{line['dial']:.6g}")}),
            }  # fmt: skip
        lines.append({"seed": int(mine[0]["seed"]), "facts": texts.facts(common), "by": by, "curve": _curve(candidates, texts)})
    return lines


def _reading() -> Facts:
    """The glossary at the foot of the page."""
    partly = (
        " Intervals are for the whole matrix, so none is shown where a filter leaves a part of the scenarios; there ± is the "
        "sample standard deviation over the seeds of one scenario."
    )
    terms = {**words.GLOSSARY, "Intervals": words.GLOSSARY["Intervals"] + partly}
    selections = {f"Selection: {name}": rule for name, rule in words.SELECTION_WORDS.items()}
    return [(term, texts[0].upper() + texts[1:]) for term, texts in (terms | selections).items()] + [
        ("What the defender was given", words.GIVEN_NOTES)
    ]


def _tracks(matrix: _Matrix) -> list[Json]:
    rows, texts = matrix.rows, matrix.texts
    blind = set(rows.loc[rows["reason"] == NOTHING_TO_VALIDATE_ON, "track"])
    return [{
        "name": texts(track), "title": texts(words.track_words(track)), "judged": stats.headline(rows, track),
        "selections": stats.selections(rows, track), "why": texts(NOTHING_TO_VALIDATE_ON if track in blind else ""),
    } for track in matrix.tracks]  # fmt: skip


def _entries(matrix: _Matrix) -> list[Json]:
    texts, look = matrix.texts, looks(matrix.rows)
    colours = [*dict.fromkeys(one.colour for one in look.values())]
    return [{
        "name": texts("none (undefended)" if entry[0] == stats.UNDEFENDED else entry[0]), "scope": texts(entry[1]),
        "look": [colours.index(look[entry].colour), look[entry].marker],
    } for entry in matrix.entries]  # fmt: skip


def contents(
    rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, title: str, *, about: str = "",
    found: Sequence[Picture] = (), shared: Mapping[str, str] | None = None,
) -> Json:  # fmt: skip
    """Everything the page shows, as JSON: figures as [value, text, interval or spread in words], texts as numbers into ``words``.

    Args:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them. title, about: of the matrix.
        found: pictures of triggers. shared: attacks without a picture of their own -> the one whose trigger is the same.
    """
    matrix = _Matrix.of(rows)
    texts = matrix.texts
    made = {
        "tracks": _tracks(matrix), "entries": _entries(matrix), "scenarios": _scenarios(matrix, found, shared or {}),
        "means": _means(matrix, timings), "places": _places(matrix), "cells": _cells(matrix, curves, timings),
        "pictures": [{"attack": texts(one.attack), "difference": texts(one.difference),
                      "image": f"data:image/png;base64,{base64.b64encode(one.image).decode()}"} for one in found],
        "selections": {name: texts(words.SELECTION_WORDS.get(name, name)) for name in stats.selections(rows)},
        "settings": texts.facts(words.setting_words(rows).items()), "reading": texts.facts(_reading()),
        "title": texts(title), "about": texts(about), "counted": texts(words.gate_words(rows)), "nothing": texts(words.NOTHING),
    }  # fmt: skip
    return {**made, "words": list(texts.numbers)}
