"""Published beside measured: what the literature printed about the same attack and defense, next to what came out here.

Publications disagree (half of the cells that two of them share are more than 10 points of ASR apart, a quarter more than 50), and
almost every matrix here follows another protocol. So the printed figures are shown as a band, each with its source; no gate, choice
or rank depends on them. :mod:`benchmark.analysis.reproduction` says by rule who meets the band, :mod:`benchmark.run.literature`
compares the undefended victims that follow the literature's protocol.
"""

from __future__ import annotations

import csv
import functools
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmark.analysis import stats

__all__ = [
    "BOARD", "FOLDER", "METRICS", "PROTOCOL", "TEST_ASR", "Comparison", "Printed", "band", "comparisons", "counterpart", "printed",
    "settings_words",
]  # fmt: skip

FOLDER = Path(__file__).parent / "published"
"""Where the figures are, as CSV files."""
METRICS = ("acc", "asr", "ra")
BOARD = "BackdoorBench leaderboard, backdoorbench.github.io@b98eab4"
"""The source of every line of ``undefended.csv``."""
TEST_ASR = "test ASR"
"""How the board chose ANP's threshold: the lowest ASR on the test set, within a tenth of its accuracy."""
PROTOCOL = {
    "data set": "the official release, all of its training images (50,000 for CIFAR-10)",
    "network": "full width, trained end to end, without a hidden layer in the head",
    "training": "BackdoorBench and FT-SAM: 100 epochs (GTSRB 50), SGD at 0.01, cosine, batch 128, pad-4 crops; READMEs: their own",
    "clean budget": "BackdoorBench and FT-SAM: 5 % of the training set, drawn from all of it, so that it may hold the originals of "
    "poisoned images",
    "seeds": "one training per figure",
    "selection": "as printed; the board's ANP has the threshold of the lowest test ASR, its fine-pruning stops on test accuracy",
}
"""The protocol of the literature's figures, in words."""


@dataclass(frozen=True)
class Printed:
    """A figure as printed, in [0, 1]; ``rate`` and metrics that were not printed are NaN.

    ``chosen_on``: what of the test set the published threshold or stop was chosen on, as far as it is known; else empty.
    """

    dataset: str
    backbone: str
    attack: str
    labels: str
    rate: float
    defense: str
    acc: float
    asr: float
    ra: float
    chosen_on: str
    source: str


@dataclass(frozen=True)
class Comparison:
    """A scenario and an entry that the literature has figures of.

    Attributes:
        place: the scenario. rate: its poisoning rate. entry: defense and scope. role: ``reference`` or ``defense``.
        printed: the literature's figures of the same data set family, attack and labels: at the same rate where somebody printed
            it, else at the next lower and higher one (rates not stated are kept); on the same architecture where there is one, else
            on every one.
        selection: of ``measured``: the one the track is judged by.
        measured: one mapping per finished seed, metric to share. leaky: the same under the leaky rule, where the literature chose
            on the test ASR; else empty.
        implanted: whether the scenario counts in the tables. same_protocol: whether the undefended victim follows the literature's
            protocol, as :func:`benchmark.run.literature.differences` finds.
    """

    place: tuple[str, str, str]
    rate: float
    entry: tuple[str, str]
    role: str
    printed: tuple[Printed, ...]
    selection: str
    measured: tuple[dict[str, float], ...]
    leaky: tuple[dict[str, float], ...]
    implanted: bool
    same_protocol: bool
    preset: str


def _share(text: str | None) -> float:
    return float(text) / 100 if text else math.nan


@functools.lru_cache(maxsize=1)
def printed() -> tuple[Printed, ...]:
    """Every published figure the project holds: ``published/undefended.csv`` and ``published/defended.csv``."""
    found = []
    for name, given in (
        ("undefended", {"labels": "all-to-one", "defense": stats.UNDEFENDED, "chosen_on": "", "source": BOARD}),
        ("defended", {}),
    ):
        with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                figure: dict[str, Any] = {**given, **line}
                numbers = {metric: _share(figure[metric]) for metric in METRICS}
                found.append(Printed(**{**figure, **numbers, "rate": float(figure["rate"] or math.nan)}))
    return tuple(found)


