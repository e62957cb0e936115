"""Every track's leader against the plainest classifiers on an extractor and training from scratch."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots

COLUMNS = (
    *ev.text(track="Track", leader="Best average rank", control="Control"), *ev.share(ra="RA, leader", control_ra="RA, control"),
    *ev.difference(difference="Difference"), *ev.count(pairs="Pairs"),
)  # fmt: skip


def against(source: ev.Source, wanted: Callable[[str], bool]) -> pd.DataFrame:
    """The leader of every track beside every control whose label is ``wanted``, paired by attacked model.

    Raises:
        Missing: there is no such pair.
    """
    cells = ev.judged_cells(source.rows)
    known = stats.entries(cells[cells["control"].astype(bool)])
    entries = [entry for entry in known if wanted(entry[0]) and entry[0] != stats.UNDEFENDED]
    lines = []
    for track in stats.tracks(source.rows):
        board = stats.leaderboard(source.rows, track, stats.headline(source.rows, track))
        ranked = board[(board["place"] == 1) & (board["cells_ok"] > 0)] if len(board) else board
        if ranked.empty:
            continue
        leader = (str(ranked.iloc[0]["defense"]), str(ranked.iloc[0]["scope"]))
        own = ev.of_entry(cells[cells["track"] == track], leader)
        for entry in entries:
            control = ev.of_entry(cells, entry)
            control = control[control["track"] == control["track"].iloc[0]]
            difference, pairs = ev.paired_gap(own, control, "ra")
            lines.append({"track": track, "leader": ev.entry_words(leader), "ra": ev.mean(own, "ra").mean,
                          "control": ev.entry_words(entry), "control_ra": ev.mean(control, "ra").mean,
                          **ev.bounded("difference", difference), "pairs": pairs})  # fmt: skip
    return ev.table_of(lines, "no such control finished beside a defense")


def frame(source: ev.Source) -> pd.DataFrame:
    plain = {cell.defense_label for cell in source.matrix.cells if cell.extractor is not None and cell.defense.control}
    return against(source, lambda label: label in plain or label.startswith(stats.SCRATCH))


def figure(table: pd.DataFrame) -> Dots:
    panels = [
        ev.dot_panel(part, f"{track}: RA of {part['leader'].iloc[0]} minus a control's", "points", {"difference": "difference"},
                     lambda line: str(line["control"]), signed=True)
        for track, part in table.groupby("track", sort=False)
    ]  # fmt: skip
    return Dots(tuple(panels), "Bars: 95 % intervals over seeds, of paired differences.")
