"""Answers from matrices that turn one setting: alpha, scope, threshold, selection, budget, rate, extractor, adaptive, natural."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from attacks.adaptive import Adaptive
from benchmark.analysis import intervals, stats
from benchmark.analysis.intervals import Interval
from benchmark.analysis.stats import ENTRY, SCENARIO, SCRATCH, WORLD
from benchmark.report.exhibits.evidence import (
    FIGURES,
    MEANS,
    UNMEASURED,
    Column,
    Missing,
    Shown,
    Source,
    before_defense,
    bounded,
    brief,
    competitors,
    entry_markdown,
    entry_words,
    figure_names,
    finished,
    implanted_words,
    in_brackets,
    interval_of,
    interval_words,
    judged,
    largest,
    listed,
    mean,
    means_of,
    of_entry,
    out_of,
    paired_gap,
    percent_words,
    points_words,
    verdict,
    victims_words,
)
from benchmark.report.figures import DotPanel, Dots, Lines, Panel, Series
from benchmark.report.text import markdown
from benchmark.report.words import SELECTION_WORDS, gate_words
from benchmark.rules.metrics import IMPLANTED_ASR
from benchmark.rules.selection import TAU
from defenses.anp import ANP
from defenses.holder_pruning import HolderPruning

__all__ = [
    "adaptive", "along_dial", "alpha", "budget", "canary", "closed", "extractor", "natural", "rate", "scope", "selection",
    "threshold",
]  # fmt: skip


# -- alpha -------------------------------------------------------------------------------------------------------------------------

def _mode(defense: HolderPruning) -> str:
    if defense.distance == "feature":
        return "distance between embeddings"
    return "steps of unequal length" if defense.clip or len(defense.radii) > 1 else "steps of equal length"


def _agreement(mine: pd.DataFrame, other: pd.DataFrame) -> tuple[int, int, float]:
    """How many of the models on two dials score the same, of how many, and Spearman's correlation of RA where both have a point."""
    keys, metrics = [*WORLD, "dial"], ["acc", "asr", "ra"]
    both = mine[[*keys, *metrics]].drop_duplicates(keys).merge(
        other[[*keys, *metrics]].drop_duplicates(keys), on=keys, how="outer", suffixes=("", "_other")
    )  # fmt: skip
    same = np.logical_and.reduce([both[name].to_numpy() == both[f"{name}_other"].to_numpy() for name in metrics])
    shared = both.dropna()
    varies = len(shared) > 2 and shared["ra"].nunique() > 1 and shared["ra_other"].nunique() > 1
    rho = float(scipy_stats.spearmanr(shared["ra"], shared["ra_other"]).statistic) if varies else math.nan
    return int(same.sum()), len(both), rho


def alpha(source: Source) -> Shown:
    """Hölder pruning by exponent, in each way of measuring distance."""
    known = {c.defense_label: c.defense for c in source.matrix.cells if isinstance(c.defense, HolderPruning)}
    known = {label: defense for label, defense in known.items() if defense.estimator != "weight-bound"}
    table = finished(source.rows)
    table = table[table["defense"].isin(known)]
    defenses = [known[name] for name in table["defense"]]
    table = table.assign(mode=[_mode(defense) for defense in defenses], alpha=[defense.alpha for defense in defenses])
    if table["alpha"].nunique() < 2:
        raise Missing("it takes Hölder pruning at two exponents or more")
    curves = stats.at_published_knob(source.curves)
    curves = curves[curves["cell"].isin(table["cell"])]
    lines: list[dict[str, Any]] = []
    panels, said, sides = [], [], []
    for (mode, scope_), group in table.groupby(["mode", "scope"], sort=False):
        by = {float(value): group[group["alpha"] == value] for value in sorted(set(group["alpha"]))}
        last = max(by)
        paths = {value: curves[curves["cell"].isin(mine["cell"])] for value, mine in by.items()}
        every = {value: _agreement(path, paths[last]) for value, path in paths.items()}
        for value, mine in by.items():
            same, points, rho = every[value]
            lines.append({"mode": mode, "scope": scope_, "alpha": value, **means_of(mine), "same": same / points if points else
                          math.nan, "points": points, "rho": rho})  # fmt: skip
        part = [line for line in lines if line["mode"] == mode and line["scope"] == scope_]
        x = tuple(float(line["alpha"]) for line in part)
        series = [Series(name.upper(), x, tuple(interval_of(line, name) for line in part)) for name in ("ra", "asr")]
        kept = tuple(Interval(line["same"], math.nan, math.nan) for line in part if line["alpha"] != last)
        series.append(Series(f"models that score as at alpha {last:g}", x[:-1], kept, aside=True))
        panels.append(Panel(f"{mode}, {scope_}", "alpha", "%", tuple(series)))
        others = [every[value] for value in by if value != last]
        same, points = sum(found[0] for found in others), sum(found[1] for found in others)
        if mode == "steps of equal length":
            said.append(
                f"At scope {scope_}, with steps of equal length, alpha changes nothing, as it must: all {points} models offered at "
                f"other exponents score as at alpha {last:g}."
                if same == points
                else f"At scope {scope_}, with steps of equal length, alpha cannot change the ranking, yet {points - same} of "
                f"{points} "
                f"models differ from those at alpha {last:g}: rounding, or a fault."
            )
            continue
        paper = HolderPruning.alpha
        if paper in by and paper != last:
            difference, pairs = paired_gap(by[paper], by[last], "ra")
            sides.append(verdict(difference))
            said.append(
                f"With {mode} ({scope_}), {100 * (1 - same / points) if points else 0:.0f} % of the models differ from those at "
                "alpha "
                f"{last:g}; RA at alpha {paper:g} minus RA at alpha {last:g}: {points_words(difference)} over {pairs} attacked "
                "models."
            )
    if sides:
        said.append(
            f"Where the exponent could matter, the published one is told apart from the Lipschitz quotient for the better in "
            f"{out_of(sides.count(1), len(sides))} comparisons and for the worse in {sides.count(-1)}"
            + ("." if sides.count(1) > sides.count(-1) else ": the result does not rest on it.")
        )
    columns = (Column("Distance", "text", "mode"), Column("Scope", "text", "scope"), Column("alpha", "number", "alpha"), *FIGURES,
               Column("Models as at the largest alpha", "share", "same"), Column("Models", "count", "points"),
               Column("Rank correlation of RA with it", "number", "rho"))  # fmt: skip
    note = "Bands: 95 % intervals over seeds. Dotted: of all models along the dial."
    about = (
        f"{MEANS}; models: every point of the dial on every such model, the same where ACC, ASR and RA are; rank correlation: "
        "Spearman's, of RA along the dial (curves hold outcomes, not the ranking of units)"
    )
    return Shown(" ".join(said), pd.DataFrame(lines), columns, about, Lines(tuple(panels), 3, note))