def counterpart(label: str, names: Iterable[str]) -> str | None:
    """The published name of a matrix's label: the longest that it is or begins with, up to the end of a word.

    "blended 2 %" is blended, "wrn16-1-w8" is wrn16-1, "cifar10-q95" is cifar10 and "cifar100" is not.
    """
    fits = [name for name in names if label == name or (label.startswith(name) and not label[len(name)].isalnum())]
    return max(fits, key=len, default=None)


def _nearest(figures: Sequence[Printed], rate: float) -> list[Printed]:
    """Those printed at a rate, else those at the next lower and the next higher one; those without a rate stay."""
    rates = sorted({figure.rate for figure in figures if not math.isnan(figure.rate)})
    same = [known for known in rates if math.isclose(known, rate)]
    around = same or [known for known in rates if known < rate][-1:] + [known for known in rates if known > rate][:1]
    return [figure for figure in figures if math.isnan(figure.rate) or figure.rate in around]


def _published(dataset: str, backbone: str, attack: str, labels: str, rate: float) -> list[Printed]:
    """What the literature has on a scenario; empty where it has nothing of the data set or the attack."""
    every = printed()
    source = counterpart(dataset, {figure.dataset for figure in every})
    name = counterpart(attack, {figure.attack for figure in every})
    here = [figure for figure in every if (figure.dataset, figure.attack, figure.labels) == (source, name, labels)]
    network = counterpart(backbone, {figure.backbone for figure in here})
    return _nearest([figure for figure in here if network in (None, figure.backbone)], rate)


def _values(table: pd.DataFrame) -> tuple[dict[str, float], ...]:
    return tuple({str(name): float(value) for name, value in line.items()} for line in table[list(METRICS)].to_dict("records"))


def comparisons(rows: pd.DataFrame, track: str) -> list[Comparison]:
    """Scenarios by entries of a track that the literature has figures of: scenarios in matrix order, the undefended model first.

    Entries that edit the head alone have no counterpart, nor do victims on given features.
    """
    table = stats.field(rows, track)
    table = table[(table["status"] == "ok") & (table["scope"] == "whole") & table["role"].isin(["reference", "defense"])]
    table = table[(table["attack"] != stats.NO_ATTACK) & (table["features"] == "")]
    judged = stats.headline(rows, track)
    gate = stats.scenarios(rows)
    live = set(gate.loc[gate["implanted"], stats.SCENARIO].itertuples(index=False, name=None))
    found = []
    for key, here in table.groupby(stats.SCENARIO, sort=False):
        place = (str(key[0]), str(key[1]), str(key[2]))
        first = here.iloc[0]
        rate = float(first["rate"])
        figures = _published(*place, str(first["label_mode"]), rate)
        for entry in sorted(stats.entries(here), key=lambda entry: entry[0] != stats.UNDEFENDED):
            method = counterpart(entry[0], {figure.defense for figure in figures})
            if method is None:
                continue
            mine = here[(here["defense"] == entry[0]) & (here["scope"] == entry[1])]
            chosen = mine[mine["selection"] == judged]
            if chosen.empty:
                continue
            theirs = tuple(figure for figure in figures if figure.defense == method)
            on_test = any(figure.chosen_on == TEST_ASR for figure in theirs)
            found.append(Comparison(
                place, rate, entry, str(chosen["role"].iloc[0]), theirs, judged, _values(chosen),
                _values(mine[mine["selection"] == "leaky"]) if on_test else (), place in live,
                bool(chosen["acc_literature"].notna().all()), " or ".join(dict.fromkeys(chosen["preset"])),
            ))  # fmt: skip
    return found


def band(values: Iterable[float]) -> tuple[float, float]:
    """The least and the largest of the values that are there; NaN twice where none is."""
    there = [value for value in values if not math.isnan(value)]
    return (float(np.min(there)), float(np.max(there))) if there else (math.nan, math.nan)


def _words(settings: Any) -> str:
    return ", ".join(f"{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items())


def settings_words(folder: Path) -> dict[str, str]:
    """Recipe and data set of a matrix as its copy ``matrix.toml`` in a results folder names them; empty where it cannot be read."""
    try:
        settings = tomllib.loads((folder / "matrix.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}
    named = {name: settings.get(name, {}) for name in ("recipe", "dataset")}
    return {name: _words(given) for name, given in named.items() if isinstance(given, dict) and given}
