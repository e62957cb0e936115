"""The tables with a line per entry: the leaderboard, on paper and on a terminal, and what each defense was given."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.text import (
    DASH,
    Cell,
    Column,
    Line,
    Table,
    csv_text,
    entry,
    markdown,
    number_text,
    percent_text,
    plain,
    signed_percent,
)
from benchmark.report.words import NOTHING, gate_words, mark_words, track_words, units_text

if TYPE_CHECKING:
    from rich.table import Table as Screen

__all__ = ["console_leaderboard", "entry_name", "given", "given_csv", "given_table", "leaderboard_csv", "leaderboard_markdown",
           "leaderboard_table", "overview_table"]  # fmt: skip


def entry_name(line: Line) -> str:
    """An entry's defense; a control measured in another track names that track, since it was granted something else."""
    if line["role"] == "reference":
        return f"{line['defense']} (undefended)"
    lent = line["role"] == "control" and line["source"] not in (line["track"], "control")
    return f"{line['defense']} (granted: {line['source']})" if lent else str(line["defense"])


def _accuracy(line: Line) -> str | Cell:
    """ACC, or why there is none."""
    return Column.interval("ACC", "acc").of(line) if line["cells_ok"] else str(line["missing"])


_LEADERBOARD = (
    Column("#", lambda line: str(line["place"] or ""), left=True),
    Column("Defense", entry_name, left=True),
    Column.words("Scope"),
    Column("ACC", _accuracy),
    *(Column.interval(name.upper(), name) for name in ("asr", "ra", "der")),
    *(Column.interval(f"d{name.upper()}", f"d_{name}", signed=True) for name in ("acc", "asr")),
    Column("Pruned / units", lambda line: units_text(line) or DASH),
    Column.number("Cost", "cost_epochs"),
    Column("Marks", lambda line: mark_words(line)),
    Column("Rank", lambda line: DASH if math.isnan(line["rank"]) else f"{line['rank']:.2f}"),
    Column("Cells", lambda line: f"{line['cells_ok']} / {line['cells']}"),
)


def leaderboard_table(board: pd.DataFrame, track: str) -> Table:
    """:func:`benchmark.analysis.stats.leaderboard` as a table: competing defenses by rank, then reference and controls."""
    return Table.by_role(_LEADERBOARD, board.assign(track=track), "Reference and controls, not ranked")


def leaderboard_markdown(board: pd.DataFrame, track: str) -> str:
    """The leaderboard in Markdown, then why cells are missing."""
    if board.empty:
        return f"{NOTHING}\n"
    incomplete = board[board["reasons"] != ""]
    missing = "".join(f"- {markdown(entry(line))}: {markdown(line['reasons'])}\n" for _, line in incomplete.iterrows())
    return leaderboard_table(board, track).markdown() + (f"\nNot in the means:\n\n{missing}" if missing else "")


def leaderboard_csv(board: pd.DataFrame, rows: pd.DataFrame, track: str, selection: str) -> str:
    """The leaderboard as CSV, every figure with its interval, with the track, the selection and how many scenarios count."""
    found = stats.scenarios(rows)
    head = pd.DataFrame({
        "track": track, "selection": selection, "ranked": ["yes" if place else "no" for place in board.get("place", [])],
        "scenarios_implanted": int(found["implanted"].sum()), "scenarios": len(found),
    })  # fmt: skip
    return csv_text(pd.concat([head, board], axis=1))


_OVERVIEW = (
    Column("Track", lambda line: line["track"] if line["role"] == "defense" else f"({line['role']})", left=True),
    Column.words("Defense"),
    Column.words("Scope"),
    *(Column.number(name.upper(), name, percent_text) for name in ("acc", "asr", "ra")),
    Column.number("dACC", "d_acc", signed_percent),
    Column.number("RA, oracle", "ra_oracle", percent_text),
    Column.number("ASR, leaky", "asr_leaky", percent_text),
    Column("Marks", lambda line: mark_words(line)),
)


def overview_table(rows: pd.DataFrame) -> Table:
    """Every entry of every track under the selection it is judged by, with what choices on the test set would report; reference
    and controls once. Without blocks where nothing is implanted."""
    found = [board.assign(track=track) for track, _, board in stats.judged_boards(rows) if len(board)]
    if not found:
        return Table(_OVERVIEW)
    boards = pd.concat(found, ignore_index=True)
    return Table.of(_OVERVIEW, boards[(boards["role"] == "defense") | ~boards.duplicated(stats.ENTRY)])


