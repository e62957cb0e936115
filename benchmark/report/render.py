"""Figures (:mod:`benchmark.report.figures`) -> PNG for reading and SVG for papers, the same bytes each time.

Panels have their sizes in inches. Matplotlib's constrained layout finds the room for ticks, titles and labels, and the page grows
around it; the title is above, the key and the note are below.
"""

from __future__ import annotations

import io
import multiprocessing
import re
import signal
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from benchmark.report.figures import Figure, Heat, Key, Mark
from benchmark.report.panels import Cell, Looks, area_style, cells_of, line_style
from benchmark.report.style import wrapped
from benchmark.report.text import plain
from benchmark.storage.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Sheet

__all__ = ["Picture", "draw", "draw_all", "sheet", "style"]

_DPI = 120
_MIN_WIDTH = 7.0
_SEVERAL = 8
"""Pictures from which on starting processes takes less time than drawing them one by one."""
_MOST = 4
"""Processes that draw."""


class Picture(NamedTuple):
    """What :func:`draw` is given."""

    figure: Figure
    title: str
    stem: Path
    known: Looks | None = None


@contextmanager
def style() -> Iterator[None]:
    """The settings every figure is drawn with.

    Text is drawn as outlines, so a figure looks the same wherever it is opened; a name's ``$`` starts no formula.
    """
    import matplotlib

    settings: Any = {
        "font.family": "DejaVu Sans", "font.size": 9.0, "axes.titlesize": 9.0, "axes.titleweight": "bold", "axes.labelsize": 9.0,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.linewidth": 0.8,
        "axes.titlelocation": "left", "axes.axisbelow": True, "grid.color": "#E3E3E3", "grid.linewidth": 0.7,
        "xtick.color": "#333333", "ytick.color": "#333333", "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5,
        "legend.frameon": False, "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "levelfield",
        "figure.facecolor": "white", "savefig.facecolor": "white", "hatch.linewidth": 0.6, "hatch.color": "#9A9A9A",
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in letters the font lacks is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


# -- the page ------------------------------------------------------------------------------------------------------------------


def _colour_bar(page: Sheet, palette: str, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = page.colorbar(ScalarMappable(Normalize(0, 100), palette), ax=page.axes, ticks=[0, 25, 50, 75, 100], fraction=0.03,
                        aspect=40, pad=0.01, label=label)  # fmt: skip
    bar.ax.tick_params(length=0)


def _up(axes: Axes) -> tuple[object, ...]:
    return (axes.get_ylabel(), axes.get_ylim(), *(tick.get_text() for tick in axes.get_yticklabels()))


def _drawcells_of(page: Sheet, cells: Sequence[Cell], columns: int) -> list[Axes]:
    """The panels of a page; words that the neighbour to the left or below has as well are left out."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    grid = page.add_gridspec(len(rows), columns, height_ratios=[max(cell.height for cell in row) for row in rows])
    found: list[Axes] = []
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        axes = page.add_subplot(grid[row, column])
        cell.paint(axes)
        # A title may reach over neighbours that have none.
        room = next((number for number, other in enumerate(rows[row][column + 1 :], 1) if other.title), columns - column)
        title = "\n".join(wrapped(plain(line), int(12.3 * room * cell.width), 2) for line in cell.title.split("\n"))
        axes.set_title(title, pad=6 + cell.pad)
        found.append(axes)
    repeated = [bool(place % columns) and _up(axes) == _up(found[place - 1]) for place, axes in enumerate(found)]
    for place, axes in enumerate(found):
        if repeated[place]:
            axes.tick_params(labelleft=False)
            axes.set_ylabel("")
        if place + columns < len(found) and found[place + columns].get_xlabel() == axes.get_xlabel():
            axes.set_xlabel("")
    return found


def _legend(page: Sheet, key: Key, bottom: float) -> float:
    """Draws the key ``bottom`` inches above the lower edge, in as many columns as fit; returns its height in inches."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not key:
        return 0.0
    handles: list[Any] = []
    for words, mark in key:
        text = wrapped(plain(words), 60, 1)
        if mark is not None and mark.kind == "marker":
            handles.append(Line2D([], [], label=text, **line_style(replace(mark, size=min(mark.size, 10)))))
        else:
            handles.append(Patch(label=text, **area_style(mark or Mark("white"))))
    dashed = any(mark is not None and mark.stroke not in ("", "-") for _, mark in key)
    width, height = page.get_size_inches()
    for columns in range(min(len(handles), 6), 0, -1):
        legend = page.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.05 / width, bottom / height), ncols=columns,
                             borderaxespad=0, columnspacing=1.4, handlelength=3.2 if dashed else 1.8, handletextpad=0.5,
                             labelspacing=0.35)  # fmt: skip
        box = legend.get_window_extent()
        if box.width <= (width - 0.1) * page.dpi or columns == 1:
            break
        legend.remove()
    return box.height / page.dpi