# -- scope -------------------------------------------------------------------------------------------------------------------------

def scope(source: Source) -> Shown:
    """Every defense on the head and on the whole network, with seconds."""
    table = finished(source.rows)
    table = table.assign(victims=victims_words(table))
    table = table.merge(source.timings[["cell", "seconds"]], on="cell", how="left")
    lines, panels, said = [], [], []
    for victims, group in table.groupby("victims", sort=False):
        names, heads, wholes, sides = [], [], [], []
        for defense in dict.fromkeys(group["defense"]):
            mine = group[(group["defense"] == defense) & (group["defense"] != stats.UNDEFENDED)]
            at = {name: mine[mine["scope"] == name] for name in ("head", "whole")}
            if not len(at["head"]):
                continue
            control = bool(mine["control"].any())
            line: dict[str, Any] = {"victims": victims, "defense": defense, "control": "control" if control else ""}
            for name, part in at.items():
                found = {metric: mean(part, metric) for metric in ("asr", "ra", "acc")}
                for metric, value in found.items():
                    line |= bounded(f"{metric}_{name}", value)
                line[f"seconds_{name}"] = float(part["seconds"].median()) if len(part) else math.nan
            difference, pairs = paired_gap(at["head"], at["whole"], "ra") if len(at["whole"]) else (UNMEASURED, 0)
            lines.append({**line, **bounded("difference", difference), "pairs": pairs})
            if pairs and not control:
                sides.append((defense, verdict(difference)))
            if pairs:
                seconds = f"{brief(line['seconds_head'])} / {brief(line['seconds_whole'])} s"
                names.append(f"{defense}{' (control)' if control else ''}, {seconds}")
                heads.append(mean(at["head"], "ra"))
                wholes.append(mean(at["whole"], "ra"))
        if sides:
            better = {side: [markdown(name) for name, found in sides if found == side] for side in (1, -1, 0)}
            said.append(
                f"On victims {markdown(victims)}, RA is higher on the head for {len(better[1])} of {len(sides)} defenses"
                f"{in_brackets(better[1])}, higher on the whole network for {len(better[-1])}{in_brackets(better[-1])}, and not "
                f"told apart for {len(better[0])}."
            )
            series = (("head", tuple(heads)), ("whole", tuple(wholes)))
            panels.append(DotPanel(f"Victims {victims}", "RA in %", tuple(names), series))
    if not said:
        raise Missing("no defense finished at both scopes on an implanted attack")
    known = {c.defense_label for c in source.matrix.cells if isinstance(c.defense, HolderPruning)}
    frame = pd.DataFrame(lines)
    competing = frame[frame["control"] == ""]
    mine, rest = competing[competing["defense"].isin(known)], competing[~competing["defense"].isin(known)]
    if len(mine) and len(rest):
        own = float(mine.groupby("defense")["seconds_head"].mean().min())
        equal = float(rest.groupby("defense")["seconds_head"].mean().max())
        unequal = float(competing.groupby("defense")["seconds_whole"].mean().max())
        if own > 0 and not math.isnan(equal + unequal):
            said.append(
                f"At equal scope, the head, the fastest Hölder pruning takes {brief(own)} s and the slowest other defense "
                f"{brief(equal)} s, {brief(equal / own)} times as long; against defenses of the whole network the same figure "
                f"would read {brief(unequal / own)} times."
            )
    columns = (
        Column("Victims", "text", "victims"), Column("Defense", "text", "defense"), Column("", "text", "control"),
        Column("RA, head", "interval", "ra_head"), Column("RA, whole", "interval", "ra_whole"),
        Column("RA, head - whole", "difference", "difference"), Column("ASR, head", "share", "asr_head"),
        Column("ASR, whole", "share", "asr_whole"), Column("ACC, head", "share", "acc_head"),
        Column("ACC, whole", "share", "acc_whole"),
        Column("Seconds, head", "number", "seconds_head"), Column("Seconds, whole", "number", "seconds_whole"),
        Column("Pairs", "count", "pairs"),
    )  # fmt: skip
    note = "Seconds: head / whole, median over cells. Bars: 95 % intervals over seeds."
    about = f"{MEANS}; differences paired by attacked model; seconds: median over cells, as measured on the machine that ran them"
    return Shown(" ".join(said), frame, columns, about, Dots(tuple(panels), note))


# -- threshold ---------------------------------------------------------------------------------------------------------------------

_STEPS = 101


def along_dial(path: pd.DataFrame, low: float, high: float, flip: bool, column: str) -> np.ndarray:
    """One attacked model's curve at 101 even places from the weakest (0) to the strongest end (1) of a dial, linear in between.

    Args:
        path: points of one cell. low, high: ends of the dial. flip: whether the strongest end is the lowest value.
    """
    points = path.groupby("dial")[column].mean()
    place = (points.index.to_numpy(np.float64) - low) / (high - low)
    place = 1 - place if flip else place
    order = np.argsort(place)
    return np.asarray(np.interp(np.linspace(0, 1, _STEPS), place[order], points.to_numpy(np.float64)[order]))


