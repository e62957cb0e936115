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
    edge = "#A8A8A8" if mark.kind == "band" else "none"
    return {"facecolor": mark.colour, "edgecolor": edge, "linewidth": 0.6, "alpha": mark.alpha}


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
                strokes = ("-", STROKES[3] if mixed else DASHED, DOTTED)
                stroke = DOTTED if series.aside else DASHED if other else strokes[min(used, 2)]
                size, marker = 8 if look.marker == "*" else 5, look.marker if marked else ""
                found[series.label] = Mark(look.colour, marker, size, stroke=stroke, alpha=0.9)
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
    axes.set(facecolor="#E6E6E6" if panel.dead else "white", xlabel=panel.xlabel, ylabel=plain(panel.ylabel))


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
        _beside(axes, np.nanmax([value, high, start]), y, f"{value:.1f}" if panel.unit == 100 else f"{value:.3g}")


def _beside(axes: Axes, x: float, y: float, text: str, colour: str = "#333333") -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=colour,
                  fontweight="bold" if text in ("F", "R", "n", "?") else "normal", zorder=5, annotation_clip=False)  # fmt: skip


def _dots_axes(axes: Axes, panel: DotPanel) -> None:
    if panel.log:
        _log(axes)
    if panel.signed:
        _signed(axes, "x", (value for _, parts in panel.series for part in parts for value in part))
    elif panel.limits is None:
        _percent(axes, "x")
    else:
        axes.set_xlim(*panel.limits)
        axes.grid(axis="x")
    axes.set(xlabel=plain(panel.xlabel), ylim=(len(panel.names) - 0.4, -0.6))
    axes.set_yticks(range(len(panel.names)), panel.names)
    axes.tick_params(axis="y", length=0)
    colour, weight = ("#B00020", "bold") if panel.alarm else ("#333333", "normal")
    axes.annotate(panel.subtitle, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=colour,
                  fontweight=weight).set_in_layout(False)  # fmt: skip


def _dots_panel(axes: Axes, panel: DotPanel, marks: Mapping[str, Mark]) -> None:
    _dots_axes(axes, panel)
    count, series = len(panel.names), dict(panel.series)
    beside = [label for label in series if marks[label].lane is None]
    one_lane = all(mark.lane == 0 for mark in marks.values())
    for row in range(count if one_lane else count - 1):
        axes.axhline(row if one_lane else row + 0.5, color="#E3E3E3", linewidth=0.7, zorder=0)
    for row in panel.hatched:
        axes.axhspan(row - 0.5, row + 0.5, zorder=0, **area_style(Mark(kind="hatch")))
    for label, mark in reversed(list(marks.items())):  # the first lies on top
        lane = (beside.index(label) + 0.5) / len(beside) * 0.8 - 0.4 if label in beside else mark.lane or 0.0
        thick = 0.3 if mark.kind == "band" else 0.76 / max(1, len(beside))
        for row in range(count):
            own = _in_row(mark, panel, row)
            part = series[label][row] if label in series else _NOTHING
            if not (math.isnan(part.mean) and math.isnan(part.low)):
                _dot(axes, own, part, row + lane, thick, panel)
            values = [panel.unit * value for value in (panel.points[label][row] if label in panel.points else ())]
            _seeds(axes, own, values, row + lane, several=label in series)
            letter = panel.letters.get((label, row), "")
            if letter:
                _beside(axes, max(0, axes.get_xlim()[0]), row + lane, letter, own.colour if len(letter) == 1 else "#777777")
    for place, joined in enumerate(panel.joined):
        x = axes.get_xlim()[1] * (1 + 0.02 * place)
        axes.plot([x] * len(joined), joined, color="#111111", linewidth=2.5, marker="o", markersize=4, clip_on=False)


def _in_row(mark: Mark, panel: DotPanel, row: int) -> Mark:
    """A mark as it is drawn for one name: in the look of the name where it has none of its own, paler where it is not counted."""
    if not mark.colour:
        colour, marker = panel.looks[row]
        star = 1.5 if marker == "*" and not mark.marker else 1.0
        return replace(mark, colour=colour, marker=mark.marker or marker, size=star * mark.size)
    return replace(mark, alpha=0.4) if row in panel.hatched and mark.kind == "bar" else mark


