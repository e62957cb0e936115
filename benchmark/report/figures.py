"""Figures as data: :class:`Lines`, :class:`Dots` (with bars), :class:`Heat` and :class:`Gallery`, drawn by one renderer.

Plots of a matrix (:mod:`benchmark.report.charts`) and exhibits say what is shown; :mod:`benchmark.report.render` says how it looks.
Values are shares in [0, 1] and drawn in percent, unless a panel says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from benchmark.analysis.intervals import Interval

__all__ = [
    "DASHED", "DOTTED", "STROKES", "DotPanel", "Dots", "Figure", "Gallery", "Heat", "HeatPanel", "Key", "Lines", "Mark", "Panel",
    "Series",
]  # fmt: skip

Stroke = str | tuple[float, tuple[float, ...]]
DASHED, DOTTED = (0, (5, 1.5)), (0, (1, 1.2))
STROKES: tuple[Stroke, ...] = ("-", DASHED, DOTTED, (0, (5, 1, 1, 1)))


@dataclass(frozen=True)
class Mark:
    """How one series is drawn, and its sample in the key.

    Attributes:
        colour: "" = that of the row's look. marker, size: as matplotlib's. hollow: white inside. stroke: "" = unjoined points.
        kind: of dots: ``marker`` with a line for its interval; ``bar`` from 0; ``band``: a box over the interval; ``hatch``.
        lane: of a series of dots: rows below the middle of the name; None = the series of a name lie side by side.
        printed: its values are written beside it. words: in the key; "" = the series' label.
    """

    colour: str = "#222222"
    marker: str = ""
    size: float = 6.0
    hollow: bool = False
    stroke: Stroke = ""
    width: float = 1.4
    alpha: float = 1.0
    kind: str = "marker"
    lane: float | None = None
    printed: bool = False
    words: str = ""


Key = tuple[tuple[str, Mark | None], ...]
"""Words and a sample each; None = words alone."""


@dataclass(frozen=True)
class Series:
    """A line: values at ``x``.

    Attributes:
        about: the entry it belongs to, so that it keeps its look; None = by position. control: grey, whatever its entry.
        aside: dotted grey, for what is no score. mark: how it is drawn, instead of all this. arrow: from first to last point.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[Interval, ...]
    about: tuple[str, str] | None = None
    control: bool = False
    aside: bool = False
    mark: Mark | None = None
    arrow: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel of lines.

    Attributes:
        log, even: x on a logarithmic axis; at even distances, whatever the values. percent: x are shares, one tick each.
        flat: horizontal reference lines, (label, height). signed: differences instead of shares.
        shares: x runs from 0 to 100 %. ticks: one at each x, where ``log``. floor: where the y axis starts, in percent; above 0 for
            points only. dead: grey, for what is not counted.
    """

    title: str
    xlabel: str
    ylabel: str
    series: tuple[Series, ...]
    log: bool = False
    even: bool = False
    percent: bool = False
    flat: tuple[tuple[str, float], ...] = ()
    signed: bool = False
    shares: bool = False
    ticks: bool = True
    floor: int = 0
    dead: bool = False


@dataclass(frozen=True)
class Lines:
    """Panels of lines, ``columns`` side by side. ``key``: instead of the one made from the series."""

    panels: tuple[Panel, ...]
    columns: int
    note: str
    key: Key = ()


@dataclass(frozen=True)
class DotPanel:
    """Names down, one mark per series and name with its interval; shares, or differences of shares where ``signed``.

    Attributes:
        limits: of x, in percent; a number, where ``unit`` is 1. log: x on a logarithmic axis.
        points: small marks of a series (seeds), or all there is of it: label -> values of each name.
        letters: what is written instead of a value: (label, place of the name) -> text. hatched: names that are not counted.
        looks: of each name, for marks without a colour of their own: (colour, marker).
        joined: names that a bar at the right-hand side joins. subtitle: under the title, in red where ``alarm``.
    """

    title: str
    xlabel: str
    names: tuple[str, ...]
    series: tuple[tuple[str, tuple[Interval, ...]], ...]
    signed: bool = False
    limits: tuple[float, float] | None = None
    unit: int = 100
    log: bool = False
    points: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    letters: Mapping[tuple[str, int], str] = field(default_factory=dict)
    hatched: tuple[int, ...] = ()
    looks: tuple[tuple[str, str], ...] = ()
    joined: tuple[tuple[int, ...], ...] = ()
    subtitle: str = ""
    alarm: bool = False


@dataclass(frozen=True)
class Dots:
    """Panels of dots or bars, ``columns`` side by side. ``marks``: of each label; by position where none is given.

    ``width``, ``row``: of a panel and of a name in it, in inches; ``key``: what the key explains beyond the series.
    """

    panels: tuple[DotPanel, ...]
    note: str
    columns: int = 1
    marks: Mapping[str, Mark] = field(default_factory=dict)
    width: float = 5.6
    row: float = 0.0
    key: Key = ()


@dataclass(frozen=True)
class HeatPanel:
    """Coloured cells with text: (names, columns) in percent; NaN = white. ``dead``: columns that are hatched, not coloured.

    Columns without a name at the end are room that keeps the cells of several panels equally wide.
    """

    title: str
    columns: tuple[str, ...]
    names: tuple[str, ...]
    values: np.ndarray
    texts: np.ndarray
    dead: tuple[int, ...] = ()


@dataclass(frozen=True)
class Heat:
    """Heat maps, ``columns`` side by side. ``rules``: lines below so many names.

    ``palette``: of a colour bar with ``label``; or a few colours for equal steps from 0 to 100, without a bar. ``cell``: inches.
    """

    panels: tuple[HeatPanel, ...]
    columns: int
    note: str
    palette: str | tuple[str, ...]
    label: str = ""
    rules: tuple[int, ...] = ()
    key: Key = ()
    cell: tuple[float, float] = (0.84, 0.33)


@dataclass(frozen=True)
class Gallery:
    """Images, uint8 (height, width, 3), each with a title and a caption, ``columns`` side by side; ``names`` beside equal parts."""

    panels: tuple[tuple[str, str, np.ndarray], ...]
    columns: int
    note: str
    names: tuple[str, ...]
    width: float
    height: float


Figure = Lines | Dots | Heat | Gallery
