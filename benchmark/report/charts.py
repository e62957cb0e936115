"""Rows -> figures, each as PNG for reading and SVG for papers; a second run writes the same bytes.

Shares are drawn in percent on axes from 0 to 100, a defense keeps its colour and marker in every figure of a matrix, and what is
missing is marked with a letter instead of left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmark.analysis import published, stats
from benchmark.report.style import METRIC_COLOURS, Panels, figures, label, log_axis, looks, percent_axis, save, wrapped
from benchmark.report.text import plain, slug
from benchmark.report.words import gate_words, scenario_words
from benchmark.rules.metrics import IMPLANTED_ASR
from models.spec import BadInput

__all__ = ["trigger_gallery", "write_plots"]

_Entry = tuple[str, str]
_WORDS = {"acc": "ACC", "asr": "ASR", "ra": "RA"}
_ABBREVIATIONS = {"failed": "F", "refused": "R"}


def _places(table: pd.DataFrame, *columns: str) -> list[tuple[str, ...]]:
    """Distinct values of some columns, in matrix order."""
    return list(dict.fromkeys(table[list(columns)].itertuples(index=False, name=None)))


def _at(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    chosen = np.ones(len(table), dtype=bool)
    for name, value in values.items():
        chosen &= (table[name] == value).to_numpy()
    return table.loc[chosen]


def _ok_mean(table: pd.DataFrame, column: str) -> float:
    good = table.loc[table["status"] == "ok", column]
    return float(good.mean()) if len(good) else math.nan


def _implanted(rows: pd.DataFrame) -> dict[tuple[str, ...], bool]:
    found = stats.scenarios(rows)
    return {(line["dataset"], line["backbone"], line["attack"]): bool(line["implanted"]) for _, line in found.iterrows()}


def _attacked(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.loc[rows["attack"] != stats.NO_ATTACK]


def _cells(table: pd.DataFrame) -> dict[tuple[str, ...], pd.DataFrame]:
    """The rows of each (dataset, backbone, attack, defense, scope)."""
    groups = table.groupby([*stats.SCENARIO, *stats.ENTRY], sort=False)
    return {tuple(map(str, np.atleast_1d(np.asarray(key, dtype=object)))): cell for key, cell in groups}


def _names(rows: pd.DataFrame) -> dict[_Entry, str]:
    every = stats.entries(rows)
    return {entry: "undefended" if entry[0] == stats.UNDEFENDED else label(entry, every) for entry in every}


def _ordered(rows: pd.DataFrame, track: str) -> list[_Entry]:
    """The undefended model, the competing entries in matrix order, then the controls."""
    table = stats.field(rows, track)
    rank = {"reference": 0, "defense": 1, "control": 2}
    roles = {(line[0], line[1]): rank[line[2]] for line in table[[*stats.ENTRY, "role"]].itertuples(index=False, name=None)}
    return sorted(roles, key=lambda entry: roles[entry])


def _legend_columns(names: Sequence[str], width: float) -> int:
    """Into how many columns a legend fits within ``width`` inches, filled column by column as matplotlib does; at least 1."""
    for columns in range(min(len(names), 6), 1, -1):
        parts = np.array_split(np.array([len(name) for name in names]), columns)
        if sum(0.45 + 0.07 * int(part.max()) for part in parts) <= width - 0.2:
            return columns
    return 1


# -- the leaderboard -----------------------------------------------------------------------------------------------------------


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


def _marked(name: str, line: pd.Series) -> str:
    """An entry's name; where it left every model as it was, it says so."""
    idle = line["role"] == "defense" and line["cells_ok"] and line["no_change"] >= line["cells_ok"]
    return wrapped(name, 40 if idle else 44, 1) + (": no change" if idle else "")


