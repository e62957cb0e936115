"""Rows -> figures: pure functions that say what each plot of a matrix shows; :mod:`benchmark.report.render` draws it.

A defense has the same colour and marker in every figure of a matrix, and a letter marks what is missing.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmark.analysis import published, rank_tests, stats
from benchmark.analysis.intervals import Interval
from benchmark.report.figures import STROKES, DotPanel, Dots, Figure, Gallery, Heat, HeatPanel, Key, Lines, Mark, Panel, Series
from benchmark.report.render import draw
from benchmark.report.style import COLOURS, MARKERS, METRIC_COLOURS, label, looks, wrapped
from benchmark.report.text import plain, slug
from benchmark.report.words import gate_words, scenario_words
from benchmark.rules.metrics import IMPLANTED_ASR
from benchmark.storage.files import write_bytes
from models.spec import BadInput

__all__ = ["trigger_gallery", "trigger_pictures", "write_plots"]

_Entry = tuple[str, str]
_METRICS = {"acc": "ACC", "asr": "ASR", "ra": "RA"}
_LETTERS = {"failed": "F", "refused": "R"}
_LETTER_KEY = {"F": "F = failed", "R": "R = refused", "n": "n = not run", "0": "0 = nothing isolated", "?": "? = not measured",
               "*": "* = some seeds missing"}  # fmt: skip
_NOT_COUNTED = "attack not implanted or adversarial: not counted"
_HATCH = Mark(kind="hatch")


def _places(table: pd.DataFrame, *columns: str) -> list[tuple[str, ...]]:
    """Distinct values of some columns, in matrix order."""
    return list(dict.fromkeys(table[list(columns)].itertuples(index=False, name=None)))


def _at(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    chosen = np.ones(len(table), dtype=bool)
    for name, value in values.items():
        chosen &= (table[name] == value).to_numpy()
    return table.loc[chosen]


def _implanted(rows: pd.DataFrame) -> dict[tuple[str, ...], bool]:
    return {tuple(line[stats.SCENARIO]): bool(line["implanted"]) for _, line in stats.scenarios(rows).iterrows()}


def _attacked(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.loc[rows["attack"] != stats.NO_ATTACK]


def _cells(table: pd.DataFrame) -> dict[tuple[str, ...], pd.DataFrame]:
    """The rows of each (dataset, backbone, attack, defense, scope)."""
    groups = table.groupby([*stats.SCENARIO, *stats.ENTRY], sort=False)
    return {tuple(map(str, np.atleast_1d(np.asarray(key, dtype=object)))): cell for key, cell in groups}


def _names(rows: pd.DataFrame) -> dict[_Entry, str]:
    every = stats.entries(rows)
    return {entry: "undefended" if entry[0] == stats.UNDEFENDED else label(entry, every) for entry in every}


def _ordered(rows: pd.DataFrame, track: str) -> dict[_Entry, str]:
    """Entry -> role: the undefended model, the competing entries in matrix order, then the controls."""
    table = stats.field(rows, track)
    roles = {(line[0], line[1]): line[2] for line in table[[*stats.ENTRY, "role"]].itertuples(index=False, name=None)}
    return dict(sorted(roles.items(), key=lambda item: ("reference", "defense", "control").index(item[1])))


def _only(value: float) -> Interval:
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


def _leaderboard(rows: pd.DataFrame) -> Figure | None:
    """Every leaderboard at a glance: RA and ASR with intervals, ACC, and the RA an oracle would have reached; None without one."""
    parts, names = _boards(rows), _names(rows)
    if not any(((part["role"] == "defense") & (part["cells_ok"] > 0)).any() for _, part in parts):
        return None

    def named(line: pd.Series) -> str:
        idle = line["role"] == "defense" and line["cells_ok"] and line["no_change"] >= line["cells_ok"]
        return wrapped(names[line["defense"], line["scope"]], 40 if idle else 44, 1) + (": no change" if idle else "")

    panels = []
    for head, part in parts:
        lines = [line for _, line in part.iterrows()]
        series = tuple((name, tuple(_interval(line, name) if name in ("ra", "asr") else _only(line[name]) for line in lines))
                       for name in _BOARD)  # fmt: skip
        missing = {("acc", row): f"{line['missing']} everywhere" for row, line in enumerate(lines) if not line["cells_ok"]}
        panels.append(DotPanel(head, "%: a defense that works has RA and ACC far right, ASR far left", tuple(map(named, lines)), series,
                               letters=missing))  # fmt: skip
    bars = ", bars: 95 % intervals over seeds" if any(part["ra_low"].notna().any() for _, part in parts) else ""
    note = (f"Means over implanted scenarios{bars}; order: average rank by RA; {gate_words(rows)}; no change: every model was left "
            "as it was.")  # fmt: skip
    return Dots(tuple(panels), note, marks=_BOARD, width=6.2, row=0.235)


# -- heat maps -----------------------------------------------------------------------------------------------------------------


def _heat_cell(mine: pd.DataFrame | None, metric: str) -> tuple[float, str]:
    """The mean over finished seeds in percent and what is written: the number, with a star where seeds are missing, or a letter."""
    if mine is None:
        return math.nan, "n"
    good = mine.loc[mine["status"] == "ok", metric]
    value = 100 * float(good.mean()) if len(good) else math.nan
    if math.isnan(value):
        return value, _LETTERS.get(mine["status"].iloc[0], "?")
    return value, f"{value:.0f}" + "*" * (len(good) < len(mine))


def _heatmap(rows: pd.DataFrame, track: str, metric: str) -> Figure:
    """Attack x defense, one panel per dataset and backbone; means over all seeds under the selection the track is judged by."""
    judged = stats.headline(rows, track)
    table = _attacked(_at(stats.field(rows, track), selection=judged))
    cells, order, names, implanted = _cells(table), _ordered(rows, track), _names(rows), _implanted(rows)
    attacks, roles = [name for (name,) in _places(table, "attack")], list(order.values())
    panels, signs = [], set()
    for place in _places(table, "dataset", "backbone"):
        found = [[_heat_cell(cells.get((*place, attack, *entry)), metric) for attack in attacks] for entry in order]
        dead = tuple(at for at, attack in enumerate(attacks) if not implanted.get((*place, attack), True))
        values, texts = (np.array([[cell[part] for cell in line] for line in found]) for part in (0, 1))
        values[:, dead] = math.nan
        signs |= {text[-1] for text in texts.ravel()}
        panels.append(HeatPanel(f"{place[0]}, {place[1]}", tuple(wrapped(plain(attack), 11, 3) for attack in attacks),
                                tuple(wrapped(names[entry], 24) for entry in order), values, texts, dead))  # fmt: skip
    key: Key = ((_NOT_COUNTED, _HATCH),) * any(panel.dead for panel in panels)
    key += tuple((text, None) for sign, text in _LETTER_KEY.items() if sign != "0" and sign in signs)
    note = (f"Means over seeds; {judged} selection; lines set off the undefended model (top) and the controls (bottom). "
            f"{gate_words(rows)}.")  # fmt: skip
    label = f"{_METRICS[metric]} in % ({'lower' if metric == 'asr' else 'higher'} is better)"
    rules = {roles.count("reference"), len(roles) - roles.count("control")} - {0, len(roles)}
    return Heat(tuple(panels), max(1, int(11.5 // (0.78 * len(attacks) + 0.2))), note, "YlOrRd" if metric == "asr" else "YlGnBu", label,
                tuple(sorted(rules)), key)  # fmt: skip


# -- lines ---------------------------------------------------------------------------------------------------------------------


def _scatter(rows: pd.DataFrame, track: str) -> Figure:
    """ACC against ASR, arrows from the undefended model; one panel per scenario."""
    judged = stats.headline(rows, track)
    table = _at(_attacked(_at(stats.field(rows, track), selection=judged)), status="ok")
    floor = max((start for start in (0, 50, 80, 90) if 100 * table["acc"].min() >= start + 1), default=0)
    present, names, implanted = set(stats.entries(table)), _names(rows), _implanted(rows)
    marks = {entry: Mark(*look, size=10 if look.marker == "*" else 6) for entry, look in looks(rows).items()}
    order = [entry for entry in _ordered(rows, track) if entry in present]
    cells, one_dataset = _cells(table), len(_places(table, "dataset")) == 1
    panels = []
    for place in _places(table, *stats.SCENARIO):
        here = table[(table[stats.SCENARIO] == list(place)).all(axis=1)]
        series = []
        for entry in order:
            if (*place, *entry) in cells:
                mine = cells[*place, *entry]
                x = (float(here["asr_undefended"].mean()), float(mine["asr"].mean()))
                y = (_only(float(here["acc_undefended"].mean())), _only(float(mine["acc"].mean())))
                series.append(Series(names[entry], x, y, mark=marks[entry], arrow=True))
        panels.append(Panel(f"{place[2]}\n{place[1] if one_dataset else ', '.join(place[:2])}", "ASR in %",
                            "ACC in %" + f" (from {floor} %)" * bool(floor), tuple(series), shares=True, floor=floor,
                            dead=not implanted.get(place, False)))  # fmt: skip
    attacks = len(_places(table, "attack"))
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
    table = stats.at_published_knob(table[table["cell"].isin(set(_attacked(rows)["cell"]))])
    table = table[[*stats.ENTRY, *stats.WORLD, "dial_name", "dial", *_METRICS]]
    return table.groupby([*stats.ENTRY, *stats.WORLD], sort=False).filter(lambda path: path["dial"].nunique() > 1)


def _dials(rows: pd.DataFrame, curves: pd.DataFrame, track: str) -> Figure | None:
    """ACC, ASR and RA along each dial (across) for each defense that has one (down); None when none has."""
    table = _dial_table(rows, curves, track)
    if table.empty:
        return None
    names, judged = _names(rows), stats.selections(rows, track)
    picks = _cells(_at(_attacked(rows), track=track, status="ok"))
    attacks, worlds = [name for (name,) in _places(table, "attack")], _places(table, "dataset", "backbone")
    colours = {attack: COLOURS[place % len(COLOURS)] for place, attack in enumerate(attacks)}
    strokes = {world: STROKES[place % len(STROKES)] for place, world in enumerate(worlds)}
    markers = {name: marker for name, marker in _CHOSEN.items() if name in judged}

    def drawn(mine: pd.DataFrame, metric: str) -> tuple[Series, ...]:
        """A curve per scenario, and a marker where each selection chose, on average."""
        found = []
        for place, seeds in mine.groupby(stats.SCENARIO, sort=False):
            paths = [path for _, path in seeds.groupby("seed", sort=True)]
            grid, mean = _dial_mean(paths, metric)
            curve, colour = Mark(colours[place[2]], stroke=strokes[place[:2]], alpha=0.9), colours[place[2]]
            found.append(Series("", tuple(grid), tuple(map(_only, mean)), mark=curve))
            chosen = picks.get((*place, *mine[stats.ENTRY].iloc[0]), rows.iloc[:0])
            for selection, marker in markers.items():
                picked = _at(chosen[np.isfinite(chosen["dial"])], selection=selection)
                if len(picked):
                    found.append(Series("", (float(picked["dial"].mean()),), (_only(float(picked[metric].mean())),),
                                        mark=Mark(colour, marker)))  # fmt: skip
        return tuple(found)

    panels = []
    for entry in stats.entries(table):
        mine = _at(table, defense=entry[0], scope=entry[1])
        positive = mine["dial"][mine["dial"] > 0]
        log = bool((mine["dial"] > 0).all() and positive.max() / positive.min() > 100)
        dial = wrapped(plain(mine["dial_name"].iloc[0]) or "dial", 42, 1)
        panels += [Panel(f"{names[entry]}: {words}", dial, "%", drawn(mine, metric), log=log, ticks=False)
                   for metric, words in _METRICS.items()]  # fmt: skip
    key: Key = tuple((name, Mark(colour, stroke="-", width=2)) for name, colour in colours.items())
    key += tuple((", ".join(world), Mark(stroke=stroke)) for world, stroke in strokes.items() if len(worlds) > 1)
    key += tuple((name, Mark(marker=marker)) for name, marker in markers.items())
    knobs = " Curves: at the published setting of the second knob, where there is one." if curves["knob"].notna().any() else ""
    return Lines(tuple(panels), 3, f"Means over seeds, implanted scenarios. Markers: the mean of what each selection chose.{knobs}", key)


# -- bars ----------------------------------------------------------------------------------------------------------------------

_RULES = {
    name: Mark(colour, kind="bar", printed=True, words=f"oracle - {name}")
    for name, colour in {"validation": "#0072B2", "default": "#E69F00", "strongest": "#009E73", "canary": "#CC79A7"}.items()
}


def _gaps(rows: pd.DataFrame) -> Figure | None:
    """RA that each rule stays below the oracle, bars with intervals: one panel per track that has a dial in it."""
    names = _names(rows)
    found = {track: gaps for track in stats.tracks(rows) if len(gaps := stats.selection_gaps(rows, track))}
    if not found:
        return None
    reach = max(5.0, 112 * max(float(np.nanmax(gaps.filter(like="gap_").to_numpy(np.float64))) for gaps in found.values()))
    panels = []
    for track, gaps in found.items():
        series = tuple((rule, tuple(_interval(line, f"gap_{rule}") for _, line in gaps.iterrows())) for rule in _RULES
                       if f"gap_{rule}" in gaps)  # fmt: skip
        called = tuple(names[entry] for entry in zip(gaps["defense"], gaps["scope"], strict=True))
        panels.append(DotPanel(track, "RA below the oracle's, percentage points: what a choice with the test set would have added", called,
                               series, limits=(0, reach)))  # fmt: skip
    return Dots(tuple(panels), "Implanted scenarios; lines: 95 % bootstrap intervals over seeds (none with a single seed).", marks=_RULES,
                width=6.2)  # fmt: skip


def _cost(rows: pd.DataFrame, timings: pd.DataFrame, track: str) -> Figure | None:
    """Standard epochs and seconds side by side, log scale where they span more than a factor of 30."""
    table = _at(stats.timing_summary(rows, timings), track=track)
    table = table[table["defense"] != stats.UNDEFENDED]
    if table.empty:
        return None
    style, names = looks(rows), _names(rows)
    order = list(zip(table["defense"], table["scope"], strict=True))
    panels = []
    for column, words in (("cost_epochs", "standard epochs (1 = one training epoch)"), ("seconds", "seconds")):
        positive = table[column][table[column] > 0]
        log = bool(len(positive) > 1 and positive.max() / positive.min() > 30)
        limits = (10.0 ** math.floor(math.log10(positive.min())) if log else 0.0,
                  float(positive.max()) * (6 if log else 1.3) if len(positive) else 1.0)  # fmt: skip
        letters = {("cost", row): "not measured" for row, value in enumerate(table[column]) if math.isnan(value)}
        panels.append(DotPanel("", words + ", log scale" * log, tuple(names[entry] for entry in order),
                               (("cost", tuple(map(_only, table[column]))),), unit=1, log=log, limits=limits, letters=letters,
                               looks=tuple(style[entry] for entry in order)))  # fmt: skip
    note = "Medians over finished cells. Seconds are those of the machine that ran the matrix; epochs are the same on every machine."
    return Dots(tuple(panels), note, 2, {"cost": Mark("", kind="bar", printed=True)}, 3.1, 0.3)


_TWIN = "the benign twin's ACC and ASR"
_ATTACK_MARKS = {metric: Mark(METRIC_COLOURS[metric], kind="bar", alpha=0.9, words=words) for metric, words in _METRICS.items()} | {
    "acc_benign": Mark("#111111", "|", 9, lane=-0.26, words=_TWIN),
    "asr_benign": Mark("#111111", "|", 9, lane=0.0, words=_TWIN),
    "least": Mark("#111111", "x", 4, lane=0.0, words=f"least ASR: {100 * IMPLANTED_ASR:g} %"),
}


def _attacks(rows: pd.DataFrame) -> Figure | None:
    """The undefended models: ACC, ASR and RA, a dot per seed, the benign twin, and the least ASR of an implanted attack."""
    worlds = _attacked(rows).groupby(stats.WORLD, sort=False).first().reset_index()
    if worlds.empty:
        return None
    scenarios = stats.scenarios(rows)
    costly = {tuple(line[stats.SCENARIO]) for _, line in scenarios.iterrows() if scenario_words(line).endswith("costs ACC")}
    implanted, panels = _implanted(rows), []
    for place in _places(worlds, "dataset", "backbone"):
        here = _at(worlds, dataset=place[0], backbone=place[1])
        seeds = {attack: _at(here, attack=attack) for (attack,) in _places(here, "attack")}
        columns = {**{metric: f"{metric}_undefended" for metric in _METRICS}, "acc_benign": "acc_benign", "asr_benign": "asr_benign"}
        series = [(name, tuple(_only(float(mine[column].mean())) for mine in seeds.values())) for name, column in columns.items()]
        panels.append(DotPanel(
            ", ".join(place), "%", tuple(wrapped(plain(attack), 30, 1) + "*" * ((*place, attack) in costly) for attack in seeds),
            (*series, ("least", (_only(IMPLANTED_ASR),) * len(seeds))),
            points={metric: tuple(tuple(mine[columns[metric]].dropna()) for mine in seeds.values()) for metric in _METRICS},
            hatched=tuple(row for row, attack in enumerate(seeds) if not implanted.get((*place, attack), False)),
        ))  # fmt: skip
    key: Key = (("one seed", Mark("#111111", ".")), ("not counted: no backdoor", _HATCH))
    return Dots(tuple(panels), f"{gate_words(rows)}; *: costs ACC.", min(2, len(panels)), _ATTACK_MARKS, 3.4, 0.5, key)


# -- isolated samples ----------------------------------------------------------------------------------------------------------


def _isolation_letters(line: pd.Series | None) -> tuple[str, str]:
    """What is written in place of precision and of recall where they cannot be drawn; empty where they can."""
    if line is None or line["cells_ok"] == 0:
        letter = "n" if line is None else _LETTERS.get(str(line["missing"]).split(" / ")[0], "?")
        return letter, letter
    return "" if line["precision_seeds"] else "0", "" if line["recall_seeds"] else "?"


def _detectors(rows: pd.DataFrame, track: str) -> Figure | None:
    """Precision (filled) and recall (hollow) of the samples each entry isolated, by attack, one panel per dataset and backbone.

    None when no entry isolates anything.
    """
    found = stats.detectors(rows, track)
    if found.empty:
        return None
    style, names, order = looks(rows), _names(rows), stats.entries(found)
    cells = _cells(_at(stats.field(rows, track), selection="default", status="ok"))
    lines = {(*line[stats.SCENARIO], *line[stats.ENTRY]): line for _, line in found.iterrows()}
    attacks = [name for (name,) in _places(found, "attack")]
    marks = {f"{names[entry]}: {part}": Mark(*style[entry], size=6.5, hollow=part == "recall", words=names[entry] if part == "precision"
                                             else "") for entry in order for part in ("precision", "recall")}  # fmt: skip
    marks["base"] = Mark("#111111", "|", 14, lane=0.0, words="base rate: precision of a random choice")
    panels, used = [], set()
    for place in _places(found, "dataset", "backbone"):
        points: dict[str, tuple[tuple[float, ...], ...]] = {}
        letters: dict[tuple[str, int], str] = {}
        for entry in order:
            for number, part in enumerate(("precision", "recall")):
                name, values = f"{names[entry]}: {part}", []
                for row, attack in enumerate(attacks):
                    key = (*place, attack, *entry)
                    letter = _isolation_letters(lines.get(key))[number]
                    if letter:
                        letters[name, row] = letter
                    values.append(() if letter else tuple(cells[key][part].dropna()))
                points[name] = tuple(values)
        here = [next((lines[*place, attack, *entry] for entry in order if (*place, attack, *entry) in lines), None) for attack in attacks]
        means = {name: tuple(_only(float(np.mean(one)) if one else math.nan) for one in values) for name, values in points.items()}
        base = tuple(_only(math.nan if line is None else float(line["base_rate"])) for line in here)
        dead = tuple(row for row, line in enumerate(here) if line is not None and not line["implanted"])
        used |= set(letters.values())
        panels.append(DotPanel(", ".join(place), "precision and recall in %", tuple(wrapped(plain(name), 18, 3) for name in attacks),
                               (*means.items(), ("base", base)), points=points, letters=letters, hatched=dead))  # fmt: skip
    extra: Key = (("filled: precision", Mark("#444444", "o")), ("hollow: recall", Mark("#444444", "o", hollow=True)),
                  ("one seed", Mark("#444444", "o", 3)), *((("attack not implanted", _HATCH),) * any(one.hatched for one in panels)),
                  *((text, None) for letter, text in _LETTER_KEY.items() if letter in used))  # fmt: skip
    return Dots(tuple(panels), "Large marks: means over all seeds, implanted or not; default selection.", min(len(panels), 2), marks, 3.6,
                0.34 * len(order) + 0.1, extra)  # fmt: skip


# -- average ranks -------------------------------------------------------------------------------------------------------------


def _ranks(rows: pd.DataFrame, track: str) -> Figure | None:
    """Average ranks by RA, best first, after Demsar's critical-difference diagram (JMLR 7, 2006): bars join entries that no test finds
    significantly different. None where :func:`benchmark.analysis.rank_tests.significance` refuses."""
    test = rank_tests.significance(rows, track, stats.headline(rows, track))
    if test is None:
        return None
    names, style, order = _names(rows), looks(rows), list(test.ranks)
    panel = DotPanel("", "average rank by RA (1 = best)", tuple(wrapped(names[entry], 34, 1) for entry in order),
                     (("rank", tuple(_only(test.ranks[entry]) for entry in order)),), unit=1, limits=(0.8, len(order) + 0.6),
                     looks=tuple(style[entry] for entry in order),
                     joined=tuple(tuple(order.index(entry) for entry in clique) for clique in test.cliques))  # fmt: skip
    verdict = "" if test.friedman < rank_tests.LEVEL else ", not significant"
    incomplete = ", ".join(names[entry] for entry in test.incomplete)
    note = (
        f"{test.blocks} implanted scenarios, {stats.headline(rows, track)} selection; Friedman p = {test.friedman:.2g}{verdict}. Bars at "
        "the right join entries between which Holm-adjusted Wilcoxon signed-rank tests find no difference at 5 %; dots on a bar are its "
        "members." + f" Left out, a scenario being missing: {incomplete}." * bool(incomplete)
    )
    return Dots((panel,), note, marks={"rank": Mark("", lane=0.0, printed=True)}, row=0.27)


# -- published beside measured -------------------------------------------------------------------------------------------------

_LEAKY = "here: chosen on the test ASR, as there"
_OURS = {
    "here: mean over seeds": Mark("", size=6.5, lane=0.15),
    "here: one seed": Mark("", marker="o", size=3.5, lane=0.38),
    _LEAKY: Mark("", size=9, hollow=True, lane=0.15),
}


def _published_words(group: Sequence[published.Comparison]) -> str:
    """Whether a scenario follows the literature's protocol, and at which rates its figures were published."""
    every = [figure.rate for one in group for figure in one.printed]
    rates = " and ".join(f"{100 * rate:g}" for rate in sorted({rate for rate in every if not math.isnan(rate)}))
    unknown = " (a source states no rate)" * any(map(math.isnan, every))
    at = f"published at {rates} % poison{unknown}" if rates else "published rate not stated"
    protocol = "the literature's protocol" if group[0].same_protocol else "OTHER PROTOCOL than the literature's"
    return f"{protocol}; {at}" + "; attack not implanted here" * (not group[0].implanted)


