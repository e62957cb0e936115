"""Does a defense do here what its publications print? A verdict by rule, from the rows and the files in ``published/``.

Compared are an entry's implanted scenarios of which the literature has a figure of the same data set family, attack and labels, at
the same poisoning rate or at the next lower and higher one, on the same architecture where there is one
(:func:`benchmark.analysis.published.comparisons`), else on those of its family, VGG or residual. A figure counts where its own
source also prints the undefended victim, and that victim's ASR is at least 50 %: otherwise neither the loss of ACC nor the worth of
a low ASR is known.

The published band runs from the least to the largest such figure. Ours, a mean over seeds under the selection that the track is
ranked by, is *as published* where it lies in the band or is better, that is, where

- its ASR is at most the largest published ASR, plus :data:`ASR_TOLERANCE`; and
- its loss of ACC against its own undefended model is at most the largest published loss, plus :data:`LOSS_TOLERANCE`. The loss,
  not the ACC: networks here are narrower than the published ones, so their ACC differ before any defense.

Else it is *worse*, in ASR, in ACC or in both. Both tolerances cover what one training per published figure leaves open; sources
that share a cell differ by more than 10 points of ASR in half of them. Where the undefended model here would pass as well, because
the published defenses fail too or because the attack is weaker here, a pass shows nothing: the scenario is *undecided*. So a model
in which nothing was changed counts against a defense or not at all.

The verdict on an entry: *reproduced* (as published on every scenario that is decided), *reproduced in part* (on some), *not
reproduced* (on none), *not comparable* (no scenario is decided, or nothing was changed in any of them).
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmark.analysis import published, stats
from benchmark.analysis.published import METRICS, Comparison, Printed
from benchmark.rules.metrics import IMPLANTED_ASR

__all__ = [
    "ASR_TOLERANCE", "LOSS_TOLERANCE", "NOT_SOUGHT", "STATES", "Claim", "Judged", "Reason", "Verdict", "claims", "judge", "judged",
    "nearest", "reason_words", "reasons", "victim_of",
]  # fmt: skip

ASR_TOLERANCE = 0.05
"""ASR may be above the largest published one by this much."""
LOSS_TOLERANCE = 0.02
"""The loss of ACC may be above the largest published one by this much: as the gate, which marks attacks that cost more."""
AS_PUBLISHED, WORSE, UNDECIDED, NOT_COMPARED = STATES = ("as published", "worse", "undecided", "not compared")
NOT_SOUGHT = "reason not yet sought"
_EXACT = 1e-9


@dataclass(frozen=True)
class Claim:
    """What a method's paper claims, in one sentence, and where; the figure it gives, where that was read."""

    defense: str
    claim: str
    paper: str
    place: str
    figure: Printed | None


@dataclass(frozen=True)
class Reason:
    """Why a published figure was not met; ``attack``: empty = on all. ``experiment``: the exhibit or folder that shows it."""

    defense: str
    attack: str
    reason: str
    experiment: str


@dataclass(frozen=True)
class Judged:
    """One scenario of one entry.

    Attributes:
        place: data set, backbone, attack. printed: the figures that count, all of them with their undefended victim.
        asr, loss: least and largest published ASR and loss of ACC; NaN where nothing counts.
        before, after: ours, metric to mean over finished seeds. seeds: finished. idle: of those, with nothing changed.
        state: one of :data:`STATES`. worse: ``ASR``, ``ACC``. leaky: the state under the leaky rule; empty where it has no rows.
        implanted: whether the scenario counts.
    """

    place: tuple[str, str, str]
    printed: tuple[Printed, ...]
    asr: tuple[float, float]
    loss: tuple[float, float]
    before: dict[str, float]
    after: dict[str, float]
    seeds: int
    idle: int
    state: str
    worse: tuple[str, ...]
    leaky: str
    implanted: bool

    @property
    def attack(self) -> str:
        return self.place[2]


@dataclass(frozen=True)
class Verdict:
    """The verdict on an entry in words, and why it is not comparable; scenarios as published, worse, and undecided."""

    words: str
    why: str
    good: tuple[Judged, ...]
    bad: tuple[Judged, ...]
    undecided: tuple[Judged, ...]


# -- the files -----------------------------------------------------------------------------------------------------------------


