"""Rows -> one page to sort, filter and open: ``results/<matrix>/leaderboard.html``, self-contained, read from disk, no network.

The page's script (``assets/page.js``) filters, sorts and draws what :mod:`benchmark.report.page_data` computed. Where a filter
leaves a part of the scenarios, it shows the single scenarios instead of a mean whose interval nobody computed.

Names are hostile: they are made plain, put into JSON in which no character can end or open a tag, and reach the document as text. A
Content-Security-Policy lets the browser run the scripts and the style sheet of this file, by their hashes, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from benchmark.report.page_data import Picture, contents
from benchmark.report.style import METRIC_COLOURS, looks
from benchmark.report.text import plain
from benchmark.storage.files import write_text

__all__ = ["PAGE", "asset", "document", "pictures", "write_page"]

PAGE = "leaderboard.html"
"""The file's name, beside the rows."""
_ASSETS = Path(__file__).parent / "assets"


def pictures(folder: Path, attacks: Sequence[str]) -> list[Picture]:
    """The pictures of triggers in ``folder``, as :func:`benchmark.report.charts.trigger_pictures` writes them; the text ``Title``
    of a PNG is its attack, ``Description`` how its difference is amplified. Those of other attacks are left out."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            texts = image.text  # type: ignore[attr-defined]
        found[texts.get("Title", "")] = Picture(texts.get("Title", ""), texts.get("Description", ""), path.read_bytes())
    return [found[attack] for attack in attacks if attack in found]


def _shared(settings: Path, drawn: Sequence[Picture]) -> dict[str, str]:
    """Attacks whose trigger another attack's picture shows: the same settings but for the label, the rate and the recipe."""
    try:
        tables = tomllib.loads(settings.read_text(encoding="utf-8")).get("attack", []) if settings.is_file() else []
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}
    apart = ("label", "rate", "recipe")
    kinds = {str(table.get("label", table["name"])): {key: value for key, value in table.items() if key not in apart}
             for table in tables}  # fmt: skip
    named = [one.attack for one in drawn]
    return {label: other for label, kind in kinds.items() if label not in named
            for other in reversed(named) if kinds.get(other) == kind}  # fmt: skip


# -- the file ------------------------------------------------------------------------------------------------------------------


def _embedded(value: object) -> str:
    """JSON for a script element: no character of it can end the element, open a comment or break a line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _for_both(colour: str) -> str:
    """A colour for light pages, and half way to white for dark ones; black is the text's colour."""
    lighter = "".join(f"{(int(colour[at : at + 2], 16) + 255) // 2:02X}" for at in (1, 3, 5))
    return "var(--ink)" if colour == "#000000" else f"light-dark({colour}, #{lighter})"


def _palette(rows: pd.DataFrame) -> str:
    """CSS: a class per colour of entries and metrics."""
    colours = dict.fromkeys(look.colour for look in looks(rows).values())
    classes = [(f"k{number}", colour) for number, colour in enumerate(colours)]
    classes += [(f"m-{name}", colour) for name, colour in METRIC_COLOURS.items()]
    return "\n".join(f".{name} {{ --k: {_for_both(colour)}; }}" for name, colour in classes)


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def document(template: str, title: str, made: object, scripts: Mapping[str, str], style: str = "") -> str:
    """A page of one file: a template of ``assets`` with its data, scripts and style, which alone a browser may run or load.

    Args:
        template: name of the template. title: of the page. made: its data, written as JSON.
        scripts: after the one of all pages, by their names in the template. style: added to that of all pages.
    """
    style, scripts = f"\n{asset('page.css')}{style}\n", {"elements": asset("elements.js"), **scripts}
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hashed(style)}; script-src {' '.join(map(_hashed, scripts.values()))}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"title": html.escape(plain(title)), "policy": policy, "style": style, "data": _embedded(made), **scripts}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], asset(template))


def asset(name: str) -> str:
    """The text of a file of ``assets``."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def write_page(
    folder: Path, rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, title: str, *, about: str = ""
) -> Path:  # fmt: skip
    """Writes ``folder/leaderboard.html`` and returns its path. No dates: the same rows give the same bytes.

    Reads ``plots/triggers/*.png`` and ``matrix.toml`` in the folder, where they exist, for the pictures of the triggers.

    Args:
        folder: the matrix's results folder. rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them.
        title, about: of the matrix.

    Raises:
        BadInput: the file cannot be written.
    """
    found = pictures(folder / "plots" / "triggers", list(dict.fromkeys(rows["attack"])))
    made = contents(rows, curves, timings, title, about=about, found=found, shared=_shared(folder / "matrix.toml", found))
    library = asset("table-core.min.js").partition("//# sourceMappingURL")[0]  # the map is not there
    page = document("page.html", title, made, {"library": library, "script": asset("page.js")}, _palette(rows))
    write_text(folder / PAGE, page)
    return folder / PAGE
