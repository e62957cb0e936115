"""Rows -> figures: the leaderboard, heat maps, trade-offs, dials, what selection and time cost, and the undefended models.

A defense has the same colour and marker in every figure of a matrix, and a letter marks what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmark.analysis import stats
from benchmark.analysis.intervals import Interval
from benchmark.report.figures import STROKES, DotPanel, Dots, Figure, Heat, HeatPanel, Key, Lines, Mark, Panel, Series
from benchmark.report.style import COLOURS, METRIC_COLOURS, label, looks, wrapped
from benchmark.report.text import plain
from benchmark.report.words import gate_words, scenario_words
from benchmark.rules.metrics import IMPLANTED_ASR

__all__ = [
    "HATCH", "LETTERS", "LETTER_KEY", "METRICS", "attacked_of", "cells_of", "cost", "dials", "gaps_below_oracle", "heatmap",
    "leaderboard", "names_of", "only", "places_of", "rows_at", "scatter", "undefended",
]  # fmt: skip

_Entry = tuple[str, str]
METRICS = {"acc": "ACC", "asr": "ASR", "ra": "RA"}
LETTERS = {"failed": "F", "refused": "R"}
LETTER_KEY = {"F": "F = failed", "R": "R = refused", "n": "n = not run", "0": "0 = nothing isolated", "?": "? = not measured",
               "*": "* = some seeds missing"}  # fmt: skip
_NOT_COUNTED = "attack not implanted or adversarial: not counted"
HATCH = Mark(kind="hatch")


def places_of(table: pd.DataFrame, *columns: str) -> list[tuple[str, ...]]:
    """Distinct values of some columns, in matrix order."""
    return list(dict.fromkeys(table[list(columns)].itertuples(index=False, name=None)))


def rows_at(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    chosen = np.ones(len(table), dtype=bool)
    for name, value in values.items():
        chosen &= (table[name] == value).to_numpy()
    return table.loc[chosen]


def _implanted(rows: pd.DataFrame) -> dict[tuple[str, ...], bool]:
    return {tuple(line[stats.SCENARIO]): bool(line["implanted"]) for _, line in stats.scenarios(rows).iterrows()}


def attacked_of(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.loc[rows["attack"] != stats.NO_ATTACK]


def cells_of(table: pd.DataFrame) -> dict[tuple[str, ...], pd.DataFrame]:
    """The rows of each (dataset, backbone, attack, defense, scope)."""
    groups = table.groupby([*stats.SCENARIO, *stats.ENTRY], sort=False)
    return {tuple(map(str, np.atleast_1d(np.asarray(key, dtype=object)))): cell for key, cell in groups}


def names_of(rows: pd.DataFrame) -> dict[_Entry, str]:
    every = stats.entries(rows)
    return {entry: "undefended" if entry[0] == stats.UNDEFENDED else label(entry, every) for entry in every}


def _ordered(rows: pd.DataFrame, track: str) -> dict[_Entry, str]:
    """Entry -> role: the undefended model, the competing entries in matrix order, then the controls."""
    table = stats.field(rows, track)
    roles = {(line[0], line[1]): line[2] for line in table[[*stats.ENTRY, "role"]].itertuples(index=False, name=None)}
    return dict(sorted(roles.items(), key=lambda item: ("reference", "defense", "control").index(item[1])))


def only(value: float) -> Interval:
    return Interval(value, math.nan, math.nan)


def _interval(line: pd.Series, name: str) -> Interval:
    return Interval(*(float(line.get(f"{name}{end}", math.nan)) for end in ("", "_low", "_high")))


# -- the leaderboard -----------------------------------------------------------------------------------------------------------

_BOARD = {
    "acc": Mark(METRIC_COLOURS["acc"], "|", 11, lane=0, words="ACC on clean images"),
    "ra": Mark(METRIC_COLOURS["ra"], "o", 7, lane=0, words="RA: right class in spite of the trigger"),
    "asr": Mark(METRIC_COLOURS["asr"], "s", lane=0, words="ASR: the attacker's class"),
    "ra_oracle": Mark(METRIC_COLOURS["ra"], "o", 7, hollow=True, lane=0, words="RA, chosen on the test set"),
}


def _boards(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Title and lines of each panel: the competing entries of every track as they are ranked, then what does not compete."""
    parts, others = [], []
    for track, judged, board in stats.judged_boards(rows):
        if board.empty:
            continue
        competing = board[board["role"] == "defense"]
        if len(competing):
            parts.append((f"{plain(track)}, chosen by {judged}", competing))
        others.append(board[board["role"] != "defense"])
    rest = pd.concat(others).drop_duplicates(stats.ENTRY) if others else pd.DataFrame()
    return [*parts, ("not competing: the undefended model and the controls", rest)] if len(rest) else parts


