"""One network trained in several ways, by precision or by recipe: do undefended figures and the order of the defenses change?"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import DotPanel, Dots

COLUMNS = (
    *ev.text(attack="Attack", defense="Defense", trained="Trained", implanted="Implanted"), *ev.interval(acc="ACC"),
    *ev.difference(d_acc="ACC, difference"), *ev.share(span_acc="ACC, span of seeds"), *ev.interval(asr="ASR"),
    *ev.difference(d_asr="ASR, difference"), *ev.share(span_asr="ASR, span of seeds"), *ev.interval(ra="RA"),
    *ev.difference(d_ra="RA, difference"),
)  # fmt: skip
EVERY = "implanted every way"
Ways = dict[str, pd.DataFrame]


def _ways(source: ev.Source) -> list[str]:
    """Labels of one network that is trained in several ways, in the order of the matrix.

    Raises:
        Missing: there is no such network.
    """
    recipes: dict[str, dict[str, str]] = {}
    for scenario in source.matrix.scenarios:
        if scenario.frozen is None:
            recipes.setdefault(str(scenario.backbone.spec()), {})[scenario.backbone_label] = str(scenario.recipe.spec())
    known = set(source.rows["backbone"])
    for labels in recipes.values():
        run = [label for label in labels if label in known]
        if len(run) > 1 and len({labels[label] for label in run}) > 1:
            return run
    raise ev.Missing("it takes one network under several labels, each with a recipe of its own")


def _order(first: pd.DataFrame, other: pd.DataFrame) -> tuple[float, int, bool]:
    """Kendall's correlation of the defenses' mean RA, one table against another; of how many; whether both have the same best."""
    entries = [entry for entry in ev.competitors(first) if entry in ev.competitors(other)]
    means = [[ev.mean(ev.of_entry(table, entry), "ra").mean for entry in entries] for table in (first, other)]
    kept = [pair for pair in zip(*means, strict=True) if not any(math.isnan(value) for value in pair)]
    if len(kept) < 2:
        return math.nan, len(kept), False
    left, right = (np.array(side) for side in zip(*kept, strict=True))
    varies = len(set(left.tolist())) > 1 and len(set(right.tolist())) > 1
    tau = float(scipy_stats.kendalltau(left, right).statistic) if varies else math.nan
    return tau, len(kept), int(left.argmax()) == int(right.argmax())


def _common(tables: Sequence[pd.DataFrame], by: list[str]) -> list[pd.DataFrame]:
    """The tables without what one of them lacks, by the columns ``by``."""
    shared = functools.reduce(lambda left, right: left.merge(right, on=by), (table[by].drop_duplicates() for table in tables))
    return [table.merge(shared, on=by) for table in tables]


def _chance(one: pd.DataFrame, other: pd.DataFrame) -> float:
    """How well orders at one seed of ``one`` and at another of ``other`` agree: the mean of Kendall's correlations.

    A table against itself shows what seeds alone do to an order.
    """
    seeds = sorted(set(one["seed"]) | set(other["seed"]))
    pairs = (_common((one[one["seed"] == a], other[other["seed"] == b]), stats.SCENARIO) for a, b in permutations(seeds, 2))
    known = [tau for left, right in pairs if not math.isnan(tau := _order(left, right)[0])]
    return float(np.mean(known)) if known else math.nan


def _undefended(by: Ways, first: str) -> list[dict[str, Any]]:
    lines = []
    for attack in dict.fromkeys(attack for worlds in by.values() for attack in worlds["attack"]):
        at = {label: worlds[worlds["attack"] == attack] for label, worlds in by.items()}
        for label, here in at.items():
            line: dict[str, Any] = {"attack": attack, "trained": label, "implanted": ev.implanted_words(here),
                                    **ev.means_of(here, ("acc", "asr"))}  # fmt: skip
            for name in ("acc", "asr"):
                span = float(at[first][name].max() - at[first][name].min())
                part = ev.paired_gap(here, at[first], name)[0] if label != first else ev.UNMEASURED
                line |= {**ev.bounded(f"d_{name}", part), f"span_{name}": span if label == first else math.nan,
                         f"_within_{name}": abs(part.mean) <= span}  # fmt: skip
            lines.append(line)
    return lines


def _defended(live: Ways, first: str) -> list[dict[str, Any]]:
    lines = []
    for entry in (entry for entry in ev.competitors(live[first]) if all(entry in ev.competitors(own) for own in live.values())):
        base = ev.of_entry(live[first], entry)
        for label, table in live.items():
            own = ev.of_entry(table, entry)
            part = ev.paired_gap(own, base, "ra")[0] if label != first else ev.UNMEASURED
            lines.append({"attack": EVERY, "defense": ev.entry_words(entry), "trained": label, **ev.means_of(own),
                          **ev.bounded("d_ra", part)})  # fmt: skip
    return lines


def _facts(by: Ways, live: Ways, first: str, label: str) -> dict[str, Any]:
    """What the wording needs of one way of training against the first."""
    tau, count, same = _order(live[first], live[label])
    gaps = {name: ev.paired_gap(by[label], by[first], name)[0] for name in ("acc", "asr")}
    return {"label": label, **gaps, "tau": tau, "count": count, "same": same, "within": _chance(live[first], live[first]),
            "across": _chance(live[first], live[label])}  # fmt: skip


def frame(source: ev.Source) -> pd.DataFrame:
    first, *others = ways = _ways(source)
    every, cells = ev.before_defense(source.rows), ev.finished(ev.judged(source.rows))
    # Pairs are made by scenario and seed: under one name for the network, for that is the same.
    by = {label: every[every["backbone"] == label].assign(backbone=first) for label in ways}
    # Defenses are compared on what implanted every way: otherwise one way's mean would be of other attacks than another's.
    parts = _common([cells[cells["backbone"] == label].assign(backbone=first) for label in ways], stats.WORLD)
    live = dict(zip(ways, parts, strict=True))
    table = pd.DataFrame([*_undefended(by, first), *_defended(live, first)])
    table["defense"] = table["defense"].fillna("none") if "defense" in table else "none"
    table["implanted"] = table["implanted"].fillna("")
    both = live[first][stats.WORLD].drop_duplicates()
    table.attrs = {"first": first, "ways": [_facts(by, live, first, label) for label in others], "models": len(by[first]),
                   "both": len(both), "attacks": list(dict.fromkeys(both["attack"]))}  # fmt: skip
    return table


def figure(table: pd.DataFrame) -> Dots:
    first, ways = table.attrs["first"], [way["label"] for way in table.attrs["ways"]]

    def panel(title: str, unit: str, part: pd.DataFrame, names: str, column: str, labels: list[str]) -> DotPanel:
        series = tuple((label, tuple(ev.interval_of(line, column) for _, line in part[part["trained"] == label].iterrows()))
                       for label in labels)  # fmt: skip
        return DotPanel(title, unit, tuple(dict.fromkeys(part[names])), series, signed=unit == "points")

    before, after = table[table["attack"] != EVERY], table[table["attack"] == EVERY]
    panels = [panel(f"{name.upper()} without a defense, difference to {first}", "points", before, "attack", f"d_{name}", ways)
              for name in ("acc", "asr")]  # fmt: skip
    if len(after):
        panels.append(panel("RA after a defense", "%", after, "defense", "ra", [first, *ways]))
    return Dots(tuple(panels), ev.BARS)