def _printed_label(figure: published.Printed) -> str:
    return f"published, {figure.backbone}" + ", chosen on test data" * bool(figure.chosen_on)


def _published_panel(group: Sequence[published.Comparison], metric: str, marks: Sequence[str], **about: object) -> DotPanel:
    """One metric of one scenario: published values with their range, ours below them."""
    bands = [published.band(getattr(figure, metric) for figure in one.printed) for one in group]
    means = tuple(_only(float(np.mean([seed[metric] for seed in one.measured]))) for one in group)
    leaky = tuple(_only(float(np.mean([seed[metric] for seed in one.leaky])) if one.leaky else math.nan) for one in group)
    series = ((marks[0], tuple(Interval(math.nan, *band) for band in bands)), ("here: mean over seeds", means),
              (_LEAKY, leaky))  # fmt: skip
    points = {
        name: tuple(tuple(value for figure in one.printed if _printed_label(figure) == name
                          and not math.isnan(value := getattr(figure, metric))) for one in group) for name in marks[1:]
    } | {"here: one seed": tuple(tuple(seed[metric] for seed in one.measured) if len(one.measured) > 1 else () for one in group)}  # fmt: skip
    letters = {(marks[0], row): "not published" for row, band in enumerate(bands) if math.isnan(band[0])}
    return DotPanel(xlabel=f"{_METRICS[metric]} in %", series=series, points=points, letters=letters, **about)  # type: ignore[arg-type]


