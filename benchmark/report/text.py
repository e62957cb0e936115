"""Text of tables: names and numbers as text, and one writer of tables for Markdown, LaTeX (booktabs) and CSV.

Names come from settings files and are treated as hostile: they break no cell, carry no markup and start no formula.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

__all__ = [
    "DASH", "Cell", "Column", "Table", "bracketed", "csv_text", "entry", "latex", "latex_table", "markdown", "number_text",
    "percent_text", "pipe_table", "plain", "signed_percent", "slug",
    "with_deviation",
]  # fmt: skip

DASH = "\N{EN DASH}"
"""What a table shows where there is no value."""
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    DASH: "--", "±": r"$\pm$",
}  # fmt: skip

Line = Mapping[Any, Any] | pd.Series
"""One line of a table, by column name."""


def plain(value: object) -> str:
    """One line of printable text: control, formatting and private characters become spaces, runs of spaces one."""
    kept = "".join(" " if unicodedata.category(letter) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"} else letter for letter in str(value))
    return " ".join(kept.split())


def markdown(value: object) -> str:
    """Text for a Markdown table cell: no pipe, tag, link, code or emphasis survives."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def latex(value: object) -> str:
    """Text for LaTeX, with every special character escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in plain(value))


def slug(text: str) -> str:
    """A part of a file name: letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


# -- numbers -------------------------------------------------------------------------------------------------------------------


def percent_text(value: float, *, signed: bool = False) -> str:
    """A share as percent with one decimal."""
    if math.isnan(value):
        return DASH
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text


