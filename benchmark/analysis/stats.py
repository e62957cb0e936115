"""Scenarios, boards, ranks and gaps: pure functions of the tables that :func:`benchmark.storage.rows.read` returns.

Vocabulary
    scenario: (dataset, backbone, attack). world: a scenario with one seed, that is, one attacked model.
    implanted: a scenario passes the attack-validity gate (:func:`benchmark.rules.metrics.gate`) on the means over its seeds.
    Aggregates take implanted scenarios only, and all of their worlds: no defense is credited for an attack that did not work.
    entry: (defense, scope), one line of a table. field: the entries in one track's tables; controls (and the undefended model)
    measured in another track are repeated, with the track they come from.

Seeds are averaged inside a scenario first, then scenarios are averaged: a scenario with more seeds weighs no more. Refused and
failed cells never enter a mean; in the ranking of a scenario they share the last place, so that failing is never an advantage. An
entry that was run on fewer scenarios than others of its track is not ranked: its mean is one over other scenarios.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from benchmark.analysis.intervals import Interval, interval, intervals, spread
from benchmark.analysis.memo import remembered
from benchmark.rules.metrics import COSTS_POINTS, COSTS_SHARE, gate
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON, TAU
from benchmark.rules.tracks import TRACKS
from defenses.base import Knowledge

__all__ = [
    "ENTRY", "EXPORTED", "HINDSIGHT", "NO_ATTACK", "RANK_KEY", "SCENARIO", "SCRATCH", "SELECTIONS", "UNDEFENDED", "WORLD",
    "at_published_knob", "average_ranks", "detectors", "entries", "field", "given", "headline", "implanted_worlds", "judged_boards",
    "leaderboard", "problems", "resolves", "scenarios", "seed_means", "selection_gaps", "selections", "stealthy", "timing_summary",
    "tracks", "validation_images",
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
EXPORTED = "met through its exported static set"
"""In the note of a row: the attack controls training, and the defense, which reads the training set, was given its exported one."""

_METRICS = ("acc", "asr", "ra", "der", "d_acc", "d_asr", "d_ra")


def tracks(rows: pd.DataFrame) -> list[str]:
    """Tracks in which something other than a control competes, in matrix order; all tracks when there are only controls.

    Empty where nothing but the undefended models was run.
    """
    if (rows["defense"] == UNDEFENDED).all():
        return []
    competing = rows[~_is_control(rows)]
    return list(dict.fromkeys((competing if len(competing) else rows)["track"]))


def selections(rows: pd.DataFrame, track: str | None = None) -> list[str]:
    """The selections present, the ranked one first; of a track: only those that apply to all of its competing entries."""
    present = set(rows["selection"])
    if track is not None:
        mine = rows[(rows["track"] == track) & ~_is_control(rows)]
        blind = set(mine.loc[mine["reason"] == NOTHING_TO_VALIDATE_ON, "selection"])
        if any(known.name == track and Knowledge.CLEAN not in known.grants for known in TRACKS):
            # Where every method has one candidate there was no choice to make, so no choice is reported.
            blind |= {"validation", "strongest", "canary"}
        present = set(mine["selection"]) - blind or present
    return [name for name in SELECTIONS if name in present]


def headline(rows: pd.DataFrame, track: str) -> str:
    """The selection a track is ranked by: validation, or the published default where the track grants no clean images."""
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
    """Standard error of a mean loss over seeds. The test images are the same for every seed, so their noise does not average out;
    the spread over seeds does. An error that was not measured counts as 0."""
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
        parts = zip(*intervals(groups), strict=True)
        return {name: Interval(*map(float, part)) for name, part in zip(columns, parts, strict=True)}
    return {
        name: interval([group[row][np.isfinite(group[row])] for group in groups]) for row, name in enumerate(columns)
    }  # fmt: skip


def seed_means(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Means over seeds of ok cells: scenarios down, entries across; NaN where there is no ok cell."""
    good = table[table["status"] == "ok"]
    means = good.groupby([*SCENARIO, *ENTRY], sort=False)[column].mean().unstack(ENTRY)
    wanted = pd.MultiIndex.from_tuples(entries(table), names=ENTRY)
    blocks = pd.MultiIndex.from_frame(table[SCENARIO].drop_duplicates())
    return means.reindex(index=blocks, columns=wanted)


