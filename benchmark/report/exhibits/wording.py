"""From a table to sentences: the templates beside the exhibits, and the filters they use.

A template reads ``lines`` (the table, one mapping per line), everything in ``table.attrs``, and the constants of the attack gate as
texts: ``half`` (the least ASR of an implanted attack), ``tau`` (the tolerated loss of ACC in points). It is rendered to one
paragraph. What it sets at its top is no text: ``about`` (what the table counts, for captions), ``brief`` (names of the columns on
the page; default all), ``by`` (by which column the page picks lines where the table is long) and ``longest`` (lines; default 10).
Names that come from settings are hostile until ``name`` or ``entry`` has escaped them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from benchmark.analysis.intervals import Interval
from benchmark.report.exhibits.evidence import entry_words, interval_of, verdict
from benchmark.report.text import markdown, number_text
from benchmark.rules.metrics import IMPLANTED_ASR
from benchmark.rules.selection import TAU

Line = Mapping[str, Any]
MEANS = "means over implanted attacked models, 95 % intervals over seeds"


class Words(NamedTuple):
    """A rendered template."""

    text: str
    about: str
    brief: tuple[str, ...]
    by: str
    longest: int = 10


def percent(value: float, digits: int = 1) -> str:
    """12.3 %."""
    return "not measured" if math.isnan(value) else f"{100 * value + 0.0:.{digits}f} %".replace("-0.0 %", "0.0 %")


def percents(part: Interval) -> str:
    """12.3 % [10.0, 15.1]."""
    return percent(part.mean) + ("" if math.isnan(part.low) else f" [{100 * part.low:.1f}, {100 * part.high:.1f}]")


def points(part: Interval) -> str:
    """+1.2 points [-0.3, +2.8]."""
    if math.isnan(part.mean):
        return "not measured"
    bounds = "" if math.isnan(part.low) else f" [{100 * part.low:+.1f}, {100 * part.high:+.1f}]"
    return f"{100 * part.mean:+.1f} points{bounds}"


def entry(line: Line) -> str:
    """anp (whole), escaped; without the scope where the line has none."""
    return markdown(entry_words((line["defense"], line["scope"])) if "scope" in line else line["defense"])


def entries(lines: Sequence[Line], column: str = "") -> list[str]:
    """The names of lines, each with its difference in ``column`` where that is given."""
    return [entry(line) + (f" {points(interval_of(line, column))}" if column else "") for line in lines]


def few(words: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of a list, and how many more there are."""
    return ", ".join(words) or "none" if len(words) <= most + 1 else f"{', '.join(words[:most])} and {len(words) - most} more"


def after_colon(words: Sequence[str], most: int = 3) -> str:
    """": a, b and 3 more", or nothing."""
    return f": {few(words, most)}" if words else ""


def in_brackets(words: Sequence[str], most: int = 3) -> str:
    """" (a, b and 3 more)", or nothing."""
    return f" ({few(words, most)})" if words else ""


def out_of(some: int, of: int) -> str:
    return f"all {of}" if some == of and of > 1 else f"none of {of}" if some == 0 else f"{some} of {of}"


def acronym(label: str) -> str:
    """ABL, HID without pruning: a label whose first word is short begins with capitals, escaped."""
    first, space, rest = label.partition(" ")
    return markdown((first.upper() if len(first) < 5 else first) + space + rest)


def _side(lines: Sequence[Line], column: str, side: int) -> list[Line]:
    return [line for line in lines if verdict(interval_of(line, column)) == side]


def _competing(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.get("role", "defense") == "defense" and not line.get("control")]


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=False,
    )  # fmt: skip
    made.filters |= {
        "name": markdown, "number": number_text, "percent": percent, "percents": percents, "points": points, "entry": entry,
        "entries": entries, "few": few, "after_colon": after_colon, "in_brackets": in_brackets, "out_of": out_of,
        "acronym": acronym, "or_none": lambda some: some or "none", "part": interval_of, "side": verdict, "competing": _competing,
        "above": lambda lines, column: _side(lines, column, 1), "below": lambda lines, column: _side(lines, column, -1),
        "measured": lambda lines, column: [line for line in lines if not math.isnan(line[column])],
    }  # fmt: skip
    made.tests["search"] = lambda text, pattern: re.search(pattern, text) is not None
    made.globals |= {"half": f"{100 * IMPLANTED_ASR:g} %", "least_asr": IMPLANTED_ASR, "tau": f"{100 * TAU:g}", "means": MEANS}
    return made


def words_of(template: str, table: pd.DataFrame) -> Words:
    """The wording of an exhibit: ``template`` is its module's name."""
    given: dict[Any, Any] = {"lines": table.to_dict("records"), **table.attrs}
    found: Any = _environment().get_template(f"{template}.md.j2").make_module(given)
    brief, by, longest = getattr(found, "brief", ""), getattr(found, "by", ""), getattr(found, "longest", 10)
    return Words(" ".join(str(found).split()), found.about, tuple(brief.split()), by, longest)
