"""Larger images: who takes the ASR down, and who reaches what the clean images give without the attacked model."""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots

COLUMNS = (*ev.ENTRY, *ev.text(role=""), *ev.FIGURES, *ev.difference(d_acc="dACC"), *ev.count(cells_ok="Cells"))


def frame(source: ev.Source) -> pd.DataFrame:
    board = ev.leaderboards(source.rows)
    cells, every = ev.judged_cells(source.rows), ev.before_defense(source.rows)
    scratch = [entry for entry in stats.entries(cells) if entry[0].startswith(stats.SCRATCH)]
    sides = [ev.verdict(ev.paired_gap(ev.of_entry(cells, entry), ev.of_entry(cells, scratch[0]), "ra")[0]) if scratch else 0
             for entry in ev.competitors(cells)]  # fmt: skip
    board.attrs = {
        "attacks": list(dict.fromkeys(every["attack"])), "implanted": ev.implanted_words(every), "acc": ev.mean(every, "acc"),
        "asr": ev.mean(every, "asr"), "scratch": bool(scratch), "sides": sides,
    }  # fmt: skip
    return board


def figure(table: pd.DataFrame) -> Dots:
    return Dots((ev.board_panel(table, "RA and ASR", "%", {"RA": "ra", "ASR": "asr"}),), ev.BARS)