def threshold(source: Source) -> Shown:
    """Every dial from end to end: the area under RA, the best point, the default, and how wide a good stretch is."""
    table = finished(source.rows)
    curves = stats.at_published_knob(source.curves)
    curves = curves[curves["cell"].isin(table["cell"]) & np.isfinite(curves["dial"])]
    default = stats.implanted_worlds(source.rows[(source.rows["selection"] == "default") & (source.rows["status"] == "ok")])
    lines, panels = [], []
    grid = tuple(float(value) for value in np.linspace(0, 1, _STEPS))
    for entry in stats.entries(table):
        mine = of_entry(curves, entry)
        if mine["dial"].nunique() < 3:
            continue
        low, high = float(mine["dial"].min()), float(mine["dial"].max())
        ends = [path.sort_values("dial")["strength"] for _, path in mine.groupby("cell")]
        flip = sum(float(end.iloc[-1] - end.iloc[0]) for end in ends) < 0
        worlds = []
        for world, path in mine.groupby(WORLD, sort=False):
            found = {name: along_dial(path, low, high, flip, name) for name in ("acc", "asr", "ra")}
            worlds.append({**dict(zip(WORLD, world, strict=True)), **found,
                           **{f"area_{name}": float(np.trapezoid(values, dx=1 / (_STEPS - 1))) for name, values in found.items()}})
        paths = pd.DataFrame(worlds)
        shown = {name: np.mean([np.mean(np.stack(group[name].to_list()), axis=0) for _, group in
                                paths.groupby(SCENARIO, sort=False)], axis=0) for name in ("acc", "asr", "ra")}  # fmt: skip
        before = mean(before_defense(source.rows).merge(paths[WORLD], on=WORLD), "acc").mean
        good = (shown["asr"] < IMPLANTED_ASR) & (shown["acc"] >= before - TAU - 1e-9)
        control = bool(of_entry(table, entry)["control"].any())
        lines.append({
            "track": of_entry(table, entry)["track"].iloc[0], "defense": entry[0], "scope": entry[1],
            "control": "control" if control else "", "dial": mine["dial_name"].iloc[0],
            "points": int(mine.groupby("cell").size().median()),
            **bounded("area", mean(paths, "area_ra")), "area_asr": mean(paths, "area_asr").mean,
            "area_acc": mean(paths, "area_acc").mean, "best": float(shown["ra"].max()),
            "default": mean(of_entry(default, entry), "ra").mean, "window": float(good.mean()),
        })  # fmt: skip
        series = tuple(
            Series(name.upper(), grid, tuple(Interval(float(value), math.nan, math.nan) for value in shown[name]))
            for name in ("acc", "asr", "ra")
        )
        title = f"RA area {100 * lines[-1]['area']:.0f}: {entry_words(entry)}"
        panels.append(Panel(title, "dial, weakest to strongest", "%", series))
    if not lines:
        raise Missing("no defense with a dial of three points or more finished on an implanted attack")
    frame = pd.DataFrame(lines)
    competing = frame[frame["control"] == ""]
    passing = competing[competing["window"] > 0].sort_values("window", ascending=False, kind="stable")
    said = [
        f"{out_of(len(passing), len(competing)).capitalize()} dials have a stretch where the mean ASR is below "
        f"{100 * IMPLANTED_ASR:g} % at a mean loss of at most {100 * TAU:g} points of ACC"
        + (": " + ", ".join(f"{entry_markdown((line['defense'], line['scope']))} on {100 * line['window']:.0f} % of its length"
                            for _, line in passing.iterrows()) if len(passing) else "")
        + "."
    ]  # fmt: skip
    if len(competing):
        most = largest(competing, "area")
        part = Interval(most["area"], most["area_low"], most["area_high"])
        who = entry_markdown((most["defense"], most["scope"]))
        said.append(f"The largest area under RA is that of {who}: {interval_words(part)}.")
        told = competing.assign(lost=competing["best"] - competing["default"]).dropna(subset=["lost"])
        lost = told["lost"]
        if len(lost):
            worst = largest(told, "lost")
            said.append(
                f"The published default stays below the best point of its own dial by {100 * lost.mean():.1f} points of RA on "
                f"average, by {100 * lost.max():.1f} for {entry_markdown((worst['defense'], worst['scope']))}."
            )
    known = {c.defense_label: c.defense for c in source.matrix.cells if isinstance(c.defense, HolderPruning)}
    rules = default[default["defense"].isin(known) & ~default["control"].astype(bool)]
    for entry in stats.entries(rules):
        own = of_entry(rules, entry)
        said.append(
            f"The rule {known[entry[0]].rule!r} of {entry_markdown(entry)} prunes {own['pruned'].mean():.1f} units on average and "
            f"none in {int((own['pruned'] == 0).sum())} of {len(own)} cells."
        )
    random = frame[(frame["control"] != "")]
    if len(random):
        top = largest(random, "area")
        above = int((competing["area_low"] > top["area_high"]).sum())
        said.append(
            f"The area of {entry_markdown((top['defense'], top['scope']))}, a control, is {percent_words(float(top['area']))}; "
            f"the intervals of {out_of(above, len(competing))} defenses lie above its interval."
        )
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"), Column("Dial", "text", "dial"), Column("Points", "count", "points"),
        Column("Area under RA", "interval", "area"), Column("under ASR", "share", "area_asr"),
        Column("under ACC", "share", "area_acc"), Column("RA, best point", "share", "best"),
        Column("RA, default", "share", "default"), Column("Good stretch", "share", "window"),
    )  # fmt: skip
    about = (
        f"{MEANS}; dials scaled to [0, 1] from their weakest to their strongest end, linear between points; good stretch: share "
        f"of the dial where the mean ASR is below {100 * IMPLANTED_ASR:g} % and the mean ACC at most {100 * TAU:g} points lower "
        "than before"
    )
    return Shown(" ".join(said), frame, columns, about, Lines(tuple(panels), 4, "Means over scenarios of means over seeds."))


# -- selection ---------------------------------------------------------------------------------------------------------------------

def _rules(source: Source) -> tuple[pd.DataFrame, list[str]]:
    """Finished rows of cells that have a dial, on implanted scenarios, and the rules that stand in them.

    Raises:
        Missing: there is none.
    """
    table = stats.implanted_worlds(source.rows)
    dials = set(table.loc[table["dial"].notna(), "cell"])
    table = table[(table["status"] == "ok") & table["cell"].isin(dials)]
    if table.empty:
        raise Missing("no defense with a dial finished on an implanted attack")
    return table, [name for name in stats.SELECTIONS if name in set(table["selection"])]


