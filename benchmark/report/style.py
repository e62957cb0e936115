"""How figures look: one colour and marker per defense everywhere, exact layout in inches, the same bytes every time."""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.text import plain
from benchmark.storage.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["METRIC_COLOURS", "Look", "Panels", "figures", "label", "log_axis", "looks", "percent_axis", "save", "wrapped"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#5E3C99")
"""Okabe and Ito's set without black and yellow (too pale on white), then brown and violet: told apart by colour-blind readers."""
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
_GREYS = ("#555555", "#8A8A8A", "#B0B0B0")
METRIC_COLOURS = {"acc": "#0072B2", "asr": "#D55E00", "ra": "#009E73"}
_DPI = 120


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
        palette = _GREYS if is_control else _COLOURS
        turn = count // math.lcm(len(palette), len(_MARKERS))  # by then colours and markers have met in every way this order gives
        found[entry] = Look(palette[count % len(palette)], _MARKERS[(count + turn) % len(_MARKERS)])
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


@contextmanager
def figures() -> Iterator[Any]:
    """``matplotlib.pyplot`` with the house style, without a display; figures are closed at the end.

    Text is drawn as outlines, so a figure looks the same wherever it is opened; a name's ``$`` starts no formula.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = {
        "font.family": "DejaVu Sans", "font.size": 9.0, "axes.titlesize": 10.0, "axes.titleweight": "bold", "axes.labelsize": 9.0,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.linewidth": 0.8,
        "axes.titlelocation": "left", "axes.axisbelow": True, "grid.color": "#E3E3E3", "grid.linewidth": 0.7,
        "xtick.color": "#333333", "ytick.color": "#333333", "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5,
        "legend.frameon": False, "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "levelfield",
        "figure.facecolor": "white", "savefig.facecolor": "white", "hatch.linewidth": 0.6, "hatch.color": "#9A9A9A",
    }  # fmt: skip
    with plt.rc_context(settings), warnings.catch_warnings():
        # A name in letters the font lacks is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        try:
            yield plt
        finally:
            plt.close("all")


class Panels:
    """A figure of equal panels at exact places, all lengths in inches: no layout engine, so nothing moves between versions.

    Args:
        plt: from :func:`figures`. count, columns: how many panels, and how many side by side at most.
        size: (width, height) of a panel. gap: (across, down) between panels.
        margins: (left, right, bottom, top) around all of them. title: left-aligned, at the very top.
        heights: one panel height per row, instead of ``size``'s. min_width: of the figure.
    """

    def __init__(
        self, plt: Any, count: int, columns: int, size: tuple[float, float], gap: tuple[float, float],
        margins: tuple[float, float, float, float], title: str, heights: Sequence[float] | None = None, min_width: float = 7.0,
    ) -> None:  # fmt: skip
        self.columns = min(columns, count)
        self.rows = -(-count // self.columns)
        left, right, bottom, top = margins
        width = max(min_width, left + right + self.columns * size[0] + (self.columns - 1) * gap[0])
        tall = list(heights) if heights else [size[1]] * self.rows
        height = bottom + top + sum(tall) + (self.rows - 1) * gap[1]
        self.figure: Figure = plt.figure(figsize=(width, height), dpi=_DPI)
        self.axes: list[Axes] = []
        for position in range(count):
            row, column = divmod(position, self.columns)
            x, y = left + column * (size[0] + gap[0]), height - top - sum(tall[: row + 1]) - row * gap[1]
            self.axes.append(self.figure.add_axes((x / width, y / height, size[0] / width, tall[row] / height)))
        self.width, self.height = width, height
        self.figure.text(0.12 / width, 1 - 0.1 / height, wrapped(title, int(width * 10)), fontsize=11, fontweight="bold", va="top")

    def left_of_row(self, position: int) -> bool:
        return position % self.columns == 0

    def legend(self, handles: Sequence[Any], columns: int, length: float = 1.8) -> None:
        """Below all panels, above the footnote; ``length`` of a handle's line in letters: dashes need more of it."""
        self.figure.legend(
            handles=list(handles), loc="lower left", bbox_to_anchor=(0.05 / self.width, 0.3 / self.height), ncols=columns,
            columnspacing=1.4, handlelength=length, handletextpad=0.5, labelspacing=0.35,
        )  # fmt: skip

    def footnote(self, text: str) -> None:
        """Small print at the very bottom."""
        lines = textwrap.fill(text, int(self.width * 16.5))
        self.figure.text(0.12 / self.width, 0.08 / self.height, lines, fontsize=7.5, color="#444444", va="bottom", ha="left")


def log_axis(axes: Any) -> None:
    """A logarithmic x axis with plain numbers, since formulas are switched off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def percent_axis(axis: Any, name: str = "", floor: int = 0) -> None:
    """``floor`` to 100 %, with a little air for the markers. A floor above 0 is for points, never bars, and is stated."""
    step = (100 - floor) / 5
    axis.set_ticks([floor + step * tick for tick in range(6)])
    axis.axes.grid(True, axis=axis.axis_name)
    air = 0.03 * (100 - floor)
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(floor - air, 100 + air)
    if name:
        axis.set_label_text(name)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes ``stem.png`` and ``stem.svg`` without dates or versions inside; returns both paths.

    Raises:
        BadInput: the folder cannot be written.
    """
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], metadata=metadata, dpi=_DPI)
        path = stem.with_name(stem.name + suffix)
        write_bytes(path, content.getvalue())
        written.append(path)
    return written
