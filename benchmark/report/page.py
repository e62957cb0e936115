"""Rows -> one page to sort, filter and open: ``results/<matrix>/leaderboard.html``, self-contained, read from disk, no network.

Every figure is computed here, by :mod:`benchmark.analysis.stats`, and written into the page as JSON together with its text; the page's
script (``assets/page.js``) filters, sorts and draws, but averages, ranks and rounds nothing. Where a filter leaves a part of the
scenarios it shows the figures of the single scenarios instead of a mean whose interval nobody computed.

Names are hostile: they are made plain, stand in JSON in which no character can end or open a tag, and reach the document as text. A
Content-Security-Policy lets the browser run the two scripts and the style sheet of this file, by their hashes, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from benchmark.analysis import intervals, stats
from benchmark.report.style import METRIC_COLOURS, looks, wrapped
from benchmark.report.tables import boards
from benchmark.report.text import number_text, percent_text, plain
from benchmark.report.words import (
    GATE_WORDS,
    GIVEN_NOTES,
    NOTHING,
    SELECTION_WORDS,
    gate_words,
    mark_words,
    scenario_words,
    setting_words,
    track_words,
)  # fmt: skip
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON
from benchmark.storage.files import write_text

__all__ = ["PAGE", "Picture", "contents", "pictures", "write_page"]

PAGE = "leaderboard.html"
"""The file's name, beside the rows."""
_ASSETS = Path(__file__).parent / "assets"
_SHARES = (("acc", False), ("asr", False), ("ra", False), ("d_acc", True))
"""The metrics with a column of their own, and whether they are differences."""
_DASH = "\N{EN DASH}"

Json = dict[str, Any]
Facts = list[tuple[str, str]]


class Picture(NamedTuple):
    """A trigger as the gallery shows it. ``image``: PNG, clean images above triggered ones above their difference."""

    attack: str
    difference: str
    image: bytes


class _Words:
    """Texts by number, each kept once; all that enters is made plain."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, value: object) -> int:
        return self.numbers.setdefault(plain(value), len(self.numbers))

    def facts(self, pairs: Iterable[tuple[str, str]]) -> list[int]:
        """(name, text) pairs as a flat list of numbers, without those whose text is empty."""
        return [number for name, text in pairs if text for number in (self(name), self(text))]


# -- figures -------------------------------------------------------------------------------------------------------------------


def _rounded(value: float) -> float:
    """To the 6 decimals of rows.csv; no negative zero."""
    return float(f"{value:.6f}") + 0.0


def _share(line: Any, name: str, *, signed: bool = False) -> list[Any] | None:
    """[value, text in percent, interval in words] of a leaderboard's column; no interval where a scenario has one seed."""
    mean, low, high = (float(line[column]) for column in (name, f"{name}_low", f"{name}_high"))
    if math.isnan(mean):
        return None
    bounds = "" if math.isnan(low) else f"[{percent_text(low, signed=signed)}, {percent_text(high, signed=signed)}]"
    return [_rounded(mean), percent_text(mean, signed=signed), bounds]


def _spread(values: Iterable[float], *, signed: bool = False) -> list[Any] | None:
    """As :func:`_share` over the seeds of one scenario, with their sample deviation instead of an interval."""
    found = [float(value) for value in values if not math.isnan(value)]
    if not found:
        return None
    mean, deviation = float(np.mean(found)), intervals.spread(found)
    return [_rounded(mean), percent_text(mean, signed=signed), "" if math.isnan(deviation) else f"±{100 * deviation:.1f}"]


def _count(value: float) -> list[Any] | None:
    """[value, text of three significant digits]."""
    return None if math.isnan(value) else [_rounded(value), number_text(value)]


def _words_of(figure: list[Any] | None) -> str:
    return _DASH if figure is None else " ".join(part for part in figure[1:] if part)


def _triple(line: Any, tail: str = "") -> str:
    """ "98.3 / 99.7 / 0.3": ACC, ASR and RA in percent."""
    return " / ".join(percent_text(float(line[f"{name}{tail}"])) for name in ("acc", "asr", "ra"))