def console_leaderboard(rows: pd.DataFrame) -> list[Screen]:
    """One compact table per track under the selection it is judged by, for a terminal of 80 columns: long names are wrapped."""
    from rich.table import Table as Screen
    from rich.text import Text

    screens = []
    for track in stats.tracks(rows):
        judged = stats.headline(rows, track)
        board = stats.leaderboard(rows, track, judged)
        screen = Screen(
            title=Text(f"{plain(track_words(track))}: {judged} selection"), title_justify="left",
            caption=Text(NOTHING if board.empty else gate_words(rows)), caption_justify="left",
        )  # fmt: skip
        # Only the defense may shrink: place and scope distinguish entries of the same name.
        for name in ("#", "defense", "scope", "ACC", "ASR", "RA", "dACC", "cost"):
            screen.add_column(name, justify="left" if name in ("defense", "scope") else "right", no_wrap=name != "defense",
                              overflow="fold")  # fmt: skip
        competing = int((board["role"] == "defense").sum()) if len(board) else 0
        for position, (_, line) in enumerate(board.assign(track=track).iterrows(), 1):
            shares = [percent_text(float(line[name]), signed=name == "d_acc") for name in ("acc", "asr", "ra", "d_acc")]
            figures = [*shares, number_text(float(line["cost_epochs"]))] if line["cells_ok"] else [line["missing"], *[DASH] * 4]
            cells = [line["place"] or "", plain(entry_name(line)), plain(line["scope"]), *figures]
            screen.add_row(*(Text(str(cell)) for cell in cells), end_section=position == competing)
        screens.append(screen)
    return screens


# -- what each defense was given -----------------------------------------------------------------------------------------------


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g}{DASH}{high:g}"


def _or(words: Iterable[str]) -> str:
    """The distinct words of an entry's cells; one, as a rule."""
    return " or ".join(dict.fromkeys(words))


def _model(line: Line) -> str:
    """Whether the deployed model is the attacked one."""
    if line["role"] == "reference":
        return "unchanged"
    if any(line["trained_anew"]):
        return "replaced" if all(line["trained_anew"]) else "edited or replaced"
    used = [words.split(" + ") for words in line["used"]]
    return _or("edited" if "model" in words else "replaced" if "extractor" in words else "not used" for words in used)


def _training(line: Line) -> str:
    """Which training images, without their number: as published (perhaps some known clean), without the poison, none."""

    def which(used: str) -> str:
        words = used.split(" + ")
        if "roles" in words:
            return "without the poison"
        if "train" not in words:
            return "none"
        return "as published, some known clean" if "seeds" in words else "as published"

    return _or(map(which, line["used"]))


def _images(line: Line) -> str:
    """Number and kind of the training images."""
    which, count = _training(line), _range(line["train_images_min"], line["train_images_max"])
    return which if which == "none" else f"{which} (of {count})" if which == "without the poison" else f"{count} {which}"


_GIVEN_WORDS: dict[str, Callable[[Line], str]] = {
    "Model": _model,
    "Clean labelled images": lambda line: (
        _range(line["clean_images_min"], line["clean_images_max"]) if line["clean_images_max"] else "none"
    ),
    "Training images": _images,
    "Extractor": lambda line: _or(text or "none" for text in line["extractor"]),
    "Controls training": lambda line: _or("yes" if trained else "no" for trained in line["trained_anew"]),
    "Preset": lambda line: _or(text or DASH for text in line["preset"]),
}


def given(line: Line) -> dict[str, str]:
    """A line of :func:`benchmark.analysis.stats.given` in words, by the header of their columns."""
    if line["cells_ok"] == 0:
        return {head: DASH if position else str(line["missing"]) for position, head in enumerate(_GIVEN_WORDS)}
    return {head: words(line) for head, words in _GIVEN_WORDS.items()}


_GIVEN = (
    Column("Defense", entry_name, left=True),
    Column.words("Scope"),
    *(Column(head, operator.itemgetter(head), left=True) for head in _GIVEN_WORDS),
    Column.number("Cost", "cost_epochs"),
    Column.number("Of which extractor", "extractor_epochs"),
)


def given_table(rows: pd.DataFrame, track: str) -> Table:
    """One line per entry of the track's field, under the selection that the track is judged by."""
    found = stats.given(rows, track, stats.headline(rows, track)).assign(track=track)
    words = pd.DataFrame([given(line) for _, line in found.iterrows()], index=found.index)
    return Table.by_role(_GIVEN, pd.concat([found, words], axis=1), "Reference and controls")


def given_csv(rows: pd.DataFrame, track: str) -> str:
    """The same with numbers and words in columns of their own; what an unfinished entry used is empty."""
    selection, lines = stats.headline(rows, track), []
    for _, line in stats.given(rows, track, selection).iterrows():
        done = bool(line["cells_ok"])
        images = {f"{name}_images_{end}": line[f"{name}_images_{end}"] if done else "" for name in ("clean", "train")
                  for end in ("min", "max")}  # fmt: skip
        lines.append({
            "track": track, "selection": selection, **{name: line[name] for name in ("role", "defense", "scope", "source")},
            "used": _or(line["used"]), "model": _model(line) if done else "", **images,
            "training_images": _training(line) if done else "", "extractor": _or(line["extractor"]),
            "controls_training": given(line)["Controls training"] if done else "", "preset": _or(line["preset"]),
            **{name: line[name] for name in ("cost_epochs", "extractor_epochs", "cells_ok", "cells", "missing")},
        })  # fmt: skip
    return csv_text(pd.DataFrame(lines))