def _leaderboard(plt: Any, rows: pd.DataFrame, title: str) -> Any | None:
    """Every leaderboard at a glance: RA and ASR with their intervals, ACC, and the RA an oracle would have reached.

    None where no attack implanted or nothing finished.
    """
    parts = _boards(rows)
    if not any(((part["role"] == "defense") & (part["cells_ok"] > 0)).any() for _, part in parts):
        return None
    names = _names(rows)
    texts = [[_marked(names[line["defense"], line["scope"]], line) for _, line in part.iterrows()] for _, part in parts]
    left = _margin([text for part in texts for text in part])
    heights = [0.12 + 0.235 * len(part) for _, part in parts]
    panels = Panels(plt, len(parts), 1, (9.2 - left, 1.0), (0, 0.52), (left, 0.3, 1.1, 0.72), title, heights=heights)
    marks: dict[str, dict[str, Any]] = {
        "ra": {"marker": "o", "markersize": 7, "markeredgecolor": "white", "zorder": 5},
        "asr": {"marker": "s", "markersize": 6, "markeredgecolor": "white", "zorder": 4},
        "ra_oracle": {"marker": "o", "markersize": 7, "markerfacecolor": "none", "zorder": 3},
        "acc": {"marker": "|", "markersize": 11, "markeredgewidth": 2.0, "zorder": 6},
    }
    colours = {name: METRIC_COLOURS[name.partition("_")[0]] for name in marks}
    for axis, (head, part), text in zip(panels.axes, parts, texts, strict=True):
        for height, (_, line) in enumerate(part.iterrows()):
            axis.plot([0, 100], [height, height], color="#EDEDED", linewidth=0.8, zorder=0)
            if not line["cells_ok"]:
                axis.text(1, height, f"{line['missing']} everywhere", va="center", fontsize=8, color="#777777", fontstyle="italic")
            for name, mark in marks.items():
                if math.isnan(line[name]):
                    continue
                shade = colours[name]
                low, high = (100 * float(line.get(f"{name}_{end}", math.nan)) for end in ("low", "high"))
                if name in ("ra", "asr") and not math.isnan(low):
                    axis.plot([low, high], [height] * 2, color=shade, linewidth=2.2, alpha=0.55, zorder=1, solid_capstyle="butt")
                axis.plot(100 * line[name], height, linestyle="", color=shade, clip_on=False, **{"markeredgecolor": shade, **mark})
        axis.set_yticks(range(len(part)), text)
        axis.set_ylim(len(part) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        percent_axis(axis.xaxis)
        axis.set_title(head)
    panels.axes[-1].set_xlabel("%: a defense that works has RA and ACC far right, ASR far left")
    words = {"ra": "RA: right class in spite of the trigger", "asr": "ASR: the attacker's class",
             "ra_oracle": "RA, chosen on the test set", "acc": "ACC on clean images"}  # fmt: skip
    panels.legend(
        [plt.Line2D([], [], linestyle="", color=colours[name], label=words[name],
                    **{key: value for key, value in marks[name].items() if key not in ("zorder", "markeredgecolor")})
         for name in marks], 4, 1.0,
    )  # fmt: skip
    intervals = any(part["ra_low"].notna().any() for _, part in parts)
    panels.footnote(
        "Means over implanted scenarios" + (", bars: 95 % intervals over seeds" if intervals else "") +
        f"; order: average rank by RA; {gate_words(rows)}; no change: every model was left as it was."
    )  # fmt: skip
    return panels.figure


# -- heat maps -----------------------------------------------------------------------------------------------------------------


def _heatmap(plt: Any, rows: pd.DataFrame, track: str, metric: str, title: str) -> Any:
    """Attack x defense, one panel per dataset and backbone; means over all seeds under the selection it is judged by."""
    import matplotlib as mpl
    import seaborn
    from matplotlib.patches import Patch, Rectangle

    table = _attacked(_at(stats.field(rows, track), selection=stats.headline(rows, track)))
    cells = _cells(table)
    order, names, implanted = _ordered(rows, track), _names(rows), _implanted(rows)
    places, attacks = _places(table, "dataset", "backbone"), [name for (name,) in _places(table, "attack")]
    cell = (0.78, 0.33)
    size = (cell[0] * len(attacks), cell[1] * len(order))
    entry_labels = [wrapped(names[entry], 24) for entry in order]
    left = _margin([part for text in entry_labels for part in text.split("\n")])
    columns = max(1, int((13.5 - left) // (size[0] + 0.2)))
    attack_labels = [wrapped(plain(name), 11, 3) for name in attacks]
    deep = max(text.count("\n") for text in attack_labels)
    # A panel of two columns is narrower than most titles (about nine letters to the inch), which then take two lines.
    tall = max(len(f"{plain(dataset)}, {plain(backbone)}") for dataset, backbone in places) > 9 * size[0] + 6
    above = 0.95 + 0.14 * deep + 0.18 * tall
    panels = Panels(plt, len(places), columns, size, (0.22, above), (left, 0.9, 0.75, above), title)
    colours, scale = mpl.colormaps["YlOrRd" if metric == "asr" else "YlGnBu"], mpl.colors.Normalize(0, 100)
    used: set[str] = set()
    for position, (axis, (dataset, backbone)) in enumerate(zip(panels.axes, places, strict=True)):
        grid = np.full((len(order), len(attacks)), np.nan)
        for column, attack in enumerate(attacks):
            live = implanted.get((dataset, backbone, attack), True)  # what was not run is marked by its letter
            for line, entry in enumerate(order):
                mine = cells.get((dataset, backbone, attack, *entry), table.iloc[:0])
                grid[line, column] = value = 100 * _ok_mean(mine, metric)
                partial = len(mine) > 1 and not (mine["status"] == "ok").all()
                text, shade = f"{value:.0f}" + ("*" if partial else ""), "#222222"
                if math.isnan(value):
                    text = _ABBREVIATIONS.get(mine["status"].iloc[0], "?") if len(mine) else "n"
                    used.add(text)
                elif partial:
                    used.add("*")
                if live and not math.isnan(value):
                    red, green, blue, _ = colours(scale(value))
                    shade = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "#222222"
                axis.text(
                    column + 0.5,
                    line + 0.5,
                    text,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=shade if live else "#777777",
                    fontweight="bold" if math.isnan(value) else "normal",
                    zorder=3,
                )
            if not live:
                used.add("hatched")
                axis.add_patch(
                    Rectangle(
                        (column, 0), 1, len(order), facecolor="#F1F1F1", edgecolor="#CFCFCF", hatch="////", linewidth=0, zorder=2
                    )
                )
        seaborn.heatmap(
            grid, mask=np.isnan(grid), ax=axis, cmap=colours, vmin=0, vmax=100, cbar=False, linewidths=1.5, linecolor="white",
            xticklabels=False, yticklabels=False,
        )  # fmt: skip
        axis.set(
            xlim=(0, len(attacks)), ylim=(len(order), 0), xticks=np.arange(len(attacks)) + 0.5, yticks=np.arange(len(order)) + 0.5
        )
        axis.xaxis.tick_top()
        axis.set_xticklabels(attack_labels, rotation=0)
        axis.set_yticklabels(entry_labels if panels.left_of_row(position) else [], rotation=0)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        ends = [sum(entry[0] == stats.UNDEFENDED for entry in order)]
        ends.append(len(order) - _controls(rows, track))
        for end in ends:
            if 0 < end < len(order):
                axis.axhline(end, color="#333333", linewidth=1.2, zorder=4)
        axis.set_title(f"{plain(dataset)}{',' if tall else ', '}{chr(10) * tall}{plain(backbone)}", pad=24 + 11 * deep, loc="left")
    last = panels.axes[min(panels.columns, len(places)) - 1].get_position()
    bar = panels.figure.add_axes((last.x1 + 0.18 / panels.width, last.y0, 0.13 / panels.width, last.height))
    panels.figure.colorbar(mpl.cm.ScalarMappable(scale, colours), cax=bar, ticks=[0, 25, 50, 75, 100])
    bar.set_ylabel(f"{_WORDS[metric]} in %" + (" (lower is better)" if metric == "asr" else " (higher is better)"))
    bar.tick_params(length=0)
    words = {"F": "F = failed", "R": "R = refused", "n": "n = not run", "?": "? = not measured", "*": "* = some seeds missing"}
    handles = (
        [Patch(facecolor="#F1F1F1", edgecolor="#BBBBBB", hatch="////", label="attack not implanted or adversarial: not counted")]
        if "hatched" in used
        else []
    )
    handles += [Patch(facecolor="white", edgecolor="white", label=words[letter]) for letter in words if letter in used]
    if handles:
        panels.legend(handles, len(handles))
    panels.footnote(
        f"Means over seeds; {stats.headline(rows, track)} selection; lines set off the undefended model "
        "(top) and the controls (bottom). "
        f"{gate_words(rows)}."
    )
    return panels.figure


def _controls(rows: pd.DataFrame, track: str) -> int:
    table = stats.field(rows, track)
    return len(stats.entries(table[table["role"] == "control"]))


# -- accuracy against attack success -------------------------------------------------------------------------------------------


def _scatter(plt: Any, rows: pd.DataFrame, track: str, title: str) -> Any:
    """ACC against ASR, arrows from the undefended model; one panel per scenario."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    table = _at(_attacked(_at(stats.field(rows, track), selection=stats.headline(rows, track))), status="ok")
    cells = _cells(table)
    floor = max((start for start in (0, 50, 80, 90) if 100 * table["acc"].min() >= start + 1), default=0)
    style, names, implanted = looks(rows), _names(rows), _implanted(rows)
    order = [entry for entry in _ordered(rows, track) if entry in set(stats.entries(table))]
    places = _places(table, *stats.SCENARIO)
    one_dataset = len(_places(table, "dataset")) == 1
    by_backbone = len(_places(table, "attack")) <= 4
    columns = min(len(places), len(_places(table, "attack")) if by_backbone else 4)
    in_legend = [wrapped(names[entry], 60, 1) for entry in order]
    dead = "attack not implanted or adversarial: not counted"
    some_dead = not all(implanted.get(place, False) for place in places)
    width = max(7.0, 0.9 + 2.35 * columns + 0.25 * (columns - 1))
    legend_columns = _legend_columns([*in_legend, *[dead] * some_dead], width)
    below = 0.85 + 0.21 * math.ceil((len(order) + some_dead) / legend_columns)
    panels = Panels(plt, len(places), columns, (2.35, 2.1), (0.25, 0.78), (0.7, 0.2, below, 0.85), title)
    for position, (axis, place) in enumerate(zip(panels.axes, places, strict=True)):
        here = table[(table[stats.SCENARIO] == list(place)).all(axis=1)]
        start = (100 * float(here["asr_undefended"].mean()), 100 * float(here["acc_undefended"].mean()))
        live = implanted.get(place, False)
        for entry in order:
            mine = cells.get((*place, *entry))
            if mine is None:
                continue
            look, end = style[entry], (100 * float(mine["asr"].mean()), 100 * float(mine["acc"].mean()))
            if entry[0] != stats.UNDEFENDED and math.dist(start, end) > 2:
                axis.annotate(
                    "",
                    end,
                    start,
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": look.colour,
                        "alpha": 0.45,
                        "linewidth": 0.9,
                        "shrinkA": 4,
                        "shrinkB": 4,
                        "mutation_scale": 8,
                    },
                    zorder=2,
                )
            axis.scatter(
                *end,
                s=95 if entry[0] == stats.UNDEFENDED else 34,
                c=look.colour,
                marker=look.marker,
                edgecolors="white",
                linewidths=0.6,
                zorder=4 if entry[0] == stats.UNDEFENDED else 3,
                clip_on=False,
            )
        percent_axis(axis.xaxis)
        percent_axis(axis.yaxis, floor=floor)
        if not live:
            axis.set_facecolor("#E6E6E6")
        world = plain(place[1]) if one_dataset else plain(f"{place[0]}, {place[1]}")
        axis.set_title(f"{wrapped(plain(place[2]), 28, 1)}\n{wrapped(world, 30, 1)}", fontsize=9)
        if not panels.left_of_row(position):
            axis.set_yticklabels([])
        else:
            axis.set_ylabel("ACC in %" + (f" (from {floor} %)" if floor else ""))
        if position + panels.columns >= len(places):
            axis.set_xlabel("ASR in %")
        else:
            axis.set_xticklabels([])
    handles: list[Any] = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=style[entry].marker,
            color=style[entry].colour,
            markeredgecolor="white",
            markeredgewidth=0.6,
            markersize=10 if entry[0] == stats.UNDEFENDED else 7,
            label=name,
        )
        for entry, name in zip(order, in_legend, strict=True)
    ]
    if some_dead:
        handles.append(Patch(facecolor="#E6E6E6", edgecolor="#BBBBBB", label=dead))
    panels.legend(handles, legend_columns)
    crop = f" The ACC axis starts at {floor} %." if floor else ""
    panels.footnote(
        f"Means over seeds; {stats.headline(rows, track)} selection; arrows start at the undefended model; "
        f"the best corner is upper left.{crop}"
    )
    return panels.figure


# -- dials ---------------------------------------------------------------------------------------------------------------------


def _dial_mean(worlds: Sequence[pd.DataFrame], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds along the dial, on the union of their dial values within the range that all of them cover."""
    paths = [world.groupby("dial")[metric].mean() for world in worlds]
    low, high = max(path.index.min() for path in paths), min(path.index.max() for path in paths)
    grid = np.unique(np.concatenate([path.index.to_numpy(np.float64) for path in paths]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.mean([np.interp(grid, path.index.to_numpy(np.float64), path.to_numpy(np.float64)) for path in paths], axis=0)


def _dials(plt: Any, rows: pd.DataFrame, curves: pd.DataFrame, track: str, title: str) -> Any | None:
    """ACC, ASR and RA along each dial (across) for each defense that has one (down); None when none has."""
    from matplotlib.lines import Line2D

    live = {place for place, good in _implanted(rows).items() if good}
    kept = [place in live for place in curves[stats.SCENARIO].itertuples(index=False, name=None)]
    table = curves[np.asarray(kept, dtype=bool) & np.isfinite(curves["dial"].to_numpy()) & (curves["track"] == track).to_numpy()]
    counted = set(_attacked(rows)["cell"])
    table = table[table["cell"].isin(counted)]
    table = stats.at_published_knob(table)
    table = table.groupby([*stats.ENTRY, *stats.WORLD], sort=False).filter(lambda path: path["dial"].nunique() > 1)
    if table.empty:
        return None
    order, names = stats.entries(table), _names(rows)
    picks = _cells(_at(_attacked(rows), track=track, status="ok"))
    places = _places(table, *stats.SCENARIO)
    attacks = [name for (name,) in _places(table, "attack")]
    worlds = _places(table, "dataset", "backbone")
    colours = dict(
        zip(
            attacks,
            ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#5E3C99"] * len(attacks),
            strict=False,
        )
    )
    strokes: dict[tuple[str, ...], Any] = dict(
        zip(worlds, ["-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1, 1, 1))] * len(worlds), strict=False)
    )
    judged = stats.selections(rows, track)
    shapes = (("validation", "o"), ("default", "s"), ("canary", "^"), ("oracle", "X"))
    marks = {name: mark for name, mark in shapes if name in judged}
    world_names = [wrapped(plain(", ".join(world)), 40, 1) for world in worlds] if len(worlds) > 1 else []
    in_legend = [*(wrapped(plain(name), 40, 1) for name in attacks), *world_names, *marks]
    legend_columns = _legend_columns(in_legend, 10.2)
    below = 0.85 + 0.21 * math.ceil(len(in_legend) / legend_columns)
    panels = Panels(plt, 3 * len(order), 3, (2.75, 1.75), (0.55, 0.72), (0.65, 0.2, below, 0.7), title)
    for line, entry in enumerate(order):
        mine = _at(table, defense=entry[0], scope=entry[1])
        positive = mine["dial"][mine["dial"] > 0]
        log = bool((mine["dial"] > 0).all() and positive.max() / positive.min() > 100)
        for column, metric in enumerate(_WORDS):
            axis = panels.axes[3 * line + column]
            for place in places:
                paths = [path for _, path in mine[(mine[stats.SCENARIO] == list(place)).all(axis=1)].groupby("seed", sort=True)]
                if not paths:
                    continue
                grid, mean = _dial_mean(paths, metric)
                axis.plot(grid, 100 * mean, color=colours[place[2]], linestyle=strokes[place[:2]], linewidth=1.4, alpha=0.9)
                chosen = picks.get((*place, *entry), rows.iloc[:0])
                chosen = chosen[np.isfinite(chosen["dial"])]
                for selection, mark in marks.items():
                    picked = _at(chosen, selection=selection)
                    if len(picked):
                        axis.plot(
                            picked["dial"].mean(),
                            100 * picked[metric].mean(),
                            marker=mark,
                            color=colours[place[2]],
                            markersize=6,
                            markeredgecolor="white",
                            markeredgewidth=0.7,
                            linestyle="",
                            zorder=4,
                            clip_on=False,
                        )
            percent_axis(axis.yaxis)
            if log:
                log_axis(axis)
            if column == 0:
                axis.set_ylabel("%")
            axis.set_title(f"{wrapped(names[entry], 36, 1)}: {_WORDS[metric]}", fontsize=8.5)
            axis.set_xlabel(wrapped(plain(mine["dial_name"].iloc[0]) or "dial", 42, 1))
    handles = [Line2D([], [], color=colours[name], linewidth=2, label=wrapped(plain(name), 40, 1)) for name in attacks]
    handles += [
        Line2D([], [], color="#444444", linestyle=strokes[world], label=name)
        for world, name in zip(worlds, world_names, strict=False)
    ]
    handles += [
        Line2D([], [], color="#444444", marker=mark, linestyle="", markeredgecolor="white", label=name)
        for name, mark in marks.items()
    ]
    panels.legend(handles, legend_columns)
    knobs = " Curves: at the published setting of the second knob, where there is one." if curves["knob"].notna().any() else ""
    panels.footnote(f"Means over seeds, implanted scenarios. Markers: where each selection stands on average.{knobs}")
    return panels.figure


# -- bars ----------------------------------------------------------------------------------------------------------------------


def _bars(
    axis: Any,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    offset: float = 0.0,
    thick: float = 0.7,
    **more: Any,
) -> None:
    heights = np.arange(len(names)) + offset
    axis.barh(heights, [0 if math.isnan(value) else value for value in values], height=thick, color=colours, **more)
    axis.set_yticks(np.arange(len(names)))
    axis.set_yticklabels(names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(True, axis="x")


def _margin(names: Sequence[str]) -> float:
    return 0.35 + 0.073 * max(map(len, names), default=5)


def _gaps(plt: Any, rows: pd.DataFrame, title: str) -> Any | None:
    """RA that each rule stays below the oracle, bars with intervals: one panel per track that has a dial in it."""
    from matplotlib.patches import Patch

    found = [(track, gaps) for track in stats.tracks(rows) if len(gaps := stats.selection_gaps(rows, track))]
    if not found:
        return None
    names = _names(rows)
    texts = [[wrapped(names[entry], 36, 1) for entry in zip(gaps["defense"], gaps["scope"], strict=True)] for _, gaps in found]
    left = _margin([name for part in texts for name in part])
    panels = Panels(
        plt,
        len(found),
        1,
        (8.6 - left, 1.0),
        (0.3, 0.95),
        (left, 0.5, 1.15, 0.82),
        title,
        heights=[(0.12 + 0.15 * sum(str(name).startswith("ra_") for name in gaps)) * len(gaps) + 0.1 for _, gaps in found],
    )
    ends = 100 * np.concatenate([gaps.filter(like="gap_").to_numpy(np.float64).ravel() for _, gaps in found])
    reach, least = max(5.0, 1.12 * float(np.nanmax(ends))), 0.0
    every = {"validation": "#0072B2", "default": "#E69F00", "strongest": "#009E73", "canary": "#CC79A7"}
    shades = {name: shade for name, shade in every.items() if any(f"gap_{name}" in gaps for _, gaps in found)}
    for axis, (track, gaps), text in zip(panels.axes, found, texts, strict=True):
        here = [name for name in shades if f"gap_{name}" in gaps]
        thick = 0.8 / len(here)
        for number, selection in enumerate(here):
            shade, offset = shades[selection], (number - (len(here) - 1) / 2) * thick
            values = 100 * gaps[f"gap_{selection}"].to_numpy()
            _bars(axis, text, list(values), [shade] * len(values), offset, 0.94 * thick)
            for line, value in enumerate(values):
                if math.isnan(value):
                    continue  # chosen by every rule but this one
                low, high = (100 * float(gaps[f"gap_{selection}_{end}"].iloc[line]) for end in ("low", "high"))
                if not math.isnan(low):
                    axis.plot([low, high], [line + offset] * 2, color="#222222", linewidth=1.2, solid_capstyle="butt")
                edge = value if math.isnan(high) else max(value, high)
                axis.text(edge + 0.008 * (reach - least), line + offset, f"{value:.1f}", va="center", fontsize=7.5, color="#333333")
        axis.set_xlim(least, reach)
        axis.axvline(0, color="#333333", linewidth=0.9)
        axis.set_title(plain(track))
        axis.set_xlabel("RA below the oracle's, percentage points: what a choice with the test set would have added")
    panels.legend([Patch(color=shade, label=f"oracle - {name}") for name, shade in shades.items()], len(shades))
    panels.footnote("Implanted scenarios; lines: 95 % bootstrap intervals over seeds (none with a single seed).")
    return panels.figure


def _cost(plt: Any, rows: pd.DataFrame, timings: pd.DataFrame, track: str, title: str) -> Any | None:
    """Standard epochs and seconds side by side, log scale where they span more than a factor of 30."""
    table = stats.timing_summary(rows, timings)
    table = _at(table, track=track)
    table = table[table["defense"] != stats.UNDEFENDED]
    if table.empty:
        return None
    style, names = looks(rows), _names(rows)
    order = list(zip(table["defense"], table["scope"], strict=True))
    texts = [wrapped(names[entry], 36, 1) for entry in order]
    left = _margin(texts)
    size = ((9.4 - left - 0.95) / 2, 0.3 * len(order) + 0.15)
    panels = Panels(plt, 2, 2, size, (0.25, 0.3), (left, 0.7, 0.85, 0.5), title)
    for position, (axis, column, words) in enumerate(
        zip(panels.axes, ("cost_epochs", "seconds"), ("standard epochs (1 = one training epoch)", "seconds"), strict=True)
    ):
        values = table[column].to_numpy(np.float64)
        _bars(axis, texts if position == 0 else [""] * len(texts), list(values), [style[entry].colour for entry in order])
        positive = values[values > 0]
        log = len(positive) > 1 and positive.max() / positive.min() > 30
        if log:
            log_axis(axis)
            axis.set_xlim(10 ** math.floor(math.log10(positive.min())), positive.max() * 3)
        else:
            axis.locator_params(axis="x", nbins=5)
            axis.set_xlim(0, max(positive.max(), 1e-9) * 1.2 if len(positive) else 1)
        start = axis.get_xlim()[0]
        for line, value in enumerate(values):
            text = "not measured" if math.isnan(value) else f"{value:.3g}"
            axis.annotate(
                text,
                (max(value, start) if not math.isnan(value) else start, line),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="#333333",
            )
        axis.set_xlabel(words + (", log scale" if log else ""))
    panels.footnote(
        "Medians over finished cells. Seconds are those of the machine that ran the matrix; epochs are the same on every machine."
    )
    return panels.figure


_PER_PANEL = 7
"""Attacks side by side in one panel; more are spread over several."""


def _attacks(plt: Any, rows: pd.DataFrame, title: str) -> Any | None:
    """The undefended models: ACC, ASR and RA bars with a dot per seed, the twin's ASR, and the validity gate's thresholds."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    attacked = rows[rows["attack"] != stats.NO_ATTACK]
    if attacked.empty:
        return None
    worlds = attacked.groupby(stats.WORLD, sort=False).first().reset_index()
    implanted = _implanted(rows)
    verdicts = {tuple(line[stats.SCENARIO]): scenario_words(line) for _, line in stats.scenarios(rows).iterrows()}
    lists = []
    for dataset, backbone in _places(worlds, "dataset", "backbone"):
        met = list(dict.fromkeys(_at(worlds, dataset=dataset, backbone=backbone)["attack"]))
        count = math.ceil(len(met) / _PER_PANEL)
        for number, shown in enumerate(np.array_split(np.array(met, dtype=object), count), 1):
            lists.append((dataset, backbone, list(shown), f" ({number} of {count})" if count > 1 else ""))
    widest = max(len(attacks) for _, _, attacks, _ in lists)
    across = min(len(lists), 2)
    panels = Panels(plt, len(lists), across, (max(3.2, 0.95 * widest), 2.2), (0.35, 1.05), (0.65, 0.2, 1.4, 0.82), title)
    metrics = {"acc": "acc_undefended", "asr": "asr_undefended", "ra": "ra_undefended"}
    for position, (axis, (dataset, backbone, attacks, part)) in enumerate(zip(panels.axes, lists, strict=True)):
        here = _at(worlds, dataset=dataset, backbone=backbone)
        for column, attack in enumerate(attacks):
            mine = _at(here, attack=attack)
            live = implanted.get((dataset, backbone, attack), False)
            if not live:
                axis.axvspan(
                    column - 0.47, column + 0.47, facecolor="#F1F1F1", edgecolor="#CFCFCF", hatch="////", linewidth=0, zorder=0
                )
            for step, (metric, name) in enumerate(metrics.items()):
                values = 100 * mine[name].dropna().to_numpy()
                if len(values):
                    x = column + 0.27 * (step - 1)
                    axis.bar(x, values.mean(), width=0.25, color=METRIC_COLOURS[metric], alpha=0.9 if live else 0.4, zorder=2)
                    axis.scatter(
                        np.linspace(x - 0.06, x + 0.06, len(values)) if len(values) > 1 else [x],
                        values,
                        s=9,
                        c="#111111",
                        zorder=4,
                        linewidths=0,
                        clip_on=False,
                    )
            for x, name in ((column - 0.27, "acc_benign"), (column, "asr_benign")):
                twin = 100 * float(mine[name].mean())
                if not math.isnan(twin):
                    axis.plot([x - 0.14, x + 0.14], [twin] * 2, color="#111111", linewidth=1.6, zorder=5, solid_capstyle="butt")
            axis.plot(
                [column - 0.14, column + 0.14],
                [100 * IMPLANTED_ASR] * 2,
                color="#111111",
                linewidth=1.2,
                linestyle=(0, (2, 1)),
                zorder=5,
            )
        percent_axis(axis.yaxis, "%" if panels.left_of_row(position) else "")
        axis.set_ylim(0, 103)
        axis.set_xlim(-0.55, widest - 0.45)
        axis.set_xticks(range(len(attacks)))
        costly = [attack for attack in attacks if verdicts[dataset, backbone, attack].endswith("costs ACC")]
        axis.set_xticklabels([wrapped(plain(attack), 12, 3) + "*" * (attack in costly) for attack in attacks])
        axis.tick_params(axis="x", length=0)
        axis.set_title(f"{plain(dataset)}, {plain(backbone)}{part}")
    handles: list[Any] = [Patch(color=METRIC_COLOURS[metric], label=_WORDS[metric]) for metric in metrics]
    handles += [
        Line2D([], [], color="#111111", linewidth=1.6, label="the benign twin's ACC and ASR"),
        Line2D([], [], color="#111111", linewidth=1.2, linestyle=(0, (2, 1)), label=f"least ASR: {100 * IMPLANTED_ASR:g} %"),
        Line2D([], [], color="#111111", marker="o", markersize=3, linestyle="", label="one seed"),
        Patch(facecolor="#F1F1F1", edgecolor="#BBBBBB", hatch="////", label="not counted: no backdoor"),
    ]
    panels.legend(handles, 4)
    panels.footnote(f"{gate_words(rows)}; *: costs ACC.")
    return panels.figure


# -- samples singled out -------------------------------------------------------------------------------------------------------


def _isolation_letters(line: pd.Series | None) -> tuple[str, str]:
    """What stands in the place of precision and of recall where they cannot be drawn; empty where they can."""
    if line is None or line["cells_ok"] == 0:
        letter = "n" if line is None else _ABBREVIATIONS.get(str(line["missing"]).split(" / ")[0], "?")
        return letter, letter
    return "" if line["precision_seeds"] else "0", "" if line["recall_seeds"] else "?"


def _detectors(plt: Any, rows: pd.DataFrame, track: str, title: str) -> Any | None:
    """Precision (filled) and recall (hollow) of the samples each entry isolated, by attack, one panel per dataset and backbone.

    One lane per entry and attack, precision above recall; small marks are seeds. None when no entry isolates anything.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = stats.detectors(rows, track)
    if found.empty:
        return None
    style, names = looks(rows), _names(rows)
    order = stats.entries(found)
    cells = _cells(_at(stats.field(rows, track), selection="default", status="ok"))
    lines = {(*line[stats.SCENARIO], *line[stats.ENTRY]): line for _, line in found.iterrows()}
    places, attacks = _places(found, "dataset", "backbone"), [name for (name,) in _places(found, "attack")]
    lane, group = 0.34, 0.34 * len(order) + 0.22
    attack_labels = [wrapped(plain(name), 18, 3) for name in attacks]
    left = _margin([part for text in attack_labels for part in text.split("\n")])
    columns = min(len(places), 3 if left < 2 else 2)
    width = max(7.0, left + 0.3 + 3.6 * columns + 0.3 * (columns - 1))
    texts = [wrapped(names[entry], 60, 1) for entry in order]
    letters = {(*place, attack, *entry): _isolation_letters(lines.get((*place, attack, *entry)))
               for place in places for attack in attacks for entry in order}  # fmt: skip
    used = {letter for pair in letters.values() for letter in pair}
    words = {"F": "F = failed", "R": "R = refused", "n": "n = not run", "0": "0 = nothing isolated", "?": "? = not measured"}
    shapes = ["precision (filled)", "recall (hollow)", "one seed", "base rate: precision of a random choice"]
    shapes += ["attack not implanted"] * (not found["implanted"].all())
    in_legend = [*texts, *shapes, *(word for letter, word in words.items() if letter in used)]
    legend_columns = _legend_columns(in_legend, width)
    below = 0.95 + 0.21 * math.ceil(len(in_legend) / legend_columns)
    size = (3.6, group * len(attacks))
    panels = Panels(plt, len(places), columns, size, (0.3, 0.85), (left, 0.3, below, 0.82), title)
    for position, (axis, place) in enumerate(zip(panels.axes, places, strict=True)):
        percent_axis(axis.xaxis, "precision and recall in %")
        axis.set_ylim(group * len(attacks), 0)
        for row, attack in enumerate(attacks):
            top = row * group
            here = [lines[key] for entry in order if (key := (*place, attack, *entry)) in lines]
            live = not here or bool(here[0]["implanted"])
            if row:
                axis.axhline(top, color="#BBBBBB", linewidth=0.8)
            if not live:
                axis.axhspan(top, top + group, facecolor="#F1F1F1", edgecolor="#CFCFCF", hatch="////", linewidth=0, zorder=0)
            if here and not math.isnan(here[0]["base_rate"]):
                base = 100 * here[0]["base_rate"]
                axis.plot([base, base], [top, top + group], color="#111111", linewidth=1.2, linestyle=(0, (2, 1)), zorder=2)
            for number, entry in enumerate(order):
                middle = top + 0.11 + lane * (number + 0.5)
                key, look = (*place, attack, *entry), style[entry]
                for name, letter, y in zip(
                    ("precision", "recall"), letters[key], (middle - 0.24 * lane, middle + 0.24 * lane), strict=True
                ):
                    if letter:
                        axis.text(1, y, letter, va="center", color=look.colour, fontweight="bold", fontsize=8)
                        continue
                    values = 100 * cells[key][name].dropna().to_numpy()
                    filled = name == "precision"
                    face = look.colour if filled else "white"
                    drawn: dict[str, Any] = {"marker": look.marker, "facecolors": face, "clip_on": False}
                    axis.scatter([values.mean()], [y], s=46, linewidths=1.2, edgecolors=look.colour, zorder=3, **drawn)
                    if len(values) > 1:
                        edge = "white" if filled else look.colour
                        axis.scatter(values, [y] * len(values), s=11, linewidths=0.6, edgecolors=edge, zorder=4, **drawn)
        axis.grid(False, axis="y")
        axis.set_yticks([group * (row + 0.5) for row in range(len(attacks))])
        axis.set_yticklabels(attack_labels if panels.left_of_row(position) else [])
        axis.tick_params(axis="y", length=0)
        axis.set_title(wrapped(f"{plain(place[0])}, {plain(place[1])}", 42, 1))
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=style[entry].marker, color=style[entry].colour, markersize=7, label=text)
        for entry, text in zip(order, texts, strict=True)
    ]
    plain_mark: dict[str, Any] = {"linestyle": "", "marker": "o", "markeredgecolor": "#444444"}
    handles += [
        Line2D([], [], markerfacecolor="#444444", markersize=7, label=shapes[0], **plain_mark),
        Line2D([], [], markerfacecolor="white", markersize=7, label=shapes[1], **plain_mark),
        Line2D([], [], markerfacecolor="#444444", markersize=3, label=shapes[2], **plain_mark),
        Line2D([], [], color="#111111", linewidth=1.2, linestyle=(0, (2, 1)), label=shapes[3]),
    ]
    if len(shapes) == 5:
        handles.append(Patch(facecolor="#F1F1F1", edgecolor="#BBBBBB", hatch="////", label=shapes[4]))
    handles += [Patch(facecolor="white", edgecolor="white", label=words[letter]) for letter in words if letter in used]
    panels.legend(handles, legend_columns)
    panels.footnote("Large marks: means over all seeds, implanted or not; default selection.")
    return panels.figure


# -- average ranks -------------------------------------------------------------------------------------------------------------


def _ranks(plt: Any, rows: pd.DataFrame, track: str, title: str) -> Any | None:
    """Critical-difference diagram (Demsar, JMLR 7, 2006): average ranks by RA, bars over entries that no test tells apart.

    None where :func:`benchmark.analysis.stats.significance` refuses.
    """
    test = stats.significance(rows, track, stats.headline(rows, track))
    if test is None:
        return None
    style, names = looks(rows), _names(rows)
    order = list(test.ranks)
    half = math.ceil(len(order) / 2)
    texts = {entry: wrapped(names[entry], 34, 1) for entry in order}
    bars = _lanes([(test.ranks[clique[0]], test.ranks[clique[-1]]) for clique in test.cliques])
    lane, step = 0.16, 0.24
    deep = 0.2 + lane * (max(bars, default=-1) + 1)
    size = (6.4, 0.1 + deep + step * half)
    side = _margin(list(texts.values())) + 0.35
    panels = Panels(plt, 1, 1, size, (0, 0), (side, side, 0.62, 1.0), title)
    (axis,) = panels.axes
    axis.set_xlim(1, len(order))
    axis.set_ylim(-size[1], 0)
    axis.xaxis.set_ticks_position("top")
    axis.set_xticks(range(1, len(order) + 1))
    axis.set_yticks([])
    axis.spines["top"].set_visible(True)
    for spine in ("left", "bottom"):
        axis.spines[spine].set_visible(False)
    axis.set_title("average rank by RA (1 = best)", loc="center", fontweight="normal", fontsize=9, pad=6)
    for position, entry in enumerate(order):
        left = position < half
        depth = -(deep + step * (position if left else len(order) - 1 - position) + 0.12)
        rank, edge = test.ranks[entry], 1 if left else len(order)
        look = style[entry]
        axis.plot([rank, rank, edge], [0, depth, depth], color="#777777", linewidth=0.8, zorder=1, clip_on=False)
        mark: dict[str, Any] = {"c": look.colour, "marker": look.marker, "edgecolors": "white", "linewidths": 0.5, "clip_on": False}
        axis.scatter([rank], [0], s=34, zorder=4, **mark)
        shown = f"{texts[entry]}  {rank:.2f}" if left else f"{rank:.2f}  {texts[entry]}"
        offset = (-5, 0) if left else (5, 0)
        axis.annotate(shown, (edge, depth), offset, textcoords="offset points", ha="right" if left else "left", va="center",
                      fontsize=8.5, annotation_clip=False)  # fmt: skip
    for clique, bar in zip(test.cliques, bars, strict=True):
        y = -(0.14 + lane * bar)
        members = [test.ranks[entry] for entry in clique]
        axis.plot([members[0], members[-1]], [y, y], color="#111111", linewidth=3, solid_capstyle="round", zorder=3, clip_on=False)
        axis.scatter(members, [y] * len(members), s=26, c="#111111", zorder=3, clip_on=False)
    verdict = "" if test.friedman < stats.LEVEL else ", which tells nothing apart"
    incomplete = ", ".join(names[entry] for entry in test.incomplete)
    left_out = f" Left out, a scenario being missing: {incomplete}." if incomplete else ""
    panels.footnote(
        f"{test.blocks} implanted scenarios, {stats.headline(rows, track)} selection; Friedman p = {test.friedman:.2g}{verdict}. "
        "Bars join entries that Holm-adjusted Wilcoxon signed-rank tests do not tell apart at 5 %; dots on a bar are its members."
        f"{left_out}"
    )
    return panels.figure


def _lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """For each span the first lane, from 0, in which it touches none of those before it."""
    taken: list[list[tuple[float, float]]] = []
    found = []
    for low, high in spans:
        free = next((lane for lane, others in enumerate(taken) if all(high < a or b < low for a, b in others)), len(taken))
        if free == len(taken):
            taken.append([])
        taken[free].append((low, high))
        found.append(free)
    return found


# -- published beside measured -------------------------------------------------------------------------------------------------

_NETWORK_MARKERS = ("o", "s", "D", "^", "v", "P")
_OTHER_PROTOCOL = "#B00020"


def _published(plt: Any, rows: pd.DataFrame, track: str, title: str) -> Any | None:
    """The literature's figures as bands, ours below each; a line of three panels (ACC, ASR, RA) per scenario.

    None where the literature has no figure of any defense of the track.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = published.comparisons(rows, track)
    if not any(one.role == "defense" for one in found):
        return None
    style, names = looks(rows), _names(rows)
    places = list(dict.fromkeys(one.place for one in found))
    networks = list(dict.fromkeys(figure.backbone for one in found for figure in one.printed))
    shapes = dict(zip(networks, _NETWORK_MARKERS * len(networks), strict=False))
    groups = [[one for one in found if one.place == place] for place in places]
    order = [entry for entry in _ordered(rows, track) if any(one.entry == entry for one in found)]
    labels = {entry: wrapped(names[entry], 26, 1) for entry in order}
    lane = 0.42
    legend: list[Any] = [
        Patch(facecolor="#D3D3D3", edgecolor="#A8A8A8", label="published: least to largest"),
        *(Line2D([], [], linestyle="", marker=shapes[network], markersize=5, markerfacecolor="#555555", markeredgecolor="#222222",
                 label=f"published, {network}") for network in networks),
    ]  # fmt: skip
    if any(figure.chosen_on for one in found for figure in one.printed):
        legend.append(Line2D([], [], linestyle="", marker="o", markersize=5, markerfacecolor="white", markeredgecolor="#222222",
                             label="published, chosen on test data"))  # fmt: skip
    legend += [
        Line2D([], [], linestyle="", marker="D", markersize=7, color="#0072B2", label="here: mean over seeds"),
        Line2D([], [], linestyle="", marker="o", markersize=3, color="#0072B2", label="here: one seed"),
    ]
    if any(one.leaky for one in found):
        legend.append(Line2D([], [], linestyle="", marker="D", markersize=7, markerfacecolor="white", markeredgecolor="#0072B2",
                             label="here: chosen on the test ASR, as there"))  # fmt: skip
    size = (2.75, 0.0)
    left = _margin(list(labels.values()))
    width = max(7.0, left + 0.25 + 3 * size[0] + 2 * 0.25)
    columns = _legend_columns([handle.get_label() for handle in legend], width)
    below = 1.0 + 0.21 * math.ceil(len(legend) / columns)
    heights = [lane * len(group) + 0.1 for group in groups]
    panels = Panels(plt, 3 * len(places), 3, size, (0.25, 1.08), (left, 0.25, below, 1.08), title, heights)
    for line, (place, group) in enumerate(zip(places, groups, strict=True)):
        for column, metric in enumerate(published.METRICS):
            axis = panels.axes[3 * line + column]
            percent_axis(axis.xaxis, f"{_WORDS[metric]} in %")
            axis.set_ylim(heights[line], 0)
            axis.grid(False, axis="y")
            for number, one in enumerate(group):
                if number:
                    axis.axhline(0.05 + lane * number, color="#E3E3E3", linewidth=0.7, zorder=1)
                _published_lane(axis, one, metric, 0.05 + lane * number, lane, style[one.entry], shapes)
            axis.set_yticks([0.05 + lane * (number + 0.5) for number in range(len(group))])
            axis.set_yticklabels([labels[one.entry] for one in group] if column == 0 else [])
            axis.tick_params(axis="y", length=0)
        where = panels.axes[3 * line].get_position()
        top = where.y1 * panels.height
        first = group[0]
        rates = sorted({figure.rate for one in group for figure in one.printed if not math.isnan(figure.rate)})
        unsaid = " (a source states no rate)" * any(math.isnan(figure.rate) for one in group for figure in one.printed)
        named = " and ".join(f"{100 * rate:g}" for rate in rates)
        at = f"published at {named} % poison{unsaid}" if rates else "published rate not stated"
        dead = "" if first.implanted else "; attack not implanted here"
        panels.figure.text(0.12 / panels.width, (top + 0.36) / panels.height, wrapped(", ".join(map(plain, place)), 90, 1),
                           fontsize=10, fontweight="bold", va="bottom")  # fmt: skip
        protocol = "the literature's protocol" if first.same_protocol else "OTHER PROTOCOL than the literature's"
        panels.figure.text(0.12 / panels.width, (top + 0.14) / panels.height, f"{protocol}; {at}{dead}", fontsize=9, va="bottom",
                           color="#333333" if first.same_protocol else _OTHER_PROTOCOL,
                           fontweight="normal" if first.same_protocol else "bold")  # fmt: skip
    panels.legend(legend, columns)
    other = "" if all(one.same_protocol for one in found) else (
        "Other protocol: recipe, network or data size differ as tables/published.md lists, so a point outside its band is no "
        "failure and one inside no success. "
    )  # fmt: skip
    panels.footnote(
        f"{other}Bands: all sources that print the attack and the method, on the same architecture where there is one. "
        f"All seeds, {stats.headline(rows, track)} selection. Nothing is judged by these figures."
    )
    return panels.figure


def _published_lane(axis: Any, one: published.Comparison, metric: str, top: float, lane: float, look: Any, shapes: Any) -> None:
    """One entry in one panel: the band and its figures in the upper half of the lane, ours in the lower."""
    from matplotlib.patches import Rectangle

    upper, lower = top + 0.28 * lane, top + 0.72 * lane
    low, high = published.band(getattr(figure, metric) for figure in one.printed)
    if math.isnan(low):
        axis.text(1, upper, "not printed", va="center", fontsize=7, color="#777777")
    else:
        axis.add_patch(Rectangle((100 * low - 0.6, upper - 0.15 * lane), 100 * (high - low) + 1.2, 0.3 * lane, facecolor="#D3D3D3",
                                 edgecolor="#A8A8A8", linewidth=0.6, zorder=2, clip_on=False))  # fmt: skip
    for figure in one.printed:
        value = getattr(figure, metric)
        if not math.isnan(value):
            axis.scatter([100 * value], [upper], s=18, marker=shapes[figure.backbone], linewidths=0.7, zorder=3, clip_on=False,
                         facecolors="white" if figure.chosen_on else "#555555", edgecolors="#222222")  # fmt: skip
    values = np.array([100 * seed[metric] for seed in one.measured])
    drawn: dict[str, Any] = {"marker": look.marker, "edgecolors": look.colour, "clip_on": False}
    if one.leaky:
        picked = np.mean([100 * seed[metric] for seed in one.leaky])
        axis.scatter([picked], [lower], s=95, facecolors="white", linewidths=1.1, zorder=3, **drawn)
    large = 70 if look.marker == "*" else 42
    axis.scatter([values.mean()], [lower], s=large, facecolors=look.colour, linewidths=0.6, zorder=4, **drawn)
    if len(values) > 1:
        axis.scatter(values, [lower + 0.2 * lane] * len(values), s=7, c=look.colour, linewidths=0, zorder=4, clip_on=False)


# -- everything ----------------------------------------------------------------------------------------------------------------


def write_plots(rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draws every figure of a matrix below ``folder/plots`` and returns the paths (PNG and SVG of each), in reading order.

    Figures that would be empty (no dial anywhere, no timing, nothing isolated) are not written.

    Args:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them.
        folder: the matrix's results folder. title: of the matrix, for the figures' titles.

    Raises:
        BadInput: the folder cannot be written.
    """
    written: list[Path] = []
    place, head = folder / "plots", plain(title)
    attacked = rows[rows["attack"] != stats.NO_ATTACK]
    with figures() as plt:

        def put(name: str, draw: Callable[..., Any], *given: Any) -> None:
            figure = draw(plt, *given)
            if figure is not None:
                written.extend(save(figure, place / name))
                plt.close(figure)

        put("leaderboard", _leaderboard, rows, f"{head}: leaderboard")
        put("attacks", _attacks, rows, f"{head}: the undefended models")
        for track in stats.tracks(rows):
            words, tail = f"{head}: {plain(track)}", slug(track)
            if len(attacked):
                put(f"heatmap-asr-{tail}", _heatmap, rows, track, "asr", f"{words}, attack success rate")
                put(f"heatmap-ra-{tail}", _heatmap, rows, track, "ra", f"{words}, robust accuracy")
            if len(attacked[attacked["status"] == "ok"]):
                put(f"scatter-{tail}", _scatter, rows, track, f"{words}, what is kept and what is removed")
            if len(curves):
                put(f"dials-{tail}", _dials, rows, curves, track, f"{words}, along the dial")
            put(f"detectors-{tail}", _detectors, rows, track, f"{words}, training samples taken for poisoned")
            put(f"cost-{tail}", _cost, rows, timings, track, f"{words}, cost")
            put(f"ranks-{tail}", _ranks, rows, track, f"{words}, average ranks")
            if len(attacked[attacked["status"] == "ok"]):
                put(f"published-{tail}", _published, rows, track, f"{words}, published beside measured")
        put("selection-gap", _gaps, rows, f"{head}: what choosing with the test set is worth")
    return written


def _amplification(difference: np.ndarray) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, 100 that keeps the difference within 255."""
    peak = int(difference.max(initial=0))
    return max((factor for factor in (1, 2, 5, 10, 20, 50, 100) if factor * peak <= 255), default=1)


def _mosaic(images: np.ndarray, gap: int) -> np.ndarray:
    """uint8 (k, C, H, W) side by side on white: (H, k * (W + gap) - gap, 3)."""
    colour = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
    count, _, height, width = colour.shape
    sheet = np.full((height, count * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for position, image in enumerate(colour):
        start = position * (width + gap)
        sheet[:, start : start + width] = image.transpose(1, 2, 0)
    return sheet


def trigger_gallery(items: Sequence[tuple[str, np.ndarray, np.ndarray]], path: Path) -> list[Path]:
    """Every trigger as pixels: clean, triggered, and the absolute difference times a factor printed beside it.

    Args:
        items: (attack label, clean uint8 (k, C, H, W), triggered uint8 of the same shape), C = 1 or 3; every item the same shape.
        path: the figure without its suffix (a suffix is replaced); written as PNG and SVG, which are returned.

    Raises:
        BadInput: an item is empty, not uint8, of another shape than its twin, or has neither 1 nor 3 channels.
    """
    for name, clean, triggered in items:
        good = clean.dtype == triggered.dtype == np.uint8 and clean.ndim == 4 and clean.shape == triggered.shape and len(clean) > 0
        if not good or clean.shape[1] not in (1, 3):
            raise BadInput(
                f"gallery of {name!r}: both uint8 (k, 1 or 3, H, W), not {clean.dtype} {clean.shape} and "
                f"{triggered.dtype} {triggered.shape}"
            )
    if not items:
        raise BadInput("a trigger gallery needs at least one attack")
    count = max(len(clean) for _, clean, _ in items)
    columns = max(1, min(len(items), 12 // max(count, 1)))
    with figures() as plt:
        panels = Panels(plt, len(items), columns, (0.72 * count, 3 * 0.72 + 0.1), (0.3, 0.72), (0.95, 0.25, 0.65, 0.7), "Triggers")
        for position, (axis, (name, clean, triggered)) in enumerate(zip(panels.axes, items, strict=True)):
            height = clean.shape[2]
            gap = max(1, round(height / 16))
            difference = np.abs(triggered.astype(np.int16) - clean.astype(np.int16))
            factor = _amplification(difference)
            strips = [_mosaic(part, gap) for part in (clean, triggered, (difference * factor).astype(np.uint8))]
            blank = np.full((gap, strips[0].shape[1], 3), 255, dtype=np.uint8)
            sheet = np.concatenate([strips[0], blank, strips[1], blank, strips[2]])
            axis.imshow(sheet, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([(height - 1) / 2 + row * (height + gap) for row in range(3)])
            axis.set_yticklabels(["clean", "triggered", "difference"] if panels.left_of_row(position) else [])
            axis.set_xlabel(f"difference \N{MULTIPLICATION SIGN} {factor}" if difference.any() else "no difference", fontsize=8.5)
            axis.tick_params(length=0)
            for spine in axis.spines.values():
                spine.set_visible(False)
            axis.set_title(wrapped(plain(name), max(12, 9 * count), 1))
        panels.footnote(
            "Absolute difference between triggered and clean image, multiplied as stated; pixels as the victim sees them (8 bit)."
        )
        return save(panels.figure, path.with_suffix(""))
