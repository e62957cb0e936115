"""How figures look: one colour and marker per defense in every figure, and names that fit their place."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.text import plain

__all__ = ["COLOURS", "GREYS", "MARKERS", "METRIC_COLOURS", "Look", "label", "looks", "wrapped"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#5E3C99")
"""Okabe and Ito's set without black and yellow (too pale on white), then brown and violet: distinct to colour-blind readers."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
GREYS = ("#555555", "#8A8A8A", "#B0B0B0")
METRIC_COLOURS = {"acc": "#0072B2", "asr": "#D55E00", "ra": "#009E73"}


class Look(NamedTuple):
    """How one entry is drawn."""

    colour: str
    marker: str


def looks(rows: pd.DataFrame) -> dict[tuple[str, str], Look]:
    """A look per (defense, scope) of a matrix: 72 distinct ones before any repeats; controls in 27 greys, the undefended black."""
    found: dict[tuple[str, str], Look] = {}
    controls = set(rows.loc[rows["control"].astype(bool), "defense"])
    counts = {True: 0, False: 0}
    for entry in stats.entries(rows):
        is_control = entry[0] in controls
        if entry[0] == stats.UNDEFENDED:
            found[entry] = Look("#000000", "*")
            continue
        count = counts[is_control]
        counts[is_control] += 1
        palette = GREYS if is_control else COLOURS
        turn = count // math.lcm(len(palette), len(MARKERS))  # by then every pair of colour and marker in step has been used
        found[entry] = Look(palette[count % len(palette)], MARKERS[(count + turn) % len(MARKERS)])
    return found


def label(entry: tuple[str, str], every: Sequence[tuple[str, str]]) -> str:
    """What a figure calls an entry: the scope only where the defense has several in ``every``."""
    several = sum(other[0] == entry[0] for other in every) > 1
    return plain(f"{entry[0]} [{entry[1]}]" if several else entry[0])


def wrapped(text: str, width: int, lines: int = 2) -> str:
    """At most ``lines`` lines of ``width`` letters, broken after spaces, dashes, underscores; cuts end in an ellipsis."""
    rows = [""]
    for piece in re.split(r"(?<=[ _+-])", text):
        if rows[-1] and len(rows[-1]) + len(piece.rstrip()) > width:
            rows.append("")
        rows[-1] += piece
    kept = [row.rstrip() for row in rows[:lines]]
    if len(rows) > lines:
        kept[-1] += "\N{HORIZONTAL ELLIPSIS}"
    return "\n".join(row if len(row) <= width else row[: width - 1] + "\N{HORIZONTAL ELLIPSIS}" for row in kept)
