"""Numbers about numbers: scenarios, intervals, ranks, gaps. Pure functions of the tables :func:`benchmark.storage.rows.read` returns.

Vocabulary
    scenario: (dataset, backbone, attack). world: a scenario with one seed, that is, one attacked model.
    implanted: a scenario passes the attack-validity gate (:func:`benchmark.rules.metrics.gate`) on the means over its seeds. Aggregates
    take implanted scenarios only, and all of their worlds: no defense is credited for an attack that was never there.
    entry: (defense, scope), one line of a table. field: the entries that stand in one track's tables; controls (and the
    undefended model) measured in another track are repeated, and say where they come from.

Seeds are averaged inside a scenario first, then scenarios are averaged: a scenario with more seeds weighs no more. Refused and
failed cells never enter a mean; in the ranking of a scenario they share the last place, so failing never pays.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from benchmark.rules.metrics import COSTS_POINTS, COSTS_SHARE, gate
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON, TAU
from benchmark.rules.tracks import TRACKS
from defenses.base import Knowledge

__all__ = [
    "ENTRY", "EXPORTED", "HINDSIGHT", "LEVEL", "MIN_BLOCKS", "NO_ATTACK", "RANK_KEY", "SCENARIO", "SCRATCH", "SELECTIONS",
    "UNDEFENDED", "WORLD",
    "Interval", "Significance", "at_published_knob", "average_ranks", "blocks_needed", "detectors", "entries", "field", "given",
    "headline",
    "holm", "implanted_worlds", "interval", "judged_boards", "leaderboard", "least_p", "paired", "problems", "resolves",
    "scenarios", "selection_gaps", "selections", "significance", "spread", "stealthy", "timing_summary", "tracks",
    "validation_images",
]  # fmt: skip

SCENARIO = ["dataset", "backbone", "attack"]
WORLD = [*SCENARIO, "seed"]
ENTRY = ["defense", "scope"]
SELECTIONS = ("validation", "default", "strongest", "canary", "oracle", "leaky")
"""In the order in which they are shown: the ranked rule first, those with hindsight last."""
HINDSIGHT = ("oracle", "leaky")
"""Choices that take the test set; never ranked."""
UNDEFENDED = "none"
"""Label of the defense that does nothing: the reference line of every table."""
NO_ATTACK = "none"
"""Label of the attack that does nothing; it is no scenario to defend and is never counted."""
RANK_KEY = "ra"
"""What is ranked on: RA, the share of triggered images given their true class. ASR + RA <= 1, so a high RA bounds the ASR, and a
broken model, which has a low ASR for free, cannot score on it."""
SCRATCH = "training-from-scratch"
"""The control that paired tests compare with: what the clean budget gives without the attacked model."""
LEVEL = 0.05
"""Of significance."""
MIN_BLOCKS = 11
"""Fewest implanted scenarios for which a rank test is reported; below, its chi-squared approximation is not to be trusted."""

EXPORTED = "met through its exported static set"
"""In the note of a row: the attack needs control of training, and a defense that reads the training set met what it left behind."""

_RESAMPLES = 2000
_METRICS = ("acc", "asr", "ra", "der", "d_acc", "d_asr", "d_ra")


class Interval(NamedTuple):
    """A mean with its 95 % interval; bounds are NaN when a scenario has a single seed (no spread can be seen)."""

    mean: float
    low: float
    high: float


def interval(samples: Mapping[tuple[str, ...], Sequence[float]] | Sequence[Sequence[float]]) -> Interval:
    """Mean over scenarios of the means over seeds, with a 95 % percentile interval.

    Seeds are resampled within each scenario, independently (stratified bootstrap, ``scipy.stats.bootstrap``, 2,000 resamples,
    fixed seed: the same samples give the same bits). It speaks of seeds alone: which attacks stand in the matrix is not random.

    Args:
        samples: one sequence of finite values per scenario, one value per seed; empty scenarios are left out.
    """
    groups = samples.values() if isinstance(samples, Mapping) else samples
    data = [np.asarray(group, dtype=np.float64)[None, :] for group in groups if len(group)]
    return Interval(*(float(part[0]) for part in _intervals(data))) if data else Interval(math.nan, math.nan, math.nan)


def _intervals(data: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As :func:`interval`, for several metrics at once: one (metrics, seeds) array per scenario; the metrics share the draws."""

    def statistic(*groups: np.ndarray, axis: int = -1) -> np.ndarray:
        means: np.ndarray = np.stack([group.mean(axis=axis) for group in groups])
        return np.asarray(means.mean(axis=0))

    mean = statistic(*data)
    if min(group.shape[-1] for group in data) < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    result = scipy_stats.bootstrap(
        data, statistic, n_resamples=_RESAMPLES, vectorized=True, axis=-1, method="percentile", rng=0
    )  # fmt: skip
    return mean, result.confidence_interval.low, result.confidence_interval.high