def selection(source: Source) -> Shown:
    """RA under every rule of choosing, and how far below the oracle each stays."""
    table, present = _rules(source)
    rules = [name for name in present if name not in stats.HINDSIGHT]
    lines, names = [], []
    shown: dict[str, list[Interval]] = {name: [] for name in present}
    for (track, defense, scope_), mine in table.groupby(["track", *ENTRY], sort=False):
        by = {name: mine[mine["selection"] == name] for name in present}
        if not len(by["oracle"]):
            continue
        line: dict[str, Any] = {"track": track, "defense": defense, "scope": scope_,
                                "control": "control" if mine["control"].any() else ""}  # fmt: skip
        for name, part in by.items():
            line |= bounded(f"ra_{name}", mean(part, "ra")) | {f"asr_{name}": mean(part, "asr").mean}
            shown[name].append(mean(part, "ra"))
        for name in rules:
            line |= bounded(f"gap_{name}", paired_gap(by["oracle"], by[name], "ra")[0])
        lines.append({**line, "models": int(mine.drop_duplicates(WORLD).shape[0])})
        names.append(f"{entry_words((str(defense), str(scope_)))}{' (control)' if line['control'] else ''}")
    frame = pd.DataFrame(lines)
    competing = frame[frame["control"] == ""]
    said = []
    for name in rules:
        measured = competing.dropna(subset=[f"gap_{name}"])
        apart = measured[measured[f"gap_{name}_low"] > 0]
        if len(measured):
            most = largest(measured, f"gap_{name}")
            found = interval_of(most, f"gap_{name}")
            said.append(
                f"A choice with the test set raises RA above that of the rule *{name}* for {out_of(len(apart), len(measured))} "
                f"defenses, most for {entry_markdown((most['defense'], most['scope']))}: {points_words(found)}."
                if len(apart)
                else f"A choice with the test set raises RA above that of the rule *{name}* for none of {len(measured)} defenses "
                "by more than its interval."
            )
    known = {c.defense_label for c in source.matrix.cells if isinstance(c.defense, ANP)}
    for _, own in competing[competing["defense"].isin(known)].iterrows():
        figures = ", ".join(f"{name} {percent_words(float(own[f'asr_{name}']))}" for name in present)
        said.append(f"ASR of {entry_markdown((own['defense'], own['scope']))}: {figures}.")
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"),
        *(Column(f"RA, {name}", "interval", f"ra_{name}") for name in present),
        *(Column(f"ASR, {name}", "share", f"asr_{name}") for name in present),
        *(Column(f"RA, oracle - {name}", "difference", f"gap_{name}") for name in rules), Column("Models", "count", "models"),
    )  # fmt: skip
    series = tuple((name, tuple(shown[name])) for name in present)
    figure = Dots((DotPanel("RA by how the setting was chosen", "RA in %", tuple(names), series),),
                  "Bars: 95 % intervals over seeds. Oracle and leaky took the test set to choose.")  # fmt: skip
    about = (
        f"{MEANS}; gaps paired by attacked model; a track that grants no clean images has the default and the choices with "
        "hindsight "
        f"alone; rules: {'; '.join(SELECTION_WORDS[name] for name in present)}"
    )
    return Shown(" ".join(said), frame, columns, about, figure)


# -- canaries ----------------------------------------------------------------------------------------------------------------------

_RESAMPLES = 2000


def closed(table: pd.DataFrame) -> Interval:
    """The share of the RA gap between ``validation`` and ``oracle`` that ``canary`` closes: a ratio of means over scenarios
    of means over seeds, with its 95 % percentile interval (seeds resampled within scenarios, fixed seed). Below 0: it chooses
    worse.

    Args:
        table: one row per attacked model with RA in columns of these names. NaN where there is no gap.
    """
    groups = [group[["validation", "canary", "oracle"]].to_numpy(np.float64) for _, group in table.groupby(SCENARIO, sort=False)]

    def ratio(means: np.ndarray) -> np.ndarray:
        gap = means[..., 2] - means[..., 0]
        share: np.ndarray = np.divide(means[..., 1] - means[..., 0], gap, out=np.full(gap.shape, math.nan), where=gap > 1e-9)
        return share

    value = float(ratio(np.mean([group.mean(axis=0) for group in groups], axis=0)))
    if math.isnan(value) or min(map(len, groups)) < 2:
        return Interval(value, math.nan, math.nan)
    draw = np.random.default_rng(0)  # noqa: TID251 - a fixed resampling of stored figures, no part of any run
    drawn = [group[draw.integers(0, len(group), (_RESAMPLES, len(group)))].mean(axis=1) for group in groups]
    found = ratio(np.mean(drawn, axis=0))
    low, high = (float(end) for end in np.nanpercentile(found, [2.5, 97.5]))
    return Interval(value, low, high)


