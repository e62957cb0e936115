"""From stored rows to everything people look at: tables, figures, page, report, console leaderboard, W&B."""

from __future__ import annotations

import functools
import hashlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmark.storage.files import write_text
from benchmark.storage.machine import cores
from benchmark.storage.rows import FILES, Curve, Key, Row, Timing, read
from models.spec import BadInput

if TYPE_CHECKING:
    from benchmark.tracking import CellLog

__all__ = [
    "catalogue", "cell_logs", "draw_exhibits", "draw_page", "draw_plots", "draw_report", "draw_tables", "explained",
    "leaderboard", "methods", "present", "write_catalogue",
]  # fmt: skip

COMMITTED = "results"
"""Name of the folder whose rows are committed."""
FRONT = "cifar10-cpu"
"""The matrix whose leaderboard is on the project's front page."""
FRONT_EXHIBIT = "reproduction"
"""The exhibit of that matrix whose picture is beside it."""
GALLERY = "triggers"
"""File stem of the trigger gallery: the one figure that rows alone cannot give."""
Frames = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


@functools.lru_cache(maxsize=2)
def _read(folder: Path, _changed: tuple[int, ...]) -> Frames:
    return read(folder / "rows.csv", Row), read(folder / "curves.csv", Curve), read(folder / "timings.csv", Timing)


def _frames(folder: Path) -> Frames:
    """The three tables of a folder, read again once a file has changed: boards of the same table are computed once."""
    found = [(folder / name).stat() for name in FILES if (folder / name).is_file()]
    return _read(folder, tuple(number for one in found for number in (one.st_mtime_ns, one.st_size)))


def _setting(folder: Path, key: str) -> str:
    """A line of the matrix's settings, from the copy beside the rows; empty where there is none."""
    settings = folder / "matrix.toml"
    if not settings.is_file():
        return ""
    try:
        return " ".join(str(tomllib.loads(settings.read_text(encoding="utf-8")).get(key, "")).split())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{settings}: cannot be read: {error}") from error


def _title(folder: Path) -> str:
    return _setting(folder, "title") or folder.name


def draw_tables(folder: Path, console: Console) -> None:
    """Writes ``tables/`` beside the rows."""
    from benchmark.report.tables.write import write_tables

    written = write_tables(*_frames(folder), folder, _title(folder))
    _only(folder / "tables", written)
    console.print(f"{len(written)} tables in {folder / 'tables'}", highlight=False)


def draw_plots(folder: Path, console: Console) -> None:
    """Writes ``plots/`` beside the rows (the trigger gallery needs the stored victims: it is drawn at the end of a run)."""
    from benchmark.report.charts import write_plots

    written = write_plots(*_frames(folder), folder, _title(folder), cores())
    _only(folder / "plots", written, keep=GALLERY)
    console.print(f"{len(written)} figures in {folder / 'plots'}", highlight=False)


def draw_page(folder: Path, console: Console) -> None:
    """Writes ``leaderboard.html`` beside the rows (with the pictures of the trigger gallery, where a run has drawn one)."""
    from benchmark.report.page import write_page

    path = write_page(folder, *_frames(folder), _title(folder), about=_setting(folder, "about"))
    console.print(f"page: {path}", highlight=False)


def _only(folder: Path, written: Sequence[Path], keep: str = "") -> None:
    """Removes what an earlier version of the matrix left, so that no page shows a track that is gone."""
    for path in folder.iterdir():
        if path.is_file() and path not in written and path.stem != keep:
            path.unlink()


def draw_report(folder: Path, console: Console) -> None:
    """Writes the folder's README.md and, for committed rows, the finding on the project's front page."""
    from benchmark.report.report import write_front, write_report

    rows = _frames(folder)[0]
    write_report(folder, rows, _title(folder), description=_setting(folder, "about"))
    if folder.parent.name == COMMITTED:
        front, place = folder.parent.parent / "README.md", f"{COMMITTED}/{folder.name}"
        if folder.name == FRONT:
            write_front(front, rows, place, "headline", FRONT_EXHIBIT)
        write_front(front, rows, place, f"words:{folder.name}")
    console.print(f"report: {folder / 'README.md'}", highlight=False)


def draw_exhibits(results: Path, console: Console) -> None:
    """Writes the page of exhibits and their files, and the board over all matrices, from the rows of every matrix that has some."""
    from benchmark.report.exhibits.write import write_exhibits
    from benchmark.report.tables.overview import write_board

    page = write_exhibits(results, cores())[-1]
    console.print(f"exhibits: {page}", highlight=False)
    console.print(f"board: {write_board(results)}", highlight=False)


