"""What answers are made of: the shape of an exhibit, means and paired differences of stored rows, figures in words. Pure functions.

The answers are in :mod:`benchmark.report.exhibits.answers_axes` (matrices that turn one setting), :mod:`benchmark.report.exhibits.answers_training` (that train in
several ways) and :mod:`benchmark.report.exhibits.answers_boards` (any matrix); :mod:`benchmark.report.exhibits.write` lists them and writes them down. An answer
is computed, both ways: where the rows are against what is claimed of pruning defenses, the sentence says so, and where they are for
it, it says that. "Told apart" means that a 95 % bootstrap interval over seeds (:func:`benchmark.analysis.intervals.interval`), of paired
differences where two things are compared, leaves out 0. Means are taken over implanted attacked models, unless they are said to be
of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from benchmark.analysis import intervals, stats
from benchmark.analysis.intervals import Interval
from benchmark.analysis.stats import SCENARIO, WORLD
from benchmark.report.figures import DotPanel, Dots, Lines, Panel, Series
from benchmark.report.text import markdown
from benchmark.report.words import gate_words
from benchmark.settings.cells import Matrix

__all__ = [
    "END_TO_END", "FIGURES", "MEANS", "UNMEASURED", "Column", "DotPanel", "Dots", "Entry", "Lines", "Missing", "Panel", "Series",
    "Shown", "Source", "after_colon", "before_defense", "bounded", "brief", "competitors", "entry_markdown", "entry_words", "few",
    "figure_names", "finished", "implanted_words", "in_brackets", "interval_of", "interval_words", "judged", "largest", "listed",
    "mean", "means_of", "of_entry", "out_of", "paired_gap", "percent_words", "points_words", "verdict", "victims_words",
]  # fmt: skip


class Missing(ValueError):
    """The rows stand, but hold nothing that the question could be answered from; says what is missing."""


@dataclass(frozen=True)
class Source:
    """A matrix that was run: its three tables as :func:`benchmark.storage.rows.read` returns them, its settings, its manifest."""

    name: str
    rows: pd.DataFrame
    curves: pd.DataFrame
    timings: pd.DataFrame
    matrix: Matrix
    manifest: dict[str, Any] = field(default_factory=dict)


Kind = Literal["text", "share", "points", "interval", "difference", "number", "count"]


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, its kind, and the frame's column it shows.

    Kinds: ``share`` in percent, ``points`` signed; ``interval`` and ``difference`` (signed) take ``name``, ``name_low`` and
    ``name_high``; ``number`` to three digits; ``count`` as it is.
    """

    head: str
    kind: Kind
    name: str


@dataclass(frozen=True)
class Shown:
    """What an exhibit shows: ``answer`` is Markdown; ``about`` says what the table counts, for its caption."""

    answer: str
    frame: pd.DataFrame
    columns: tuple[Column, ...]
    about: str
    figure: Lines | Dots | None = None


# -- rows --------------------------------------------------------------------------------------------------------------------------

Entry = tuple[str, str]
UNMEASURED = Interval(math.nan, math.nan, math.nan)


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows under the selection that their track is judged by."""
    chosen = {track: stats.headline(rows, track) for track in dict.fromkeys(rows["track"])}
    return rows[rows["selection"] == rows["track"].map(chosen)]


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """Finished cells of implanted attacked models under the selection their track is judged by.

    Raises:
        Missing: there is none.
    """
    table = stats.implanted_worlds(judged(rows))
    table = table[table["status"] == "ok"]
    if table.empty:
        raise Missing(f"no attack implanted, so no defense can be judged ({gate_words(rows)})")
    return table


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


def of_entry(table: pd.DataFrame, entry: Entry) -> pd.DataFrame:
    return table[(table["defense"] == entry[0]) & (table["scope"] == entry[1])]


def competitors(table: pd.DataFrame) -> list[Entry]:
    """Entries that are no controls, in matrix order."""
    return stats.entries(table[~table["control"].astype(bool) & (table["defense"] != stats.UNDEFENDED)])


def before_defense(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per attacked model: what it scores before any defense."""
    attacked = rows[rows["attack"] != stats.NO_ATTACK].drop_duplicates(WORLD)
    return attacked.assign(
        acc=attacked["acc_undefended"], asr=attacked["asr_undefended"], ra=attacked["ra_undefended"],
        loss=attacked["acc_benign"] - attacked["acc_undefended"],
    )  # fmt: skip


