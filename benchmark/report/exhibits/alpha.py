"""Hölder pruning by exponent, in each way of measuring distance."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Lines, Panel
from defenses.holder_pruning import HolderPruning

COLUMNS = (
    *ev.text(mode="Distance", scope="Scope"), *ev.number(alpha="alpha"), *ev.FIGURES,
    *ev.share(same="Models as at the largest alpha"), *ev.count(points="Models"), *ev.number(rho="Rank correlation of RA with it"),
)  # fmt: skip
EQUAL = "steps of equal length"


def mode(defense: HolderPruning) -> str:
    if defense.distance == "feature":
        return "distance between embeddings"
    return "steps of unequal length" if defense.clip or len(defense.radii) > 1 else EQUAL


def _agreement(mine: pd.DataFrame, other: pd.DataFrame) -> tuple[int, int, float]:
    """How many of the models on two dials score the same, of how many, and Spearman's correlation of RA where both have a point."""
    keys, metrics = [*stats.WORLD, "dial"], ["acc", "asr", "ra"]
    both = mine[[*keys, *metrics]].drop_duplicates(keys).merge(
        other[[*keys, *metrics]].drop_duplicates(keys), on=keys, how="outer", suffixes=("", "_other")
    )  # fmt: skip
    same = np.logical_and.reduce([both[name].to_numpy() == both[f"{name}_other"].to_numpy() for name in metrics])
    shared = both.dropna()
    varies = len(shared) > 2 and shared["ra"].nunique() > 1 and shared["ra_other"].nunique() > 1
    rho = float(scipy_stats.spearmanr(shared["ra"], shared["ra_other"]).statistic) if varies else math.nan
    return int(same.sum()), len(both), rho


def frame(source: ev.Source) -> pd.DataFrame:
    known = {label: defense for label, defense in source.labels(HolderPruning).items() if defense.estimator != "weight-bound"}
    cells = ev.judged_cells(source.rows)
    cells = cells[cells["defense"].isin(known)]
    defenses = [known[name] for name in cells["defense"]]
    cells = cells.assign(mode=[mode(defense) for defense in defenses], alpha=[defense.alpha for defense in defenses])
    if cells["alpha"].nunique() < 2:
        raise ev.Missing("it takes Hölder pruning at two exponents or more")
    curves = stats.at_published_knob(source.curves)
    lines, gaps, changed = [], [], []
    for (way, scope), group in cells.groupby(["mode", "scope"], sort=False):
        by = {float(value): group[group["alpha"] == value] for value in sorted(set(group["alpha"]))}
        last, paper = max(by), HolderPruning.alpha
        paths = {value: curves[curves["cell"].isin(mine["cell"])] for value, mine in by.items()}
        for value, mine in by.items():
            same, points, rho = _agreement(paths[value], paths[last])
            if value != last:
                changed.append({"equal": way == EQUAL, "points": points, "changed": points - same})
            lines.append({"mode": way, "scope": scope, "alpha": value, **ev.means_of(mine),
                          "same": same / points if points else math.nan, "points": points, "rho": rho})  # fmt: skip
        if way != EQUAL and paper in by and paper != last:
            gap, pairs = ev.paired_gap(by[paper], by[last], "ra")
            gaps.append({"mode": way, "scope": scope, "alpha": paper, "last": last, "ra": gap, "pairs": pairs})
    return ev.table_of(lines, gaps=gaps, changed=changed)


def figure(table: pd.DataFrame) -> Lines:
    panels = []
    for (way, scope), part in table.groupby(["mode", "scope"], sort=False):
        same = f"models that score as at alpha {part['alpha'].iloc[-1]:g}"
        panels.append(Panel(f"{way}, {scope}", "alpha", "%", (
            *(ev.series(name.upper(), part, "alpha", name) for name in ("ra", "asr")),
            ev.series(same, part.iloc[:-1], "alpha", "same", aside=True),
        )))  # fmt: skip
    return Lines(tuple(panels), 3, "Bands: 95 % intervals over seeds. Dotted: of all models along the dial.")