def _lines(name: str) -> list[dict[str, str]]:
    with (published.FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@functools.lru_cache(maxsize=1)
def claims() -> dict[str, Claim]:
    """Defense -> its claim: ``published/claims.csv``. The figure is looked up among the published ones, never written twice."""
    found = {}
    for line in _lines("claims.csv"):
        key = (line["defense"], line["dataset"], line["backbone"], line["attack"], "all-to-one", line["source"])
        figures = [one for one in published.printed() if line["attack"] and float(line["rate"]) == one.rate
                   and (one.defense, one.dataset, one.backbone, one.attack, one.labels, one.source) == key]  # fmt: skip
        found[line["defense"]] = Claim(line["defense"], line["claim"], line["paper"], line["place"], next(iter(figures), None))
    return found


def reasons() -> list[Reason]:
    """``published/reasons.csv``."""
    return [Reason(**line) for line in _lines("reasons.csv")]


@functools.lru_cache(maxsize=1)
def _victims() -> dict[tuple[str, ...], list[Printed]]:
    found: dict[tuple[str, ...], list[Printed]] = {}
    for figure in published.printed():
        if figure.defense == stats.UNDEFENDED:
            found.setdefault(_victim_key(figure), []).append(figure)
    return found


def _victim_key(figure: Printed) -> tuple[str, ...]:
    source = figure.source.split(",", maxsplit=1)[0]
    return (source, figure.dataset, figure.backbone, figure.attack, figure.labels, str(figure.rate))


def _family(network: str) -> str:
    return "vgg" if "vgg" in network else "residual" if "resnet" in network or "wrn" in network else ""


def nearest(figures: Sequence[Printed], network: str) -> list[Printed]:
    """The figures of a network's family where there are any, else all."""
    return [one for one in figures if _family(one.backbone) == _family(network)] or list(figures)


def victim_of(figure: Printed) -> Printed | None:
    """The undefended victim that a figure's own source prints, or None."""
    return next(iter(_victims().get(_victim_key(figure), [])), None)


# -- the rule ------------------------------------------------------------------------------------------------------------------


def _mean(seeds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([seed[name] for seed in seeds])) if seeds else math.nan for name in METRICS}


def _worse(before: dict[str, float], after: dict[str, float], asr: float, loss: float) -> tuple[str, ...]:
    """In what ours is worse than the largest published ASR and loss of ACC, tolerances added."""
    failed = {"ASR": after["asr"] - asr - ASR_TOLERANCE, "ACC": before["acc"] - after["acc"] - loss - LOSS_TOLERANCE}
    return tuple(name for name, excess in failed.items() if excess > _EXACT)


def judged(one: Comparison, cells: pd.DataFrame) -> Judged:
    """A comparison by the rule above; ``cells``: the finished rows behind ``one.measured``."""
    figures = nearest(one.printed, one.place[1])
    pairs = [(figure, victim) for figure in figures if (victim := victim_of(figure)) and victim.asr >= IMPLANTED_ASR]
    asr = published.band(figure.asr for figure, _ in pairs)
    loss = published.band(victim.acc - figure.acc for figure, victim in pairs)
    before = {name: float(cells[f"{name}_undefended"].mean()) for name in METRICS}
    after, idle = _mean(one.measured), int((cells["mark"] == "no change").sum())

    def state(ours: dict[str, float]) -> tuple[str, tuple[str, ...]]:
        if not pairs or not one.implanted:
            return NOT_COMPARED, ()
        worse = _worse(before, ours, asr[1], loss[1])
        return WORSE if worse else AS_PUBLISHED if _worse(before, before, asr[1], loss[1]) else UNDECIDED, worse

    words, worse = state(after)
    leaky = state(_mean(one.leaky))[0] if one.leaky else ""
    return Judged(one.place, tuple(figure for figure, _ in pairs), asr, loss, before, after, len(cells), idle, words, worse, leaky,
                  one.implanted)  # fmt: skip


def judge(found: Sequence[Judged]) -> Verdict:
    """The verdict on an entry from its scenarios."""
    good, bad, undecided = (tuple(one for one in found if one.state == state) for state in (AS_PUBLISHED, WORSE, UNDECIDED))
    compared, why = (*good, *bad, *undecided), ""
    if not found:
        why = "no cell finished"
    elif not any(one.printed for one in found):
        why = "no published figure of an attack that was run"
    elif not compared:
        why = "no scenario with a published figure is implanted"
    elif all(one.idle == one.seeds for one in compared):
        why = "nothing was changed in any cell"
    elif not good and not bad:
        why = "the undefended models would meet the published figures"
    part = "reproduced in part" if good and bad else "reproduced" if good else "not reproduced"
    return Verdict("not comparable" if why else part, why, good, bad, undecided)


def reason_words(defense: str, verdict: Verdict) -> str:
    """Why scenarios are worse than published: what the file of reasons has on the defense and these attacks, each with its
    experiment; what the rows themselves show of the choice on the test ASR; else :data:`NOT_SOUGHT`. Empty where none is worse."""
    if not verdict.bad or verdict.why:
        return ""
    attacks = {one.attack for one in verdict.bad}
    known = [f"{one.reason} ({one.experiment})" for one in reasons()
             if published.counterpart(defense, [one.defense])
             and (not one.attack or any(published.counterpart(attack, [one.attack]) for attack in attacks))]  # fmt: skip
    chosen = [one.attack for one in verdict.bad if one.leaky == AS_PUBLISHED]
    if chosen:
        known.append(f"chosen on the test ASR, it is as published on {', '.join(dict.fromkeys(chosen))} (leaky rule)")
    return "; ".join(dict.fromkeys(known)) or NOT_SOUGHT