def _published(rows: pd.DataFrame, track: str) -> Figure | None:
    """The literature's figures as bands, ours below each; a line of three panels (ACC, ASR, RA) per scenario.

    None where the literature has no figure of any defense of the track.
    """
    found = published.comparisons(rows, track)
    if not any(one.role == "defense" for one in found):
        return None
    style, names = looks(rows), _names(rows)
    networks = list(dict.fromkeys(figure.backbone for one in found for figure in one.printed))
    marks = {"published: least to largest": Mark("#D3D3D3", kind="band", lane=-0.22)} | {
        _printed_label(figure): Mark("#444444", MARKERS[networks.index(figure.backbone) % len(MARKERS)], 4.5, bool(figure.chosen_on),
                                     lane=-0.22)
        for one in found for figure in sorted(one.printed, key=lambda figure: bool(figure.chosen_on))
    }  # fmt: skip
    panels = []
    for place in dict.fromkeys(one.place for one in found):
        group = [one for one in found if one.place == place]
        called, shown = tuple(wrapped(names[one.entry], 26, 1) for one in group), tuple(style[one.entry] for one in group)
        for number, metric in enumerate(published.METRICS):
            panels.append(_published_panel(
                group, metric, list(marks), title=", ".join(place) * (not number), names=called, looks=shown,
                subtitle=_published_words(group) * (not number), alarm=not group[0].same_protocol,
            ))  # fmt: skip
    ours = {name: mark for name, mark in _OURS.items() if name != _LEAKY or any(one.leaky for one in found)}
    other = "" if all(one.same_protocol for one in found) else (
        "Other protocol: recipe, network or data size differ as tables/published.md lists, so a point outside its band is no "
        "failure and one inside no success. "
    )  # fmt: skip
    note = (f"{other}Bands: all sources that print the attack and the method, on the same architecture where there is one. All seeds, "
            f"{stats.headline(rows, track)} selection. Nothing is judged by these figures.")  # fmt: skip
    return Dots(tuple(panels), note, 3, marks | ours, 2.75, 0.42)


