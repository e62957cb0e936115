"""Writes the exhibits: reviewers' questions, each answered from the stored rows of one matrix, touching no model.

:func:`write_exhibits` writes ``results/EXHIBITS.md`` and, below ``results/exhibits``, the table (Markdown, LaTeX, CSV) and the
figure of each. An exhibit whose matrix has not been run says so, and how to run it. A second run writes the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark.analysis.stats import headline, tracks
from benchmark.report.exhibits.catalogue import EXHIBITS
from benchmark.report.exhibits.evidence import Column, Exhibit, Missing, NotRun, Source
from benchmark.report.exhibits.wording import Words, words_of
from benchmark.report.render import Picture, draw_all
from benchmark.report.style import looks
from benchmark.report.text import bracketed, csv_text, latex, latex_table, markdown, number_text, percent_text, pipe_table, plain
from benchmark.report.words import GATE_WORDS, gate_words, setting_words
from benchmark.settings.load import load_matrix
from benchmark.settings.provenance import STALE_WORDS, stale
from benchmark.storage.files import write_text
from benchmark.storage.rows import Curve, Row, Timing, read
from models.spec import BadInput

__all__ = ["brief_table", "caption", "command", "source_of", "table_latex", "table_markdown", "wording", "write_exhibits"]

_FOLDER = "exhibits"
_MISSING = "\N{EN DASH}"


def command(exhibit: Exhibit) -> str:
    """What makes the rows an exhibit reads."""
    return "make benchmark" if exhibit.matrix == "quick" else f"make benchmark MATRIX={exhibit.matrix}"


# -- sources -------------------------------------------------------------------------------------------------------------------

def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error


def source_of(folder: Path) -> Source | None:
    """A matrix's stored results and those of the same settings on other machines, or None where it was not run.

    Raises:
        BadInput: a file exists but is not what it should be.
    """
    if not (folder / "rows.csv").is_file():
        return None
    manifest = _manifest(folder)
    rows, curves, timings = (
        read(folder / "rows.csv", Row), read(folder / "curves.csv", Curve), read(folder / "timings.csv", Timing)
    )  # fmt: skip
    others = (source for other in sorted(folder.parent.glob(f"{folder.name}-*"))
              if _elsewhere(manifest, other) and (source := source_of(other)))  # fmt: skip
    return Source(folder.name, rows, curves, timings, load_matrix(folder / "matrix.toml"), manifest, tuple(others))


def _elsewhere(manifest: dict[str, Any], other: Path) -> bool:
    """Whether a folder holds the same settings, computed with another arithmetic."""
    found = _manifest(other)
    same = bool(found) and found.get("settings") == manifest.get("settings")
    return same and found.get("arithmetic") != manifest.get("arithmetic")


# -- tables --------------------------------------------------------------------------------------------------------------------

def _shown(line: pd.Series, column: Column, escape: Callable[[object], str], small: Callable[[str], str]) -> str:
    value = line[column.name]
    if column.kind == "text":
        return escape(value)
    if column.kind in ("interval", "difference"):
        return bracketed(line, column.name, signed=column.kind == "difference", small=small)
    found = float(value)
    if math.isnan(found):
        return _MISSING
    if column.kind in ("share", "points"):
        return percent_text(found, signed=column.kind == "points")
    return f"{found:.0f}" if column.kind == "count" else number_text(found)


def _filled(exhibit: Exhibit, table: pd.DataFrame, only: Sequence[str] = ()) -> list[Column]:
    """The columns that hold something, text first. "RA, {}" of "ra {}" stands for one column per name that begins with "ra "."""
    every: list[Column] = []
    for column in exhibit.answer.COLUMNS:
        start = column.name.removesuffix("{}")
        names = [name for name in map(str, table) if name.startswith(start)] if start != column.name else [column.name]
        every += [Column(column.head.format(name[len(start):]), column.kind, name) for name in names if name in table]
    kept = [column for column in every if (column.name in only or not only) and
            ((table[column.name] != "") if column.kind == "text" else table[column.name].notna()).any()]  # fmt: skip
    return sorted(kept, key=lambda column: column.kind != "text")


def table_markdown(exhibit: Exhibit, table: pd.DataFrame, only: Sequence[str] = ()) -> str:
    """An exhibit's table, or ``only`` some of its columns; percent, differences in percentage points."""
    columns = _filled(exhibit, table, only)
    lines = [[_shown(line, column, markdown, str) for column in columns] for _, line in table.iterrows()]
    texts = sum(column.kind == "text" for column in columns)
    return pipe_table([markdown(column.head) for column in columns], lines, left=max(texts, 1))


def brief_table(exhibit: Exhibit, table: pd.DataFrame, words: Words) -> str:
    """What the page shows of a table: the columns its template names; of a long table its first lines, without controls."""
    full = f"[{exhibit.name}.csv]({_FOLDER}/{exhibit.name}.csv)"
    kept = table
    if len(table) > words.longest:
        role = "control" if "control" in table else "role"
        kept = table[table[role].isin(["", "defense"])] if "defense" in table and role in table else table
        if words.by:
            kept = kept.loc[kept[words.by].abs().sort_values(ascending=False, kind="stable").index]
        kept = kept.head(words.longest)
    heads = [f", sorted by {column.head}" for column in exhibit.answer.COLUMNS if words.by == column.name]
    note = f"{len(kept)} of {len(table)} lines{''.join(heads)}; all: {full}." if len(kept) < len(table) else f"Whole table: {full}."
    return f"{table_markdown(exhibit, kept, words.brief)}\n{note}"