def leaderboard(folder: Path, console: Console) -> None:
    """Prints the leaderboards of a result folder."""
    from benchmark.report.tables.boards import console_leaderboard

    rows, _, _ = _frames(folder)
    for table in console_leaderboard(rows):
        console.print(table)
    bad = rows[(rows["status"] == "failed") & (rows["selection"] == "default")]
    if len(bad):
        console.print(f"[red]{len(bad)} failed cells[/]; first: {bad.iloc[0]['defense']}: {bad.iloc[0]['reason']}", highlight=False)


def explained(folder: Path, only: str, console: Console) -> None:
    """Prints why the rows that ``only`` names count, and why their candidates were chosen."""
    from benchmark.report.explain import explain

    rows, curves, _ = _frames(folder)
    for paragraph in explain(rows, curves, only):
        console.print(paragraph, highlight=False, markup=False)


def _fingerprint(folder: Path) -> str:
    """What the pictures are made of: the three files and the code that draws them."""
    content = hashlib.sha256()
    for name in (*FILES, "matrix.toml"):
        content.update((folder / name).read_bytes())
    here = Path(__file__).parent
    for part in sorted({*here.rglob("*.py"), *(here / "report").rglob("*.*")}):
        if "__pycache__" not in part.parts:
            content.update(part.read_bytes())
    return content.hexdigest()


def present(folder: Path, matrix: Any, *, cache: Path, console: Console, track: bool) -> None:
    """Everything after the rows. Pictures are left alone where rows and drawing code are unchanged."""
    stamp = cache / "drawn" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.txt"
    made_of = _fingerprint(folder)
    drawn = [folder / "README.md", folder / "leaderboard.html", folder / "plots", folder / "tables"]
    if not (stamp.is_file() and stamp.read_text() == made_of and all(path.exists() for path in drawn)):
        draw_tables(folder, console)
        draw_plots(folder, console)
        _gallery(folder, matrix, cache)
        draw_page(folder, console)
        draw_report(folder, console)
        write_text(stamp, made_of)
    leaderboard(folder, console)
    if track:
        _track(folder, matrix, cache, console)
    console.print(f"report: {folder / 'README.md'}", highlight=False)


def _gallery(folder: Path, matrix: Any, cache: Path) -> None:
    """Clean, triggered and amplified difference of a few test images per attack, from the first backbone and seed."""
    from benchmark.report.charts import trigger_gallery
    from benchmark.run.keys import victim_key
    from benchmark.run.victim import read_victim
    from benchmark.run.world import world
    from benchmark.storage.store import Store

    store = Store(cache / "store")
    first = matrix.scenarios[0]
    seen: list[tuple[Any, str]] = []
    items: list[tuple[str, np.ndarray, np.ndarray]] = []
    for scenario in matrix.scenarios:
        kind = (scenario.attack.spec(), scenario.plan.label_mode)
        if scenario.seed != first.seed or scenario.backbone_label != first.backbone_label or kind in seen:
            continue
        if not store.has("victim", victim_key(scenario, world(scenario, cache).data.fingerprint)):
            continue  # a slice of the matrix: nothing is trained for a picture
        victim = read_victim(scenario, store, cache)
        if victim.triggered is None:
            continue
        seen.append(kind)
        source = victim.triggered.source[:4]
        clean = world(scenario, cache).data.test.images[source]
        items.append((scenario.attack_label, clean.numpy(), victim.triggered.images[:4].numpy()))
    if items:
        trigger_gallery(items, folder / "plots" / GALLERY)


def _track(folder: Path, matrix: Any, cache: Path, console: Console) -> None:
    from benchmark.tracking import log_matrix

    rows, curves, _ = _frames(folder)
    tables = {path.stem: pd.read_csv(path) for path in sorted((folder / "tables").glob("*.csv"))}
    logs = cell_logs(rows, curves, matrix.cells)
    line = log_matrix(matrix.name, logs, tables, sorted((folder / "plots").glob("*.png")), cache / "wandb")
    console.print(line, highlight=False)