def _run_everywhere(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of entries that have a row, of whatever status, in every scenario of the table."""
    run = table.drop_duplicates([*SCENARIO, *ENTRY]).groupby(ENTRY).size()
    return table[pd.MultiIndex.from_frame(table[ENTRY]).isin(run.index[run == len(table.drop_duplicates(SCENARIO))])]


def average_ranks(rows: pd.DataFrame, track: str, selection: str) -> dict[tuple[str, str], float]:
    """Mean over implanted scenarios of each competing entry's rank by seed-averaged RA (1 = best, ties share the mean rank).

    Where an entry has no value (refused, failed) it shares the last places. An entry that was not run in a scenario in which others
    of the track were has no rank. Empty when nothing is implanted.
    """
    table = field(rows, track)
    table = implanted_worlds(table[table["selection"] == selection])
    table = _run_everywhere(table[table["role"] == "defense"])
    if table.empty:
        return {}
    values = seed_means(table, RANK_KEY).fillna(-np.inf).to_numpy()
    ranks = scipy_stats.rankdata(-values, method="average", axis=1).mean(axis=0)
    return dict(zip(entries(table), map(float, ranks), strict=True))


def _reasons(table: pd.DataFrame) -> str:
    """Why cells are missing, in words: "failed in 2 of 12: out of memory"."""
    bad = table[table["status"] != "ok"]
    counted = Counter(zip(bad["status"], bad["reason"], strict=True))
    return "; ".join(
        f"{status} in {count} of {len(table)}: {reason or 'no reason recorded'}" for (status, reason), count in counted.items()
    )


@remembered
def leaderboard(rows: pd.DataFrame, track: str, selection: str) -> pd.DataFrame:
    """One line per entry of the track's field: competing entries by average rank, then the reference, then the controls.

    Columns: ``role``, ``defense``, ``scope``, ``source``, ``place`` (1 = best; 0 = not ranked), ``rank`` (average rank, NaN = not
    ranked), ``cells_ok``, ``cells`` (cells of implanted worlds), ``scenarios_ok``, ``scenarios_run`` (with a row, whatever its
    status), ``scenarios`` (implanted ones of the matrix), ``reasons``, ``missing`` (``refused``, ``failed`` or both), then
    ``acc``, ``asr``, ``ra``, ``der``, ``d_acc``, ``d_asr``, ``d_ra`` (differences to the undefended model), each with ``_low``
    and ``_high``, then ``pruned``, ``units``, ``cost_epochs`` (means of scenario means), then how many finished cells are marked
    ``no_change`` or ``mechanism_failed``, and in how many the untouched model was ``kept``. Hindsight is never ranked.
    """
    table = field(rows, track)
    table = _with_deltas(implanted_worlds(table[table["selection"] == selection]))
    ranks = {} if selection in HINDSIGHT else average_ranks(rows, track, selection)
    every = int(scenarios(rows)["implanted"].sum())
    lines = []
    for position, (defense, scope) in enumerate(entries(table)):
        mine = table[(table["defense"] == defense) & (table["scope"] == scope)]
        good = mine[mine["status"] == "ok"]
        line: dict[str, object] = {
            "role": mine["role"].iloc[0], "defense": defense, "scope": scope, "source": mine["source"].iloc[0],
            "rank": ranks.get((defense, scope), math.nan), "cells_ok": len(good), "cells": len(mine),
            "scenarios_ok": len(good.drop_duplicates(SCENARIO)), "scenarios_run": len(mine.drop_duplicates(SCENARIO)),
            "scenarios": every, "reasons": _reasons(mine), "missing": _missing(mine), "position": position,
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

    Adds what other selections give: ``ra_oracle``, ``asr_oracle``, ``asr_leaky``; NaN where there is no such row.
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
    """Whether so many validation images suffice to detect a loss of ``tau``.

    Returns:
        Whether the standard error is at most half of ``tau``, and the standard error: of a paired loss where one pair in ten is
        discordant.
    """
    error = math.sqrt(0.1 / images) if images else math.inf
    return error <= tau / 2, error


def selection_gaps(rows: pd.DataFrame, track: str) -> pd.DataFrame:
    """What each selection rule gives and loses against the oracle: a line per entry of the track with a dial, controls included.

    Columns: ``defense``, ``scope``, ``cells`` (worlds of implanted scenarios that every selection finished, canary aside),
    ``acc_<selection>``, ``asr_<selection>``, ``ra_<selection>``; then, paired by world, each with ``_low`` and ``_high``:
    ``gap_<selection>`` = RA under the oracle minus RA under that selection, never below 0, and ``leak_<selection>`` = ASR under
    that selection minus ASR under the leaky rule. The canary columns are NaN for an entry without canaries, and means over the
    worlds with canaries where only some have them.
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
    """What each entry of the track's field used: competing entries in matrix order, then the reference, then the controls.

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
    """Precision, recall and AUROC of the training samples that entries of the track's field isolate; a line per entry and scenario.

    Entries that isolate nothing anywhere have no line. Rows of the default selection (isolation does not depend on it), all
    seeds, implanted or not. Columns: ``role``, ``defense``, ``scope``, ``source``, the scenario, ``cells_ok``, ``cells``,
    ``missing``; means over finished cells: ``isolated`` (samples), ``isolated_share`` (of the training set), ``precision`` (where
    something was isolated), ``recall`` and ``auroc``, each with ``_sd`` (sample deviation over seeds) and ``_seeds`` (how many it
    is a mean of), ``base_rate`` (of poison: the precision of a random choice); ``seeds``, ``implanted_seeds``, ``implanted``,
    ``exported`` (the defense was given the attack's exported poisoned set).
    """
    table = field(rows, track)
    table = table[(table["selection"] == "default") & (table["attack"] != NO_ATTACK)]
    known = table["precision"].notna() | table["recall"].notna()
    counts = ["seeds", "implanted_seeds", "implanted"]
    gate = {tuple(line[SCENARIO]): line[counts].to_dict() for _, line in scenarios(rows).iterrows()}
    lines = []
    for (defense, scope), every in _by_role(table):
        if not known[every.index].any():
            continue
        for place in dict.fromkeys(every[SCENARIO].itertuples(index=False, name=None)):
            mine = every[(every[SCENARIO] == list(place)).all(axis=1)]
            good = mine[mine["status"] == "ok"]
            reported = good[known[good.index]]
            size = reported["train_images"].where(reported["train_images"] > 0)
            line: dict[str, object] = {
                "role": mine["role"].iloc[0], "defense": defense, "scope": scope, "source": mine["source"].iloc[0],
                **dict(zip(SCENARIO, place, strict=True)), "cells_ok": len(good), "cells": len(mine), "missing": _missing(mine),
                "isolated": float(reported["isolated"].mean()),
                "isolated_share": float((reported["isolated"] / size).mean()),
            }  # fmt: skip
            for name in ("precision", "recall", "auroc"):
                values = [float(value) for value in good[name].dropna()]
                line |= {name: float(np.mean(values)) if values else math.nan, f"{name}_sd": spread(values),
                         f"{name}_seeds": len(values)}  # fmt: skip
            line["base_rate"] = float(mine["realised_rate"].mean())
            line |= {name: gate[place][name] for name in counts}
            line["exported"] = bool(mine["note"].str.contains(EXPORTED, regex=False).any())
            lines.append(line)
    return pd.DataFrame(lines)


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