def _seeds(axes: Axes, mark: Mark, values: Sequence[float], y: float, *, several: bool) -> None:
    """The points of a series; small, and only if there are two, where it has a mean (``several``)."""
    small = replace(mark, colour="#111111", marker=".", size=5) if mark.kind == "bar" else replace(mark, size=0.5 * mark.size)
    if len(values) > several:
        axes.plot(values, [y] * len(values), clip_on=False, zorder=5, **line_style(replace(small if several else mark, stroke="")))


def _dots(figure: Dots) -> tuple[list[Cell], Key]:
    marks = _dot_marks(figure)
    cells = []
    for panel in figure.panels:
        named = replace(panel, names=tuple(name if "\n" in name else wrapped(plain(name), 62, 1) for name in panel.names))
        lane = 0.15 if any(marks[label].printed for label, _ in panel.series) else 0.06
        height = 0.2 + (figure.row or 0.15 + lane * len(panel.series)) * len(panel.names)
        paint = partial(_dots_panel, panel=named, marks=marks)
        cells.append(Cell(panel.title, figure.width, height, paint, 13 * bool(panel.subtitle)))
    key: dict[str, Mark] = {}
    for label, mark in marks.items():
        shown = mark if mark.colour else replace(mark, colour=COLOURS[0], marker=mark.marker or "D")
        key.setdefault(mark.words or plain(label), shown)
    return cells, (*(key.items() if len(key) > 1 else ()), *figure.key)


# -- heat maps and images ------------------------------------------------------------------------------------------------------


def _heat_panel(axes: Axes, panel: HeatPanel, figure: Heat) -> None:
    import seaborn

    blank = np.isnan(panel.values)
    few = isinstance(figure.palette, tuple)
    seaborn.heatmap(panel.values, mask=blank, annot=panel.texts, fmt="", ax=axes, vmin=0, vmax=100, cbar=False, linewidths=1.5,
                    cmap=list(figure.palette) if few else figure.palette, linecolor="white",
                    annot_kws={"fontsize": 8.0 if few else 9, "linespacing": 1.25})  # fmt: skip
    for row, column in zip(*np.nonzero(blank), strict=True):
        dead = column in panel.dead and panel.texts[row, column][:1].isdigit()
        axes.text(column + 0.5, row + 0.5, panel.texts[row, column], ha="center", va="center", zorder=3,
                  color="#777777" if dead else "#222222", fontweight="normal" if dead else "bold")  # fmt: skip
    for column in panel.dead:
        axes.axvspan(column, column + 1, zorder=2, **area_style(Mark(kind="hatch")))
    for rule in figure.rules:
        axes.axhline(rule, xmax=sum(map(bool, panel.columns)) / len(panel.columns), color="#333333", linewidth=1.2, zorder=4)
    axes.xaxis.tick_top()
    axes.set_xticks(np.arange(len(panel.columns)) + 0.5, panel.columns, rotation=0)
    axes.set_yticks(np.arange(len(panel.names)) + 0.5, panel.names, rotation=0)
    axes.tick_params(length=0)


def _picture(axes: Axes, caption: str, image: np.ndarray, names: Sequence[str]) -> None:
    axes.imshow(image, interpolation="nearest", aspect="equal")
    axes.set_anchor("W")
    axes.set_yticks((np.arange(len(names)) + 0.5) * len(image) / len(names), names)
    axes.set_xticks([image.shape[1] / 2], [caption])  # no label of the axis: those are written once for equal neighbours
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def cells_of(figure: Figure, known: Looks) -> tuple[list[Cell], Key]:
    if isinstance(figure, Lines):
        return _lines(figure, known)
    if isinstance(figure, Dots):
        return _dots(figure)
    if isinstance(figure, Heat):
        return [Cell(panel.title, figure.cell[0] * len(panel.columns), figure.cell[1] * len(panel.names),
                     partial(_heat_panel, panel=panel, figure=figure)) for panel in figure.panels], figure.key  # fmt: skip
    return [Cell(title, figure.width, figure.height, partial(_picture, caption=caption, image=image, names=figure.names))
            for title, caption, image in figure.panels], ()  # fmt: skip