def _surround(page: Sheet, title: str, note: str, key: Key) -> None:
    """Draws title, key and note, and leaves the rest to the panels."""
    for artist in (*page.texts, *page.legends):
        artist.remove()
    width, height = map(float, page.get_size_inches())
    head = page.text(0.12 / width, 1 - 0.1 / height, wrapped(title, int(width * 10)), fontsize=11, fontweight="bold", va="top")
    small = page.text(0.12 / width, 0.08 / height, textwrap.fill(note, int(width * 16)), fontsize=7.5, color="#444444")
    foot = 0.16 + small.get_window_extent().height / page.dpi
    below = foot + _legend(page, key, foot) + 0.08
    above = 0.2 + head.get_window_extent().height / page.dpi
    engine: Any = page.get_layout_engine()
    engine.set(rect=(0, below / height, 1, 1 - (above + below) / height))
    engine.execute(page)


def sheet(figure: Figure, title: str, known: Looks | None = None) -> Sheet:
    """The figure laid out on a page of matplotlib's; to be called within :func:`style`.

    Args:
        known: looks of the entries that an exhibit's lines are about.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet

    cells, key = cells_of(figure, known or {})
    columns = min(figure.columns, len(cells))
    wide = columns * cells[0].width
    tall = sum(max(cell.height for cell in cells[start : start + columns]) for start in range(0, len(cells), columns))
    page = Sheet(figsize=(max(_MIN_WIDTH, wide + 2), tall * 1.3 + 2 + 0.25 * len(key)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(page)
    axes = _drawcells_of(page, cells, columns)
    if isinstance(figure, Heat) and isinstance(figure.palette, str):
        _colour_bar(page, figure.palette, figure.label)
    engine: Any = page.get_layout_engine()
    engine.set(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.02)
    _surround(page, title, figure.note, key)
    # Words keep their size, so the page grows or shrinks by what the panels lack.
    width, height = map(float, page.get_size_inches())
    boxes = [one.get_position() for one in axes]
    width += wide - width * sum(box.width for box in boxes[:columns])
    height += tall - height * sum(box.height for box in boxes[::columns])
    page.set_size_inches(round(max(_MIN_WIDTH, width), 2), round(height, 2))
    _surround(page, title, figure.note, key)
    page.set_layout_engine("none")
    for one in page.axes:  # the solver's last digits differ from run to run
        box = one.get_position()
        one.set_position((round(box.x0, 6), round(box.y0, 6), round(box.width, 6), round(box.height, 6)))
    return page


def draw(figure: Figure, title: str, stem: Path, known: Looks | None = None, *, colours: int | None = 128) -> list[Path]:
    """Writes ``stem.png`` and ``stem.svg``, without dates, versions or comments inside; returns both paths.

    Args:
        known: looks of the entries that an exhibit's lines are about. colours: of the PNG's palette; None = all.

    Raises:
        BadInput: the folder cannot be written.
    """
    with style():
        page = sheet(figure, title, known)
        canvas: Any = page.canvas
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        if colours is not None:
            # Not the default method, which gives rare colours, such as those of single markers, to their neighbours.
            picture = picture.quantize(colours, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        png, svg = io.BytesIO(), io.StringIO()
        picture.save(png, "PNG", optimize=True)
        page.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    written = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    write_bytes(written[0], png.getvalue())
    write_bytes(written[1], re.sub(r" *<!--.*?-->\n?", "", svg.getvalue(), flags=re.DOTALL).encode())
    return written


def draw_all(pictures: Sequence[Picture], processes: int = 1) -> list[Path]:
    """:func:`draw` of several pictures; all paths, in the same order.

    Args:
        processes: that draw, at most four; copies of this one, since importing what draws takes longer than a picture.

    Raises:
        BadInput: the folder cannot be written.
    """
    if len(pictures) < _SEVERAL or processes < 2:
        return [path for picture in pictures for path in draw(*picture)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(processes, _MOST), context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return [path for paths in pool.map(_drawn, pictures) for path in paths]


def _drawn(picture: Picture) -> list[Path]:
    return draw(*picture)
