"""What every exhibit is made of: rows of a matrix, their means with 95 % intervals over seeds, and the columns of a table.

An exhibit is one module beside this one and one line of :data:`benchmark.report.exhibits.catalogue.EXHIBITS`. The module has

- ``frame(source)``: the table, as it is written to CSV; raises :class:`Missing`. Columns that begin with ``_`` are left out of the
  CSV: they hold what only the figure draws. ``frame.attrs`` holds what else the wording and the figure need;
- ``figure(table)``: the figure as data (:mod:`benchmark.report.figures`), or None;
- ``COLUMNS``: how the table is shown;
- its wording in a template of the same name (see :mod:`benchmark.report.exhibits.wording`).

Means are over scenarios of means over seeds. Two things differ significantly where the 95 % bootstrap interval of their paired
differences excludes 0. All figures are shares in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd

from benchmark.analysis import intervals, stats
from benchmark.analysis.intervals import Interval
from benchmark.analysis.stats import SCENARIO, WORLD
from benchmark.report.figures import DotPanel, Figure, Series
from benchmark.report.words import gate_words
from benchmark.settings.cells import Matrix

Entry = tuple[str, str]
Columns: TypeAlias = "tuple[Column, ...]"
UNMEASURED = Interval(math.nan, math.nan, math.nan)
BARS = "Bars: 95 % intervals over seeds."
BANDS = "Bands: 95 % intervals over seeds."


class Missing(ValueError):
    """The rows exist but cannot answer the question; says what they lack."""


class NotRun(Missing):
    """The rows do not exist; says how to make them."""


@dataclass(frozen=True)
class Source:
    """The results of one matrix.

    Attributes:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them. matrix: its settings. manifest: of its folder.
        elsewhere: the same settings run with another arithmetic, from folders ``<name>-<something>``.
    """

    name: str
    rows: pd.DataFrame
    curves: pd.DataFrame
    timings: pd.DataFrame
    matrix: Matrix
    manifest: dict[str, Any] = field(default_factory=dict)
    elsewhere: tuple[Source, ...] = ()

    def labels(self, kind: type[Any]) -> dict[str, Any]:
        """The defenses of a class, by label."""
        return {cell.defense_label: cell.defense for cell in self.matrix.cells if isinstance(cell.defense, kind)}


@dataclass(frozen=True)
class Column:
    """A column of a table; :func:`text` and the other functions of this kind make several, as ``name="Head"``.

    Attributes:
        kind: ``share`` in percent, ``points`` signed; ``interval`` and ``difference`` (signed) read ``name``, ``name_low`` and
            ``name_high``; ``number`` to three digits; ``count`` without decimals.
    """

    head: str
    kind: str
    name: str


def _maker(kind: str) -> Callable[..., Columns]:
    def columns(**heads: str) -> Columns:
        return tuple(Column(head, kind, name) for name, head in heads.items())

    return columns


text, share, points, interval, difference, number, count = map(
    _maker, ("text", "share", "points", "interval", "difference", "number", "count")
)  # fmt: skip
DEFENSE = text(defense="Defense", scope="Scope", control="")
ENTRY = text(track="Track", defense="Defense", scope="Scope")
FIGURES = interval(acc="ACC", asr="ASR", ra="RA")


class Answer(Protocol):
    """The module of an exhibit."""

    __name__: str

    @property
    def COLUMNS(self) -> Columns: ...  # noqa: N802
    def frame(self, source: Source) -> pd.DataFrame: ...
    def figure(self, table: pd.DataFrame) -> Figure | None: ...


@dataclass(frozen=True)
class Exhibit:
    """A question, the shipped matrix whose rows answer it, and the module that does; ``name``: file name and anchor."""

    name: str
    title: str
    question: str
    matrix: str
    answer: Answer


# -- rows --------------------------------------------------------------------------------------------------------------------------

def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows under the selection that their track is judged by."""
    chosen = {track: stats.headline(rows, track) for track in dict.fromkeys(rows["track"])}
    return rows[rows["selection"] == rows["track"].map(chosen)]


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """The finished cells among ``rows`` on implanted attacked models."""
    table = stats.implanted_worlds(rows)
    return table[table["status"] == "ok"]


def judged_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Finished cells of implanted attacked models under the selection their track is judged by.

    Raises:
        Missing: there is none.
    """
    table = finished(judged(rows))
    if table.empty:
        raise Missing(f"no attack implanted, so no defense can be judged ({gate_words(rows)})")
    return table


def before_defense(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per attacked model: what it scores before any defense."""
    attacked = rows[rows["attack"] != stats.NO_ATTACK].drop_duplicates(WORLD)
    return attacked.assign(
        acc=attacked["acc_undefended"], asr=attacked["asr_undefended"], ra=attacked["ra_undefended"],
        loss=attacked["acc_benign"] - attacked["acc_undefended"],
    )  # fmt: skip


def leaderboards(rows: pd.DataFrame) -> pd.DataFrame:
    """The leaderboards of all tracks under the selection each is judged by, one after the other; controls once.

    Raises:
        Missing: there is none.
    """
    parts = []
    for track in stats.tracks(rows):
        board = stats.leaderboard(rows, track, stats.headline(rows, track))
        if len(board):
            parts.append(board.assign(track=track, selection=stats.headline(rows, track)))
    if not parts:
        raise Missing(f"no attack implanted, so no defense can be judged ({gate_words(rows)})")
    every: pd.DataFrame = pd.concat(parts, ignore_index=True)
    competing = every["role"] == "defense"
    return pd.concat([every[competing], every[~competing].drop_duplicates(stats.ENTRY)], ignore_index=True)


