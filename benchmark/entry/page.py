"""The page of all entries, ``entries/README.md``: who, where, the figures, and whether they were computed again."""

from __future__ import annotations

from pathlib import Path

from benchmark.analysis import stats
from benchmark.entry.enter import CARD, ENTRIES, read_card
from benchmark.report.text import DASH, markdown, percent_text, pipe_table
from benchmark.report.words import mark_words
from benchmark.storage.files import write_text
from benchmark.storage.rows import Row, read

__all__ = ["write_page"]

HEAD = ("entry", "defense", "track", "scenarios", "ACC", "ASR", "RA", "marks", "paper", "tuned on", "rows")
_INTRO = """# Entries

Defenses of other people, run on the attacked models of a shipped matrix. *reported*: the authors' rows; *reproduced*: a random
tenth of them was computed again and agrees. Figures are means over implanted scenarios in percent, under the selection by which the
track is judged. [The rules](../../.github/ENTRIES.md) say what an entry may use.

"""


def write_page(results: Path) -> Path:
    """Writes the page from the cards and rows of all entries; returns its path.

    Raises:
        BadInput: a card or rows are damaged.
    """
    lines = []
    for path in sorted((results / ENTRIES).glob(f"*/{CARD}")):
        card = read_card(path.parent)
        rows = read(path.parent / str(card["matrix"]) / "rows.csv", Row)
        said = [markdown(str(card[name])) for name in ("paper", "tuned_on", "status")]
        for track, _, board in stats.judged_boards(rows):
            if board.empty:
                lines.append([markdown(str(card["name"])), DASH, track, "none implanted", DASH, DASH, DASH, "", *said])
                continue
            for _, line in board[board["role"] == "defense"].iterrows():
                figures = [percent_text(float(line[name])) if line["cells_ok"] else DASH for name in ("acc", "asr", "ra")]
                count, who = f"{line['scenarios_ok']} of {line['scenarios']}", markdown(str(card["name"]))
                lines.append([who, markdown(line["defense"]), track, count, *figures, mark_words(line), *said])
    page = results / ENTRIES / "README.md"
    write_text(page, _INTRO + (pipe_table(HEAD, lines, left=3) if lines else "There is none yet.\n"))
    return page