def tracks(rows: pd.DataFrame) -> list[str]:
    """Tracks in which something other than a control competes, in matrix order; all tracks when there are only controls.

    None where nothing but the undefended models was run: there is nobody to compare.
    """
    if (rows["defense"] == UNDEFENDED).all():
        return []
    competing = rows[~_is_control(rows)]
    return list(dict.fromkeys((competing if len(competing) else rows)["track"]))


def selections(rows: pd.DataFrame, track: str | None = None) -> list[str]:
    """The selections present, the honest one first; of a track: without those that not all its competitors can be chosen by."""
    present = set(rows["selection"])
    if track is not None:
        mine = rows[(rows["track"] == track) & ~_is_control(rows)]
        blind = set(mine.loc[mine["reason"] == NOTHING_TO_VALIDATE_ON, "selection"])
        if any(known.name == track and Knowledge.CLEAN not in known.grants for known in TRACKS):
            # Where every method has one candidate there was no choice to make, and none is claimed.
            blind |= {"validation", "strongest", "canary"}
        present = set(mine["selection"]) - blind or present
    return [name for name in SELECTIONS if name in present]


def headline(rows: pd.DataFrame, track: str) -> str:
    """The selection a track is judged by: validation, or the published default where the track grants nothing to validate on."""
    return next(iter(selections(rows, track)), "default")


