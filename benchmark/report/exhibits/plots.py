"""Exhibits -> figures: lines and dots with intervals; what to draw is data (:mod:`benchmark.report.figures`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmark.analysis.stats import UNDEFENDED
from benchmark.report.figures import DotPanel, Dots, Lines, Panel, Series
from benchmark.report.style import METRIC_COLOURS, Look, Panels, log_axis, percent_axis, wrapped
from benchmark.report.tables import plain

__all__ = ["draw"]

Looks = Mapping[tuple[str, str], Look]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#5E3C99")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
_GREYS = ("#555555", "#8A8A8A", "#B0B0B0")
_BLACK = Look("#000000", "*")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))


def _look(series: Series, position: int, known: Looks) -> Look:
    """An entry keeps its look; ACC, ASR and RA have theirs; anything else goes by position."""
    if series.aside:
        return Look("#777777", "")
    if series.control:
        return Look(_GREYS[position % len(_GREYS)], _MARKERS[position % len(_MARKERS)])
    if series.about is not None:
        if series.about[0] == UNDEFENDED:
            return _BLACK
        if series.about in known:
            return known[series.about]
    metric = series.label.lower()
    if metric in METRIC_COLOURS:
        return Look(METRIC_COLOURS[metric], _MARKERS[position % len(_MARKERS)])
    return Look(_COLOURS[position % len(_COLOURS)], _MARKERS[position % len(_MARKERS)])


def _columns(names: Sequence[str], width: float, handle: float = 0.5) -> int:
    """Into how many columns a legend fits within ``width`` inches, handles and gaps taking ``handle`` each."""
    widest = max((len(name) for name in names), default=1)
    return max(1, int((width - 0.2) // (handle + 0.072 * widest)))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """An axis for differences in points: at least 2 to each side of 0, else as far as the values go."""
    found = [100 * value for value in values if not math.isnan(value)]
    low, high = min([-2.0, *found]), max([2.0, *found])
    room = 0.06 * (high - low)
    return low - room, high + room


def _lines(plt: Any, figure: Lines, known: Looks, title: str) -> Any:
    names: dict[str, tuple[Look, Any]] = {}
    flats: dict[str, int] = {}
    mixed = len({series.about is None for panel in figure.panels for series in panel.series}) > 1
    for panel in figure.panels:
        for position, series in enumerate(panel.series):
            if series.x:
                # Where entries and other things share a figure, the others are dashed and take colours from the far end.
                other = mixed and series.about is None
                look = _look(series, len(_COLOURS) - 1 - position if other else position, known)
                # Lines of one colour, where there are more entries than colours, differ in more than their markers.
                worn = sum(one.colour == look.colour for one, _ in names.values())
                strokes = ("-", _DASHES[3] if mixed else _DASHES[1], _DASHES[2])
                stroke = _DASHES[2] if series.aside else _DASHES[1] if other else strokes[min(worn, 2)]
                names.setdefault(series.label, (look, stroke))
        for label, _ in panel.flat:
            flats.setdefault(label, len(flats))
    few = len(figure.panels[0].series[0].x) <= 30 if figure.panels and figure.panels[0].series else True
    columns = min(figure.columns, len(figure.panels))
    panel_width = 2.9 if columns <= 3 else 2.45
    width = max(7.0, 0.9 + columns * panel_width + 0.65 * (columns - 1))
    in_legend = [wrapped(plain(name), 44, 1) for name in (*names, *flats)]
    across = _columns(in_legend, width, 0.7)
    below = 0.95 + 0.21 * math.ceil(len(in_legend) / across)
    panels = Panels(plt, len(figure.panels), columns, (panel_width, 2.1), (0.65, 0.85), (0.65, 0.2, below, 0.75), title)
    for position, (axis, panel) in enumerate(zip(panels.axes, figure.panels, strict=True)):
        _line_panel(axis, panel, names, flats, marked=few)
        axis.set_title(wrapped(plain(panel.title), int(12.5 * panel_width), 2), fontsize=8.5)
        axis.set_xlabel(plain(panel.xlabel))
        if panels.left_of_row(position) or panel.ylabel != figure.panels[position - 1].ylabel:
            axis.set_ylabel(plain(panel.ylabel))
    handles = [
        plt.Line2D([], [], color=look.colour, marker=look.marker if few else "", markeredgecolor="white", markeredgewidth=0.6,
                   markersize=9 if look.marker == "*" else 6, linewidth=1.4, linestyle=stroke, label=wrapped(plain(name), 44, 1))
        for name, (look, stroke) in names.items()
    ]  # fmt: skip
    handles += [plt.Line2D([], [], color="#777777", linewidth=1.1, linestyle=_DASHES[1 + number % 3],
                           label=wrapped(plain(name), 44, 1)) for name, number in flats.items()]  # fmt: skip
    panels.legend(handles, across, 3.4)
    panels.footnote(figure.note)
    return panels.figure


def _line_panel(axis: Any, panel: Panel, looks: Mapping[str, tuple[Look, Any]], flats: Mapping[str, int], *, marked: bool) -> None:
    ticks = sorted({value for series in panel.series for value in series.x})
    for series in panel.series:
        if not series.x:
            continue
        look, stroke = looks[series.label]
        x = np.asarray([ticks.index(value) for value in series.x] if panel.even else series.x, dtype=np.float64)
        middle, low, high = 100 * np.asarray([tuple(part) for part in series.y], dtype=np.float64).T
        if np.isfinite(low).any():
            axis.fill_between(x, low, high, color=look.colour, alpha=0.12, linewidth=0)
        axis.plot(
            x, middle, color=look.colour, marker=look.marker if marked else "", markersize=8 if look.marker == "*" else 4.5,
            markeredgecolor="white", markeredgewidth=0.5, linewidth=1.4, linestyle=stroke, alpha=0.9, clip_on=False, zorder=3,
        )  # fmt: skip
    for label, value in panel.flat:
        axis.axhline(100 * value, color="#777777", linewidth=1.1, linestyle=_DASHES[1 + flats[label] % 3], zorder=2)
    if ticks and (panel.log or panel.even):
        if panel.log:
            log_axis(axis)
        axis.set_xticks(range(len(ticks)) if panel.even else ticks, minor=False)
        axis.set_xticklabels([f"{100 * value:g} %" if panel.percent else f"{value:g}" for value in ticks], fontsize=7.5)
        axis.minorticks_off()
        axis.margins(x=0.06)
    if panel.signed:
        values = [value for series in panel.series for part in series.y for value in part]
        axis.set_ylim(*_range(values))
        axis.grid(True, axis="y")
        axis.axhline(0, color="#333333", linewidth=0.9, zorder=2)
    else:
        percent_axis(axis.yaxis)


def _dots(plt: Any, figure: Dots, title: str) -> Any:
    names = [name for panel in figure.panels for name in panel.names]
    left = 0.35 + 0.072 * max((min(len(plain(name)), 62) for name in names), default=10)
    labels = list(dict.fromkeys(label for panel in figure.panels for label, _ in panel.series))
    looks = {
        label: Look(METRIC_COLOURS.get(label.lower(), _COLOURS[number % len(_COLOURS)]), _MARKERS[number % len(_MARKERS)])
        for number, label in enumerate(labels)
    }
    heights = [0.2 + (0.15 + 0.06 * len(panel.series)) * len(panel.names) for panel in figure.panels]
    several = len(labels) > 1
    margins = (left, 0.35, 0.75 + 0.24 * several, 0.78)
    panels = Panels(plt, len(figure.panels), 1, (5.6, 1.0), (0.0, 0.95), margins, title, heights=heights)
    for axis, panel in zip(panels.axes, figure.panels, strict=True):
        _dot_panel(axis, panel, looks)
    handles = [plt.Line2D([], [], color=look.colour, marker=look.marker, markeredgecolor="white", markeredgewidth=0.6, markersize=7,
                          linewidth=1.2, label=wrapped(plain(label), 44, 1)) for label, look in looks.items()]  # fmt: skip
    if several:
        panels.legend(handles, _columns(labels, panels.width))
    panels.footnote(figure.note)
    return panels.figure


def _dot_panel(axis: Any, panel: DotPanel, looks: Mapping[str, Look]) -> None:
    count, step = len(panel.names), 0.62 / max(1, len(panel.series) - 1) if len(panel.series) > 1 else 0.0
    for number, (label, parts) in enumerate(panel.series):
        look = looks[label]
        for row, part in enumerate(parts):
            if math.isnan(part.mean):
                continue
            height = row - 0.31 * (len(panel.series) > 1) + step * number
            if not math.isnan(part.low):
                ends = [100 * part.low, 100 * part.high]
                axis.plot(ends, [height, height], color=look.colour, linewidth=1.3, alpha=0.75, zorder=2)
            axis.plot(100 * part.mean, height, color=look.colour, marker=look.marker, markersize=5.5, markeredgecolor="white",
                      markeredgewidth=0.6, linestyle="", zorder=3, clip_on=False)  # fmt: skip
    axis.set_ylim(count - 0.4, -0.6)
    axis.set_yticks(range(count))
    axis.set_yticklabels([wrapped(plain(name), 62, 1) for name in panel.names])
    axis.tick_params(axis="y", length=0)
    for row in range(count - 1):
        axis.axhline(row + 0.5, color="#EEEEEE", linewidth=0.7, zorder=1)
    if panel.signed:
        values = [value for _, parts in panel.series for part in parts for value in part]
        axis.set_xlim(*_range(values))
        axis.grid(True, axis="x")
        axis.axvline(0, color="#333333", linewidth=0.9, zorder=2)
    else:
        percent_axis(axis.xaxis)
    axis.set_xlabel(plain(panel.xlabel))
    axis.set_title(wrapped(plain(panel.title), 66, 2), fontsize=9.0)


def draw(plt: Any, figure: Lines | Dots, known: Looks, title: str) -> Any:
    """The figure of an exhibit; ``plt`` and ``known`` from :mod:`benchmark.report.style`."""
    return _lines(plt, figure, known, title) if isinstance(figure, Lines) else _dots(plt, figure, title)