def number_text(value: float) -> str:
    """At most three significant digits, no exponent, no trailing zeros: 0.0312, 1.25, 48, 4800."""
    if math.isnan(value):
        return DASH
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    digits = max(0, min(6, 2 - math.floor(math.log10(abs(value)))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


signed_percent = partial(percent_text, signed=True)


def with_deviation(mean: float, deviation: float) -> str:
    """A mean share in percent with its sample deviation, which is NaN for a single value: "71.0±1.4"."""
    return percent_text(mean) + ("" if math.isnan(deviation) else f"±{100 * deviation:.1f}")


def _bounds(line: Line, name: str, *, signed: bool) -> str:
    low, high = float(line[f"{name}_low"]), float(line[f"{name}_high"])
    return "" if math.isnan(low) else f"[{percent_text(low, signed=signed)}, {percent_text(high, signed=signed)}]"


def bracketed(line: Line, name: str, *, signed: bool = False, small: Callable[[str], str] = str) -> str:
    """A share in percent with its interval, if it has one; ``small`` formats the interval."""
    mean, bounds = percent_text(float(line[name]), signed=signed), _bounds(line, name, signed=signed)
    return f"{mean} {small(bounds)}" if bounds else mean


# -- tables --------------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A cell: its text, an ``interval`` set small after it, a second line ``below``; ``strong`` is bold."""

    text: str
    interval: str = ""
    below: str = ""
    strong: bool = False

    def markdown(self) -> str:
        """For a Markdown table."""
        text = f"**{markdown(self.text)}**" if self.strong else markdown(self.text)
        return text + (f" {self.interval}" if self.interval else "") + (f"<br>{markdown(self.below)}" if self.below else "")

    def latex(self) -> str:
        """For a LaTeX table."""
        text = rf"\textbf{{{latex(self.text)}}}" if self.strong else latex(self.text)
        return text + (rf" {{\scriptsize {latex(self.interval)}}}" if self.interval else "") + f" {latex(self.below)}"


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        head: its header.
        cell: a line of the frame -> the cell, as plain text or a :class:`Cell`; without it, the line's value in column ``name``.
        left: aligned left, as words are; numbers are aligned right.
        name: column of the frame that is shown as it is.
    """

    head: str | Cell
    cell: Callable[[Line], str | Cell] | None = None
    left: bool = False
    name: str = ""

    def of(self, line: Line) -> Cell:
        """The cell of a line."""
        found = str(line[self.name]) if self.cell is None else self.cell(line)
        return found if isinstance(found, Cell) else Cell(found)

    @classmethod
    def words(cls, head: str, name: str = "") -> Column:
        """Text, aligned left; ``name`` is by default the header in lower case."""
        return cls(head, left=True, name=name or head.lower())

    @classmethod
    def number(cls, head: str, name: str, form: Callable[[float], str] = number_text) -> Column:
        """A number as ``form`` writes it."""
        return cls(head, lambda line: form(float(line[name])))

    @classmethod
    def interval(cls, head: str, name: str, *, signed: bool = False) -> Column:
        """A share in percent with its interval; a dash where the line has no such column."""

        def cell(line: Line) -> str | Cell:
            if name not in line:
                return DASH
            return Cell(percent_text(float(line[name]), signed=signed), _bounds(line, name, signed=signed))

        return cls(head, cell)


@dataclass(frozen=True)
class Table:
    """Columns and the lines they show, in blocks.

    Attributes:
        columns: in order. blocks: (heading, lines); the heading of the first block is not shown.
    """

    columns: Sequence[Column]
    blocks: Sequence[tuple[str, Sequence[Line]]] = field(default_factory=list)

    @classmethod
    def of(cls, columns: Sequence[Column], frame: pd.DataFrame) -> Table:
        """A table of one block: the lines of a frame."""
        return cls(columns, [("", frame.to_dict("records"))])

    @classmethod
    def by_role(cls, columns: Sequence[Column], frame: pd.DataFrame, heading: str) -> Table:
        """Competing defenses, then below a heading the reference and the controls."""
        competing = frame["role"] == "defense"
        blocks = [("", frame[competing]), (heading, frame[~competing])]
        return cls(columns, [(words, lines.to_dict("records")) for words, lines in blocks if len(lines)])

    def markdown(self) -> str:
        """The table in Markdown; the columns that are aligned left come first."""
        heads = [(column.head if isinstance(column.head, Cell) else Cell(column.head)).markdown() for column in self.columns]
        lines: list[list[str]] = []
        for heading, block in self.blocks:
            if heading:
                lines.append([f"**{heading}**" if head == "Defense" else "" for head in heads])
            lines += [[column.of(line).markdown() for column in self.columns] for line in block]
        return pipe_table(heads, lines, left=sum(column.left for column in self.columns))

    def latex(self, caption: str, label: str) -> str:
        """The table in LaTeX; blocks are separated by a rule."""
        body: list[str] = []
        for _, block in self.blocks:
            body += [r"\midrule"] * bool(body)
            body += [" & ".join(column.of(line).latex().strip() for column in self.columns) + r" \\" for line in block]
        heads = [column.head if isinstance(column.head, str) else column.head.text for column in self.columns]
        return latex_table(heads, "".join("l" if column.left else "r" for column in self.columns), body, caption, label)


def entry(line: Line) -> str:
    """ "anp (whole)": a defense and its scope."""
    return f"{line['defense']} ({line['scope']})"


def pipe_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table of cells that are already escaped; the first ``left`` columns are aligned left, the others right."""
    rule = [":--" if column < left else "--:" for column in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])


def latex_table(header: Sequence[str], columns: str, body: Sequence[str], caption: str, label: str) -> str:
    """A floating booktabs table as wide as the text; ``body`` is LaTeX already, ``caption`` and ``header`` are not."""
    return "\n".join([
        r"% needs \usepackage{booktabs,graphicx}", r"\begin{table}", r"\centering", rf"\caption{{{latex(caption)}}}",
        rf"\label{{tab:{label}}}", r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
        " & ".join(latex(name) for name in header) + r" \\", r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}}", r"\end{table}", "",
    ])  # fmt: skip


def _csv_cell(value: object) -> str:
    """Numbers as in rows.csv; text that a spreadsheet would read as a formula is quoted with an apostrophe."""
    if isinstance(value, float):
        return "" if math.isnan(value) else (f"{value:.6f}".rstrip("0").rstrip(".") if "." in f"{value:.6f}" else str(value))
    if isinstance(value, str):
        text = plain(value)
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return str(value)


def csv_text(table: pd.DataFrame) -> str:
    """A frame as CSV; shares stay in [0, 1]."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.itertuples(index=False, name=None):
        writer.writerow([_csv_cell(value) for value in row])
    return out.getvalue()