def by_entry(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Every entry of every track: the start of its line, and its rows."""
    for names, mine in table.groupby(["track", *stats.ENTRY], sort=False):
        yield dict(zip(("track", *stats.ENTRY), names, strict=True)), mine


def of_entry(table: pd.DataFrame, entry: Entry) -> pd.DataFrame:
    return table[(table["defense"] == entry[0]) & (table["scope"] == entry[1])]


def competitors(table: pd.DataFrame) -> list[Entry]:
    """Entries that are no controls, in matrix order."""
    return stats.entries(table[~table["control"].astype(bool) & (table["defense"] != stats.UNDEFENDED)])


def table_of(lines: Sequence[Mapping[str, Any]], missing: str = "there is nothing to show", **facts: Any) -> pd.DataFrame:
    """A table with ``facts`` as its ``attrs``.

    Raises:
        Missing: there are no lines.
    """
    if not lines:
        raise Missing(missing)
    table = pd.DataFrame(lines)
    table.attrs = dict[Any, Any](facts)
    return table


# -- numbers -----------------------------------------------------------------------------------------------------------------------

def mean(table: pd.DataFrame, column: str) -> Interval:
    """Mean over scenarios of means over seeds, with its interval; values that are missing are left out."""
    kept = table[np.isfinite(table[column].to_numpy(np.float64))]
    return intervals.interval([group[column].to_list() for _, group in kept.groupby(SCENARIO, sort=False)])


def paired_gap(left: pd.DataFrame, right: pd.DataFrame, column: str) -> tuple[Interval, int]:
    """``left`` minus ``right``, attacked model by attacked model: the mean with its interval, and the number of pairs.

    Each table holds at most one row per attacked model.
    """
    both = left[[*WORLD, column]].merge(right[[*WORLD, column]], on=WORLD, suffixes=("", "_other"), validate="one_to_one")
    both["difference"] = both[column] - both[f"{column}_other"]
    return mean(both, "difference"), int(both["difference"].notna().sum())


def verdict(part: Interval) -> int:
    """1 where the interval lies above 0, -1 below, 0 where it holds 0 (or there is none)."""
    return 1 if part.low > 0 else -1 if part.high < 0 else 0


def bounded(name: str, part: Interval) -> dict[str, float]:
    """An interval as three values of a line."""
    return {name: part.mean, f"{name}_low": part.low, f"{name}_high": part.high}


def interval_of(line: Mapping[str, Any] | pd.Series, name: str) -> Interval:
    """The value of a line, with its interval where it has one."""
    return Interval(float(line[name]), *(float(line.get(f"{name}{end}", math.nan)) for end in ("_low", "_high")))


def means_of(table: pd.DataFrame, names: Sequence[str] = ("acc", "asr", "ra")) -> dict[str, float]:
    line: dict[str, float] = {}
    for name in names:
        line |= bounded(name, mean(table, name))
    return line


def point(value: float) -> Interval:
    """A value without an interval."""
    return Interval(float(value), math.nan, math.nan)


# -- names and figures -------------------------------------------------------------------------------------------------------------

def entry_words(entry: Sequence[Any], control: object = "") -> str:
    """anp (whole); "undefended"; a control is marked as one."""
    return "undefended" if entry[0] == stats.UNDEFENDED else f"{entry[0]} ({entry[1]}){' (control)' if control else ''}"


def control_words(table: pd.DataFrame) -> str:
    return "control" if table["control"].any() else ""


def victims_words(table: pd.DataFrame) -> pd.Series:
    """In words, where the features of each row's victim come from."""
    return ("with a head on features " + table["features"]).where(table["features"] != "", "trained end to end")


def implanted_words(worlds: pd.DataFrame) -> str:
    return f"{int(worlds['implanted'].astype(bool).sum())} of {len(worlds)}"


def idle_words(cells: pd.DataFrame) -> dict[Entry, str]:
    """Entries with finished cells in which nothing was changed: "no change in 3 of 12"."""
    found = {entry: of_entry(cells, entry)["mark"] == "no change" for entry in stats.entries(cells)}
    return {entry: f"no change in {idle.sum()} of {len(idle)}" for entry, idle in found.items() if idle.any()}


def no_figure(table: pd.DataFrame) -> None:
    """For exhibits without a figure."""


def series(label: str, table: pd.DataFrame, x: str, y: str, **look: Any) -> Series:
    """A line through the lines of a table that have a value."""
    kept = [line for _, line in table.dropna(subset=[y]).iterrows()]
    return Series(label, tuple(float(line[x]) for line in kept), tuple(interval_of(line, y) for line in kept), **look)


def dot_panel(
    table: pd.DataFrame, title: str, xlabel: str, marks: Mapping[str, str],
    name: Callable[[pd.Series], str] = lambda line: entry_words((line["defense"], line["scope"]), line.get("control")),
    *, signed: bool = False,
) -> DotPanel:  # fmt: skip
    """Lines of a table as dots; ``marks``: what each mark is called, and its column."""
    lines = [line for _, line in table.iterrows()]
    parts = tuple((words, tuple(interval_of(line, column) for line in lines)) for words, column in marks.items())
    return DotPanel(title, xlabel, tuple(map(name, lines)), parts, signed)


def board_panel(board: pd.DataFrame, title: str, xlabel: str, marks: Mapping[str, str], *, signed: bool = False) -> DotPanel:
    """As :func:`dot_panel`, of leaderboard lines."""
    def name(line: pd.Series) -> str:
        return f"{line['defense']} ({line['scope']})" + ("" if line["role"] == "defense" else f" ({line['role']})")

    return dot_panel(board, title, xlabel, marks, name, signed=signed)