def leaderboard(rows: pd.DataFrame) -> Figure | None:
    """Every leaderboard at a glance: RA and ASR with intervals, ACC, and the RA an oracle would have reached; None without one."""
    parts, names = _boards(rows), names_of(rows)
    if not any(((part["role"] == "defense") & (part["cells_ok"] > 0)).any() for _, part in parts):
        return None

    def idle(line: pd.Series) -> bool:
        return bool(line["role"] == "defense" and line["cells_ok"] and line["no_change"] >= line["cells_ok"])

    def named(line: pd.Series) -> str:
        run, every = int(line["scenarios_run"]), int(line["scenarios"])
        rest = f" ({run} of {every})" * (run < every) + ": no change" * idle(line)
        return f"{wrapped(names[line['defense'], line['scope']], 44 - len(rest), 1)}{rest}"

    panels = []
    for head, part in parts:
        lines = [line for _, line in part.iterrows()]
        series = tuple((name, tuple(_interval(line, name) if name in ("ra", "asr") else only(line[name]) for line in lines))
                       for name in _BOARD)  # fmt: skip
        missing = {("acc", row): f"{line['missing']} everywhere" for row, line in enumerate(lines) if not line["cells_ok"]}
        across = "%: a defense that works has RA and ACC far right, ASR far left"
        panels.append(DotPanel(head, across, tuple(map(named, lines)), series, letters=missing))
    bars = ", bars: 95 % intervals over seeds" if any(part["ra_low"].notna().any() for _, part in parts) else ""
    unchanged = any(idle(line) for _, part in parts for _, line in part.iterrows())
    partial = any((part["scenarios_run"] < part["scenarios"]).any() for _, part in parts)
    note = (f"Means over implanted scenarios{bars}; order: average rank by RA; {gate_words(rows)}"
            f"{'; no change: the defense changed no model' if unchanged else ''}"
            f"{'; (n of m): run on n of m scenarios, so neither ranked nor comparable' if partial else ''}.")  # fmt: skip
    return Dots(tuple(panels), note, marks=_BOARD, width=6.2, row=0.235)


# -- heat maps -----------------------------------------------------------------------------------------------------------------


def _heat_cell(mine: pd.DataFrame | None, metric: str) -> tuple[float, str]:
    """The mean over finished seeds in percent and what is written: the number, with a star where seeds are missing, or a letter."""
    if mine is None:
        return math.nan, "n"
    good = mine.loc[mine["status"] == "ok", metric]
    value = 100 * float(good.mean()) if len(good) else math.nan
    if math.isnan(value):
        return value, LETTERS.get(mine["status"].iloc[0], "?")
    return value, f"{value:.0f}" + "*" * (len(good) < len(mine))


