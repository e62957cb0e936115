"""Whether a backdoor of the defender's own, planted in a copy, finds the settings that remove the attacker's."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from benchmark.analysis import intervals, stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.exhibits.selection import cells_with_a_dial
from benchmark.report.figures import Dots

COLUMNS = (
    *ev.ENTRY, *ev.share(ra_validation="RA, validation", ra_canary="RA, canary", ra_oracle="RA, oracle"),
    *ev.difference(difference="RA, canary - validation"), *ev.points(gap="Gap, oracle - validation"),
    *ev.interval(closed="Share of the gap closed"),
    *ev.share(canary_hits="As good as the oracle: canary", validation_hits="validation"),
    *ev.number(cost_validation="Cost, validation", cost_canary="Cost, canary"), *ev.count(models="Models"),
)  # fmt: skip
_RULES = ("validation", "canary", "oracle")
_RESAMPLES = 2000


def closed(ra: pd.DataFrame) -> intervals.Interval:
    """The share of the RA gap between ``validation`` and ``oracle`` that ``canary`` closes: a ratio of means over scenarios
    of means over seeds, with its 95 % percentile interval (seeds resampled within scenarios, fixed seed). Below 0: it chooses
    worse.

    Args:
        ra: one row per attacked model with RA in columns of these names. NaN where there is no gap.
    """
    groups = [group[["validation", "canary", "oracle"]].to_numpy(np.float64) for _, group in ra.groupby(stats.SCENARIO, sort=False)]

    def ratio(means: np.ndarray) -> np.ndarray:
        gap = means[..., 2] - means[..., 0]
        share: np.ndarray = np.divide(means[..., 1] - means[..., 0], gap, out=np.full(gap.shape, math.nan), where=gap > 1e-9)
        return share

    value = float(ratio(np.mean([group.mean(axis=0) for group in groups], axis=0)))
    if math.isnan(value) or min(map(len, groups)) < 2:
        return intervals.Interval(value, math.nan, math.nan)
    draw = np.random.default_rng(0)  # noqa: TID251 - a fixed resampling of stored figures, no part of any run
    drawn = [group[draw.integers(0, len(group), (_RESAMPLES, len(group)))].mean(axis=1) for group in groups]
    low, high = (float(end) for end in np.nanpercentile(ratio(np.mean(drawn, axis=0)), [2.5, 97.5]))
    return intervals.Interval(value, low, high)


def _mean(ra: pd.DataFrame, values: pd.Series) -> intervals.Interval:
    return intervals.interval([group.to_list() for _, group in values.groupby([ra[name] for name in stats.SCENARIO], sort=False)])


def frame(source: ev.Source) -> pd.DataFrame:
    cells = cells_with_a_dial(source)
    cells = cells[cells["selection"].isin(_RULES) & ~cells["control"].astype(bool)]
    lines, every = [], []
    for start, mine in ev.by_entry(cells):
        ra = mine.pivot(index=stats.WORLD, columns="selection", values="ra")
        if not set(_RULES) <= set(ra.columns) or ra.dropna().empty:
            continue
        ra = ra.dropna().reset_index()
        cost = mine.groupby("selection")["cost_epochs"].mean()
        means = {name: _mean(ra, ra[name]) for name in _RULES}
        lines.append({
            **start, "models": len(ra),
            **{f"ra_{name}": part.mean for name, part in means.items()}, "gap": float((ra["oracle"] - ra["validation"]).mean()),
            **ev.bounded("closed", closed(ra)), **ev.bounded("difference", _mean(ra, ra["canary"] - ra["validation"])),
            **{f"{name}_hits": float((ra["oracle"] - ra[name] < 1e-9).mean()) for name in ("canary", "validation")},
            **{f"cost_{name}": float(cost[name]) for name in ("validation", "canary")},
            **{key: value for name, part in means.items() for key, value in ev.bounded(f"_{name}", part).items()},
        })  # fmt: skip
        every.append(ra)
    planted = [one.name for one in source.matrix.cells[0].canaries]
    together = closed(pd.concat(every)) if every else ev.UNMEASURED
    return ev.table_of(lines, "no defense with a dial was chosen by canaries on an implanted attack", closed=together,
                       planted=planted, failed=_failed(source.rows))  # fmt: skip


def _failed(rows: pd.DataFrame) -> dict[str, int]:
    """Why cells were not chosen by canaries although they could have been, and how many."""
    reasons = rows.loc[(rows["selection"] == "canary") & (rows["status"] != "ok"), "reason"]
    reasons = reasons[~reasons.str.startswith(("the track grants", "no canary is planted"))]
    return {str(reason): int(count) for reason, count in reasons.str.replace(r"\(ASR.*\)", "", regex=True).value_counts().items()}


def figure(table: pd.DataFrame) -> Dots:
    series = {name: f"_{name}" for name in _RULES}
    return Dots((ev.dot_panel(table, "RA by rule of selection", "RA in %", series),), ev.BARS)