def canary(source: Source) -> Shown:
    """Whether a backdoor of the defender's own, planted in a copy, finds the settings that remove the attacker's."""
    table, _ = _rules(source)
    wanted = ["validation", "canary", "oracle"]
    reasons = source.rows.loc[(source.rows["selection"] == "canary") & (source.rows["status"] != "ok"), "reason"]
    lines, names, every = [], [], []
    shown: dict[str, list[Interval]] = {name: [] for name in wanted}
    for (track, defense, scope_), mine in table[~table["control"].astype(bool)].groupby(["track", *ENTRY], sort=False):
        ra = mine[mine["selection"].isin(wanted)].pivot(index=WORLD, columns="selection", values="ra")
        if not set(wanted) <= set(ra.columns) or ra.dropna().empty:
            continue
        ra = ra.dropna().reset_index()
        cost = mine[mine["selection"].isin(wanted)].groupby("selection")["cost_epochs"].mean()
        part, gap = closed(ra), ra["oracle"] - ra["validation"]
        difference = intervals.interval([list(group["canary"] - group["validation"]) for _, group in ra.groupby(SCENARIO, sort=False)])
        for name in wanted:
            shown[name].append(intervals.interval([list(group[name]) for _, group in ra.groupby(SCENARIO, sort=False)]))
        lines.append({
            "track": track, "defense": defense, "scope": scope_, "models": len(ra),
            **{f"ra_{name}": shown[name][-1].mean for name in wanted}, "gap": float(gap.mean()), **bounded("closed", part),
            **bounded("difference", difference), "canary_hits": float((ra["oracle"] - ra["canary"] < 1e-9).mean()),
            "validation_hits": float((ra["oracle"] - ra["validation"] < 1e-9).mean()),
            "cost_validation": float(cost["validation"]), "cost_canary": float(cost["canary"]),
        })  # fmt: skip
        every.append(ra)
        names.append(entry_words((str(defense), str(scope_))))
    if not lines:
        raise Missing("no defense with a dial was chosen by canaries on an implanted attack")
    frame = pd.DataFrame(lines)
    sides = [verdict(interval_of(line, "difference")) for _, line in frame.iterrows()]
    better, worse = ([f"{entry_markdown((line['defense'], line['scope']))} {points_words(interval_of(line, 'difference'))}"
                      for (_, line), side in zip(frame.iterrows(), sides, strict=True) if side == wanted_side]
                     for wanted_side in (1, -1))  # fmt: skip
    together = closed(pd.concat(every))
    bounds = "" if math.isnan(together.low) else f" [{100 * together.low:.0f}, {100 * together.high:.0f}]"
    share = (
        "There is no gap to close." if math.isnan(together.mean)
        else f"Over all of them, canaries close {100 * together.mean:.0f} %{bounds} of the RA gap between *validation* and "
        "*oracle*."
    )  # fmt: skip
    said = [
        share,
        f"RA is higher than under *validation* for {out_of(len(better), len(frame))} defenses{in_brackets(better)} and lower for "
        f"{len(worse)}{in_brackets(worse)}; the others are not told apart.",
        f"The choice by canaries is as good as the oracle's in {percent_words(float(frame['canary_hits'].mean()))} of the models, "
        "that "
        f"by validation in {percent_words(float(frame['validation_hits'].mean()))} (means over defenses).",
        f"It costs {frame['cost_canary'].mean():.1f} standard epochs where validation costs {frame['cost_validation'].mean():.1f}.",
    ]
    failed = reasons[~reasons.str.startswith(("the track grants", "no canary is planted"))]
    if len(failed):
        kinds = failed.str.replace(r"\(ASR.*\)", "", regex=True).value_counts()
        said.append("Not chosen by canaries: " + "; ".join(f"{count} cells: {markdown(reason)}" for reason, count in kinds.items())
        + ".")
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("RA, validation", "share", "ra_validation"), Column("RA, canary", "share", "ra_canary"),
        Column("RA, oracle", "share", "ra_oracle"), Column("RA, canary - validation", "difference", "difference"),
        Column("Gap, oracle - validation", "points", "gap"), Column("Share of the gap closed", "interval", "closed"),
        Column("As good as the oracle: canary", "share", "canary_hits"), Column("validation", "share", "validation_hits"),
        Column("Cost, validation", "number", "cost_validation"), Column("Cost, canary", "number", "cost_canary"),
        Column("Models", "count", "models"),
    )  # fmt: skip
    series = tuple((name, tuple(shown[name])) for name in wanted)
    panel = DotPanel("RA by how the setting was chosen", "RA in %", tuple(names), series)
    figure = Dots((panel,), "Bars: 95 % intervals over seeds.")
    planted = source.matrix.cells[0].canaries
    about = (
        f"{MEANS}; canaries planted: {listed([one.name for one in planted])}, in copies of the attacked model, with the clean "
        "budget "
        "alone; share of the gap: ratio of means, negative where canaries choose worse than validation; cost in standard epochs"
    )
    return Shown(" ".join(said), frame, columns, about, figure)


# -- budget ------------------------------------------------------------------------------------------------------------------------

_BUDGET = re.compile(r"^(?P<base>.*), budget (?P<percent>[0-9.]+) %$")


def _budgeted(label: str) -> tuple[str, float]:
    """A defense's label without its budget, and the budget as a share; NaN without one."""
    found = _BUDGET.match(label)
    return (found["base"], float(found["percent"]) / 100) if found else (label, math.nan)


def budget(source: Source) -> Shown:
    """ACC, ASR and RA against the number of clean images."""
    table = stats.implanted_worlds(judged(source.rows))
    parts = [_budgeted(label) for label in table["defense"]]
    table = table.assign(base=[base for base, _ in parts], share=[share for _, share in parts])
    if table["share"].nunique() < 2:
        raise Missing("it takes defenses met with two clean budgets or more")
    good = table[table["status"] == "ok"]
    images = good[good["clean_images"] > 0].groupby("share")["clean_images"].max().to_dict()
    scratch = good[good["base"].str.startswith(SCRATCH)]
    lines, reasons = [], []
    for (base, scope_, share), mine in table.groupby(["base", "scope", "share"], sort=False, dropna=False):
        if base == stats.UNDEFENDED:
            continue
        done = mine[mine["status"] == "ok"]
        why = listed([str(reason) for reason in dict.fromkeys(mine.loc[mine["status"] != "ok", "reason"])], "")
        same = scratch[scratch["share"] == share]
        versus = paired_gap(done, same, "ra")[0] if len(done) and len(same) and not str(base).startswith(SCRATCH) else UNMEASURED
        lines.append({"defense": base, "scope": scope_, "control": "control" if mine["control"].any() else "", "share": share,
                      "images": images.get(share, math.nan), "cells": f"{len(done)} of {len(mine)}", **means_of(done),
                      **bounded("versus", versus), "reason": why})  # fmt: skip
        reasons += [why] * bool(why)
    frame = pd.DataFrame(lines)
    told = frame[frame["share"].notna() & frame["images"].notna()]
    if told.empty:
        raise Missing("no defense finished with a budget")
    said = []
    for share in (told["share"].min(), told["share"].max()):
        here = told[(told["share"] == share) & told["versus"].notna() & (told["control"] == "")]
        ahead = [entry_markdown((line["defense"], line["scope"])) for _, line in here.iterrows() if line["versus_low"] > 0]
        behind = int((here["versus_high"] < 0).sum())
        if len(here):
            said.append(
                f"With {images[share]:.0f} clean images ({100 * share:g} %), RA is above that of training from scratch on the "
                f"same images for {out_of(len(ahead), len(here))} defenses{in_brackets(ahead)} and below it for {behind}."
            )
    competing = told[told["control"] == ""]
    ends = []
    for (base, scope_), mine in competing.groupby(["defense", "scope"], sort=False):
        by = mine.set_index("share")
        ends.append((str(base), str(scope_), by["ra"][by.index.min()], by["ra"][by.index.max()]))
    if ends:
        most = max(ends, key=lambda line: line[3] - line[2])
        said.append(
            f"From the smallest finished budget to the largest, the RA of {entry_markdown((most[0], most[1]))} gains most: from "
            f"{percent_words(most[2])} to {percent_words(most[3])}."
            if most[3] > most[2]
            else "No defense gains RA from the smallest finished budget to the largest."
        )
    if reasons:
        said.append("Refused: " + "; ".join(markdown(reason) for reason in dict.fromkeys(reasons)) + ".")
    columns = (
        Column("Defense", "text", "defense"), Column("Scope", "text", "scope"), Column("", "text", "control"),
        Column("Budget", "share", "share"), Column("Images", "count", "images"), Column("Cells", "text", "cells"), *FIGURES,
        Column("RA - RA from scratch", "difference", "versus"), Column("Refused or failed", "text", "reason"),
    )  # fmt: skip
    panels = []
    for name in ("ra", "asr", "acc"):
        series = []
        for (base, scope_), mine in told.groupby(["defense", "scope"], sort=False):
            mine = mine.dropna(subset=[name]).sort_values("share")
            y = tuple(Interval(line[name], line[f"{name}_low"], line[f"{name}_high"]) for _, line in mine.iterrows())
            called, control = entry_words((str(base), str(scope_))), bool((mine["control"] != "").any())
            series.append(Series(called, tuple(mine["images"].astype(float)), y, control=control))
        free = frame[frame["share"].isna() & frame[name].notna()]
        flat = tuple(
            (f"{entry_words((line['defense'], line['scope']))}, no images", float(line[name])) for _, line in free.iterrows()
        )
        panels.append(Panel(name.upper(), "clean images", "%", tuple(series), log=True, flat=flat))
    about = f"{MEANS}; images: a fifth of them for validation; differences paired by attacked model, on the same images"
    return Shown(" ".join(said), frame, columns, about, Lines(tuple(panels), 3, "Bands: 95 % intervals over seeds."))


