"""Significance tests: Friedman's and Wilcoxon's, adjusted by Holm's method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from benchmark.analysis.intervals import RESAMPLES, Interval
from benchmark.analysis.stats import (
    RANK_KEY,
    SCENARIO,
    SCRATCH,
    WORLD,
    entries,
    field,
    headline,
    implanted_worlds,
    seed_means,
    tracks,
)  # fmt: skip

__all__ = [
    "LEVEL", "MIN_BLOCKS", "Significance", "blocks_needed", "critical_difference", "holm", "least_p", "paired", "signed_rank",
    "significance",
]  # fmt: skip

LEVEL = 0.05
"""Of significance."""
MIN_BLOCKS = 11
"""Fewest implanted scenarios for which a rank test is reported; below, its chi-squared approximation is too inexact."""
_EXACT = 50  # beyond so many differences the counts of sign patterns outgrow a float, and the normal approximation is good


def signed_rank(differences: np.ndarray) -> float:
    """p of the two-sided Wilcoxon signed-rank test, zeros left out; exact up to 50 differences, also with ties.

    scipy's exact test does not take ties: it enumerates sign patterns one by one, seconds for a dozen differences, or uses the
    normal approximation. Here the patterns are counted by their rank sum, doubled so that mid-ranks are whole numbers.
    """
    kept = np.round(differences, 9)  # two equal differences of rows may differ in their last bit
    kept = kept[kept != 0]
    if not len(kept):
        return 1.0
    if len(kept) > _EXACT:
        return float(scipy_stats.wilcoxon(kept).pvalue)
    ranks = np.rint(2 * scipy_stats.rankdata(np.abs(kept))).astype(int)
    patterns = np.zeros(int(ranks.sum()) + 1)  # [s]: how many sign patterns have positive ranks that add up to s
    patterns[0] = 1
    for rank in ranks:
        patterns[rank:] += patterns[:-rank].copy()
    observed = int(ranks[kept > 0].sum())
    tail = min(patterns[: observed + 1].sum(), patterns[observed:].sum())
    return float(min(1.0, 2 * tail / 2 ** len(kept)))


def holm(raw: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down method, in the order given; a NaN (no test) stays, uncounted."""
    tested = sorted((position for position, p in enumerate(raw) if not math.isnan(p)), key=lambda position: raw[position])
    adjusted, floor = [math.nan] * len(raw), 0.0
    for step, position in enumerate(tested):
        floor = max(floor, min(1.0, (len(tested) - step) * raw[position]))
        adjusted[position] = floor
    return adjusted


def least_p(count: int) -> float:
    """The smallest p that a two-sided signed-rank test of ``count`` differences can give: all of one sign; 1 for none."""
    return min(1.0, 2.0 ** (1 - count))


def blocks_needed(comparisons: int = 1) -> int:
    """How many differences it takes until the smallest p, times ``comparisons``, falls below the level."""
    return next(count for count in range(1, 1000) if comparisons * least_p(count) < LEVEL)


def critical_difference(entries: int, blocks: int) -> float:
    """Nemenyi's critical difference: two average ranks differ significantly (5 %, all pairs at once) if they are further apart.

    ``q / sqrt(2) * sqrt(k (k + 1) / (6 N))``, with the 95 % point q of the studentized range of ``k`` values (Demsar, "Statistical
    comparisons of classifiers over multiple data sets", JMLR 7, 2006, section 3.2.2).

    Args:
        entries: k, at least 2. blocks: N, at least 1.
    """
    q = float(scipy_stats.studentized_range.ppf(1 - LEVEL, entries, np.inf))
    return q / math.sqrt(2) * math.sqrt(entries * (entries + 1) / (6 * blocks))


class Significance(NamedTuple):
    """Rank tests over implanted scenarios.

    Attributes:
        blocks: scenarios. friedman: p of Friedman's test.
        pairs: (entry, entry, Holm-adjusted p of a two-sided Wilcoxon signed-rank test).
        ranks: average rank by RA of each entry tested, best first (1 = best, ties share the mean rank).
        cliques: sets of two entries or more, no two of them significantly different; largest sets only, best first. One set of
            all entries where Friedman's test is not significant.
        incomplete: competing entries left out because a scenario is missing.
        critical: Nemenyi's critical difference (:func:`critical_difference`). groups: as ``cliques``, of entries whose average
            ranks are not further apart.
    """

    blocks: int
    friedman: float
    pairs: list[tuple[tuple[str, str], tuple[str, str], float]]
    ranks: dict[tuple[str, str], float]
    cliques: list[tuple[tuple[str, str], ...]]
    incomplete: list[tuple[str, str]]
    critical: float
    groups: list[tuple[tuple[str, str], ...]]


