"""Figures as data: panels with titles, axes, series and notes, which one renderer draws."""

from __future__ import annotations

from dataclasses import dataclass

from benchmark.analysis.stats import Interval

__all__ = ["DotPanel", "Dots", "Lines", "Panel", "Series"]


@dataclass(frozen=True)
class Series:
    """A line: values at ``x``.

    Attributes:
        about: the entry it belongs to, so that it keeps its look; None = by position. control: grey, whatever its entry.
        aside: dotted grey, for what is no score.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[Interval, ...]
    about: tuple[str, str] | None = None
    control: bool = False
    aside: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel of lines.

    Attributes:
        log, even: x on a logarithmic axis; at even distances, whatever the values. percent: x are shares.
        flat: horizontal reference lines, (label, height). signed: differences instead of shares.
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


@dataclass(frozen=True)
class Lines:
    """Panels of lines, ``columns`` side by side."""

    panels: tuple[Panel, ...]
    columns: int
    note: str


@dataclass(frozen=True)
class DotPanel:
    """Names down, one mark per series and name with its interval; shares, or differences of shares where ``signed``."""

    title: str
    xlabel: str
    names: tuple[str, ...]
    series: tuple[tuple[str, tuple[Interval, ...]], ...]
    signed: bool = False


@dataclass(frozen=True)
class Dots:
    """Panels of dots, one below the other."""

    panels: tuple[DotPanel, ...]
    note: str