# -- rate --------------------------------------------------------------------------------------------------------------------------

def _rateless(label: str) -> str:
    """An attack's label without its poisoning rate."""
    return re.sub(r" [0-9.]+ %$", "", label)


def rate(source: Source) -> Shown:
    """Undefended ASR and ACC loss against the poisoning rate, and what defenses leave."""
    before = before_defense(source.rows)
    before = before.assign(kind=before["attack"].map(_rateless))
    if before.groupby("kind")["rate"].nunique().max() < 2:
        raise Missing("it takes an attack at two poisoning rates or more")
    table = stats.implanted_worlds(judged(source.rows))
    table = table[table["status"] == "ok"].assign(kind=lambda rows: rows["attack"].map(_rateless))
    every = stats.entries(table[table["defense"] != stats.UNDEFENDED])
    lines, said = [], []
    undefended: list[Series] = []
    losses: list[Series] = []
    for kind, mine in before.groupby("kind", sort=False):
        for value, here in mine.groupby("rate"):
            line: dict[str, Any] = {"attack": kind, "rate": value, "implanted": implanted_words(here)}
            line |= means_of(here, ("asr", "loss"))
            at = table[(table["kind"] == kind) & (table["rate"] == value)]
            line |= {f"ra {entry_words(entry)}": mean(of_entry(at, entry), "ra").mean for entry in every}
            lines.append({**line, "counts": bool(here["implanted"].astype(bool).mean() > 0.5)})
        part = [line for line in lines if line["attack"] == kind]
        x = tuple(float(line["rate"]) for line in part)
        undefended.append(Series(str(kind), x, tuple(Interval(p["asr"], p["asr_low"], p["asr_high"]) for p in part)))
        losses.append(Series(str(kind), x, tuple(Interval(p["loss"], p["loss_low"], p["loss_high"]) for p in part)))
        works = [line["rate"] for line in part if line["counts"]]
        said.append(
            f"{markdown(kind)} implants in most seeds at {', '.join(f'{100 * value:g} %' for value in works)}; at the highest "
            "rate it "
            f"costs {points_words(Interval(part[-1]['loss'], part[-1]['loss_low'], part[-1]['loss_high'])).lstrip('+')} of ACC."
            if works
            else f"{markdown(kind)} implants at no rate."
        )
    changes = []
    for entry in competitors(table):
        differences = []
        for kind, mine in of_entry(table, entry).groupby("kind", sort=False):
            low, high = mine["rate"].min(), mine["rate"].max()
            if low < high:
                ends = [mine[mine["rate"] == value].assign(attack=kind) for value in (high, low)]
                both = ends[0][[*WORLD, "ra"]].merge(ends[1][[*WORLD, "ra"]], on=WORLD, suffixes=("", "_low"))
                differences.append((both["ra"] - both["ra_low"]).to_list())
        if any(differences):
            changes.append((entry, intervals.interval(differences)))
    if changes:
        falls = [f"{entry_markdown(entry)} {points_words(part)}" for entry, part in changes if verdict(part) < 0]
        rises = [f"{entry_markdown(entry)} {points_words(part)}" for entry, part in changes if verdict(part) > 0]
        said.append(
            f"From the lowest rate that implants to the highest, RA falls for {len(falls)} of {len(changes)} defenses"
            f"{in_brackets(falls)} and rises for {len(rises)}{in_brackets(rises)}."
        )
    frame = pd.DataFrame(lines)
    columns = (
        Column("Attack", "text", "attack"), Column("Rate", "share", "rate"), Column("Implanted", "text", "implanted"),
        Column("ASR, undefended", "interval", "asr"), Column("ACC, loss to the benign twin", "difference", "loss"),
        *(Column(f"RA, {entry_words(entry)}", "share", f"ra {entry_words(entry)}") for entry in every),
    )  # fmt: skip
    panels = [Panel("Undefended: ASR", "poisoning rate", "%", tuple(undefended), log=True, percent=True),
              Panel("Undefended: loss of ACC", "poisoning rate", "points", tuple(losses), log=True, percent=True, signed=True)]
    for kind in dict.fromkeys(frame["attack"]):
        part = frame[(frame["attack"] == kind) & frame["counts"]]
        series = []
        for entry in every:
            at = of_entry(table[table["kind"] == kind], entry)
            x = tuple(float(value) for value in sorted(set(at["rate"])))
            y = tuple(mean(at[at["rate"] == value], "ra") for value in x)
            series.append(Series(entry_words(entry), x, y, entry))
        if len(part):
            panels.append(Panel(f"{kind}: RA, defended", "poisoning rate", "%", tuple(series), log=True, percent=True))
    about = "undefended figures: means over all seeds; RA: means over implanted attacked models; 95 % intervals over seeds"
    note = "Undefended: all seeds. Defended: rates at which most seeds implant, those seeds. Bands: 95 % intervals over seeds."
    return Shown(" ".join(said), frame.drop(columns="counts"), columns, about, Lines(tuple(panels), 3, note))


# -- extractor ---------------------------------------------------------------------------------------------------------------------