def largest(table: pd.DataFrame, column: str) -> pd.Series:
    """The line of the largest value; the first of equals."""
    return table.iloc[int(np.nanargmax(table[column].to_numpy(np.float64)))]


# -- parts of a table --------------------------------------------------------------------------------------------------------------

def bounded(name: str, part: Interval) -> dict[str, float]:
    return {name: part.mean, f"{name}_low": part.low, f"{name}_high": part.high}


def means_of(table: pd.DataFrame, names: Sequence[str] = ("acc", "asr", "ra")) -> dict[str, float]:
    line: dict[str, float] = {}
    for name in names:
        line |= bounded(name, mean(table, name))
    return line


def interval_of(line: Mapping[str, Any] | pd.Series, name: str) -> Interval:
    return Interval(*(float(line[f"{name}{end}"]) for end in ("", "_low", "_high")))


FIGURES = (Column("ACC", "interval", "acc"), Column("ASR", "interval", "asr"), Column("RA", "interval", "ra"))
MEANS = "means over implanted attacked models, 95 % intervals over seeds"


# -- words -------------------------------------------------------------------------------------------------------------------------

def entry_words(entry: Entry) -> str:
    return f"{entry[0]} ({entry[1]})"


def entry_markdown(entry: Entry) -> str:
    return markdown(entry_words(entry))


def figure_names(table: pd.DataFrame, wanted: Sequence[Entry]) -> list[str]:
    """Names for a figure; controls say that they are."""
    controls = set(stats.entries(table[table["control"].astype(bool)]))

    def called(entry: Entry) -> str:
        return "undefended" if entry[0] == stats.UNDEFENDED else entry_words(entry) + " (control)" * (entry in controls)

    return [called(entry) for entry in wanted]


END_TO_END = "trained end to end"


def victims_words(table: pd.DataFrame) -> pd.Series:
    """In words, where the features of each row's victim come from."""
    return table["features"].where(table["features"] != "", END_TO_END).map(
        lambda words: words if words == END_TO_END else f"with a head on features {words}"
    )  # fmt: skip


def implanted_words(worlds: pd.DataFrame) -> str:
    return f"{int(worlds['implanted'].astype(bool).sum())} of {len(worlds)}"


def percent_words(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{100 * value + 0.0:.1f} %".replace("-0.0 %", "0.0 %")


def interval_words(part: Interval) -> str:
    """In words: 12.3 % [10.0, 15.1]."""
    return percent_words(part.mean) + ("" if math.isnan(part.low) else f" [{100 * part.low:.1f}, {100 * part.high:.1f}]")


def points_words(part: Interval) -> str:
    """A difference in words: +1.2 points [-0.3, +2.8]."""
    if math.isnan(part.mean):
        return "not measured"
    bounds = "" if math.isnan(part.low) else f" [{100 * part.low:+.1f}, {100 * part.high:+.1f}]"
    return f"{100 * part.mean:+.1f} points{bounds}"


def brief(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def verdict(part: Interval) -> int:
    """1 where the interval lies above 0, -1 below, 0 where it does not tell (or there is none)."""
    return 1 if part.low > 0 else -1 if part.high < 0 else 0


def listed(words: Sequence[str], none: str = "none") -> str:
    return ", ".join(words) or none


def few(words: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of a list, and how many more there are."""
    return listed(words) if len(words) <= most + 1 else f"{', '.join(words[:most])} and {len(words) - most} more"


def after_colon(words: Sequence[str]) -> str:
    """": a, b and 3 more", or nothing."""
    return f": {few(words)}" if words else ""


def in_brackets(words: Sequence[str]) -> str:
    """" (a, b and 3 more)", or nothing."""
    return f" ({few(words)})" if words else ""


def out_of(some: int, of: int) -> str:
    return f"all {of}" if some == of and of > 1 else f"none of {of}" if some == 0 else f"{some} of {of}"