def table_latex(exhibit: Exhibit, table: pd.DataFrame, words: str) -> str:
    """An exhibit's table for a paper (booktabs)."""
    columns = _filled(exhibit, table)

    def small(text: str) -> str:
        return rf"{{\scriptsize {text}}}"

    body = [
        " & ".join(_shown(line, column, latex, small).replace(_MISSING, "--") for column in columns) + r" \\"
        for _, line in table.iterrows()
    ]
    kinds = "".join("l" if column.kind == "text" else "r" for column in columns)
    return latex_table([column.head for column in columns], kinds, body, words, f"exhibit-{exhibit.name}")


def wording(exhibit: Exhibit, table: pd.DataFrame) -> Words:
    return words_of(exhibit.answer.__name__.rpartition(".")[2], table)


def caption(exhibit: Exhibit, source: Source, about: str) -> str:
    """What a table needs to be read alone: data, backbones, attacks and rates, seeds, selection, tracks, scenarios implanted."""
    # Rates once, where the label of an attack has it already: "badnets 1 % (1 %)" is "badnets 1 %".
    setting = re.sub(r" ([0-9.]+ %) \(\1\)", r" \1", "; ".join(": ".join(pair) for pair in setting_words(source.rows).items()))
    chosen = "; ".join(f"{plain(track)}: {headline(source.rows, track)}" for track in tracks(source.rows))
    return (
        f"{exhibit.title}. Percent; {plain(about)}. {setting}; track and the selection it is judged by: {chosen}; "
        f"{gate_words(source.rows)}. Poisoned samples replace clean ones."
    )


# -- the page ------------------------------------------------------------------------------------------------------------------

_INTRO = f"""# Exhibits

Questions that reviewers of pruning defenses asked, each answered from stored rows. The sentences are computed, so they change
with the rows. Two figures differ *significantly* where the 95 % bootstrap interval over seeds of their paired differences excludes
0. With three seeds such intervals are too narrow, and among so many comparisons a single one at the edge of its interval is no
finding. The attack-validity gate: {GATE_WORDS}. `make paper` redraws this page.
"""


def _exhibited(exhibit: Exhibit, source: Source, folder: Path, written: list[Path], pictures: list[Picture]) -> str:
    """Writes the tables of one exhibit and adds its picture to those to draw; returns its part of the page."""
    table = exhibit.answer.frame(source)
    words = wording(exhibit, table)
    text, stem = caption(exhibit, source, words.about), folder / exhibit.name
    public = table[[name for name in table if not str(name).startswith("_")]]
    files = {"md": f"# {exhibit.title}\n\n{table_markdown(exhibit, table)}\n{markdown(text)}\n", "csv": csv_text(public),
             "tex": table_latex(exhibit, table, text)}  # fmt: skip
    for suffix, content in files.items():
        written.append(stem.with_name(f"{stem.name}.{suffix}"))
        write_text(written[-1], content)
    figure = exhibit.answer.figure(table)
    if figure is not None:
        title = f"{exhibit.title}: {setting_words(source.rows)['dataset']}"
        pictures.append(Picture(figure, title, stem, looks(source.rows)))
    picture = f"![{exhibit.title}]({_FOLDER}/{exhibit.name}.png)\n\n" if figure is not None else ""
    links = ", ".join(f"[{suffix}]({_FOLDER}/{exhibit.name}.{suffix})" for suffix in files)
    rows = f"[{exhibit.matrix}]({exhibit.matrix}/rows.csv), `{command(exhibit)}`"
    return f"{picture}{words.text}\n\n{brief_table(exhibit, table, words)} Rows: {rows}. Files: {links}.\n"


def write_exhibits(results: Path, processes: int = 1) -> list[Path]:
    """Writes ``EXHIBITS.md`` and the folder ``exhibits`` below ``results``; returns every path written, the page last.

    Raises:
        BadInput: stored rows cannot be read, or a file cannot be written.
    """
    written: list[Path] = []
    pictures: list[Picture] = []
    index, parts = [], []
    sources: dict[str, Source | None] = {}
    for exhibit in EXHIBITS:
        if exhibit.matrix not in sources:
            sources[exhibit.matrix] = source_of(results / exhibit.matrix)
        try:
            source = sources[exhibit.matrix]
            if source is None:
                raise NotRun(f"`{command(exhibit)}`")
            old = f"{STALE_WORDS}\n\n" if stale(results / exhibit.matrix) else ""
            text, state = old + _exhibited(exhibit, source, results / _FOLDER, written, pictures), f"`{exhibit.matrix}`"
        except NotRun as reason:
            text, state = f"Not run yet: {reason}\n", f"not run yet: {reason}"
        except Missing as reason:
            state = f"The rows of [{exhibit.matrix}]({exhibit.matrix}/rows.csv) cannot answer this: {markdown(reason)}."
            text = f"{state}\n\nRows: `{command(exhibit)}`\n"
        parts.append(f"## {exhibit.title}\n\n<a id=\"{exhibit.name}\"></a>\n\n**{exhibit.question}**\n\n{text}")
        index.append([exhibit.question, f"[{exhibit.title}](#{exhibit.name})", state])
    written += draw_all(pictures, processes)
    for path in (results / _FOLDER).glob("*"):  # those of exhibits that are gone
        if path.is_file() and path not in written:
            path.unlink()
    page = results / "EXHIBITS.md"
    write_text(page, "\n".join([_INTRO, pipe_table(["Question", "Exhibit", "Rows"], index, left=3), *parts]))
    return [*written, page]