def extractor(source: Source) -> Shown:
    """Heads on features of every origin: do attacks implant, do defenses help, and does the plainest classifier do better?"""
    given = {(c.defense_label): c.extractor_label for c in source.matrix.cells if c.extractor is not None}
    frozen = {c.scenario.backbone_label: c.scenario.frozen.label for c in source.matrix.cells if c.scenario.frozen}
    if not frozen:
        raise Missing("it takes a victim on given features")
    every = before_defense(source.rows).assign(victims=lambda rows: victims_words(rows))
    live = stats.implanted_worlds(judged(source.rows))
    live = live[live["status"] == "ok"].assign(victims=lambda rows: victims_words(rows))
    lines, panels, said, sides = [], [], [], []
    for (victims, backbone), worlds in every.groupby(["victims", "backbone"], sort=False):
        label = frozen.get(str(backbone), "")
        counts = []
        for attack, here in worlds.groupby("attack", sort=False):
            line: dict[str, Any] = {"victims": victims, "attack": attack, "implanted": implanted_words(here),
                                    **means_of(here, ("acc", "asr", "loss"))}  # fmt: skip
            counts.append(f"{markdown(attack)} in {implanted_words(here)} seeds")
            at = live[(live["backbone"] == backbone) & (live["attack"] == attack)]
            means = {entry: mean(of_entry(at, entry), "ra").mean for entry in competitors(at)}
            found = {entry: value for entry, value in means.items() if not math.isnan(value)}
            known = stats.entries(at[at["control"].astype(bool)]) if label else []
            plainest = [entry for entry in known if given.get(entry[0]) == label]
            if found:
                best = max(found, key=lambda entry: found[entry])
                line |= {"best": entry_words(best), "best_ra": found[best]}
                for entry in plainest[:2]:
                    difference, _ = paired_gap(of_entry(at, best), of_entry(at, entry), "ra")
                    sides.append((best, entry, difference))
                controls = {entry: mean(of_entry(at, entry), "ra").mean for entry in plainest}
                if controls:
                    top = max(controls, key=lambda entry: controls[entry])
                    line |= {"plainest": top[0], "plainest_ra": controls[top],
                             **bounded("difference", paired_gap(of_entry(at, best), of_entry(at, top), "ra")[0])}  # fmt: skip
            lines.append(line)
        said.append(f"On victims {markdown(victims)}: {', '.join(counts)}.")
        here = live[live["backbone"] == backbone]
        own = [entry for entry in stats.entries(here) if not given.get(entry[0]) or given[entry[0]] == label]
        if own:
            series = tuple((name.upper(), tuple(mean(of_entry(here, entry), name) for entry in own)) for name in ("ra", "asr"))
            worked = int(here[SCENARIO].drop_duplicates().shape[0])
            title = f"Victims {victims}; {worked} attack{'s' * (worked != 1)} implanted"
            panels.append(DotPanel(title, "%", tuple(figure_names(here, own)), series))
    said.insert(0, "Implanted:")
    if sides:
        ahead, behind = (sum(verdict(part) == side for _, _, part in sides) for side in (1, -1))
        said.append(
            f"Of {len(sides)} pairs of the best head defense (picked with hindsight) and a plain classifier on the same "
            "features, the "
            f"defense is ahead in {ahead}, behind in {behind}, and the rest are not told apart: "
            + (
                "the attacked head is worth keeping there."
                if ahead > behind
                else "what the features give without any head is not beaten."
            )
        )
    else:
        said.append("Through no given features did an attack implant, so no defense of a head on them can be judged.")
    columns = (
        Column("Victims", "text", "victims"), Column("Attack", "text", "attack"), Column("Implanted", "text", "implanted"),
        Column("ACC", "interval", "acc"), Column("ACC, loss to the benign twin", "difference", "loss"),
        Column("ASR", "interval", "asr"),
        Column("Best defense of the head", "text", "best"), Column("RA, best defense", "share", "best_ra"),
        Column("Best plain classifier on the features", "text", "plainest"), Column("RA, plain classifier", "share", "plainest_ra"),
        Column("RA, difference", "difference", "difference"),
    )  # fmt: skip
    frame = pd.DataFrame(lines)
    for name in ("best", "plainest"):
        frame[name] = frame[name].fillna("") if name in frame else ""
    for name in ("best_ra", "plainest_ra", "difference", "difference_low", "difference_high"):
        frame[name] = frame.get(name, math.nan)
    about = "undefended figures: means over all seeds; RA: means over implanted attacked models; 95 % intervals over seeds"
    note = "Means over implanted attacked models; bars: 95 % intervals over seeds."
    return Shown(" ".join(said), frame, columns, about, Dots(tuple(panels), note) if panels else None)


# -- adaptive ----------------------------------------------------------------------------------------------------------------------