def cell_logs(rows: pd.DataFrame, curves: pd.DataFrame, cells: Sequence[Any] = ()) -> list[CellLog]:
    """What is logged of every cell: all its rows and its curve; its settings too where ``cells`` of a matrix holds it."""
    from benchmark.tracking import CellLog

    specs = {cell_log_name(cell): cell for cell in cells}
    by_cell = dict(list(curves.groupby("cell", sort=False)))
    logs = []
    for key, group in rows.groupby("cell", sort=False):
        first = group.iloc[0]
        name = f"{first['defense']}/{first['scope']}/{first['track']}/{first['attack']}/{first['backbone']}/{first['seed']}"
        cell = specs.get(name)
        axes = {column: _plain(first[column]) for column in Key.__dataclass_fields__}
        curve = by_cell.get(key)
        if curve is not None:
            axes["dial_name"] = str(curve["dial_name"].iloc[0])  # words are no history: a chart holds numbers
        logs.append(
            CellLog(
                key=str(key),
                job_type=str(first["defense"]),
                name=name,
                config={**axes, "spec": cell.spec() if cell else {}},
                summary=_records(group),
                curve=[] if curve is None else _records(curve),
            )
        )
    return logs


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(column): _plain(value) for column, value in record.items()} for record in table.to_dict("records")]


def cell_log_name(cell: Any) -> str:
    """The name a cell's tracking run carries, the same from settings and from rows; it begins with what runs are grouped by."""
    s = cell.scenario
    return f"{cell.defense_label}/{cell.scope.value}/{cell.track.name}/{s.attack_label}/{s.backbone_label}/{s.seed}"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def catalogue(console: Console) -> None:
    """Prints everything a matrix may name."""
    from attacks import ATTACKS
    from benchmark.data.sources import DATASETS
    from benchmark.rules.tracks import TRACKS
    from benchmark.settings.load import FOLDER, matrix_names
    from benchmark.settings.presets import presets
    from defenses import DEFENSES
    from models import BACKBONES
    from models.extractors import EXTRACTORS

    def head(cls: type) -> str:
        module = __import__(cls.__module__, fromlist=["__doc__"]).__doc__ or ""
        return str(module.strip().splitlines()[0])

    def table(title: str, lines: list[tuple[str, str]]) -> None:
        grid = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, words in lines:
            grid.add_row(f"[bold]{name}[/]", words)
        console.print(grid)

    table("matrices", [(name, str(tomllib.loads((FOLDER / f"{name}.toml").read_text())["title"])) for name in matrix_names()])
    table("data sets", [(source.name, source.about) for source in DATASETS])
    table("backbones", [(cls.name, head(cls)) for cls in BACKBONES])
    table("attacks", [(cls.name, head(cls)) for cls in ATTACKS])
    table("defenses", [(cls.name + (" (control)" if cls.control else ""), head(cls)) for cls in DEFENSES])
    # The first sentence of the class, without what it cites in brackets.
    extractors = [(cls.name, re.split(r"\. | \(|\.$", " ".join((cls.__doc__ or "").split()))[0]) for cls in EXTRACTORS]
    table("extractors", extractors)
    table("presets", [(name, ", ".join(["paper", *known])) for name, known in presets().items()])
    table("tracks", [(track.name, track.title) for track in TRACKS])


WIDE = 150
"""Columns of a terminal from which on the table of methods has a column for everything."""


def methods(console: Console, what: str) -> None:
    """Prints the table of ``defenses`` or ``attacks``: family, needs, cost and paper of each."""
    from benchmark.settings.catalogue import Paper, attack_table, defense_table

    heads, rows = defense_table() if what == "defenses" else attack_table()
    wide = console.width >= WIDE
    grid = Table(title=what, title_justify="left", show_header=wide, box=None, padding=(0, 2, 0, 0))
    for head in heads if wide else ("", ""):
        grid.add_column(head, no_wrap=wide and head not in ("needs", "cost", "paper"))
    for row in rows:
        cells = [escape(cell.words if isinstance(cell, Paper) else cell) for cell in row]
        rest = [f"{head}: {cell}" for head, cell in zip(heads[1:], cells[1:], strict=True)]
        grid.add_row(*(cells if wide else (f"[bold]{cells[0]}[/]", "; ".join(rest))))
    console.print(grid)


def write_catalogue(console: Console) -> None:
    """Writes the tables of defenses and attacks into the README.md files of their folders."""
    from benchmark.settings.catalogue import write_tables

    changed = write_tables()
    console.print("\n".join(f"changed: {page}" for page in changed) or "both tables were up to date", highlight=False, markup=False)
