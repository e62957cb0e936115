"""Every dial from end to end: the area under RA, the best point, the default, and how wide a good stretch is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Lines, Panel, Series
from benchmark.rules.metrics import IMPLANTED_ASR
from benchmark.rules.selection import TAU
from defenses.holder_pruning import HolderPruning

COLUMNS = (
    *ev.ENTRY, *ev.text(control="", dial="Dial"), *ev.count(points="Points"), *ev.interval(area="Area under RA"),
    *ev.share(area_asr="under ASR", area_acc="under ACC", best="RA, best point", default="RA, default", window="Good stretch"),
)  # fmt: skip
_METRICS = ("acc", "asr", "ra")
_STEPS = 101


def along_dial(path: pd.DataFrame, low: float, high: float, flip: bool, column: str) -> np.ndarray:
    """One attacked model's curve at 101 even places from the weakest (0) to the strongest end (1) of a dial, linear in between.

    Args:
        path: points of one cell.
        low, high: ends of the dial.
        flip: whether the strongest end is the lowest value.
    """
    points = path.groupby("dial")[column].mean()
    place = (points.index.to_numpy(np.float64) - low) / (high - low)
    place = 1 - place if flip else place
    order = np.argsort(place)
    return np.asarray(np.interp(np.linspace(0, 1, _STEPS), place[order], points.to_numpy(np.float64)[order]))


def _paths(mine: pd.DataFrame) -> pd.DataFrame:
    """One line per attacked model of an entry: its curve of every metric, and the area under each."""
    low, high = float(mine["dial"].min()), float(mine["dial"].max())
    ends = [path.sort_values("dial")["strength"] for _, path in mine.groupby("cell")]
    flip = sum(float(end.iloc[-1] - end.iloc[0]) for end in ends) < 0
    lines: list[dict[str, Any]] = []
    for world, path in mine.groupby(stats.WORLD, sort=False):
        curves = {name: along_dial(path, low, high, flip, name) for name in _METRICS}
        areas = {f"area_{name}": float(np.trapezoid(values, dx=1 / (_STEPS - 1))) for name, values in curves.items()}
        lines.append({**dict(zip(stats.WORLD, world, strict=True)), **curves, **areas})
    return pd.DataFrame(lines)


def frame(source: ev.Source) -> pd.DataFrame:
    cells = ev.judged_cells(source.rows)
    curves = stats.at_published_knob(source.curves)
    curves = curves[curves["cell"].isin(cells["cell"]) & np.isfinite(curves["dial"])]
    default = ev.finished(source.rows)
    default = default[default["selection"] == "default"]
    before = ev.before_defense(source.rows)
    lines = []
    for entry in stats.entries(cells):
        mine, own = ev.of_entry(curves, entry), ev.of_entry(cells, entry)
        if mine["dial"].nunique() < 3:
            continue
        paths = _paths(mine)
        shown = {name: np.mean([np.mean(np.stack(group[name].to_list()), axis=0) for _, group in
                                paths.groupby(stats.SCENARIO, sort=False)], axis=0) for name in _METRICS}  # fmt: skip
        acc = ev.mean(before.merge(paths[stats.WORLD], on=stats.WORLD), "acc").mean
        good = (shown["asr"] < IMPLANTED_ASR) & (shown["acc"] >= acc - TAU - 1e-9)
        lines.append({
            "track": own["track"].iloc[0], "defense": entry[0], "scope": entry[1], "control": ev.control_words(own),
            "dial": mine["dial_name"].iloc[0], "points": int(mine.groupby("cell").size().median()),
            **ev.bounded("area", ev.mean(paths, "area_ra")), "area_asr": ev.mean(paths, "area_asr").mean,
            "area_acc": ev.mean(paths, "area_acc").mean, "best": float(shown["ra"].max()),
            "default": ev.mean(ev.of_entry(default, entry), "ra").mean, "window": float(good.mean()),
            **{f"_{name}": values for name, values in shown.items()},
        })  # fmt: skip
    known = source.labels(HolderPruning)
    own = default[default["defense"].isin(known) & ~default["control"].astype(bool)]
    missing = "no defense with a dial of three points or more finished on an implanted attack"
    return ev.table_of(lines, missing, idle=int((own["pruned"] == 0).sum()), cells=len(own))


def figure(table: pd.DataFrame) -> Lines:
    grid = tuple(float(value) for value in np.linspace(0, 1, _STEPS))
    panels = []
    for _, line in table.iterrows():
        series = tuple(Series(name.upper(), grid, tuple(map(ev.point, line[f"_{name}"]))) for name in _METRICS)
        title = f"RA area {100 * line['area']:.0f}: {ev.entry_words((line['defense'], line['scope']))}"
        panels.append(Panel(title, "dial, weakest to strongest", "%", series))
    return Lines(tuple(panels), 4, "Means over scenarios of means over seeds.")