def heatmap(rows: pd.DataFrame, track: str, metric: str) -> Figure:
    """Attack x defense, one panel per dataset and backbone; means over all seeds under the selection the track is judged by."""
    judged = stats.headline(rows, track)
    table = attacked_of(rows_at(stats.field(rows, track), selection=judged))
    cells, order, names, implanted = cells_of(table), _ordered(rows, track), names_of(rows), _implanted(rows)
    attacks, roles = [name for (name,) in places_of(table, "attack")], list(order.values())
    panels, signs = [], set()
    for place in places_of(table, "dataset", "backbone"):
        found = [[_heat_cell(cells.get((*place, attack, *entry)), metric) for attack in attacks] for entry in order]
        dead = tuple(at for at, attack in enumerate(attacks) if not implanted.get((*place, attack), True))
        values, texts = (np.array([[cell[part] for cell in line] for line in found]) for part in (0, 1))
        values[:, dead] = math.nan
        signs |= {text[-1] for text in texts.ravel()}
        panels.append(HeatPanel(f"{place[0]}, {place[1]}", tuple(wrapped(plain(attack), 12, 3) for attack in attacks),
                                tuple(wrapped(names[entry], 24) for entry in order), values, texts, dead))  # fmt: skip
    key: Key = ((_NOT_COUNTED, HATCH),) * any(panel.dead for panel in panels)
    key += tuple((text, None) for sign, text in LETTER_KEY.items() if sign != "0" and sign in signs)
    note = (f"Means over seeds; {judged} selection; lines set off the undefended model (top) and the controls (bottom). "
            f"{gate_words(rows)}.")  # fmt: skip
    label = f"{METRICS[metric]} in % ({'lower' if metric == 'asr' else 'higher'} is better)"
    rules = {roles.count("reference"), len(roles) - roles.count("control")} - {0, len(roles)}
    columns, palette = max(1, int(11.5 // (0.84 * len(attacks) + 0.2))), "YlOrRd" if metric == "asr" else "YlGnBu"
    return Heat(tuple(panels), columns, note, palette, label, tuple(sorted(rules)), key)


# -- lines ---------------------------------------------------------------------------------------------------------------------


def scatter(rows: pd.DataFrame, track: str) -> Figure:
    """ACC against ASR, arrows from the undefended model; one panel per scenario."""
    judged = stats.headline(rows, track)
    table = rows_at(attacked_of(rows_at(stats.field(rows, track), selection=judged)), status="ok")
    floor = max((start for start in (0, 50, 80, 90) if 100 * table["acc"].min() >= start + 1), default=0)
    present, names, implanted = set(stats.entries(table)), names_of(rows), _implanted(rows)
    marks = {entry: Mark(*look, size=10 if look.marker == "*" else 6) for entry, look in looks(rows).items()}
    order = [entry for entry in _ordered(rows, track) if entry in present]
    cells, one_dataset = cells_of(table), len(places_of(table, "dataset")) == 1
    panels = []
    for place in places_of(table, *stats.SCENARIO):
        here = table[(table[stats.SCENARIO] == list(place)).all(axis=1)]
        series = []
        for entry in order:
            if (*place, *entry) in cells:
                mine = cells[*place, *entry]
                x = (float(here["asr_undefended"].mean()), float(mine["asr"].mean()))
                y = (only(float(here["acc_undefended"].mean())), only(float(mine["acc"].mean())))
                series.append(Series(names[entry], x, y, mark=marks[entry], arrow=True))
        panels.append(Panel(f"{place[2]}\n{place[1] if one_dataset else ', '.join(place[:2])}", "ASR in %",
                            "ACC in %" + f" (from {floor} %)" * bool(floor), tuple(series), shares=True, floor=floor,
                            dead=not implanted.get(place, False)))  # fmt: skip
    attacks = len(places_of(table, "attack"))
    key = (*((names[entry], marks[entry]) for entry in order),
           *(((_NOT_COUNTED, Mark("#E6E6E6", kind="band")),) * any(panel.dead for panel in panels)))  # fmt: skip
    crop = f" The ACC axis starts at {floor} %." if floor else ""
    note = f"Means over seeds; {judged} selection; arrows start at the undefended model; the best corner is upper left.{crop}"
    return Lines(tuple(panels), attacks if attacks <= 4 else 4, note, key)


_CHOSEN = {"validation": "o", "default": "s", "canary": "^", "oracle": "X"}


def _dial_mean(worlds: Sequence[pd.DataFrame], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds along the dial, on the union of their dial values within the range that all of them cover."""
    paths = [world.groupby("dial")[metric].mean() for world in worlds]
    low, high = max(path.index.min() for path in paths), min(path.index.max() for path in paths)
    grid = np.unique(np.concatenate([path.index.to_numpy(np.float64) for path in paths]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.mean([np.interp(grid, path.index.to_numpy(np.float64), path.to_numpy(np.float64)) for path in paths], axis=0)


def _dial_table(rows: pd.DataFrame, curves: pd.DataFrame, track: str) -> pd.DataFrame:
    """The candidates of a track's entries with a dial, in implanted scenarios, at the published setting of a second knob."""
    live = {place for place, good in _implanted(rows).items() if good}
    kept = [place in live for place in curves[stats.SCENARIO].itertuples(index=False, name=None)]
    table = curves[np.asarray(kept, dtype=bool) & np.isfinite(curves["dial"].to_numpy()) & (curves["track"] == track).to_numpy()]
    table = stats.at_published_knob(table[table["cell"].isin(set(attacked_of(rows)["cell"]))])
    table = table[[*stats.ENTRY, *stats.WORLD, "dial_name", "dial", *METRICS]]
    return table.groupby([*stats.ENTRY, *stats.WORLD], sort=False).filter(lambda path: path["dial"].nunique() > 1)


def dials(rows: pd.DataFrame, curves: pd.DataFrame, track: str) -> Figure | None:
    """ACC, ASR and RA along each dial (across) for each defense that has one (down); None when none has."""
    table = _dial_table(rows, curves, track)
    if table.empty:
        return None
    names, judged = names_of(rows), stats.selections(rows, track)
    picks = cells_of(rows_at(attacked_of(rows), track=track, status="ok"))
    attacks, worlds = [name for (name,) in places_of(table, "attack")], places_of(table, "dataset", "backbone")
    colours = {attack: COLOURS[place % len(COLOURS)] for place, attack in enumerate(attacks)}
    strokes = {world: STROKES[place % len(STROKES)] for place, world in enumerate(worlds)}
    markers = {name: marker for name, marker in _CHOSEN.items() if name in judged}

    def drawn(mine: pd.DataFrame, metric: str) -> tuple[Series, ...]:
        """A curve per scenario, and a marker where each selection chose, on average."""
        found = []
        for named, seeds in mine.groupby(stats.SCENARIO, sort=False):
            place = tuple(map(str, named))
            paths = [path for _, path in seeds.groupby("seed", sort=True)]
            grid, mean = _dial_mean(paths, metric)
            curve, colour = Mark(colours[place[2]], stroke=strokes[place[:2]], alpha=0.9), colours[place[2]]
            found.append(Series("", tuple(grid), tuple(map(only, mean)), mark=curve))
            chosen = picks.get((*place, *mine[stats.ENTRY].iloc[0]), rows.iloc[:0])
            for selection, marker in markers.items():
                picked = rows_at(chosen[np.isfinite(chosen["dial"])], selection=selection)
                if len(picked):
                    found.append(Series("", (float(picked["dial"].mean()),), (only(float(picked[metric].mean())),),
                                        mark=Mark(colour, marker)))  # fmt: skip
        return tuple(found)

    panels = []
    for entry in stats.entries(table):
        mine = rows_at(table, defense=entry[0], scope=entry[1])
        positive = mine["dial"][mine["dial"] > 0]
        log = bool((mine["dial"] > 0).all() and positive.max() / positive.min() > 100)
        dial = wrapped(plain(mine["dial_name"].iloc[0]) or "dial", 40)
        panels += [Panel(f"{names[entry]}: {words}", dial, "%", drawn(mine, metric), log=log, ticks=False)
                   for metric, words in METRICS.items()]  # fmt: skip
    key: Key = tuple((name, Mark(colour, stroke="-", width=2)) for name, colour in colours.items())
    key += tuple((", ".join(world), Mark(stroke=stroke)) for world, stroke in strokes.items() if len(worlds) > 1)
    key += tuple((name, Mark(marker=marker)) for name, marker in markers.items())
    knobs = " Curves: at the published setting of the second knob, where there is one." if curves["knob"].notna().any() else ""
    note = f"Means over seeds, implanted scenarios. Markers: the mean of what each selection chose.{knobs}"
    return Lines(tuple(panels), 3, note, key)


# -- bars ----------------------------------------------------------------------------------------------------------------------

_RULES = {
    name: Mark(colour, kind="bar", printed=True, words=f"oracle - {name}")
    for name, colour in {"validation": "#0072B2", "default": "#E69F00", "strongest": "#009E73", "canary": "#CC79A7"}.items()
}


def gaps_below_oracle(rows: pd.DataFrame) -> Figure | None:
    """RA that each rule stays below the oracle, bars with intervals: one panel per track that has a dial in it."""
    names = names_of(rows)
    found = {track: gaps for track in stats.tracks(rows) if len(gaps := stats.selection_gaps(rows, track))}
    if not found:
        return None
    reach = max(5.0, 112 * max(float(np.nanmax(gaps.filter(like="gap_").to_numpy(np.float64))) for gaps in found.values()))
    panels = []
    for track, gaps in found.items():
        series = tuple((rule, tuple(_interval(line, f"gap_{rule}") for _, line in gaps.iterrows())) for rule in _RULES
                       if f"gap_{rule}" in gaps)  # fmt: skip
        called = tuple(names[entry] for entry in zip(gaps["defense"], gaps["scope"], strict=True))
        across = "RA below the oracle's, percentage points: what a choice with the test set would have added"
        panels.append(DotPanel(track, across, called, series, limits=(0, reach)))
    note = "Implanted scenarios; lines: 95 % bootstrap intervals over seeds (none with a single seed)."
    return Dots(tuple(panels), note, marks=_RULES, width=6.2)


def cost(rows: pd.DataFrame, timings: pd.DataFrame, track: str) -> Figure | None:
    """Standard epochs and seconds side by side, log scale where they span more than a factor of 30."""
    table = rows_at(stats.timing_summary(rows, timings), track=track)
    table = table[table["defense"] != stats.UNDEFENDED]
    if table.empty:
        return None
    style, names = looks(rows), names_of(rows)
    order = list(zip(table["defense"], table["scope"], strict=True))
    panels = []
    for column, words in (("cost_epochs", "standard epochs (1 = one training epoch)"), ("seconds", "seconds")):
        positive = table[column][table[column] > 0]
        log = bool(len(positive) > 1 and positive.max() / positive.min() > 30)
        limits = (10.0 ** math.floor(math.log10(positive.min())) if log else 0.0,
                  float(positive.max()) * (6 if log else 1.3) if len(positive) else 1.0)  # fmt: skip
        letters = {("cost", row): "not measured" for row, value in enumerate(table[column]) if math.isnan(value)}
        panels.append(DotPanel("", words + ", log scale" * log, tuple(names[entry] for entry in order),
                               (("cost", tuple(map(only, table[column]))),), unit=1, log=log, limits=limits, letters=letters,
                               looks=tuple(style[entry] for entry in order)))  # fmt: skip
    note = "Medians over finished cells. Seconds: on the machine that ran the matrix; epochs are the same on every machine."
    return Dots(tuple(panels), note, 2, {"cost": Mark("", kind="bar", printed=True)}, 3.1, 0.3)


_TWIN = "the benign twin's ACC and ASR"
_ATTACK_MARKS = {metric: Mark(METRIC_COLOURS[metric], kind="bar", alpha=0.9, words=words) for metric, words in METRICS.items()} | {
    "acc_benign": Mark("#111111", "|", 9, lane=-0.26, words=_TWIN),
    "asr_benign": Mark("#111111", "|", 9, lane=0.0, words=_TWIN),
    "least": Mark("#111111", "x", 4, lane=0.0, words=f"least ASR: {100 * IMPLANTED_ASR:g} %"),
}


def undefended(rows: pd.DataFrame) -> Figure | None:
    """The undefended models: ACC, ASR and RA, a dot per seed, the benign twin, and the least ASR of an implanted attack."""
    worlds = attacked_of(rows).groupby(stats.WORLD, sort=False).first().reset_index()
    if worlds.empty:
        return None
    scenarios = stats.scenarios(rows)
    costly = {tuple(line[stats.SCENARIO]) for _, line in scenarios.iterrows() if scenario_words(line).endswith("costs ACC")}
    implanted, panels = _implanted(rows), []
    for place in places_of(worlds, "dataset", "backbone"):
        here = rows_at(worlds, dataset=place[0], backbone=place[1])
        seeds = {attack: rows_at(here, attack=attack) for (attack,) in places_of(here, "attack")}
        columns = {**{metric: f"{metric}_undefended" for metric in METRICS}, "acc_benign": "acc_benign", "asr_benign": "asr_benign"}
        series = [(name, tuple(only(float(mine[column].mean())) for mine in seeds.values())) for name, column in columns.items()]
        panels.append(DotPanel(
            ", ".join(place), "%", tuple(wrapped(plain(attack), 30, 1) + "*" * ((*place, attack) in costly) for attack in seeds),
            (*series, ("least", (only(IMPLANTED_ASR),) * len(seeds))),
            points={metric: tuple(tuple(mine[columns[metric]].dropna()) for mine in seeds.values()) for metric in METRICS},
            hatched=tuple(row for row, attack in enumerate(seeds) if not implanted.get((*place, attack), False)),
        ))  # fmt: skip
    key: Key = (("one seed", Mark("#111111", ".")), ("not counted: no backdoor", HATCH))
    return Dots(tuple(panels), f"{gate_words(rows)}; *: costs ACC.", min(2, len(panels)), _ATTACK_MARKS, 3.4, 0.5, key)