def adaptive(source: Source) -> Shown:
    """Attackers who know the defense, against the same attack at strength 0."""
    known = {c.scenario.attack_label: c.scenario.attack for c in source.matrix.cells if isinstance(c.scenario.attack, Adaptive)}
    strengths = {label: (attack.name, attack.strength) for label, attack in known.items()}
    if len(set(strengths.values())) < 2:
        raise Missing("it takes an adaptive attack at two strengths or more")
    every = before_defense(source.rows)
    every = every[every["attack"].isin(strengths)]
    table = stats.implanted_worlds(judged(source.rows))
    table = table[(table["status"] == "ok") & table["attack"].isin(strengths)]
    kinds = list(dict.fromkeys(kind for kind, _ in strengths.values()))
    lines, said, top, bottom = [], [], [], []
    for kind in kinds:
        labels = {strength: label for label, (name, strength) in strengths.items() if name == kind}
        worlds = {strength: every[every["attack"] == labels[strength]] for strength in sorted(labels)}
        counts = "; ".join(f"{strength:g}: {implanted_words(here)}" for strength, here in worlds.items())
        panels: dict[str, list[Series]] = {"ra": [], "asr": []}
        falls, rises = [], []
        mine = table[table["attack"].isin(labels.values())]
        for entry in stats.entries(mine):
            own = of_entry(mine, entry)
            at = {strength: own[own["attack"] == label] for strength, label in sorted(labels.items())}
            x = tuple(strength for strength, part in at.items() if len(part))
            for name, series in panels.items():
                called = "undefended" if entry[0] == stats.UNDEFENDED else entry_words(entry)
                series.append(Series(called, x, tuple(mean(at[strength], name) for strength in x), entry))
            line: dict[str, Any] = {"attack": kind, "defense": entry[0], "scope": entry[1],
                                    "control": "control" if own["control"].any() else "", "implanted": counts}  # fmt: skip
            strongest = max(x, default=0.0)
            line |= {"strength": strongest, **bounded("strong", mean(at[strongest], "ra"))}
            if 0.0 in x:
                line |= bounded("base", mean(at[0.0], "ra"))
            if 0.0 in x and strongest > 0:
                ends = [at[strength].assign(attack=kind) for strength in (strongest, 0.0)]
                part = paired_gap(ends[0], ends[1], "ra")[0]
                line |= bounded("difference", part)
                line |= bounded("asr_difference", paired_gap(ends[0], ends[1], "asr")[0])
                if not own["control"].any():
                    falls += [f"{entry_markdown(entry)} {points_words(part)}"] * (verdict(part) < 0)
                    rises += [f"{entry_markdown(entry)} {points_words(part)}"] * (verdict(part) > 0)
            lines.append(line)
        works = [strength for strength, here in worlds.items() if here["implanted"].astype(bool).mean() > 0.5]
        tested = [line for line in lines if line["attack"] == kind and not line["control"] and "difference" in line]
        said.append(
            f"{markdown(kind)} (implanted in most seeds at {', '.join(f'{value:g}' for value in works)}): against its base "
            "attack, RA "
            f"falls for {len(falls)} of {len(tested)} defenses{in_brackets(falls)} and rises for {len(rises)}{in_brackets(rises)}."
            if tested
            else f"{markdown(kind)} does not implant at both strength 0 and another, so nothing can be compared."
        )
        top.append(Panel(f"{kind}: RA", "strength", "%", tuple(panels["ra"]), even=True))
        bottom.append(Panel(f"{kind}: ASR", "strength", "%", tuple(panels["asr"]), even=True))
    frame = pd.DataFrame(lines)
    if frame.empty:
        raise Missing(f"no adaptive attack implanted ({gate_words(source.rows)})")
    for name in ("base", "strong", "difference", "asr_difference"):
        for end in ("", "_low", "_high"):
            frame[name + end] = frame.get(name + end, math.nan)
    columns = (
        Column("Attack", "text", "attack"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"), Column("RA, strength 0", "interval", "base"),
        Column("Strongest that implants", "number", "strength"),
        Column("RA there", "interval", "strong"), Column("RA, difference", "difference", "difference"),
        Column("ASR, difference", "difference", "asr_difference"), Column("Implanted, by strength", "text", "implanted"),
    )  # fmt: skip
    about = f"{MEANS}; differences to strength 0 paired by seed, where both implanted"
    note = "Strengths at which most seeds implant, those seeds. Bands: 95 % intervals over seeds."
    figure = Lines((*top, *bottom), len(kinds), note)
    return Shown(" ".join(said), frame, columns, about, figure)


# -- natural -----------------------------------------------------------------------------------------------------------------------

def natural(source: Source) -> Shown:
    """A trigger searched for on a benign model: kept, and found again on the defended model."""
    table = judged(source.rows)
    # Nobody poisoned these models, so the effect is 0 by definition: what counts here is that the trigger works.
    table = table[(table["status"] == "ok") & table["asr_recraft"].notna() & (table["asr_undefended"] >= IMPLANTED_ASR)]
    if table.empty:
        raise Missing("no trigger that is computed on the model works")
    every = before_defense(source.rows)
    lines: list[dict[str, Any]] = []
    kept: list[bool] = []
    found: list[bool] = []
    panels, said = [], []
    for attack, worlds in every.groupby("attack", sort=False):
        said.append(
            f"On {len(worlds)} models that nobody poisoned, {markdown(attack)} reaches an ASR of "
            f"{interval_words(mean(worlds, 'asr'))}; on {int((worlds['asr'] >= IMPLANTED_ASR).sum())} it is at least "
            f"{100 * IMPLANTED_ASR:g} %, and defenses are shown on these. Such a trigger is adversarial under the gate."
        )
        mine = table[table["attack"] == attack]
        entries = stats.entries(mine)
        for entry in entries:
            own = of_entry(mine, entry)
            difference = own.assign(gap=own["asr_recraft"] - own["asr"])
            lines.append({
                "attack": attack, "defense": entry[0], "scope": entry[1], "control": "control" if own["control"].any() else "",
                **means_of(own, ("acc", "asr", "ra", "asr_recraft", "ra_recraft")), **bounded("gap", mean(difference, "gap")),
            })  # fmt: skip
            if entry[0] != stats.UNDEFENDED and not own["control"].any():
                kept.append(bool(lines[-1]["asr"] < IMPLANTED_ASR))
                found.append(bool(lines[-1]["asr_recraft"] < IMPLANTED_ASR))
        if len(mine):
            series = tuple((words, tuple(mean(of_entry(mine, entry), name) for entry in entries))
                           for words, name in (("trigger kept", "asr"), ("found again", "asr_recraft")))  # fmt: skip
            panels.append(DotPanel(str(attack), "ASR in %", tuple(figure_names(mine, entries)), series))
    if kept:
        if sum(found) < sum(kept):
            tail = "what they remove is one trigger, not the weakness."
        else:
            tail = "what they remove stays removed." if sum(kept) else "they remove nothing of it."
        said.append(
            "Defenses, which have no backdoor to find here, take the ASR of the trigger that is kept below "
            f"{100 * IMPLANTED_ASR:g} % in {out_of(sum(kept), len(kept))} cases, and of a trigger found again on the defended "
            f"model in {out_of(sum(found), len(found))}: {tail}"
        )
    columns = (
        Column("Attack", "text", "attack"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"), Column("ACC", "interval", "acc"), Column("ASR, trigger kept", "interval", "asr"),
        Column("ASR, found again", "interval", "asr_recraft"), Column("Difference", "difference", "gap"),
        Column("RA, kept", "share", "ra"), Column("RA, found again", "share", "ra_recraft"),
    )  # fmt: skip
    about = f"means over models whose ASR is at least {100 * IMPLANTED_ASR:g} %, whatever their twin answers, 95 % intervals over "
    "seeds"
    return Shown(" ".join(said), pd.DataFrame(lines), columns, about, Dots(tuple(panels), "Bars: 95 % intervals over seeds."))