# -- everything ----------------------------------------------------------------------------------------------------------------


def write_plots(rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draws every figure of a matrix below ``folder/plots`` and returns the paths (PNG and SVG of each), in reading order.

    Figures that would be empty (no dial anywhere, no timing, nothing isolated) are not written.

    Args:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them.
        folder: the matrix's results folder.
        title: of the matrix, for the figures' titles.

    Raises:
        BadInput: the folder cannot be written.
    """
    written: list[Path] = []

    def put(name: str, figure: Figure | None, words: str) -> None:
        if figure is not None:
            written.extend(draw(figure, f"{plain(title)}: {words}", folder / "plots" / name))

    put("leaderboard", _leaderboard(rows), "leaderboard")
    put("attacks", _attacks(rows), "the undefended models")
    attacked = _attacked(rows)
    finished = (attacked["status"] == "ok").any()
    for track in stats.tracks(rows):
        words, tail = plain(track), slug(track)
        if len(attacked):
            put(f"heatmap-asr-{tail}", _heatmap(rows, track, "asr"), f"{words}, attack success rate")
            put(f"heatmap-ra-{tail}", _heatmap(rows, track, "ra"), f"{words}, robust accuracy")
        if finished:
            put(f"scatter-{tail}", _scatter(rows, track), f"{words}, what is kept and what is removed")
        if len(curves):
            put(f"dials-{tail}", _dials(rows, curves, track), f"{words}, along the dial")
        put(f"detectors-{tail}", _detectors(rows, track), f"{words}, training samples isolated as poisoned")
        put(f"cost-{tail}", _cost(rows, timings, track), f"{words}, cost")
        put(f"ranks-{tail}", _ranks(rows, track), f"{words}, average ranks")
        if finished:
            put(f"published-{tail}", _published(rows, track), f"{words}, published beside measured")
    put("selection-gap", _gaps(rows), "what choosing with the test set is worth")
    return written


# -- triggers ------------------------------------------------------------------------------------------------------------------


def _amplification(difference: np.ndarray) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, 100 that keeps the difference within 255."""
    peak = int(difference.max(initial=0))
    return max((factor for factor in (1, 2, 5, 10, 20, 50, 100) if factor * peak <= 255), default=1)


def _mosaic(images: np.ndarray, gap: int) -> np.ndarray:
    """uint8 (k, C, H, W) side by side on white, each with a margin of ``gap`` at its right and below: (H + gap, k * (W + gap), 3)."""
    colour = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
    padded = np.pad(colour, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=255)
    return np.concatenate(list(padded.transpose(0, 2, 3, 1)), axis=1)


_Item = tuple[str, np.ndarray, np.ndarray]


def _sheet(item: _Item) -> tuple[np.ndarray, str]:
    """Clean above triggered above difference, (3 H + 2 gaps, k W + (k - 1) gaps, 3), and the words for the difference.

    Raises:
        BadInput: an item is empty, not uint8, of another shape than its twin, or has neither 1 nor 3 channels.
    """
    name, clean, triggered = item
    good = clean.dtype == triggered.dtype == np.uint8 and clean.ndim == 4 and clean.shape == triggered.shape and len(clean) > 0
    if not good or clean.shape[1] not in (1, 3):
        raise BadInput(f"gallery of {name!r}: both uint8 (k, 1 or 3, H, W), not {clean.dtype} {clean.shape} and {triggered.dtype} "
                       f"{triggered.shape}")  # fmt: skip
    gap = max(1, round(clean.shape[2] / 16))
    difference = np.abs(triggered.astype(np.int16) - clean.astype(np.int16))
    factor = _amplification(difference)
    strips = [_mosaic(part, gap) for part in (clean, triggered, (difference * factor).astype(np.uint8))]
    words = f"difference \N{MULTIPLICATION SIGN} {factor}" if difference.any() else "no difference"
    return np.concatenate(strips)[:-gap, :-gap], words


def trigger_pictures(items: Sequence[_Item], folder: Path) -> list[Path]:
    """Writes ``folder/<attack>.png`` for each attack: clean images above triggered ones above their amplified difference.

    Every pixel is a square of whole pixels. The file's text ``Title`` is the attack's label, ``Description`` the amplification.

    Args:
        items: (attack label, clean uint8 (k, C, H, W), triggered uint8 of the same shape), C = 1 or 3.

    Raises:
        BadInput: an item is not as above, or the folder cannot be written.
    """
    written = []
    for item in items:
        image, words = _sheet(item)
        scale = max(1, 320 // image.shape[1])
        about, content = PngInfo(), io.BytesIO()
        about.add_itxt("Title", item[0])
        about.add_itxt("Description", words)
        Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1)).save(content, "PNG", optimize=True, pnginfo=about)
        written.append(folder / f"{slug(item[0])}.png")
        write_bytes(written[-1], content.getvalue())
    return written


def trigger_gallery(items: Sequence[_Item], path: Path) -> list[Path]:
    """Every trigger as pixels: clean, triggered, and the absolute difference times a factor printed beside it.

    Args:
        items: as of :func:`trigger_pictures`; every item the same shape.
        path: the figure without its suffix (a suffix is replaced); written as PNG and SVG, beside a folder of this name with the
            pictures of single attacks. Returns all paths, the figure's first.

    Raises:
        BadInput: an item is not as there, there is none, or a file cannot be written.
    """
    if not items:
        raise BadInput("a trigger gallery needs at least one attack")
    count = max(len(clean) for _, clean, _ in items)
    panels = tuple((wrapped(plain(item[0]), max(12, 9 * count), 1), words, image) for item in items for image, words in [_sheet(item)])
    note = "Absolute difference between triggered and clean image, multiplied as stated; pixels as the victim sees them (8 bit)."
    figure = Gallery(panels, max(1, min(len(items), 12 // max(count, 1))), note, ("clean", "triggered", "difference"), 0.72 * count, 2.26)
    stem = path.with_suffix("")
    return [*draw(figure, "Triggers", stem, colours=None), *trigger_pictures(items, stem)]