def significance(rows: pd.DataFrame, track: str, selection: str) -> Significance | None:
    """Friedman's test over the competing entries with a value in every implanted scenario, then every pair of them, on RA.

    As Demsar, "Statistical comparisons of classifiers over multiple data sets" (JMLR 7, 2006), with scenarios in the place of data
    sets. Pairs are tested by Holm-adjusted signed-rank tests, and by Nemenyi's critical difference of average ranks. None with
    fewer than 11 implanted scenarios or 3 entries, or when all entries are equal everywhere (nothing to test).
    """
    table = field(rows, track)
    table = implanted_worlds(table[table["selection"] == selection])
    table = table[table["role"] == "defense"]
    if table.empty:
        return None
    values = seed_means(table, RANK_KEY).dropna(axis=1)
    if len(values) < MIN_BLOCKS or values.shape[1] < 3 or bool((values.nunique(axis=1) == 1).all()):
        return None
    columns = [(str(column[0]), str(column[1])) for column in values.columns.to_list()]
    friedman = float(scipy_stats.friedmanchisquare(*values.to_numpy().T).pvalue)
    couples = list(combinations(range(len(columns)), 2))
    figures = values.to_numpy(np.float64)
    adjusted = holm([signed_rank(figures[:, left] - figures[:, right]) for left, right in couples])
    pairs = [(columns[left], columns[right], p) for (left, right), p in zip(couples, adjusted, strict=True)]
    mean = scipy_stats.rankdata(-figures, method="average", axis=1).mean(axis=0)
    ranks = dict(sorted(zip(columns, map(float, mean), strict=True), key=lambda item: item[1]))
    together = pairs if friedman >= LEVEL else [pair for pair in pairs if pair[2] >= LEVEL]
    left_out = [entry for entry in entries(table) if entry not in ranks]
    critical = critical_difference(len(ranks), len(values))
    close = [(a, b) for a, b in combinations(ranks, 2) if friedman >= LEVEL or ranks[b] - ranks[a] <= critical]
    cliques = _cliques(ranks, [(a, b) for a, b, _ in together])
    return Significance(len(values), friedman, pairs, ranks, cliques, left_out, critical, _cliques(ranks, close))


def _cliques(
    ranks: Mapping[tuple[str, str], float], together: Sequence[tuple[tuple[str, str], tuple[str, str]]]
) -> list[tuple[tuple[str, str], ...]]:
    """The largest sets of entries of which every two are a pair of ``together``, each and all in the order of ``ranks``."""
    import networkx  # only where there is a test to draw

    graph = networkx.Graph(list(together))
    order = {entry: position for position, entry in enumerate(ranks)}
    found = [tuple(sorted(clique, key=order.__getitem__)) for clique in networkx.find_cliques(graph)]
    return sorted(found, key=lambda clique: [order[entry] for entry in clique])