def entries(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(defense, scope) pairs in matrix order."""
    return list(dict.fromkeys(zip(rows["defense"], rows["scope"], strict=True)))


def _is_control(rows: pd.DataFrame) -> pd.Series:
    return rows["control"].astype(bool) | (rows["defense"] == UNDEFENDED)


def field(rows: pd.DataFrame, track: str) -> pd.DataFrame:
    """The rows of one track, then the controls it lacks, from the first track that has them.

    Adds ``role`` (``defense`` | ``control`` | ``reference``) and ``source`` (the track a row was measured in).
    """
    own = rows[rows["track"] == track]
    present = set(entries(own))
    if any(defense == UNDEFENDED for defense, _ in present):
        present |= {entry for entry in entries(rows) if entry[0] == UNDEFENDED}
    borrowed = []
    others = rows.loc[(rows["track"] != track) & _is_control(rows)]
    for entry in entries(others):
        if entry in present:
            continue
        lent = others[(others["defense"] == entry[0]) & (others["scope"] == entry[1])]
        borrowed.append(lent[lent["track"] == lent["track"].iloc[0]])
        present |= {other for other in entries(others) if other[0] == UNDEFENDED} if entry[0] == UNDEFENDED else {entry}
    table: pd.DataFrame = pd.concat([own, *borrowed], ignore_index=True)
    role = np.where(table["defense"] == UNDEFENDED, "reference", np.where(_is_control(table), "control", "defense"))
    return table.assign(role=role, source=table["track"], track=track)


def scenarios(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per scenario, in matrix order.

    Columns: the scenario; ``seeds``, ``implanted_seeds`` (those that pass the gate by themselves); means over seeds of ``asr``,
    ``asr_benign`` and ``effect`` (NaN: not measured); ``implanted`` and ``adversarial`` (the gate on these means); ``acc_benign``,
    ``acc_loss``, ``acc_loss_low`` (lower end of its 95 % interval), ``costs_acc`` (that end is above 2 points and above 5 % of the
    twin's ACC).
    """
    attacked = rows[rows["attack"] != NO_ATTACK].drop_duplicates(WORLD)
    lines = []
    for place, worlds in attacked.groupby(SCENARIO, sort=False):
        asr, benign = float(worlds["asr_undefended"].mean()), float(worlds["asr_benign"].mean())
        verdict = gate(asr, benign)
        acc, loss = float(worlds["acc_benign"].mean()), worlds["acc_benign"] - worlds["acc_undefended"]
        low = float(loss.mean()) - 1.96 * _loss_error(loss, worlds["acc_loss_se"])
        lines.append({
            **dict(zip(SCENARIO, place, strict=True)), "seeds": len(worlds), "implanted_seeds": int(worlds["implanted"].sum()),
            "asr": asr, "asr_benign": benign, "effect": asr - benign, "implanted": verdict.implanted,
            "adversarial": verdict.adversarial, "acc_benign": acc, "acc_loss": float(loss.mean()), "acc_loss_low": low,
            "costs_acc": low > max(COSTS_POINTS, COSTS_SHARE * acc),
        })  # fmt: skip
    columns = [*SCENARIO, "seeds", "implanted_seeds", "asr", "asr_benign", "effect", "implanted", "adversarial", "acc_benign",
               "acc_loss", "acc_loss_low", "costs_acc"]  # fmt: skip
    return pd.DataFrame(lines, columns=columns)


def _loss_error(loss: pd.Series, errors: pd.Series) -> float:
    """Standard error of a mean loss over seeds: the test images are the same for every seed, so their noise does not average out;
    the seeds' own spread does. An error that was not measured counts as 0."""
    over_images = float(errors.fillna(0.0).pow(2).mean())
    over_seeds = float(loss.var(ddof=1)) / len(loss) if len(loss) > 1 else 0.0
    return math.sqrt(over_images + over_seeds)


def _of_scenarios(rows: pd.DataFrame, column: str) -> pd.Series:
    """Which rows belong to a scenario of which ``column`` of :func:`scenarios` holds."""
    found = scenarios(rows)
    kept = set(found.loc[found[column].astype(bool), SCENARIO].itertuples(index=False, name=None))
    return pd.Series([key in kept for key in rows[SCENARIO].itertuples(index=False, name=None)], index=rows.index, dtype=bool)


def implanted_worlds(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that may enter an aggregate, whatever their status: those of implanted scenarios, all seeds."""
    return rows.loc[_of_scenarios(rows, "implanted")]


def stealthy(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without the scenarios whose attack costs accuracy."""
    return rows.loc[~_of_scenarios(rows, "costs_acc")]


def _with_deltas(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(**{f"d_{name}": rows[name] - rows[f"{name}_undefended"] for name in ("acc", "asr", "ra")})


def _stratified(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, Interval]:
    """:func:`interval` of several columns of one entry's rows; values that are not finite are left out."""
    groups = [group[list(columns)].to_numpy(np.float64).T for _, group in table.groupby(SCENARIO, sort=False)]
    if groups and all(np.isfinite(group).all() for group in groups):
        parts = zip(*_intervals(groups), strict=True)
        return {name: Interval(*map(float, part)) for name, part in zip(columns, parts, strict=True)}
    return {
        name: interval([group[row][np.isfinite(group[row])] for group in groups]) for row, name in enumerate(columns)
    }  # fmt: skip


def _seed_means(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Means over seeds of ok cells: scenarios down, entries across; NaN where nothing stands."""
    good = table[table["status"] == "ok"]
    means = good.groupby([*SCENARIO, *ENTRY], sort=False)[column].mean().unstack(ENTRY)
    wanted = pd.MultiIndex.from_tuples(entries(table), names=ENTRY)
    blocks = pd.MultiIndex.from_frame(table[SCENARIO].drop_duplicates())
    return means.reindex(index=blocks, columns=wanted)


def average_ranks(rows: pd.DataFrame, track: str, selection: str) -> dict[tuple[str, str], float]:
    """Mean over implanted scenarios of each competing entry's rank by seed-averaged RA (1 = best, ties share the mean rank).

    Where an entry has no value (refused, failed, not run) it shares the last places. Empty when nothing is implanted.
    """
    table = field(rows, track)
    table = implanted_worlds(table[table["selection"] == selection])
    table = table[table["role"] == "defense"]
    if table.empty:
        return {}
    values = _seed_means(table, RANK_KEY).fillna(-np.inf).to_numpy()
    ranks = scipy_stats.rankdata(-values, method="average", axis=1).mean(axis=0)
    return dict(zip(entries(table), map(float, ranks), strict=True))


def _reasons(table: pd.DataFrame) -> str:
    """Why cells are missing, in words: "failed in 2 of 12: out of memory"."""
    bad = table[table["status"] != "ok"]
    counted = Counter(zip(bad["status"], bad["reason"], strict=True))
    return "; ".join(
        f"{status} in {count} of {len(table)}: {reason or 'no reason recorded'}" for (status, reason), count in counted.items()
    )


def leaderboard(rows: pd.DataFrame, track: str, selection: str) -> pd.DataFrame:
    """One line per entry of the track's field: competing entries by average rank, then the reference, then the controls.

    Columns: ``role``, ``defense``, ``scope``, ``source``, ``place`` (1 = best; 0 = not ranked), ``rank`` (average rank, NaN = not
    ranked), ``cells_ok``, ``cells`` (cells of implanted worlds), ``scenarios_ok``, ``reasons``, ``missing``
    (``refused``, ``failed`` or both), then ``acc``, ``asr``, ``ra``,
    ``der``, ``d_acc``, ``d_asr``, ``d_ra`` (differences to the undefended model), each with ``_low`` and ``_high``, then
    ``pruned``, ``units``, ``cost_epochs`` (means of scenario means), then how many finished cells are marked ``no_change`` or
    ``mechanism_failed``, and in how many the untouched model was ``kept``. Choices with hindsight are never ranked.
    """
    table = field(rows, track)
    table = _with_deltas(implanted_worlds(table[table["selection"] == selection]))
    ranks = {} if selection in HINDSIGHT else average_ranks(rows, track, selection)
    lines = []
    for position, (defense, scope) in enumerate(entries(table)):
        mine = table[(table["defense"] == defense) & (table["scope"] == scope)]
        good = mine[mine["status"] == "ok"]
        line: dict[str, object] = {
            "role": mine["role"].iloc[0], "defense": defense, "scope": scope, "source": mine["source"].iloc[0],
            "rank": ranks.get((defense, scope), math.nan), "cells_ok": len(good), "cells": len(mine),
            "scenarios_ok": good[SCENARIO].drop_duplicates().shape[0], "reasons": _reasons(mine),
            "missing": _missing(mine), "position": position,
        }  # fmt: skip
        measured = _stratified(good, _METRICS)
        for name in _METRICS:
            line |= dict(zip((name, f"{name}_low", f"{name}_high"), measured[name], strict=True))
        for name in ("pruned", "units", "cost_epochs"):
            line[name] = float(good.groupby(SCENARIO, sort=False)[name].mean().mean()) if len(good) else math.nan
        for name in ("no change", "mechanism failed"):
            line[name.replace(" ", "_")] = int((good["mark"] == name).sum())
        line["kept"] = int(good["kept"].sum())
        lines.append(line)
    if not lines:
        return pd.DataFrame()
    board = pd.DataFrame(lines)
    block = board["role"].map(_BLOCK)
    board = board.assign(block=block).sort_values(["block", "rank", "position"], kind="stable", na_position="last")
    ranked = board["rank"].notna()
    place = board["rank"].where(ranked).rank(method="min").fillna(0).astype(int)
    return board.assign(place=place).drop(columns=["block", "position"]).reset_index(drop=True)


def judged_boards(rows: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Every track, the selection it is judged by, and its :func:`leaderboard` under that selection (empty: nothing implanted).

    Adds what other choices would have reported: ``ra_oracle``, ``asr_oracle``, ``asr_leaky``; NaN where there is no such row.
    """
    found = []
    for track in tracks(rows):
        judged = headline(rows, track)
        board = leaderboard(rows, track, judged)
        if len(board):
            for selection, metric in (("oracle", "ra"), ("oracle", "asr"), ("leaky", "asr")):
                other = leaderboard(rows, track, selection)
                best = {(line["defense"], line["scope"]): float(line[metric]) for _, line in other.iterrows()}
                lines = zip(board["defense"], board["scope"], strict=True)
                board = board.assign(**{f"{metric}_{selection}": [best.get(entry, math.nan) for entry in lines]})
        found.append((track, judged, board))
    return found


def at_published_knob(curves: pd.DataFrame) -> pd.DataFrame:
    """The candidates of each cell at the published setting of its knob, without the untouched model; all where there is no knob."""
    published = curves.loc[curves["is_default"].astype(bool)].drop_duplicates("cell").set_index("cell")["knob"]
    own = curves["cell"].map(published)
    return curves[~curves["kept"].astype(bool) & ((curves["knob"] == own) | own.isna())]


def validation_images(rows: pd.DataFrame) -> int:
    """Images of the validation part of the clean budget, the smallest over the rows; 0 where no defense used the budget."""
    budgets = rows.loc[rows["clean_images"] > 0, "clean_images"]
    return round(int(budgets.min()) / 5) if len(budgets) else 0


def resolves(images: int, tau: float = TAU) -> tuple[bool, float]:
    """Whether so many validation images can tell a loss of ``tau`` from none, and the standard error of a paired loss when one pair
    in ten is discordant: it must be at most half of ``tau``."""
    error = math.sqrt(0.1 / images) if images else math.inf
    return error <= tau / 2, error


def selection_gaps(rows: pd.DataFrame, track: str) -> pd.DataFrame:
    """How much each way of choosing along a dial is worth: one line per entry of the track that has a dial, controls included.

    Columns: ``defense``, ``scope``, ``cells`` (worlds of implanted scenarios that every selection finished, canary aside),
    ``acc_<selection>``, ``asr_<selection>``, ``ra_<selection>``; then, paired by world, each with ``_low`` and ``_high``:
    ``gap_<selection>`` = RA under the oracle minus RA under that selection, never below 0, and ``leak_<selection>`` = ASR under
    that selection minus ASR under the leaky rule. Where an entry was not chosen by canaries, theirs are NaN; where it was in some
    worlds only, they are means over these.
    """
    table = implanted_worlds(rows[(rows["track"] == track)])
    dials = set(table.loc[table["dial"].notna(), "cell"])
    table = table[(table["status"] == "ok") & table["cell"].isin(dials)]
    present = selections(rows, track)
    lines = []
    for defense, scope in entries(table):
        mine = table[(table["defense"] == defense) & (table["scope"] == scope) & table["selection"].isin(present)]
        wide = mine.pivot_table(index=WORLD, columns="selection", values=["acc", "asr", "ra"], sort=False)
        found, needed = set(wide.columns.get_level_values(1)), {*HINDSIGHT, *present} - {"canary"}
        wide = wide.dropna(subset=[column for column in wide.columns if column[1] in needed])
        if wide.empty or not needed <= found:
            continue
        flat = wide.set_axis(["_".join(map(str, column)) for column in wide.columns.to_list()], axis=1)
        for name in present:
            if name not in HINDSIGHT and name in found:
                flat[f"gap_{name}"] = flat["ra_oracle"] - flat[f"ra_{name}"]
                flat[f"leak_{name}"] = flat[f"asr_{name}"] - flat["asr_leaky"]
        measured = _stratified(flat.reset_index(), list(flat.columns))
        line: dict[str, object] = {"defense": defense, "scope": scope, "cells": len(flat)}
        for column, part in measured.items():
            line[column] = part.mean
            if column.startswith(("gap_", "leak_")):
                line |= {f"{column}_low": part.low, f"{column}_high": part.high}
        lines.append(line)
    return pd.DataFrame(lines)


_BLOCK = {"defense": 0, "reference": 1, "control": 2}


def _by_role(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """Each entry of a field with its rows: competing entries in matrix order, then the reference, then the controls."""
    groups = [(entry, table[(table["defense"] == entry[0]) & (table["scope"] == entry[1])]) for entry in entries(table)]
    return sorted(groups, key=lambda group: _BLOCK[group[1]["role"].iloc[0]])


def _missing(mine: pd.DataFrame) -> str:
    return " / ".join(dict.fromkeys(mine.loc[mine["status"] != "ok", "status"]))


def given(rows: pd.DataFrame, track: str, selection: str) -> pd.DataFrame:
    """What each entry of the track's field took: competing entries in matrix order, then the reference, then the controls.

    Columns: ``role``, ``defense``, ``scope``, ``source``, ``cells_ok``, ``cells``, ``missing`` (``refused``, ``failed`` or both);
    over finished cells, implanted or not: ``used``, ``trained_anew``, ``extractor``, ``preset`` (tuples of the distinct values, in
    matrix order), ``clean_images`` and ``train_images``, each as ``_min`` and ``_max``, ``cost_epochs`` and ``extractor_epochs``
    (means; NaN where there is none).
    """
    table = field(rows, track)
    lines = []
    for (defense, scope), mine in _by_role(table[table["selection"] == selection]):
        good = mine[mine["status"] == "ok"]
        line: dict[str, object] = {
            "role": mine["role"].iloc[0], "defense": defense, "scope": scope, "source": mine["source"].iloc[0],
            "cells_ok": len(good), "cells": len(mine), "missing": _missing(mine),
        }  # fmt: skip
        line |= {name: tuple(dict.fromkeys(good[name])) for name in ("used", "trained_anew", "extractor", "preset")}
        for name in ("clean_images", "train_images"):
            line |= {f"{name}_{end}": int(getattr(good[name], end)()) if len(good) else 0 for end in ("min", "max")}
        line |= {name: float(good[name].mean()) for name in ("cost_epochs", "extractor_epochs")}
        lines.append(line)
    return pd.DataFrame(lines)


def detectors(rows: pd.DataFrame, track: str) -> pd.DataFrame:
    """How the training samples that entries of the track's field singled out meet the poisoned ones; a line per entry and scenario.

    Entries that single out nothing anywhere have no line. Rows of the default selection (isolation does not depend on it), all
    seeds, implanted or not. Columns: ``role``, ``defense``, ``scope``, ``source``, the scenario, ``cells_ok``, ``cells``,
    ``missing``; means over finished cells: ``isolated`` (samples), ``isolated_share`` (of the training set), ``precision`` (where
    something was isolated) and ``recall``, each with ``_sd`` (sample deviation over seeds) and ``_seeds`` (how many it is a mean
    of), ``base_rate`` (of poison: the precision of a random choice); ``seeds``, ``implanted_seeds``, ``implanted``, ``exported``
    (the attack was met through its exported static set).
    """
    table = field(rows, track)
    table = table[(table["selection"] == "default") & (table["attack"] != NO_ATTACK)]
    told = table["precision"].notna() | table["recall"].notna()
    counts = ["seeds", "implanted_seeds", "implanted"]
    gate = {tuple(line[SCENARIO]): line[counts].to_dict() for _, line in scenarios(rows).iterrows()}
    lines = []
    for (defense, scope), every in _by_role(table):
        if not told[every.index].any():
            continue
        for place in dict.fromkeys(every[SCENARIO].itertuples(index=False, name=None)):
            mine = every[(every[SCENARIO] == list(place)).all(axis=1)]
            good = mine[mine["status"] == "ok"]
            reported = good[told[good.index]]
            size = reported["train_images"].where(reported["train_images"] > 0)
            line: dict[str, object] = {
                "role": mine["role"].iloc[0], "defense": defense, "scope": scope, "source": mine["source"].iloc[0],
                **dict(zip(SCENARIO, place, strict=True)), "cells_ok": len(good), "cells": len(mine), "missing": _missing(mine),
                "isolated": float(reported["isolated"].mean()),
                "isolated_share": float((reported["isolated"] / size).mean()),
            }  # fmt: skip
            for name in ("precision", "recall"):
                values = [float(value) for value in good[name].dropna()]
                line |= {name: float(np.mean(values)) if values else math.nan, f"{name}_sd": spread(values),
                         f"{name}_seeds": len(values)}  # fmt: skip
            line["base_rate"] = float(mine["realised_rate"].mean())
            line |= {name: gate[place][name] for name in counts}
            line["exported"] = bool(mine["note"].str.contains(EXPORTED, regex=False).any())
            lines.append(line)
    return pd.DataFrame(lines)


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation over seeds; NaN for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def problems(rows: pd.DataFrame) -> pd.DataFrame:
    """Refused and failed cells, one line per reason and place: a cell's selections are one, its seeds are joined."""
    bad = rows[(rows["status"] != "ok") & (rows["reason"] != NOTHING_TO_VALIDATE_ON)]
    keys = ["track", *ENTRY, *SCENARIO, "status", "reason"]
    if bad.empty:
        return pd.DataFrame(columns=[*keys, "seeds"])
    seeds = bad.groupby(keys, sort=False)["seed"].agg(lambda found: ", ".join(map(str, sorted(set(found)))))
    return seeds.rename("seeds").reset_index()


def timing_summary(rows: pd.DataFrame, timings: pd.DataFrame) -> pd.DataFrame:
    """Cost per track and entry over all ok cells: median ``seconds``, largest ``peak_mib``, median ``share`` of the seconds the
    victim took to train, median ``cost_epochs``, and ``cells``."""
    good = rows[rows["status"] == "ok"].drop_duplicates("cell")
    joined = timings.merge(good[["cell", "cost_epochs"]], on="cell", how="inner")
    victim = joined["victim_seconds"].where(joined["victim_seconds"] > 0)
    joined = joined.assign(share=joined["seconds"] / victim)
    return (
        joined.groupby(["track", *ENTRY], sort=False)
        .agg(seconds=("seconds", "median"), peak_mib=("peak_mib", "max"), share=("share", "median"),
             cost_epochs=("cost_epochs", "median"), cells=("cell", "size"))
        .reset_index()
    )  # fmt: skip


# -- tests ---------------------------------------------------------------------------------------------------------------------

_EXACT = 50  # beyond so many differences the counts of sign patterns outgrow a float, and the normal approximation is good


def _signed_rank(differences: np.ndarray) -> float:
    """p of the two-sided Wilcoxon signed-rank test, zeros left out; exact up to 50 differences, also with ties.

    scipy's own exact test knows no ties; with them it enumerates sign patterns one by one, seconds for a dozen differences, or
    falls back on the normal approximation. Here the patterns are counted by their rank sum, doubled so that mid-ranks are whole.
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


class Significance(NamedTuple):
    """Rank tests over implanted scenarios.

    Attributes:
        blocks: scenarios. friedman: p of Friedman's test.
        pairs: (entry, entry, Holm-adjusted p of a two-sided Wilcoxon signed-rank test).
        ranks: average rank by RA of each entry tested, best first (1 = best, ties share the mean rank).
        cliques: sets of two entries or more, none of them told apart from another; largest sets only, best first. All entries
            where Friedman's test tells nothing apart.
        incomplete: competing entries left out because a scenario is missing.
    """

    blocks: int
    friedman: float
    pairs: list[tuple[tuple[str, str], tuple[str, str], float]]
    ranks: dict[tuple[str, str], float]
    cliques: list[tuple[tuple[str, str], ...]]
    incomplete: list[tuple[str, str]]


def significance(rows: pd.DataFrame, track: str, selection: str) -> Significance | None:
    """Friedman's test over the competing entries that stand in every implanted scenario, then pairwise Wilcoxon tests, on RA.

    As Demsar, "Statistical comparisons of classifiers over multiple data sets" (JMLR 7, 2006), with scenarios in the place of data
    sets and Holm-adjusted signed-rank tests in the place of Nemenyi's. None with fewer than 11 implanted scenarios or 3 entries,
    or when all entries are equal everywhere (nothing to test).
    """
    table = field(rows, track)
    table = implanted_worlds(table[table["selection"] == selection])
    table = table[table["role"] == "defense"]
    if table.empty:
        return None
    values = _seed_means(table, RANK_KEY).dropna(axis=1)
    if len(values) < MIN_BLOCKS or values.shape[1] < 3 or bool((values.nunique(axis=1) == 1).all()):
        return None
    columns = [(str(column[0]), str(column[1])) for column in values.columns.to_list()]
    friedman = float(scipy_stats.friedmanchisquare(*values.to_numpy().T).pvalue)
    couples = list(combinations(range(len(columns)), 2))
    figures = values.to_numpy(np.float64)
    adjusted = holm([_signed_rank(figures[:, left] - figures[:, right]) for left, right in couples])
    pairs = [(columns[left], columns[right], p) for (left, right), p in zip(couples, adjusted, strict=True)]
    mean = scipy_stats.rankdata(-figures, method="average", axis=1).mean(axis=0)
    ranks = dict(sorted(zip(columns, map(float, mean), strict=True), key=lambda item: item[1]))
    together = pairs if friedman >= LEVEL else [pair for pair in pairs if pair[2] >= LEVEL]
    left_out = [entry for entry in entries(table) if entry not in ranks]
    return Significance(len(values), friedman, pairs, ranks, _cliques(ranks, [(a, b) for a, b, _ in together]), left_out)


def _cliques(
    ranks: Mapping[tuple[str, str], float], together: Sequence[tuple[tuple[str, str], tuple[str, str]]]
) -> list[tuple[tuple[str, str], ...]]:
    """The largest sets of entries in which every two stand in ``together``, each and all of them in the order of ``ranks``."""
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


def _by_blocks(table: pd.DataFrame) -> tuple[Interval, np.ndarray]:
    """Mean over scenarios of means over seeds of the column ``difference``, its interval, and the mean of each block.

    A block is all worlds of one data set and seed that are there. They are not independent of each other: they share the clean
    budget, and on each backbone the benign twin and the network trained from scratch, the very same one whatever the attack. So the
    interval resamples whole blocks (all scenarios of a data set get the same draw of seeds); otherwise it is that of
    :func:`interval`.
    """
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
            seeds, statistic, n_resamples=_RESAMPLES, vectorized=True, axis=-1, method="percentile", rng=0
        )  # fmt: skip
        low, high = map(float, found.confidence_interval)
    return Interval(mean, low, high), np.concatenate([_present_mean(grid, axis=0) for grid in grids])


def paired(rows: pd.DataFrame, track: str, control: str = SCRATCH) -> pd.DataFrame:
    """Every competing entry of a track against one control, attacked model by attacked model, in RA and in ACC.

    A pair is an implanted world that both finished, under the selection the track is judged by. Empty where the matrix has no such
    control, or nothing is implanted. The control is the first entry whose label is, or begins with, ``control``.

    Columns: ``defense``, ``scope``, ``control``, ``metric`` (``ra`` | ``acc``), ``pairs``, ``worlds`` (pairs there would be if
    nothing were missing), ``difference`` (entry minus control: mean over scenarios of means over seeds), ``difference_low``,
    ``difference_high`` (bootstrap of blocks), ``p`` (signed-rank test over pairs), ``p_holm`` (adjusted over all lines of the
    track), ``p_least`` (the smallest p so many pairs can give), and the same test over the means of the blocks: ``blocks``,
    ``p_blocks``, ``p_blocks_least``.
    """
    table = field(rows, track)
    table = implanted_worlds(table[table["selection"] == headline(rows, track)])
    controls = table[(table["role"] == "control") & table["defense"].str.startswith(control)]
    if controls.empty or not (table["role"] == "defense").any():
        return pd.DataFrame()
    chosen = entries(controls)[0]
    metrics = ["ra", "acc"]

    def finished(entry: tuple[str, str]) -> pd.DataFrame:
        mine = table[(table["defense"] == entry[0]) & (table["scope"] == entry[1]) & (table["status"] == "ok")]
        return mine.set_index(WORLD)[metrics]

    base = finished(chosen).add_suffix("_control")
    lines = []
    for entry in entries(table[table["role"] == "defense"]):
        both = finished(entry).join(base, how="inner", validate="one_to_one").reset_index()
        worlds = int(((table["defense"] == entry[0]) & (table["scope"] == entry[1])).sum())
        for metric in metrics:
            both["difference"] = both[metric] - both[f"{metric}_control"]
            pairs = both.dropna(subset="difference")
            found, blocks = _by_blocks(pairs) if len(pairs) else (Interval(*[math.nan] * 3), np.empty(0))
            lines.append({
                "defense": entry[0], "scope": entry[1], "control": chosen[0], "metric": metric, "pairs": len(pairs),
                "worlds": worlds, "difference": found.mean, "difference_low": found.low, "difference_high": found.high,
                "p": _signed_rank(pairs["difference"].to_numpy(np.float64)) if len(pairs) else math.nan,
                "p_least": least_p(len(pairs)), "blocks": len(blocks),
                "p_blocks": _signed_rank(blocks) if len(blocks) else math.nan, "p_blocks_least": least_p(len(blocks)),
            })  # fmt: skip
    found_lines = pd.DataFrame(lines)
    found_lines.insert(10, "p_holm", holm(list(found_lines["p"])))
    return found_lines
