"""What is inside the axes of a figure: lines, dots and bars, heat maps, images, and the key that goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmark.analysis.intervals import Interval
from benchmark.analysis.stats import UNDEFENDED
from benchmark.report.figures import (
    DASHED,
    DOTTED,
    STROKES,
    DotPanel,
    Dots,
    Figure,
    Heat,
    HeatPanel,
    Key,
    Lines,
    Mark,
    Panel,
    Series,
)
from benchmark.report.style import COLOURS, GREYS, MARKERS, METRIC_COLOURS, Look, wrapped
from benchmark.report.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Cell", "Looks", "area_style", "cells_of", "line_style"]

Looks = Mapping[tuple[str, str], Look]
_NOTHING = Interval(math.nan, math.nan, math.nan)
_ALARM = "#B00020"


class Cell(NamedTuple):
    """A panel: its title, its size in inches without any words, what draws it, points between title and panel."""

    title: str
    width: float
    height: float
    paint: Callable[[Axes], None]
    pad: float = 0


# -- parts ---------------------------------------------------------------------------------------------------------------------


def line_style(mark: Mark) -> dict[str, Any]:
    return {
        "color": mark.colour, "marker": mark.marker, "markersize": mark.size, "linestyle": mark.stroke, "linewidth": mark.width,
        "markerfacecolor": "white" if mark.hollow else mark.colour, "alpha": mark.alpha,
        "markeredgecolor": mark.colour if mark.hollow or mark.marker in "|x" else "white",
        "markeredgewidth": 1.8 if mark.marker == "|" else 1.1 if mark.hollow else 0.6,
    }  # fmt: skip


def area_style(mark: Mark) -> dict[str, Any]:
    if mark.kind == "hatch":
        return {"facecolor": "#F1F1F1", "edgecolor": "#BBBBBB", "hatch": "////", "linewidth": 0}
    return {"facecolor": mark.colour, "edgecolor": "#A8A8A8" if mark.kind == "band" else "none", "linewidth": 0.6, "alpha": mark.alpha}


def _percent(axes: Axes, which: str, floor: int = 0) -> None:
    """``floor`` to 100 %, with room for the markers. A floor above 0 is for points, never bars, and is named."""
    step, room = (100 - floor) / 5, 0.03 * (100 - floor)
    getattr(axes, f"set_{which}ticks")([floor + step * tick for tick in range(6)])
    getattr(axes, f"set_{which}lim")(floor - room, 100 + room)
    axes.grid(axis=which)  # type: ignore[arg-type]


def _signed(axes: Axes, which: str, values: Iterable[float]) -> None:
    """An axis for differences in points: at least 2 to each side of 0, else as far as the values go."""
    found = [100 * value for value in values if not math.isnan(value)]
    low, high = min([-2.0, *found]), max([2.0, *found])
    room = 0.06 * (high - low)
    getattr(axes, f"set_{which}lim")(low - room, high + room)
    axes.grid(axis=which)  # type: ignore[arg-type]
    (axes.axvline if which == "x" else axes.axhline)(0, color="#333333", linewidth=0.9, zorder=2)


def _log(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers, since formulas are switched off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


# -- lines ---------------------------------------------------------------------------------------------------------------------


def _look(series: Series, position: int, known: Looks) -> Look:
    """An entry keeps its look; ACC, ASR and RA have theirs; anything else goes by position."""
    marker = MARKERS[position % len(MARKERS)]
    if series.aside:
        return Look("#777777", "")
    if series.control:
        return Look(GREYS[position % len(GREYS)], marker)
    if series.about is not None and (series.about[0] == UNDEFENDED or series.about in known):
        return Look("#000000", "*") if series.about[0] == UNDEFENDED else known[series.about]
    return Look(METRIC_COLOURS.get(series.label.lower(), COLOURS[position % len(COLOURS)]), marker)


def _line_marks(figure: Lines, known: Looks) -> dict[str, Mark]:
    """How the lines of each label are drawn; lines of one colour differ in their stroke too."""
    found: dict[str, Mark] = {}
    every = [series for panel in figure.panels for series in panel.series]
    mixed = len({series.about is None for series in every}) > 1
    marked = len(every[0].x) <= 30 if every else True
    for panel in figure.panels:
        for position, series in enumerate(panel.series):
            if series.mark is None and series.x and series.label not in found:
                # Where entries and other things share a figure, the others are dashed and take colours from the far end.
                other = mixed and series.about is None
                look = _look(series, len(COLOURS) - 1 - position if other else position, known)
                used = sum(mark.colour == look.colour for mark in found.values())
                stroke = DOTTED if series.aside else DASHED if other else ("-", STROKES[3] if mixed else DASHED, DOTTED)[min(used, 2)]
                found[series.label] = Mark(look.colour, look.marker if marked else "", 8 if look.marker == "*" else 5, stroke=stroke,
                                           alpha=0.9)  # fmt: skip
    flat = dict.fromkeys(label for panel in figure.panels for label, _ in panel.flat)
    return found | {label: Mark("#777777", stroke=STROKES[1 + place % 3], width=1.1) for place, label in enumerate(flat)}


def _lines_panel(axes: Axes, panel: Panel, marks: Mapping[str, Mark]) -> None:
    ticks = sorted({value for series in panel.series for value in series.x})
    for series in panel.series:
        if not series.x:
            continue
        mark = series.mark or marks[series.label]
        x = np.asarray([ticks.index(value) for value in series.x] if panel.even else series.x) * (100 if panel.shares else 1)
        y, low, high = 100 * np.asarray([tuple(part) for part in series.y], dtype=np.float64).T
        if np.isfinite(low).any():
            axes.fill_between(x, low, high, color=mark.colour, alpha=0.12, linewidth=0)
        if series.arrow and math.dist((x[0], y[0]), (x[-1], y[-1])) > 2:
            head = {"arrowstyle": "-|>", "color": mark.colour, "alpha": 0.45, "linewidth": 0.9, "shrinkA": 4, "shrinkB": 4,
                    "mutation_scale": 8}  # fmt: skip
            axes.annotate("", (x[-1], y[-1]), (x[0], y[0]), arrowprops=head, zorder=2)
        start = -1 if series.arrow else 0
        axes.plot(x[start:], y[start:], clip_on=False, zorder=3 + (mark.marker == "*"), **line_style(mark))
    for label, value in panel.flat:
        axes.axhline(100 * value, zorder=2, **line_style(marks[label]))
    if panel.log:
        _log(axes)
    if ticks and ((panel.log and panel.ticks) or panel.even):
        axes.set_xticks(range(len(ticks)) if panel.even else ticks,
                        [f"{100 * value:g} %" if panel.percent else f"{value:g}" for value in ticks])  # fmt: skip
        axes.minorticks_off()
    if panel.shares:
        _percent(axes, "x")
    if panel.signed:
        _signed(axes, "y", (value for series in panel.series for part in series.y for value in part))
    else:
        _percent(axes, "y", panel.floor)
    axes.set(facecolor="#E6E6E6" if panel.dead else "white", xlabel=plain(panel.xlabel), ylabel=plain(panel.ylabel))


def _lines(figure: Lines, known: Looks) -> tuple[list[Cell], Key]:
    marks = _line_marks(figure, known)
    width = 2.9 if min(figure.columns, len(figure.panels)) <= 3 else 2.45
    cells = [Cell(panel.title, width, 2.1, partial(_lines_panel, panel=panel, marks=marks)) for panel in figure.panels]
    return cells, figure.key or tuple(marks.items())


# -- dots and bars -------------------------------------------------------------------------------------------------------------


def _dot_marks(figure: Dots) -> dict[str, Mark]:
    labels = dict.fromkeys([label for panel in figure.panels for label in (*(name for name, _ in panel.series), *panel.points)])
    return {
        label: figure.marks.get(
            label, Mark(METRIC_COLOURS.get(label.lower(), COLOURS[place % len(COLOURS)]), MARKERS[place % len(MARKERS)], 5.5)
        )
        for place, label in enumerate(labels)
    }


def _dot(axes: Axes, mark: Mark, part: Interval, y: float, thick: float, panel: DotPanel) -> None:
    """One value of a series with its interval."""
    value, low, high = (panel.unit * end for end in part)
    start = axes.get_xlim()[0] if panel.log else 0.0
    if mark.kind == "band":
        axes.barh(y, high - low + 1.2, thick, low - 0.6, zorder=2, **area_style(mark))
    elif mark.kind == "bar":
        axes.barh(y, max(value, start) - start, thick, start, zorder=2, **area_style(mark))
    if not math.isnan(low) and mark.kind != "band":
        colour, width = ("#222222", 1.2) if mark.kind == "bar" else (mark.colour, 1.4)
        axes.plot([low, high], [y, y], color=colour, linewidth=width, alpha=0.75, zorder=2.5, solid_capstyle="butt")
    if mark.kind == "marker":
        axes.plot(value, y, clip_on=False, zorder=4, **line_style(mark))
    if mark.printed:
        _beside(axes, np.nanmax([value, high, start]), y, f"{value:.{1 if panel.unit == 100 else 3}{'f' if panel.unit == 100 else 'g'}}")


def _beside(axes: Axes, x: float, y: float, text: str, colour: str = "#333333", *, bold: bool = False) -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=colour,
                  fontweight="bold" if bold else "normal", zorder=5, annotation_clip=False)  # fmt: skip


def _dots_panel(axes: Axes, panel: DotPanel, marks: Mapping[str, Mark]) -> None:
    count, series = len(panel.names), dict(panel.series)
    if panel.log:
        _log(axes)
    if panel.signed:
        _signed(axes, "x", (value for parts in series.values() for part in parts for value in part))
    elif panel.limits is None:
        _percent(axes, "x")
    else:
        axes.set_xlim(*panel.limits)
        axes.grid(axis="x")
    axes.set(xlabel=plain(panel.xlabel), ylim=(count - 0.4, -0.6))
    axes.set_yticks(range(count), panel.names)
    axes.tick_params(axis="y", length=0)
    axes.annotate(panel.subtitle, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8.5,
                  color=_ALARM if panel.alarm else "#333333").set_in_layout(False)  # fmt: skip
    beside = list(dict.fromkeys(label for label in series if marks[label].lane is None))
    for row in range(count) if not beside else range(count - 1):
        axes.axhline(row if not beside else row + 0.5, color="#E9E9E9", linewidth=0.7, zorder=0)
    for row in panel.hatched:
        axes.axhspan(row - 0.5, row + 0.5, zorder=0, **area_style(Mark(kind="hatch")))
    for label, mark in reversed(list(marks.items())):  # the first lies on top
        lane = mark.lane if mark.lane is not None else (0.8 * ((beside.index(label) + 0.5) / len(beside) - 0.5) if label in beside else 0)
        for row in range(count):
            own = mark if mark.colour else replace(mark, colour=panel.looks[row][0], marker=mark.marker or panel.looks[row][1])
            faded = replace(own, alpha=0.4) if row in panel.hatched and mark.kind == "bar" else own
            part = series[label][row] if label in series else _NOTHING
            if not (math.isnan(part.mean) and math.isnan(part.low)):
                _dot(axes, faded, part, row + lane, 0.76 / max(1, len(beside)), panel)
            values = panel.points.get(label, ((),) * count)[row]
            small = replace(own, colour="#111111", marker=".", size=5) if mark.kind == "bar" else replace(own, size=0.55 * own.size)
            if len(values) > (label in series):
                shown = small if label in series else own
                axes.plot([panel.unit * value for value in values], [row + lane] * len(values), clip_on=False, zorder=5,
                          **line_style(replace(shown, stroke="")))  # fmt: skip
            if (label, row) in panel.letters:
                _beside(axes, max(0, axes.get_xlim()[0]), row + lane, panel.letters[label, row], own.colour, bold=True)
    for place, joined in enumerate(panel.joined):
        axes.plot([axes.get_xlim()[1] * (1 + 0.02 * place)] * len(joined), joined, color="#111111", linewidth=2.5, marker="o", markersize=4,
                  clip_on=False)  # fmt: skip


def _dots(figure: Dots) -> tuple[list[Cell], Key]:
    marks = _dot_marks(figure)
    cells = []
    for panel in figure.panels:
        named = replace(panel, names=tuple(name if "\n" in name else wrapped(plain(name), 62, 1) for name in panel.names))
        height = 0.2 + (figure.row or 0.15 + 0.06 * len(panel.series)) * len(panel.names)
        cells.append(Cell(panel.title, figure.width, height, partial(_dots_panel, panel=named, marks=marks), 13 * bool(panel.subtitle)))
    key = {mark.words or plain(label): mark if mark.colour else replace(mark, colour=COLOURS[0], marker=mark.marker or "D")
           for label, mark in marks.items()}  # fmt: skip
    return cells, (*(key.items() if len(key) > 1 else ()), *figure.key)


# -- heat maps and images ------------------------------------------------------------------------------------------------------


def _heat_panel(axes: Axes, panel: HeatPanel, figure: Heat) -> None:
    import seaborn

    blank = np.isnan(panel.values)
    seaborn.heatmap(panel.values, mask=blank, annot=panel.texts, fmt="", ax=axes, cmap=figure.palette, vmin=0, vmax=100, cbar=False,
                    linewidths=1.5, linecolor="white", annot_kws={"fontsize": 9})  # fmt: skip
    for row, column in zip(*np.nonzero(blank), strict=True):
        dead = column in panel.dead and panel.texts[row, column][:1].isdigit()
        axes.text(column + 0.5, row + 0.5, panel.texts[row, column], ha="center", va="center", zorder=3,
                  color="#777777" if dead else "#222222", fontweight="normal" if dead else "bold")  # fmt: skip
    for column in panel.dead:
        axes.axvspan(column, column + 1, zorder=2, **area_style(Mark(kind="hatch")))
    for rule in figure.rules:
        axes.axhline(rule, color="#333333", linewidth=1.2, zorder=4)
    axes.xaxis.tick_top()
    axes.set_xticks(np.arange(len(panel.columns)) + 0.5, panel.columns, rotation=0)
    axes.set_yticks(np.arange(len(panel.names)) + 0.5, panel.names, rotation=0)
    axes.tick_params(length=0)


def _picture(axes: Axes, caption: str, image: np.ndarray, names: Sequence[str]) -> None:
    axes.imshow(image, interpolation="nearest", aspect="auto")
    axes.set_yticks((np.arange(len(names)) + 0.5) * len(image) / len(names), names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_xlabel(caption, fontsize=8.5)
    axes.spines[:].set_visible(False)


def cells_of(figure: Figure, known: Looks) -> tuple[list[Cell], Key]:
    if isinstance(figure, Lines):
        return _lines(figure, known)
    if isinstance(figure, Dots):
        return _dots(figure)
    if isinstance(figure, Heat):
        return [Cell(panel.title, 0.78 * len(panel.columns), 0.33 * len(panel.names), partial(_heat_panel, panel=panel, figure=figure))
                for panel in figure.panels], figure.key  # fmt: skip
    return [Cell(title, figure.width, figure.height, partial(_picture, caption=caption, image=image, names=figure.names))
            for title, caption, image in figure.panels], ()  # fmt: skip
