"""Friedman's test over implanted scenarios, the critical-difference diagram, and every pair by Wilcoxon's test (Holm)."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmark.analysis import rank_tests, stats
from benchmark.analysis.intervals import Interval
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import DotPanel, Dots, Mark
from benchmark.report.style import COLOURS

COLUMNS = (
    *ev.text(track="Track", defense="Entry", other="Against"), *ev.number(rank="Average rank", rank_other="of the other"),
    *ev.text(nemenyi="Further apart than the critical difference"), *ev.points(difference="RA, difference"),
    *ev.count(won="Scenarios won", tied="tied", lost="lost"), *ev.number(p="p (Wilcoxon, Holm)"), *ev.text(idle="Nothing changed"),
)  # fmt: skip


def _pairs(test: rank_tests.Significance, values: pd.DataFrame, idle: dict[ev.Entry, str]) -> list[dict[str, Any]]:
    """A line per pair of entries, the one with the better average rank first; ``values``: RA, scenarios down, entries across."""
    lines = []
    for pair in test.pairs:
        one, two = sorted(pair[:2], key=list(test.ranks).index)
        gap = values[one] - values[two]
        lines.append({
            "defense": one[0], "other": two[0], "rank": test.ranks[one], "rank_other": test.ranks[two],
            "nemenyi": "no" if any(one in group and two in group for group in test.groups) else "yes",
            "difference": float(gap.mean()), "won": int((gap > 0).sum()), "tied": int((gap == 0).sum()),
            "lost": int((gap < 0).sum()), "p": pair[2],
            "idle": "; ".join(f"{entry[0]}: {idle[entry]}" for entry in (one, two) if entry in idle),
        })  # fmt: skip
    return lines


def frame(source: ev.Source) -> pd.DataFrame:
    rows = source.rows[source.rows["scope"] == "whole"]
    lines, tests = [], []
    for track in stats.tracks(rows):
        judged = stats.headline(rows, track)
        test = rank_tests.significance(rows, track, judged)
        if test is None:
            continue
        cells = ev.finished(rows[(rows["track"] == track) & (rows["selection"] == judged)])
        idle = ev.idle_words(cells)
        lines += [{"track": track, **line} for line in _pairs(test, stats.seed_means(cells, "ra"), idle)]
        names = [(entry[0], test.ranks[entry], idle.get(entry, "")) for entry in test.ranks]
        places = {entry: number for number, entry in enumerate(test.ranks)}
        tests.append({
            "track": track, "blocks": test.blocks, "p": test.friedman, "critical": test.critical, "names": names,
            "groups": [tuple(places[entry] for entry in group) for group in test.groups],
            "needed": max(rank_tests.MIN_BLOCKS, rank_tests.blocks_needed(len(test.pairs))),
            "incomplete": [entry[0] for entry in test.incomplete],
        })  # fmt: skip
    return ev.table_of(lines, _missing(rows), tests=tests)


def _missing(rows: pd.DataFrame) -> str:
    blocks = int(stats.scenarios(rows)["implanted"].sum())
    return (f"a rank test takes {rank_tests.MIN_BLOCKS} implanted scenarios, here {blocks}, and a track with three entries on the "
            "whole network that finished all of them and differ")  # fmt: skip


def figure(table: pd.DataFrame) -> Dots:
    """Demsar's critical-difference diagram, turned by 90 degrees: names down, ranks to the right."""
    panels = []
    for test in table.attrs["tests"]:
        names = [words + f" ({idle})" * bool(idle) for words, _, idle in test["names"]]
        scale = Interval(float("nan"), 1.0, 1.0 + test["critical"])
        ranks = tuple(ev.point(rank) for _, rank, _ in test["names"])
        nothing = (ev.UNMEASURED,)
        panels.append(DotPanel(
            f"{test['track']}: {test['blocks']} scenarios, Friedman p = {test['p']:.2g}", "average rank by RA (1 = best)",
            (f"critical difference {test['critical']:.2f}", *names),
            (("average rank", (*nothing, *ranks)), ("critical difference", (scale, *nothing * len(ranks)))),
            unit=1, limits=(0.8, max(len(names), 1 + test["critical"]) + 0.6),
            points={"critical difference": (scale[1:], *[()] * len(ranks))},
            joined=tuple(tuple(place + 1 for place in group) for group in test["groups"]),
        ))  # fmt: skip
    marks = {"average rank": Mark(COLOURS[0], "o", lane=0.0, printed=True),
             "critical difference": Mark("#111111", "|", 9, lane=0.0)}  # fmt: skip
    note = ("Bars at the right join entries whose average ranks are no further apart than the critical difference (Nemenyi, 5 %): "
            "between them no difference is shown. One block is a scenario: RA is the mean over its seeds.")  # fmt: skip
    return Dots(tuple(panels), note, marks=marks, row=0.27)
