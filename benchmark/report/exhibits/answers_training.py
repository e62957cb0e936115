"""Answers from matrices that train the same networks in several ways: by precision, by recipe."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from benchmark.analysis import stats
from benchmark.analysis.intervals import Interval
from benchmark.report.exhibits.evidence import (
    UNMEASURED,
    Column,
    Missing,
    Shown,
    Source,
    after_colon,
    before_defense,
    bounded,
    competitors,
    entry_markdown,
    entry_words,
    implanted_words,
    judged,
    listed,
    mean,
    means_of,
    of_entry,
    out_of,
    paired_gap,
    points_words,
    verdict,
)
from benchmark.report.figures import DotPanel, Dots
from benchmark.report.text import markdown, number_text

__all__ = ["training"]


def _ways(source: Source) -> list[str]:
    """Labels of one network that is trained in several ways, in the order of the matrix.

    Raises:
        Missing: there is no such network.
    """
    recipes: dict[str, dict[str, str]] = {}
    for cell in source.matrix.cells:
        scenario = cell.scenario
        if scenario.frozen is None:
            recipes.setdefault(str(scenario.backbone.spec()), {})[scenario.backbone_label] = str(scenario.recipe.spec())
    known = set(source.rows["backbone"])
    for labels in recipes.values():
        run = [label for label in labels if label in known]
        if len(run) > 1 and len({labels[label] for label in run}) > 1:
            return run
    raise Missing("it takes one network under several labels, each with a recipe of its own")


def _spread(table: pd.DataFrame, column: str) -> float:
    """What the seeds of one scenario span."""
    return float(table[column].max() - table[column].min())


def _order(first: pd.DataFrame, other: pd.DataFrame) -> tuple[float, int, bool]:
    """Kendall's correlation of the defenses' mean RA, one table against another; of how many; whether both have the same best."""
    entries = [entry for entry in competitors(first) if entry in competitors(other)]
    means = [[mean(of_entry(table, entry), "ra").mean for entry in entries] for table in (first, other)]
    kept = [pair for pair in zip(*means, strict=True) if not any(math.isnan(value) for value in pair)]
    if len(kept) < 2:
        return math.nan, len(kept), False
    left, right = (np.array(side) for side in zip(*kept, strict=True))
    varies = len(set(left.tolist())) > 1 and len(set(right.tolist())) > 1
    tau = float(scipy_stats.kendalltau(left, right).statistic) if varies else math.nan
    return tau, len(kept), int(left.argmax()) == int(right.argmax())


def _common(tables: Iterable[pd.DataFrame], by: list[str]) -> list[pd.DataFrame]:
    """The tables without what one of them lacks, by the columns ``by``."""
    tables = list(tables)
    shared = functools.reduce(lambda left, right: left.merge(right, on=by), (table[by].drop_duplicates() for table in tables))
    return [table.merge(shared, on=by) for table in tables]


def _chance(one: pd.DataFrame, other: pd.DataFrame) -> float:
    """How well an order at one seed of ``one`` agrees with that at another seed of ``other``: the mean of Kendall's correlations.

    A table against itself says what seeds alone do to an order.
    """
    seeds = sorted(set(one["seed"]) | set(other["seed"]))
    pairs = (_common((one[one["seed"] == a], other[other["seed"] == b]), stats.SCENARIO) for a, b in permutations(seeds, 2))
    known = [tau for left, right in pairs if not math.isnan(tau := _order(left, right)[0])]
    return float(np.mean(known)) if known else math.nan


def training(source: Source) -> Shown:
    """The first way of training against every other: do undefended figures and the order of the defenses stay?"""
    first, *others = _ways(source)
    every = before_defense(source.rows)
    # Pairs are made by scenario and seed: under one name for the network, for that is the same.
    by = {label: every[every["backbone"] == label].assign(backbone=first) for label in (first, *others)}
    table = stats.implanted_worlds(judged(source.rows))
    table = table[table["status"] == "ok"]
    # Defenses are compared on what implanted every way: otherwise one way's mean would be of other attacks than another's.
    parts = _common((table[table["backbone"] == label].assign(backbone=first) for label in by), stats.WORLD)
    live = dict(zip(by, parts, strict=True))
    both = live[first][stats.WORLD].drop_duplicates()
    lines: list[dict[str, Any]] = []
    said: list[str] = []
    moved: dict[str, dict[str, list[Interval]]] = {label: {"acc": [], "asr": []} for label in others}
    attacks = list(dict.fromkeys(every["attack"]))
    for attack in attacks:
        base = by[first][by[first]["attack"] == attack]
        for label, worlds in by.items():
            here = worlds[worlds["attack"] == attack]
            line: dict[str, Any] = {"attack": attack, "trained": label, "implanted": implanted_words(here),
                                    **means_of(here, ("acc", "asr"))}  # fmt: skip
            for name in ("acc", "asr"):
                part = paired_gap(here, base, name)[0] if label != first else UNMEASURED
                line |= {**bounded(f"d_{name}", part), f"span_{name}": _spread(base, name) if label == first else math.nan}
                if label != first:
                    line[f"inside_{name}"] = bool(abs(part.mean) <= _spread(base, name))
                    moved[label][name].append(part)
            lines.append(line)
    if len(both):
        named = listed([markdown(name) for name in dict.fromkeys(both["attack"])])
        said.append(
            f"Defenses are compared on {len(both)} of {len(by[first])} attacked models, which implanted every way: {named}."
        )
    for label in others:
        mine = [line for line in lines if line["trained"] == label]
        whole = {name: paired_gap(by[label], by[first], name)[0] for name in ("acc", "asr")}
        inside = {name: sum(line[f"inside_{name}"] for line in mine) for name in ("acc", "asr")}
        tau, count, same = _order(live[first], live[label])
        said.append(
            f"{markdown(label)} against {markdown(first)}, the same seeds: ACC {points_words(whole['acc'])}, ASR "
            f"{points_words(whole['asr'])}; the mean stays within what the seeds of {markdown(first)} span for "
            f"{out_of(inside['acc'], len(mine))} attacks in ACC and {out_of(inside['asr'], len(mine))} in ASR."
        )
        if count < 2:
            said.append("Too few defenses met models that implanted both ways for an order to be compared.")
        else:
            words = "not defined" if math.isnan(tau) else number_text(tau)
            said.append(
                f"The order of {count} defenses by RA agrees with a Kendall correlation of {words}, and the best is "
                f"{'the same' if same else 'another'}."
            )
            within, across = _chance(live[first], live[first]), _chance(live[first], live[label])
            if not (math.isnan(within) or math.isnan(across)):
                said.append(
                    f"Between two different seeds, orders agree by {number_text(across)} on average across the two, and by "
                    f"{number_text(within)} within {markdown(first)} alone."
                )
    entries = [entry for entry in competitors(live[first]) if all(entry in competitors(live[label]) for label in others)]
    apart: dict[str, list[str]] = {label: [] for label in others}
    for entry in entries:
        base = of_entry(live[first], entry)
        for label in live:
            own = of_entry(live[label], entry)
            part = paired_gap(own, base, "ra")[0] if label != first else UNMEASURED
            if verdict(part):
                apart[label].append(f"{entry_markdown(entry)} {points_words(part)}")
            lines.append({"attack": "implanted every way", "defense": entry_words(entry), "trained": label,
                          **means_of(own), **bounded("d_ra", part)})  # fmt: skip
    for label in others if entries else ():
        said.append(
            f"After a defense, RA under {markdown(label)} and {markdown(first)} is told apart for "
            f"{out_of(len(apart[label]), len(entries))}{after_colon(apart[label])}."
        )
    columns = (
        Column("Attack", "text", "attack"), Column("Defense", "text", "defense"), Column("Trained", "text", "trained"),
        Column("Implanted", "text", "implanted"),
        Column("ACC", "interval", "acc"), Column("ACC, difference", "difference", "d_acc"),
        Column("ACC, span of seeds", "share", "span_acc"),
        Column("ASR", "interval", "asr"), Column("ASR, difference", "difference", "d_asr"),
        Column("ASR, span of seeds", "share", "span_asr"),
        Column("RA", "interval", "ra"), Column("RA, difference", "difference", "d_ra"),
    )  # fmt: skip
    panels = [
        DotPanel(f"{name.upper()} without a defense, difference to {first}", "points", tuple(attacks),
                 tuple((label, tuple(moved[label][name])) for label in others), signed=True)
        for name in ("acc", "asr")
    ]  # fmt: skip
    if entries:
        ra = {label: tuple(mean(of_entry(live[label], entry), "ra") for entry in entries) for label in live}
        panels.append(DotPanel("RA after a defense", "%", tuple(map(entry_words, entries)), tuple(ra.items())))
    about = (
        f"without a defense: all seeds; with one: attacked models that implanted every way; differences to {first}, paired by "
        "seed; 95 % intervals over seeds"
    )
    frame = pd.DataFrame(lines).drop(columns=["inside_acc", "inside_asr"])
    frame["defense"] = frame["defense"].fillna("none") if entries else "none"
    frame["implanted"] = frame["implanted"].fillna("")
    return Shown(" ".join(said), frame, columns, about, Dots(tuple(panels), "Bars: 95 % intervals over seeds."))