def _present_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the finite values along an axis; NaN where there is none."""
    present = np.isfinite(values)
    count = present.sum(axis=axis)
    total = np.where(present, values, 0.0).sum(axis=axis)
    means: np.ndarray = np.divide(total, count, out=np.full(count.shape, math.nan), where=count > 0)
    return means


def _by_blocks(table: pd.DataFrame, *, scenarios: bool = False) -> tuple[Interval, np.ndarray]:
    """Mean over scenarios of means over seeds of the column ``difference``, its interval, and the mean of each block.

    A block is all worlds of one data set and seed in ``table``. They are not independent: they share the clean budget, and on each
    backbone the benign twin and the network trained from scratch, whatever the attack. So the interval resamples whole blocks (all
    scenarios of a data set get the same draw of seeds); otherwise it is that of :func:`interval`.

    With ``scenarios`` a block is a scenario, with the mean over its seeds, as in the rank tests: the interval then says how much
    depends on which attacks and networks were run, and seeds may differ in number.
    """
    if scenarios:
        grids = [table.groupby(SCENARIO, sort=False)["difference"].mean().to_numpy(np.float64)[None, :]]
    else:
        grids = [
            mine.pivot_table(index=SCENARIO, columns="seed", values="difference", sort=False).to_numpy(np.float64)
            for _, mine in table.groupby("dataset", sort=False)
        ]

    def statistic(*draws: np.ndarray, axis: int = -1) -> np.ndarray:
        means = [_present_mean(grid[:, draw.astype(int)], axis=-1) for grid, draw in zip(grids, draws, strict=True)]
        return _present_mean(np.concatenate(means), axis=0)

    seeds = [np.arange(grid.shape[1]) for grid in grids]
    mean = float(statistic(*seeds))
    low = high = math.nan
    if min(map(len, seeds)) > 1:
        found = scipy_stats.bootstrap(
            seeds, statistic, n_resamples=RESAMPLES, vectorized=True, axis=-1, method="percentile", rng=0
        )  # fmt: skip
        low, high = map(float, found.confidence_interval)
    return Interval(mean, low, high), np.concatenate([_present_mean(grid, axis=0) for grid in grids])


def _judged_control(rows: pd.DataFrame, track: str, control: str) -> pd.DataFrame:
    """The implanted rows of the first whole-network entry whose label is, or begins with, ``control``, under the selection that its
    track is ranked by: of the track's own field, or else of the first track that has it. Empty where no track has it."""
    for name in dict.fromkeys([track, *tracks(rows)]):
        table = field(rows, name)
        table = table[(table["selection"] == headline(rows, name)) & (table["scope"] == "whole")]
        found = implanted_worlds(table[table["defense"].str.startswith(control)])
        if len(found):
            mine: pd.DataFrame = found[found["defense"] == found["defense"].iloc[0]]
            return mine
    return rows.iloc[:0]


def paired(
    rows: pd.DataFrame, track: str, control: str = SCRATCH, *, metrics: Sequence[str] = ("ra", "acc"), scenarios: bool = False
) -> pd.DataFrame:
    """Every competing entry of a track against one control, attacked model by attacked model.

    A pair is an implanted world that both finished, each under the selection that its track is ranked by. Empty where the matrix
    has no such control, or nothing is implanted. The control is the first entry on the whole network whose label is, or begins
    with, ``control``. It may be a competing entry too, and of another track where this one has none; it is not compared with
    itself.

    Args:
        metrics: columns of ``rows`` to compare. scenarios: a block is a scenario instead of a data set's seed.

    Returns:
        Columns: ``defense``, ``scope``, ``control``, ``metric``, ``pairs``, ``worlds`` (pairs there would be if nothing were
        missing), ``difference`` (entry minus control: mean over scenarios of means over seeds), ``difference_low``,
        ``difference_high`` (bootstrap of blocks), ``p`` (signed-rank test over pairs), ``p_holm`` (adjusted over all lines of the
        track), ``p_least`` (the smallest p so many pairs can give), and the same test over the means of the blocks: ``blocks``,
        ``p_blocks``, ``p_blocks_least``.
    """
    table = field(rows, track)
    table = implanted_worlds(table[table["selection"] == headline(rows, track)])
    base = _judged_control(rows, track, control)
    own = [entry for entry in entries(table[table["role"] == "defense"]) if entry not in entries(base)]
    if base.empty or not own:
        return pd.DataFrame()
    columns = list(metrics)

    def finished(mine: pd.DataFrame) -> pd.DataFrame:
        return mine[mine["status"] == "ok"].set_index(WORLD)[columns]

    lines = []
    for entry in own:
        mine = table[(table["defense"] == entry[0]) & (table["scope"] == entry[1])]
        both = finished(mine).join(finished(base).add_suffix("_control"), how="inner", validate="one_to_one").reset_index()
        for metric in columns:
            both["difference"] = both[metric] - both[f"{metric}_control"]
            pairs = both.dropna(subset="difference")
            found, blocks = _by_blocks(pairs, scenarios=scenarios) if len(pairs) else (Interval(*[math.nan] * 3), np.empty(0))
            lines.append({
                "defense": entry[0], "scope": entry[1], "control": base["defense"].iloc[0], "metric": metric, "pairs": len(pairs),
                "worlds": len(mine), "difference": found.mean, "difference_low": found.low, "difference_high": found.high,
                "p": signed_rank(pairs["difference"].to_numpy(np.float64)) if len(pairs) else math.nan,
                "p_least": least_p(len(pairs)), "blocks": len(blocks),
                "p_blocks": signed_rank(blocks) if len(blocks) else math.nan, "p_blocks_least": least_p(len(blocks)),
            })  # fmt: skip
    found_lines = pd.DataFrame(lines)
    found_lines.insert(10, "p_holm", holm(list(found_lines["p"])))
    return found_lines