def _clock(clock: Mapping[Any, Any] | None) -> str:
    """Seconds and memory of :class:`benchmark.storage.rows.Timing`."""
    if clock is None:
        return ""
    return f"{number_text(float(clock['seconds']))} s; {number_text(float(clock['peak_mib']))} MiB, on the machine that ran it"


def _units(pruned: float, units: float) -> str:
    return "" if math.isnan(units) or units == 0 else f"{pruned:.1f} / {units:.1f}".replace(".0", "")


def _with_deltas(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(d_acc=rows["acc"] - rows["acc_undefended"], d_asr=rows["asr"] - rows["asr_undefended"])


# -- the parts of the page -----------------------------------------------------------------------------------------------------


class _Matrix(NamedTuple):
    """What all parts share: the rows, and the numbers by which the page calls tracks, entries, scenarios and cells."""

    rows: pd.DataFrame
    words: _Words
    tracks: dict[str, int]
    entries: dict[tuple[str, str], int]
    scenarios: dict[tuple[str, ...], int]
    implanted: dict[tuple[str, ...], bool]
    cells: dict[str, int]


def _scenarios(matrix: _Matrix, found: Sequence[Picture], shared: dict[str, str]) -> list[Json]:
    """Every scenario with its gate and its undefended models: means over all seeds, implanted or not, and their spread."""
    rows, words = matrix.rows, matrix.words
    gates = {tuple(line[stats.SCENARIO]): line for _, line in stats.scenarios(rows).iterrows()}
    worlds = rows.drop_duplicates(stats.WORLD)
    lines = []
    for place in matrix.scenarios:
        mine, gate = worlds[(worlds[stats.SCENARIO] == list(place)).all(axis=1)], gates.get(place)
        state = "no attack" if gate is None else _state(gate)
        picture = next((number for number, one in enumerate(found) if one.attack == shared.get(place[2], place[2])), None)
        lines.append({
            **dict(zip("dba", map(words, place), strict=True)), "implanted": matrix.implanted.get(place, False),
            "state": words(state), "picture": picture, "rate": words(f"{100 * float(mine['rate'].iloc[0]):g} %"),
            "undefended": {name: _spread(mine[f"{name}_undefended"]) for name in ("acc", "asr", "ra")},
            "benign": _spread(mine["acc_benign"]),
        })  # fmt: skip
    return lines


def _state(gate: pd.Series) -> str:
    """A scenario's verdict with the figures it rests on."""
    twin = "" if math.isnan(gate["asr_benign"]) else f", the twin's {percent_text(float(gate['asr_benign']))}"
    return f"{scenario_words(gate)} (ASR {percent_text(float(gate['asr']))}{twin})"


def _given(rows: pd.DataFrame, track: str, selection: str) -> dict[tuple[str, str], Facts]:
    """What each entry of a track's field was given, in words."""
    def epochs(line: pd.Series) -> str:
        return "" if math.isnan(line["extractor_epochs"]) else number_text(float(line["extractor_epochs"]))

    return {
        (line["defense"], line["scope"]): [
            *boards.given(line).items(),
            ("Cost, of which extractor", epochs(line)),
        ]
        for _, line in stats.given(rows, track, selection).iterrows()
    }


def _gaps(rows: pd.DataFrame, track: str) -> dict[tuple[str, str], Facts]:
    """RA that the oracle would have reached beyond each way of choosing, in points."""
    return {
        (line["defense"], line["scope"]): [
            (f"RA below the oracle's, {name}", f"{_words_of(_share(line, f'gap_{name}', signed=True))} points")
            for name in stats.SELECTIONS if f"gap_{name}" in line
        ]
        for _, line in stats.selection_gaps(rows, track).iterrows()
    }  # fmt: skip


def _joined(lines: Iterable[Mapping[Any, Any]], name: str, between: str = "; ") -> str:
    """The distinct texts of a column, in order."""
    return between.join(dict.fromkeys(str(line[name]) for line in lines if line[name]))


def _means(matrix: _Matrix, timings: pd.DataFrame) -> list[Json]:
    """The leaderboards, line by line: means over implanted scenarios as :func:`benchmark.analysis.stats.leaderboard` gives them."""
    rows, words = matrix.rows, matrix.words
    clocks = stats.timing_summary(rows, timings).set_index(["track", *stats.ENTRY]).to_dict("index")
    counted, lines = gate_words(rows), []
    for track in matrix.tracks:
        gaps = _gaps(rows, track)
        for selection in stats.selections(rows, track):
            table, given = stats.field(rows, track), _given(rows, track, selection)
            table = table[table["selection"] == selection]
            for _, line in stats.leaderboard(rows, track, selection).iterrows():
                entry = (line["defense"], line["scope"])
                mine = table[(table["defense"] == entry[0]) & (table["scope"] == entry[1])]
                facts = [
                    ("Selection", SELECTION_WORDS.get(selection, selection)), *given.get(entry, []),
                    ("Measured in track", line["source"] if line["source"] != track else ""),
                    ("Marks", mark_words(line)),
                    ("Pruned / units", _units(float(line["pruned"]), float(line["units"]))),
                    ("dASR", f"{_words_of(_share(line, 'd_asr', signed=True))} points" if line["cells_ok"] else ""),
                    ("DER", _words_of(_share(line, "der")) if line["cells_ok"] else ""), *gaps.get(entry, []),
                    ("Seconds, median; peak memory", _clock(clocks.get((line["source"], *entry)))),
                    ("Note", "; ".join(dict.fromkeys(text for text in mine["note"] if text))),
                    ("Not in the means", line["reasons"]), ("Gate", counted),
                ]  # fmt: skip
                lines.append({
                    **_head(matrix, track, selection, entry, line), "place": int(line["place"]),
                    "rank": None if math.isnan(line["rank"]) else [_rounded(line["rank"]), f"{line['rank']:.2f}"],
                    **{name: _share(line, name, signed=signed) for name, signed in _SHARES},
                    "cost": _count(float(line["cost_epochs"])), "ok": int(line["cells_ok"]), "of": int(line["cells"]),
                    "missing": words(line["missing"]), "facts": words.facts(facts),
                })  # fmt: skip
    return lines


def _head(matrix: _Matrix, track: str, selection: str, entry: tuple[str, str], line: Any) -> Json:
    return {"t": matrix.tracks[track], "s": selection, "e": matrix.entries[entry], "role": str(line["role"])}


def _places(matrix: _Matrix) -> list[Json]:
    """Every entry in every scenario: means over the seeds that count there, their spread, and the rank by RA inside the scenario.

    The leaderboards' means are the means of these over implanted scenarios; the others stand in no mean.
    """
    rows, lines = _with_deltas(matrix.rows), []
    # What ranks are made of, alone: every copy of a table with all columns takes several times as long.
    gate = ["implanted", "asr_undefended", "asr_benign", "acc_undefended", "acc_benign", "acc_loss_se"]
    narrow = rows[[*stats.WORLD, *stats.ENTRY, "track", "selection", "control", "status", *gate, stats.RANK_KEY]]
    within = {place: narrow[(narrow[stats.SCENARIO] == list(place)).all(axis=1)] for place in matrix.scenarios}
    for track in matrix.tracks:
        for selection in stats.selections(rows, track):
            table = stats.field(rows, track)
            table = table[table["selection"] == selection]
            found: dict[tuple[tuple[str, ...], tuple[str, str]], list[Json]] = {}
            for line in table.to_dict("records"):
                place, entry = tuple(line[name] for name in stats.SCENARIO), (str(line["defense"]), str(line["scope"]))
                found.setdefault((place, entry), []).append({str(name): value for name, value in line.items()})
            for place in matrix.scenarios:
                ranked = matrix.implanted.get(place, False) and selection not in stats.HINDSIGHT
                ranks = stats.average_ranks(within[place], track, selection) if ranked else {}
                for (here, entry), every in found.items():
                    if here == place:
                        head = _head(matrix, track, selection, entry, every[0])
                        lines.append(head | _place(matrix, track, place, every, ranks.get(entry)))
    return lines


def _place(matrix: _Matrix, track: str, place: tuple[str, ...], every: list[Json], rank: float | None) -> Json:
    """One entry in one scenario; ``every``: its rows there, one per seed."""
    good, bad = ([line for line in every if (line["status"] == "ok") is done] for done in (True, False))
    first, reasons = every[0], dict.fromkeys(f"{line['status']}: {line['reason'] or 'no reason recorded'}" for line in bad)
    gates = [f"seed {line['seed']}: {line['gate']}" for line in every if line["gate"]]
    said = {str(line["gate"]) for line in every}  # where every seed says the same, once is enough

    def mean(name: str, of: list[Json] = good) -> float:
        return float(np.mean([line[name] for line in of])) if of else math.nan

    facts = [
        ("Preset", _joined(every, "preset", " or ")), ("Pruned / units", _units(mean("pruned"), mean("units"))),
        ("Marks", _marks(good)),
        ("Measured in track", first["source"] if first["source"] != track else ""), ("Note", _joined(every, "note")),
        ("Poisoning rate", f"{100 * first['rate']:g} %, really {percent_text(mean('realised_rate', every))} %"),
        ("Features of the victim", first["features"]),
        ("Not in the means", "; ".join(reasons)),
        ("Gate", said.pop() if len(said) == 1 else "; ".join(gates)),
    ]  # fmt: skip
    return {
        "p": matrix.scenarios[place], "rank": None if rank is None else [_rounded(rank), f"{rank:g}"],
        **{name: _spread([line[name] for line in good], signed=signed) for name, signed in _SHARES},
        "cost": _count(mean("cost_epochs")), "ok": len(good), "of": len(every),
        "missing": matrix.words(_joined(bad, "status", " / ")), "facts": matrix.words.facts(facts),
        "cells": [matrix.cells[line["cell"]] for line in every],
    }  # fmt: skip


def _marks(lines: Sequence[Json]) -> str:
    """In how many of some finished cells a mark stands."""
    found = Counter("kept untouched" if line["kept"] else line["mark"] for line in lines if line["kept"] or line["mark"])
    return ", ".join(f"{mark} in {count} of {len(lines)}" for mark, count in found.items())


def _cell_facts(line: Any, dial: str, clock: Any) -> Facts:
    """The settings and everything measured of one cell under one selection, in words."""
    of_extractor = "" if math.isnan(line["extractor_epochs"]) else f", {number_text(line['extractor_epochs'])} epochs"
    isolated = f"{line['isolated']}; precision {percent_text(line['precision'])} %, recall {percent_text(line['recall'])} %"
    again = f"{percent_text(line['asr_recraft'])} / {percent_text(line['ra_recraft'])}"
    return [
        ("Selection", SELECTION_WORDS.get(line["selection"], line["selection"])),
        ("Not measured", "" if line["status"] == "ok" else f"{line['status']}: {line['reason'] or 'no reason recorded'}"),
        ("Preset", line["preset"]),
        ("Dial", "" if math.isnan(line["dial"]) else f"{dial or 'dial'}: {number_text(float(line['dial']))}"),
        ("Knob", "" if math.isnan(line["knob"]) else number_text(float(line["knob"]))),
        ("Mark", "kept untouched" if line["kept"] else line["mark"]),
        ("Pruned / units", _units(float(line["pruned"]), float(line["units"])) if line["status"] == "ok" else ""),
        ("ACC on held-out clean images", "" if math.isnan(line["val_acc"]) else f"{percent_text(line['val_acc'])} %"),
        ("Loss on them, with its standard error", "" if math.isnan(line["val_loss"]) else
         f"{percent_text(line['val_loss'], signed=True)} ± {percent_text(line['val_loss_se'])} points"),
        ("dASR", "" if math.isnan(line["d_asr"]) else f"{percent_text(line['d_asr'], signed=True)} points"),
        ("DER", "" if math.isnan(line["der"]) else percent_text(line["der"])),
        ("ASR / RA, trigger computed again", "" if math.isnan(line["asr_recraft"]) else again),
        ("Took from what it was granted", line["used"]),
        ("Clean labelled images", str(line["clean_images"] or "")), ("Training images", str(line["train_images"] or "")),
        ("Trained anew", "yes" if line["trained_anew"] else ""),
        ("Extractor", f"{line['extractor']}{of_extractor}" if line["extractor"] else ""),
        ("Features of the victim", line["features"]),
        ("Samples singled out", isolated if line["isolated"] else ""),
        ("Undefended ACC / ASR / RA", _triple(line, "_undefended")),
        ("ACC of the benign twin", "" if math.isnan(line["acc_benign"]) else percent_text(line["acc_benign"])),
        ("ASR of the benign twin", "" if math.isnan(line["asr_benign"]) else percent_text(line["asr_benign"])),
        ("Poisoning rate", f"{100 * line['rate']:g} %, really {percent_text(line['realised_rate'])} %"),
        ("Labels", f"{line['label_mode']}, target {line['target']}" if line["label_mode"] == "all-to-one" else line["label_mode"]),
        ("Note", line["note"]), ("Gate", line["gate"]),
        ("Seconds; peak memory", _clock(clock)), ("Cell", line["cell"]),
    ]  # fmt: skip


def _curve(candidates: Sequence[Json], words: _Words) -> Json | None:
    """A cell's dial as [dial, ACC, ASR, RA] points in its order, at the published setting of its knob; None where it has no two
    positions."""
    published = next((line["knob"] for line in candidates if line["is_default"]), math.nan)
    mine = [line for line in candidates if line["knob"] == published or math.isnan(published)]
    good = sorted((line for line in mine if math.isfinite(line["dial"])), key=lambda line: float(line["dial"]))
    if len({line["dial"] for line in good}) < 2:
        return None
    points = [[float(f"{line['dial']:.6g}"), *(float(f"{line[name]:.4f}") for name in ("acc", "asr", "ra"))] for line in good]
    return {"name": words(good[0]["dial_name"] or "dial"), "points": points}


def _by_cell(table: pd.DataFrame) -> dict[str, list[Json]]:
    """The lines of each cell, in order."""
    found: dict[str, list[Json]] = {}
    for line in table.to_dict("records"):
        found.setdefault(str(line["cell"]), []).append({str(name): value for name, value in line.items()})
    return found


def _cells(matrix: _Matrix, curves: pd.DataFrame, timings: pd.DataFrame) -> list[Json]:
    """Every cell: what all its selections share, then what each of them measured."""
    rows, words, lines = _with_deltas(matrix.rows), matrix.words, []
    dials = _by_cell(curves)
    clocks = timings.drop_duplicates("cell").set_index("cell").to_dict("index")
    for cell, mine in _by_cell(rows).items():
        candidates = dials.get(cell, [])
        dial = str(candidates[0]["dial_name"]) if candidates else ""
        told = {str(line["selection"]): _cell_facts(line, dial, clocks.get(cell)) for line in mine}
        common = [pair for pair in next(iter(told.values())) if all(pair in pairs for pairs in told.values())]
        by = {}
        for line in mine:
            done, selection = line["status"] == "ok", str(line["selection"])
            shares = {name: None if math.isnan(line[name]) else [_rounded(line[name]), percent_text(line[name], signed=signed), ""]
                      for name, signed in _SHARES}  # fmt: skip
            by[selection] = {
                **shares, "cost": _count(float(line["cost_epochs"])), "ok": int(done), "of": 1,
                "missing": words("" if done else line["status"]),
                "facts": words.facts(pair for pair in told[selection] if pair not in common),
                **({} if math.isnan(line["dial"]) else {"dial": float(f"{line['dial']:.6g}")}),
            }  # fmt: skip
        lines.append({
            "seed": int(mine[0]["seed"]), "facts": words.facts(common), "by": by,
            **({} if (curve := _curve(candidates, words)) is None else {"curve": curve}),
        })  # fmt: skip
    return lines


def _reading() -> Facts:
    """The glossary at the foot of the page."""
    return [
        ("ACC", "Accuracy on clean test images."),
        ("ASR", "Share of triggered test images, target class excluded, that are classified as the target."),
        ("RA", "Share of the same images given their true class; ASR + RA is at most 100. Rankings use RA: a broken model has a "
         "low ASR for free, but not a high RA."),
        ("dACC, dASR", "Percentage points against the undefended model of the same scenario and seed."),
        ("DER", "(max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2; printed because papers print it, never ranked on."),
        ("Cost", "Standard-epoch equivalents: 1 = forward and backward over the training set."),
        ("Rank", "Mean over implanted scenarios of the rank by RA among the defenses of the track; in the view by scenario, the "
         "rank there. A refused or failed cell takes the last place. Controls and choices with hindsight (oracle, leaky) are never "
         "ranked, tracks never mixed."),
        ("Brackets", "95 % bootstrap intervals over seeds within scenarios; without brackets a scenario had one seed. They speak "
         "of the whole matrix, so that no interval is shown where a filter leaves a part of the scenarios."),
        ("±", "Sample standard deviation over the seeds of one scenario."),
        ("Implanted", f"{GATE_WORDS[0].upper()}{GATE_WORDS[1:]}. Scenarios that are not implanted are shown, marked, and stand in "
         "no mean and no rank."),
        ("Marks", "No change: no weight of the chosen model differs from the attacked one's. Kept untouched: no candidate was "
         "within the tolerance. Mechanism failed: what the defense took for poisoned is no more poisoned than the training set."),
        *((f"Selection: {name}", words) for name, words in SELECTION_WORDS.items()),
        ("What the defender was given", GIVEN_NOTES),
    ]  # fmt: skip


def contents(
    rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, title: str, *, about: str = "",
    found: Sequence[Picture] = (), shared: dict[str, str] | None = None,
) -> Json:  # fmt: skip
    """Everything the page shows, as JSON: figures as [value, text, interval or spread in words], texts as numbers into ``words``.

    Args:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them. title, about: of the matrix.
        found: the trigger gallery's pictures. shared: attacks without a picture of their own -> the one whose trigger is the same.
    """
    words = _Words()
    gates = stats.scenarios(rows)
    scenarios = list(dict.fromkeys(rows[stats.SCENARIO].itertuples(index=False, name=None)))
    matrix = _Matrix(
        rows, words, {track: number for number, track in enumerate(stats.tracks(rows))},
        {entry: number for number, entry in enumerate(stats.entries(rows))},
        {place: number for number, place in enumerate(scenarios)},
        {tuple(line[stats.SCENARIO]): bool(line["implanted"]) for _, line in gates.iterrows()},
        {cell: number for number, cell in enumerate(dict.fromkeys(rows["cell"]))},
    )  # fmt: skip
    look = looks(rows)
    colours = {colour: number for number, colour in enumerate(dict.fromkeys(one.colour for one in look.values()))}
    tracks = []
    for track in matrix.tracks:
        blind = ((rows["track"] == track) & (rows["reason"] == NOTHING_TO_VALIDATE_ON)).any()
        tracks.append({
            "name": words(track), "title": words(track_words(track)), "judged": stats.headline(rows, track),
            "selections": stats.selections(rows, track), "why": words(NOTHING_TO_VALIDATE_ON if blind else ""),
        })  # fmt: skip
    made = {
        "tracks": tracks,
        "entries": [{"name": words("none (undefended)" if entry[0] == stats.UNDEFENDED else entry[0]), "scope": words(entry[1]),
                     "look": [colours[look[entry].colour], look[entry].marker]} for entry in matrix.entries],
        "scenarios": _scenarios(matrix, found, shared or {}),
        "means": _means(matrix, timings), "places": _places(matrix), "cells": _cells(matrix, curves, timings),
        "pictures": [{"attack": words(one.attack), "difference": words(one.difference),
                      "image": f"data:image/png;base64,{base64.b64encode(one.image).decode()}"} for one in found],
        "selections": {name: words(SELECTION_WORDS.get(name, name)) for name in stats.selections(rows)},
        "settings": words.facts(setting_words(rows).items()), "reading": words.facts(_reading()),
        "title": words(title), "about": words(about), "counted": words(gate_words(rows)), "nothing": words(NOTHING),
    }  # fmt: skip
    return {**made, "words": list(words.numbers)}


# -- the trigger gallery -------------------------------------------------------------------------------------------------------

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


def pictures(gallery: Path, attacks: Sequence[str]) -> list[Picture]:
    """The panels of the trigger gallery (``plots/triggers.svg``), which alone of all figures cannot be drawn from rows.

    A panel is told by its title, which matplotlib keeps as a comment; panels of no attack named are left out. Empty when there is
    no gallery, or none that can be read.
    """
    if not gallery.is_file():
        return []
    try:
        parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
        sheet = ElementTree.fromstring(gallery.read_bytes(), parser)
    except ElementTree.ParseError:
        return []
    found = []
    for panel in sheet.iter(f"{_SVG}g"):
        image = panel.find(f".//{_SVG}image") if panel.get("id", "").startswith("axes_") else None
        texts = [" ".join((node.text or "").split()) for node in panel.iter(ElementTree.Comment)]  # type: ignore[arg-type]
        if image is None or not texts:
            continue
        # Titles are shortened to the width of their panel, which holds one to twelve images.
        widths = {max(12, 9 * count) for count in range(1, 13)}
        named = [attack for attack in attacks if texts[-1] in {wrapped(plain(attack), width, 1) for width in widths}]
        encoded = (image.get(_LINK) or "").partition(";base64,")[2]
        if not named or not encoded:
            continue
        # SVG's y axis points down and matplotlib's up, so the pixels are stored upside down.
        upright = ImageOps.flip(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
        content = io.BytesIO()
        upright.save(content, "PNG", optimize=True)
        amplified = next((text for text in texts if text.startswith(("difference ", "no difference"))), "")
        found.append(Picture(named[0], amplified, content.getvalue()))
    return found


def _shared(settings: Path, drawn: Sequence[Picture]) -> dict[str, str]:
    """Attacks whose trigger another attack's picture shows: the same settings but for the label, the rate and the recipe."""
    try:
        tables = tomllib.loads(settings.read_text(encoding="utf-8")).get("attack", []) if settings.is_file() else []
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}
    apart = ("label", "rate", "recipe")
    kinds = {
        str(table.get("label", table["name"])): {key: value for key, value in table.items() if key not in apart} for table in tables
    }
    named = [one.attack for one in drawn]
    return {
        label: next((other for other in named if kinds.get(other) == kind), label)
        for label, kind in kinds.items() if label not in named
    }  # fmt: skip


# -- the file ------------------------------------------------------------------------------------------------------------------


def _embedded(value: object) -> str:
    """JSON that may stand inside a script element: no character of it can end the element, open a comment or break a line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _lighter(colour: str) -> str:
    """The same hue for a dark page: half way to white."""
    return "#" + "".join(f"{(int(colour[at : at + 2], 16) + 255) // 2:02X}" for at in (1, 3, 5))


def _palette(rows: pd.DataFrame) -> str:
    """CSS: a class per colour of the house's palette, with its twin for dark pages; the undefended model has the text's colour."""
    colours = dict.fromkeys(look.colour for look in looks(rows).values())
    shades = {colour: "var(--ink)" if colour == "#000000" else f"light-dark({colour}, {_lighter(colour)})" for colour in colours}
    lines = [f".k{number} {{ --k: {shade}; }}" for number, shade in enumerate(shades.values())]
    lines += [f".m-{name} {{ --k: light-dark({colour}, {_lighter(colour)}); }}" for name, colour in METRIC_COLOURS.items()]
    return "\n".join(lines)


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_page(
    folder: Path, rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, title: str, *, about: str = ""
) -> Path:  # fmt: skip
    """Writes ``folder/leaderboard.html`` and returns its path. No dates: the same rows give the same bytes.

    Reads ``plots/triggers.svg`` and ``matrix.toml`` in the folder where they are there, for the pictures of the triggers.

    Args:
        folder: the matrix's results folder. rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them.
        title, about: of the matrix.

    Raises:
        BadInput: the file cannot be written.
    """
    found = pictures(folder / "plots" / "triggers.svg", list(dict.fromkeys(rows["attack"])))
    made = contents(rows, curves, timings, title, about=about, found=found, shared=_shared(folder / "matrix.toml", found))
    style = f"\n{(_ASSETS / 'page.css').read_text(encoding='utf-8')}{_palette(rows)}\n"
    # The library's last line points at a source map that is not there.
    library = (_ASSETS / "table-core.min.js").read_text(encoding="utf-8").partition("//# sourceMappingURL")[0]
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hashed(style)}; script-src {_hashed(library)} {_hashed(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"title": html.escape(plain(title)), "policy": policy, "style": style, "data": _embedded(made), "library": library,
             "script": script}  # fmt: skip
    template = (_ASSETS / "page.html").read_text(encoding="utf-8")
    path = folder / PAGE
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template))
    return path
