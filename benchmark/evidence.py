"""What stored rows say to a question: an answer in words, a table, and what to draw. Pure functions; :mod:`benchmark.exhibits`
lists them and writes them down.

An answer is computed, both ways: where the rows are against what is claimed of pruning defenses, the sentence says so, and where
they are for it, it says that. "Told apart" means that a 95 % bootstrap interval over seeds (:func:`benchmark.stats.interval`), of
paired differences where two things are compared, leaves out 0. Means are taken over implanted attacked models, unless they are said
to be of all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from attacks.adaptive import Adaptive
from benchmark import stats
from benchmark.matrix import Matrix
from benchmark.metrics import IMPLANTED_ASR, MAX_ACC_LOSS
from benchmark.selection import TAU
from benchmark.stats import ENTRY, SCENARIO, WORLD, Interval
from benchmark.tables import gate_words, markdown
from defenses.anp import ANP
from defenses.holder_pruning import HolderPruning
from models.spec import digest

__all__ = [
    "Column",
    "DotPanel",
    "Dots",
    "Lines",
    "Missing",
    "Panel",
    "Series",
    "Shown",
    "Source",
    "adaptive",
    "along_dial",
    "alpha",
    "benign",
    "budget",
    "controls",
    "detectors",
    "extractor",
    "judged",
    "mean",
    "natural",
    "paired",
    "performance",
    "pruned",
    "rate",
    "replaced",
    "robust",
    "scope",
    "selection",
    "significance",
    "size",
    "threshold",
    "validity",
]  # fmt: skip


class Missing(ValueError):
    """The rows stand, but hold nothing that the question could be answered from; says what is missing."""


@dataclass(frozen=True)
class Source:
    """A matrix that was run: its three tables as :func:`benchmark.rows.read` returns them, its settings, its manifest."""

    name: str
    rows: pd.DataFrame
    curves: pd.DataFrame
    timings: pd.DataFrame
    matrix: Matrix
    manifest: dict[str, Any] = field(default_factory=dict)


Kind = Literal["text", "share", "points", "interval", "difference", "number", "count"]


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, its kind, and the frame's column it shows.

    Kinds: ``share`` in percent, ``points`` signed; ``interval`` and ``difference`` (signed) take ``name``, ``name_low`` and
    ``name_high``; ``number`` to three digits; ``count`` as it is.
    """

    head: str
    kind: Kind
    name: str


@dataclass(frozen=True)
class Series:
    """A line: values at ``x``.

    Attributes:
        about: the entry it belongs to, so that it keeps its look; None = by position. control: grey, whatever its entry.
        aside: dotted grey, for what is no score.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[Interval, ...]
    about: tuple[str, str] | None = None
    control: bool = False
    aside: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel of lines.

    Attributes:
        log, even: x on a logarithmic axis; at even distances, whatever the values. percent: x are shares.
        flat: horizontal reference lines, (label, height). signed: differences instead of shares.
    """

    title: str
    xlabel: str
    ylabel: str
    series: tuple[Series, ...]
    log: bool = False
    even: bool = False
    percent: bool = False
    flat: tuple[tuple[str, float], ...] = ()
    signed: bool = False


@dataclass(frozen=True)
class Lines:
    """Panels of lines, ``columns`` side by side."""

    panels: tuple[Panel, ...]
    columns: int
    note: str


@dataclass(frozen=True)
class DotPanel:
    """Names down, one mark per series and name with its interval; shares, or differences of shares where ``signed``."""

    title: str
    xlabel: str
    names: tuple[str, ...]
    series: tuple[tuple[str, tuple[Interval, ...]], ...]
    signed: bool = False


@dataclass(frozen=True)
class Dots:
    """Panels of dots, one below the other."""

    panels: tuple[DotPanel, ...]
    note: str


@dataclass(frozen=True)
class Shown:
    """What an exhibit shows: ``answer`` is Markdown; ``about`` says what the table counts, for its caption."""

    answer: str
    frame: pd.DataFrame
    columns: tuple[Column, ...]
    about: str
    figure: Lines | Dots | None = None


# -- what every answer needs ---------------------------------------------------------------------------------------------------

_NOTHING = Interval(math.nan, math.nan, math.nan)
Entry = tuple[str, str]


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows under the selection that their track is judged by."""
    chosen = {track: stats.headline(rows, track) for track in dict.fromkeys(rows["track"])}
    return rows[rows["selection"] == rows["track"].map(chosen)]


def _good(rows: pd.DataFrame) -> pd.DataFrame:
    """Finished cells of implanted attacked models under the selection their track is judged by.

    Raises:
        Missing: there is none.
    """
    table = stats.implanted_worlds(judged(rows))
    table = table[table["status"] == "ok"]
    if table.empty:
        raise Missing(f"no attack implanted, so no defense can be judged ({gate_words(rows)})")
    return table


def mean(table: pd.DataFrame, column: str) -> Interval:
    """Mean over scenarios of means over seeds, with its interval; values that are missing are left out."""
    kept = table[np.isfinite(table[column].to_numpy(np.float64))]
    return stats.interval([group[column].to_list() for _, group in kept.groupby(SCENARIO, sort=False)])


def paired(left: pd.DataFrame, right: pd.DataFrame, column: str) -> tuple[Interval, int]:
    """``left`` minus ``right``, attacked model by attacked model: the mean with its interval, and the number of pairs.

    Each table holds at most one row per attacked model.
    """
    both = left[[*WORLD, column]].merge(right[[*WORLD, column]], on=WORLD, suffixes=("", "_other"), validate="one_to_one")
    both["difference"] = both[column] - both[f"{column}_other"]
    return mean(both, "difference"), int(both["difference"].notna().sum())


def _entry(table: pd.DataFrame, entry: Entry) -> pd.DataFrame:
    return table[(table["defense"] == entry[0]) & (table["scope"] == entry[1])]


def _competing(table: pd.DataFrame) -> list[Entry]:
    """Entries that are no controls, in matrix order."""
    return stats.entries(table[~table["control"].astype(bool) & (table["defense"] != stats.UNDEFENDED)])


def _called(entry: Entry) -> str:
    return f"{entry[0]} ({entry[1]})"


def _name(entry: Entry) -> str:
    return markdown(_called(entry))


def _spread(name: str, part: Interval) -> dict[str, float]:
    return {name: part.mean, f"{name}_low": part.low, f"{name}_high": part.high}


def _percent(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{100 * value + 0.0:.1f} %".replace("-0.0 %", "0.0 %")


def _share(part: Interval) -> str:
    """In words: 12.3 % [10.0, 15.1]."""
    return _percent(part.mean) + ("" if math.isnan(part.low) else f" [{100 * part.low:.1f}, {100 * part.high:.1f}]")


def _points(part: Interval) -> str:
    """A difference in words: +1.2 points [-0.3, +2.8]."""
    if math.isnan(part.mean):
        return "not measured"
    bounds = "" if math.isnan(part.low) else f" [{100 * part.low:+.1f}, {100 * part.high:+.1f}]"
    return f"{100 * part.mean:+.1f} points{bounds}"


def _side(part: Interval) -> int:
    """1 where the interval lies above 0, -1 below, 0 where it does not tell (or there is none)."""
    return 1 if part.low > 0 else -1 if part.high < 0 else 0


def _listed(words: Sequence[str], none: str = "none") -> str:
    return ", ".join(words) or none


def _few(words: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of a list, and how many more there are."""
    return _listed(words) if len(words) <= most + 1 else f"{', '.join(words[:most])} and {len(words) - most} more"


def _told(words: Sequence[str]) -> str:
    """": a, b and 3 more", or nothing."""
    return f": {_few(words)}" if words else ""


def _of(some: int, of: int) -> str:
    return f"all {of}" if some == of and of > 1 else f"none of {of}" if some == 0 else f"{some} of {of}"


def _undefended(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per attacked model: what it scores before any defense."""
    attacked = rows[rows["attack"] != stats.NO_ATTACK].drop_duplicates(WORLD)
    return attacked.assign(
        acc=attacked["acc_undefended"], asr=attacked["asr_undefended"], ra=attacked["ra_undefended"],
        loss=attacked["acc_benign"] - attacked["acc_undefended"],
    )  # fmt: skip


def _implanted(worlds: pd.DataFrame) -> str:
    return f"{int(worlds['implanted'].astype(bool).sum())} of {len(worlds)}"


def _measured(table: pd.DataFrame, names: Sequence[str] = ("acc", "asr", "ra")) -> dict[str, float]:
    line: dict[str, float] = {}
    for name in names:
        line |= _spread(name, mean(table, name))
    return line


_FIGURES = (Column("ACC", "interval", "acc"), Column("ASR", "interval", "asr"), Column("RA", "interval", "ra"))
_MEANS = "means over implanted attacked models, 95 % intervals over seeds"


# -- alpha ---------------------------------------------------------------------------------------------------------------------


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
    table = _good(source.rows)
    table = table[table["defense"].isin(known)]
    mine = [known[name] for name in table["defense"]]
    table = table.assign(mode=[_mode(defense) for defense in mine], alpha=[defense.alpha for defense in mine])
    if table["alpha"].nunique() < 2:
        raise Missing("it takes Hölder pruning at two exponents or more")
    curves = source.curves[source.curves["cell"].isin(table["cell"])]
    lines, panels, said, better, compared = [], [], [], [], 0
    for (mode, scope_), group in table.groupby(["mode", "scope"], sort=False):
        by = {float(value): mine for value, mine in group.groupby("alpha")}
        last = max(by)
        paths = {value: curves[curves["cell"].isin(mine["cell"])] for value, mine in by.items()}
        every = {value: _agreement(path, paths[last]) for value, path in paths.items()}
        for value, mine in by.items():
            same, points, rho = every[value]
            lines.append({"mode": mode, "scope": scope_, "alpha": value, **_measured(mine), "same": same / points if points else
                          math.nan, "points": points, "rho": rho})  # fmt: skip
        part = [line for line in lines if line["mode"] == mode and line["scope"] == scope_]
        x = tuple(float(line["alpha"]) for line in part)
        series = [Series(name.upper(), x, tuple(_part(line, name) for line in part)) for name in ("ra", "asr")]
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
            compared += 1
            difference, pairs = paired(by[paper], by[last], "ra")
            better += [(mode, scope_)] * (_side(difference) > 0)
            said.append(
                f"With {mode} ({scope_}), {100 * (1 - same / points) if points else 0:.0f} % of the models differ from those at "
                "alpha "
                f"{last:g}; RA at alpha {paper:g} minus RA at alpha {last:g}: {_points(difference)} over {pairs} attacked models."
            )
    if compared:
        said.append(
            f"The published exponent is above the Lipschitz quotient in {_of(len(better), compared)} comparisons where it could be."
            if better
            else f"In none of {compared} comparisons where the exponent could matter is the published one told apart, for the "
            "better, "
            "from the Lipschitz quotient: the result does not rest on it."
        )
    columns = (Column("Distance", "text", "mode"), Column("Scope", "text", "scope"), Column("alpha", "number", "alpha"), *_FIGURES,
               Column("Models as at the largest alpha", "share", "same"), Column("Models", "count", "points"),
               Column("Rank correlation of RA with it", "number", "rho"))  # fmt: skip
    note = "Bands: 95 % intervals over seeds. Dotted: of all models along the dial."
    about = (
        f"{_MEANS}; models: every point of the dial on every such model, the same where ACC, ASR and RA are; rank correlation: "
        "Spearman's, of RA along the dial (curves hold outcomes, not the ranking of units)"
    )
    return Shown(" ".join(said), pd.DataFrame(lines), columns, about, Lines(tuple(panels), 3, note))


# -- scope ---------------------------------------------------------------------------------------------------------------------

_END_TO_END = "trained end to end"


def _victims(table: pd.DataFrame) -> pd.Series:
    """In words, where the features of each row's victim come from."""
    return table["features"].where(table["features"] != "", _END_TO_END).map(
        lambda words: words if words == _END_TO_END else f"with a head on features {words}"
    )  # fmt: skip


def scope(source: Source) -> Shown:
    """Every defense on the head and on the whole network, with seconds."""
    table = _good(source.rows)
    table = table.assign(victims=_victims(table))
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
                    line |= _spread(f"{metric}_{name}", value)
                line[f"seconds_{name}"] = float(part["seconds"].median()) if len(part) else math.nan
            difference, pairs = paired(at["head"], at["whole"], "ra") if len(at["whole"]) else (_NOTHING, 0)
            lines.append({**line, **_spread("difference", difference), "pairs": pairs})
            if pairs and not control:
                sides.append((defense, _side(difference)))
            if pairs:
                seconds = f"{_brief(line['seconds_head'])} / {_brief(line['seconds_whole'])} s"
                names.append(f"{defense}{' (control)' if control else ''}, {seconds}")
                heads.append(mean(at["head"], "ra"))
                wholes.append(mean(at["whole"], "ra"))
        if sides:
            better = {side: [markdown(name) for name, found in sides if found == side] for side in (1, -1, 0)}
            said.append(
                f"On victims {markdown(victims)}, RA is higher on the head for {len(better[1])} of {len(sides)} defenses "
                f"({_listed(better[1])}), higher on the whole network for {len(better[-1])} ({_listed(better[-1])}), and not told "
                f"apart for {len(better[0])}."
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
                f"At equal scope, the head, the fastest Hölder pruning takes {_brief(own)} s and the slowest other defense "
                f"{_brief(equal)} s, {_brief(equal / own)} times as long; against defenses of the whole network the same figure "
                f"would read {_brief(unequal / own)} times."
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
    about = f"{_MEANS}; differences paired by attacked model; seconds: median over cells, as measured on the machine that ran them"
    return Shown(" ".join(said), frame, columns, about, Dots(tuple(panels), note))


def _brief(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


# -- threshold -----------------------------------------------------------------------------------------------------------------

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
    return np.interp(np.linspace(0, 1, _STEPS), place[order], points.to_numpy(np.float64)[order])


def threshold(source: Source) -> Shown:
    """Every dial from end to end: the area under RA, the best point, the default, and how wide a good stretch is."""
    table = _good(source.rows)
    curves = source.curves[source.curves["cell"].isin(table["cell"]) & np.isfinite(source.curves["dial"])]
    default = stats.implanted_worlds(source.rows[(source.rows["selection"] == "default") & (source.rows["status"] == "ok")])
    lines, panels = [], []
    grid = tuple(float(value) for value in np.linspace(0, 1, _STEPS))
    for entry in stats.entries(table):
        mine = _entry(curves, entry)
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
        before = mean(_undefended(source.rows).merge(paths[WORLD], on=WORLD), "acc").mean
        good = (shown["asr"] < IMPLANTED_ASR) & (shown["acc"] >= before - TAU - 1e-9)
        control = bool(_entry(table, entry)["control"].any())
        lines.append({
            "track": _entry(table, entry)["track"].iloc[0], "defense": entry[0], "scope": entry[1],
            "control": "control" if control else "", "dial": mine["dial_name"].iloc[0],
            "points": int(mine.groupby("cell").size().median()),
            **_spread("area", mean(paths, "area_ra")), "area_asr": mean(paths, "area_asr").mean,
            "area_acc": mean(paths, "area_acc").mean, "best": float(shown["ra"].max()),
            "default": mean(_entry(default, entry), "ra").mean, "window": float(good.mean()),
        })  # fmt: skip
        series = tuple(
            Series(name.upper(), grid, tuple(Interval(float(value), math.nan, math.nan) for value in shown[name]))
            for name in ("acc", "asr", "ra")
        )
        panels.append(Panel(f"RA area {100 * lines[-1]['area']:.0f}: {_called(entry)}", "dial, weakest to strongest", "%", series))
    if not lines:
        raise Missing("no defense with a dial of three points or more finished on an implanted attack")
    frame = pd.DataFrame(lines)
    competing = frame[frame["control"] == ""]
    passing = competing[competing["window"] > 0].sort_values("window", ascending=False, kind="stable")
    said = [
        f"{_of(len(passing), len(competing)).capitalize()} dials pass through a stretch where the mean ASR is below "
        f"{100 * IMPLANTED_ASR:g} % at a mean loss of at most {100 * TAU:g} points of ACC"
        + (": " + ", ".join(f"{_name((line['defense'], line['scope']))} on {100 * line['window']:.0f} % of its length"
                            for _, line in passing.iterrows()) if len(passing) else "")
        + "."
    ]  # fmt: skip
    if len(competing):
        most = competing.loc[competing["area"].idxmax()]
        part = Interval(most["area"], most["area_low"], most["area_high"])
        said.append(f"The largest area under RA is that of {_name((most['defense'], most['scope']))}: {_share(part)}.")
        lost = (competing["best"] - competing["default"]).dropna()
        if len(lost):
            worst = competing.loc[lost.idxmax()]
            said.append(
                f"The published default stays below the best point of its own dial by {100 * lost.mean():.1f} points of RA on "
                "average, "
                f"by {100 * lost.max():.1f} for {_name((worst['defense'], worst['scope']))}."
            )
    random = frame[(frame["control"] != "")]
    if len(random):
        top = random.loc[random["area"].idxmax()]
        above = int((competing["area_low"] > top["area_high"]).sum())
        said.append(
            f"The area of {_name((top['defense'], top['scope']))}, a control, is {_percent(float(top['area']))}; the intervals of "
            f"{_of(above, len(competing))} defenses lie above its interval."
        )
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"), Column("Dial", "text", "dial"), Column("Points", "count", "points"),
        Column("Area under RA", "interval", "area"), Column("under ASR", "share", "area_asr"),
        Column("under ACC", "share", "area_acc"), Column("RA, best point", "share", "best"),
        Column("RA, default", "share", "default"), Column("Good stretch", "share", "window"),
    )  # fmt: skip
    about = (
        f"{_MEANS}; dials scaled to [0, 1] from their weakest to their strongest end, linear between points; good stretch: share "
        "of "
        f"the dial where the mean ASR is below {100 * IMPLANTED_ASR:g} % and the mean ACC at most {100 * TAU:g} points lower than "
        "before"
    )
    return Shown(" ".join(said), frame, columns, about, Lines(tuple(panels), 4, "Means over scenarios of means over seeds."))


# -- selection -----------------------------------------------------------------------------------------------------------------


def selection(source: Source) -> Shown:
    """The published default, an honest choice, and the oracle's."""
    table = stats.implanted_worlds(source.rows)
    table = table[(table["status"] == "ok") & table["dial"].notna()]
    if table.empty:
        raise Missing("no defense with a dial finished on an implanted attack")
    known = {c.defense_label for c in source.matrix.cells if isinstance(c.defense, ANP)}
    lines, names = [], []
    shown: dict[str, list[Interval]] = {name: [] for name in stats.SELECTIONS}
    for (track, defense, scope_), mine in table.groupby(["track", *ENTRY], sort=False):
        by = {name: mine[mine["selection"] == name] for name in stats.SELECTIONS}
        if not len(by["oracle"]):
            continue
        line: dict[str, Any] = {"track": track, "defense": defense, "scope": scope_,
                                "control": "control" if mine["control"].any() else ""}  # fmt: skip
        for name, part in by.items():
            line |= _spread(f"asr_{name}", mean(part, "asr")) | {f"ra_{name}": mean(part, "ra").mean}
            shown[name].append(mean(part, "asr"))
        for name in ("default", "validation"):
            line |= _spread(f"gap_{name}", paired(by[name], by["oracle"], "asr")[0])
        lines.append({**line, "models": int(mine.drop_duplicates(WORLD).shape[0])})
        names.append(f"{_called((str(defense), str(scope_)))}{' (control)' if line['control'] else ''}")
    frame = pd.DataFrame(lines)
    competing = frame[frame["control"] == ""]
    said = []
    for name, words in (("default", "the published default"), ("validation", "the honest validation choice")):
        measured = competing.dropna(subset=[f"gap_{name}"])
        apart = measured[measured[f"gap_{name}_low"] > 0]
        if len(measured):
            most = measured.loc[measured[f"gap_{name}"].idxmax()]
            part = Interval(*(float(most[f"gap_{name}{end}"]) for end in ("", "_low", "_high")))
            said.append(
                f"Choosing with the test set takes the ASR below that of {words} for {_of(len(apart), len(measured))} defenses, "
                "most "
                f"for {_name((most['defense'], most['scope']))}: {_points(part)}."
                if len(apart)
                else f"Choosing with the test set does not take the ASR of any of {len(measured)} defenses below that of {words} "
                "by "
                "more than its interval."
            )
    for _, line in competing[competing["defense"].isin(known)].iterrows():
        figures = ", ".join(f"{name} {_percent(float(line[f'asr_{name}']))}" for name in ("default", "validation", "oracle"))
        said.append(f"ASR of {_name((line['defense'], line['scope']))}: {figures}.")
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"),
        *(Column(f"ASR, {name}", "interval", f"asr_{name}") for name in ("default", "validation", "oracle")),
        *(Column(f"RA, {name}", "share", f"ra_{name}") for name in ("default", "validation", "oracle")),
        Column("ASR, default - oracle", "difference", "gap_default"),
        Column("ASR, validation - oracle", "difference", "gap_validation"), Column("Models", "count", "models"),
    )  # fmt: skip
    series = tuple((name, tuple(shown[name])) for name in ("default", "validation", "oracle"))
    figure = Dots((DotPanel("ASR by how the dial was set", "ASR in %", tuple(names), series),), "Bars: 95 % intervals over seeds.")
    about = f"{_MEANS}; gaps paired by attacked model; a track that grants no clean images has no validation choice"
    return Shown(" ".join(said), frame, columns, about, figure)


# -- budget --------------------------------------------------------------------------------------------------------------------

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
    scratch = good[good["base"].str.startswith(_SCRATCH)]
    lines, reasons = [], []
    for (base, scope_, share), mine in table.groupby(["base", "scope", "share"], sort=False, dropna=False):
        if base == stats.UNDEFENDED:
            continue
        done = mine[mine["status"] == "ok"]
        why = _listed([str(reason) for reason in dict.fromkeys(mine.loc[mine["status"] != "ok", "reason"])], "")
        same = scratch[scratch["share"] == share]
        versus = paired(done, same, "ra")[0] if len(done) and len(same) and not str(base).startswith(_SCRATCH) else _NOTHING
        lines.append({"defense": base, "scope": scope_, "control": "control" if mine["control"].any() else "", "share": share,
                      "images": images.get(share, math.nan), "cells": f"{len(done)} of {len(mine)}", **_measured(done),
                      **_spread("versus", versus), "reason": why})  # fmt: skip
        reasons += [why] * bool(why)
    frame = pd.DataFrame(lines)
    told = frame[frame["share"].notna() & frame["images"].notna()]
    if told.empty:
        raise Missing("no defense finished with a budget")
    said = []
    for share in (told["share"].min(), told["share"].max()):
        here = told[(told["share"] == share) & told["versus"].notna() & (told["control"] == "")]
        ahead = [_name((line["defense"], line["scope"])) for _, line in here.iterrows() if line["versus_low"] > 0]
        behind = int((here["versus_high"] < 0).sum())
        if len(here):
            said.append(
                f"With {images[share]:.0f} clean images ({100 * share:g} %), RA is above that of training from scratch on the "
                "same images "
                f"for {_of(len(ahead), len(here))} defenses ({_few(ahead)}) and below it for {behind}."
            )
    competing = told[told["control"] == ""]
    ends = []
    for (base, scope_), mine in competing.groupby(["defense", "scope"], sort=False):
        by = mine.set_index("share")
        ends.append((str(base), str(scope_), by["ra"][by.index.min()], by["ra"][by.index.max()]))
    if ends:
        most = max(ends, key=lambda line: line[3] - line[2])
        said.append(
            f"From the smallest finished budget to the largest, the RA of {_name((most[0], most[1]))} gains most: from "
            f"{_percent(most[2])} to {_percent(most[3])}."
            if most[3] > most[2]
            else "No defense gains RA from the smallest finished budget to the largest."
        )
    if reasons:
        said.append("Refused: " + "; ".join(markdown(reason) for reason in dict.fromkeys(reasons)) + ".")
    columns = (
        Column("Defense", "text", "defense"), Column("Scope", "text", "scope"), Column("", "text", "control"),
        Column("Budget", "share", "share"), Column("Images", "count", "images"), Column("Cells", "text", "cells"), *_FIGURES,
        Column("RA - RA from scratch", "difference", "versus"), Column("Refused or failed", "text", "reason"),
    )  # fmt: skip
    panels = []
    for name in ("ra", "asr", "acc"):
        series = []
        for (base, scope_), mine in told.groupby(["defense", "scope"], sort=False):
            mine = mine.dropna(subset=[name]).sort_values("share")
            y = tuple(Interval(line[name], line[f"{name}_low"], line[f"{name}_high"]) for _, line in mine.iterrows())
            called, control = _called((str(base), str(scope_))), bool((mine["control"] != "").any())
            series.append(Series(called, tuple(mine["images"].astype(float)), y, control=control))
        free = frame[frame["share"].isna() & frame[name].notna()]
        flat = tuple((_called((line["defense"], line["scope"])) + ", no images", float(line[name])) for _, line in free.iterrows())
        panels.append(Panel(name.upper(), "clean images", "%", tuple(series), log=True, flat=flat))
    about = f"{_MEANS}; images: a fifth of them for validation; differences paired by attacked model, on the same images"
    return Shown(" ".join(said), frame, columns, about, Lines(tuple(panels), 3, "Bands: 95 % intervals over seeds."))


_SCRATCH = "training-from-scratch"


# -- rate ----------------------------------------------------------------------------------------------------------------------


def _rateless(label: str) -> str:
    """An attack's label without its poisoning rate."""
    return re.sub(r" [0-9.]+ %$", "", label)


def rate(source: Source) -> Shown:
    """Undefended ASR and ACC loss against the poisoning rate, and what defenses leave."""
    before = _undefended(source.rows)
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
            line: dict[str, Any] = {"attack": kind, "rate": value, "implanted": _implanted(here)}
            line |= _measured(here, ("asr", "loss"))
            at = table[(table["kind"] == kind) & (table["rate"] == value)]
            line |= {f"ra {_called(entry)}": mean(_entry(at, entry), "ra").mean for entry in every}
            lines.append({**line, "counts": bool(here["implanted"].astype(bool).mean() > 0.5)})
        part = [line for line in lines if line["attack"] == kind]
        x = tuple(float(line["rate"]) for line in part)
        undefended.append(Series(str(kind), x, tuple(Interval(p["asr"], p["asr_low"], p["asr_high"]) for p in part)))
        losses.append(Series(str(kind), x, tuple(Interval(p["loss"], p["loss_low"], p["loss_high"]) for p in part)))
        works = [line["rate"] for line in part if line["counts"]]
        said.append(
            f"{markdown(kind)} implants in most seeds at {', '.join(f'{100 * value:g} %' for value in works)}; at the highest "
            "rate it "
            f"costs {_points(Interval(part[-1]['loss'], part[-1]['loss_low'], part[-1]['loss_high'])).lstrip('+')} of ACC."
            if works
            else f"{markdown(kind)} implants at no rate."
        )
    changes = []
    for entry in _competing(table):
        differences = []
        for kind, mine in _entry(table, entry).groupby("kind", sort=False):
            low, high = mine["rate"].min(), mine["rate"].max()
            if low < high:
                ends = [mine[mine["rate"] == value].assign(attack=kind) for value in (high, low)]
                both = ends[0][[*WORLD, "ra"]].merge(ends[1][[*WORLD, "ra"]], on=WORLD, suffixes=("", "_low"))
                differences.append((both["ra"] - both["ra_low"]).to_list())
        if any(differences):
            changes.append((entry, stats.interval(differences)))
    if changes:
        falls = [f"{_name(entry)} {_points(part)}" for entry, part in changes if _side(part) < 0]
        rises = [f"{_name(entry)} {_points(part)}" for entry, part in changes if _side(part) > 0]
        said.append(
            f"From the lowest rate that implants to the highest, RA falls for {len(falls)} of {len(changes)} defenses "
            f"({_few(falls)}) and rises for {len(rises)} ({_few(rises)})."
        )
    frame = pd.DataFrame(lines)
    columns = (
        Column("Attack", "text", "attack"), Column("Rate", "share", "rate"), Column("Implanted", "text", "implanted"),
        Column("ASR, undefended", "interval", "asr"), Column("ACC, loss to the benign twin", "difference", "loss"),
        *(Column(f"RA, {_called(entry)}", "share", f"ra {_called(entry)}") for entry in every),
    )  # fmt: skip
    panels = [Panel("Undefended: ASR", "poisoning rate", "%", tuple(undefended), log=True, percent=True),
              Panel("Undefended: loss of ACC", "poisoning rate", "points", tuple(losses), log=True, percent=True, signed=True)]
    for kind in dict.fromkeys(frame["attack"]):
        part = frame[(frame["attack"] == kind) & frame["counts"]]
        series = []
        for entry in every:
            at = _entry(table[table["kind"] == kind], entry)
            x = tuple(float(value) for value in sorted(set(at["rate"])))
            y = tuple(mean(at[at["rate"] == value], "ra") for value in x)
            series.append(Series(_called(entry), x, y, entry))
        if len(part):
            panels.append(Panel(f"{kind}: RA, defended", "poisoning rate", "%", tuple(series), log=True, percent=True))
    about = "undefended figures: means over all seeds; RA: means over implanted attacked models; 95 % intervals over seeds"
    note = "Undefended: all seeds. Defended: rates at which most seeds implant, those seeds. Bands: 95 % intervals over seeds."
    return Shown(" ".join(said), frame.drop(columns="counts"), columns, about, Lines(tuple(panels), 3, note))


# -- extractor -----------------------------------------------------------------------------------------------------------------


def extractor(source: Source) -> Shown:
    """Heads on features of every origin: do attacks implant, do defenses help, and does the plainest classifier do better?"""
    given = {(c.defense_label): c.extractor_label for c in source.matrix.cells if c.extractor is not None}
    frozen = {c.scenario.backbone_label: c.scenario.frozen.label for c in source.matrix.cells if c.scenario.frozen}
    if not frozen:
        raise Missing("it takes a victim on given features")
    every = _undefended(source.rows).assign(victims=lambda rows: _victims(rows))
    live = stats.implanted_worlds(judged(source.rows))
    live = live[live["status"] == "ok"].assign(victims=lambda rows: _victims(rows))
    lines, panels, said, sides = [], [], [], []
    for (victims, backbone), worlds in every.groupby(["victims", "backbone"], sort=False):
        label = frozen.get(str(backbone), "")
        counts = []
        for attack, here in worlds.groupby("attack", sort=False):
            line: dict[str, Any] = {"victims": victims, "attack": attack, "implanted": _implanted(here),
                                    **_measured(here, ("acc", "asr", "loss"))}  # fmt: skip
            counts.append(f"{markdown(attack)} in {_implanted(here)} seeds")
            at = live[(live["backbone"] == backbone) & (live["attack"] == attack)]
            means = {entry: mean(_entry(at, entry), "ra").mean for entry in _competing(at)}
            found = {entry: value for entry, value in means.items() if not math.isnan(value)}
            known = stats.entries(at[at["control"].astype(bool)]) if label else []
            plainest = [entry for entry in known if given.get(entry[0]) == label]
            if found:
                best = max(found, key=lambda entry: found[entry])
                line |= {"best": _called(best), "best_ra": found[best]}
                for entry in plainest[:2]:
                    difference, _ = paired(_entry(at, best), _entry(at, entry), "ra")
                    sides.append((best, entry, difference))
                controls = {entry: mean(_entry(at, entry), "ra").mean for entry in plainest}
                if controls:
                    top = max(controls, key=lambda entry: controls[entry])
                    line |= {"plainest": top[0], "plainest_ra": controls[top],
                             **_spread("difference", paired(_entry(at, best), _entry(at, top), "ra")[0])}  # fmt: skip
            lines.append(line)
        said.append(f"On victims {markdown(victims)}: {', '.join(counts)}.")
        here = live[live["backbone"] == backbone]
        own = [entry for entry in stats.entries(here) if not given.get(entry[0]) or given[entry[0]] == label]
        if own:
            series = tuple((name.upper(), tuple(mean(_entry(here, entry), name) for entry in own)) for name in ("ra", "asr"))
            worked = int(here[SCENARIO].drop_duplicates().shape[0])
            panels.append(DotPanel(f"Victims {victims}; {worked} attacks implanted", "%", tuple(_shown(here, own)), series))
    said.insert(0, "Implanted:")
    if sides:
        ahead, behind = (sum(_side(part) == side for _, _, part in sides) for side in (1, -1))
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
        Column("Best defense of the head", "text", "best"), Column("its RA", "share", "best_ra"),
        Column("Best plain classifier on the features", "text", "plainest"), Column("its RA ", "share", "plainest_ra"),
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


def _shown(table: pd.DataFrame, wanted: Sequence[Entry]) -> list[str]:
    """Names for a figure; controls say that they are."""
    controls = set(stats.entries(table[table["control"].astype(bool)]))
    return [
        "undefended" if entry[0] == stats.UNDEFENDED else _called(entry) + " (control)" * (entry in controls) for entry in wanted
    ]


# -- adaptive ------------------------------------------------------------------------------------------------------------------


def adaptive(source: Source) -> Shown:
    """Attackers who know the defense, against the same attack at strength 0."""
    known = {c.scenario.attack_label: c.scenario.attack for c in source.matrix.cells if isinstance(c.scenario.attack, Adaptive)}
    strengths = {label: (attack.name, attack.strength) for label, attack in known.items()}
    if len(set(strengths.values())) < 2:
        raise Missing("it takes an adaptive attack at two strengths or more")
    every = _undefended(source.rows)
    every = every[every["attack"].isin(strengths)]
    table = stats.implanted_worlds(judged(source.rows))
    table = table[(table["status"] == "ok") & table["attack"].isin(strengths)]
    kinds = list(dict.fromkeys(kind for kind, _ in strengths.values()))
    lines, said, top, bottom = [], [], [], []
    for kind in kinds:
        labels = {strength: label for label, (name, strength) in strengths.items() if name == kind}
        worlds = {strength: every[every["attack"] == labels[strength]] for strength in sorted(labels)}
        counts = "; ".join(f"{strength:g}: {_implanted(here)}" for strength, here in worlds.items())
        panels: dict[str, list[Series]] = {"ra": [], "asr": []}
        falls, rises = [], []
        mine = table[table["attack"].isin(labels.values())]
        for entry in stats.entries(mine):
            own = _entry(mine, entry)
            at = {strength: own[own["attack"] == label] for strength, label in sorted(labels.items())}
            x = tuple(strength for strength, part in at.items() if len(part))
            for name, series in panels.items():
                called = "undefended" if entry[0] == stats.UNDEFENDED else _called(entry)
                series.append(Series(called, x, tuple(mean(at[strength], name) for strength in x), entry))
            line: dict[str, Any] = {"attack": kind, "defense": entry[0], "scope": entry[1],
                                    "control": "control" if own["control"].any() else "", "implanted": counts}  # fmt: skip
            strongest = max(x, default=0.0)
            line |= {"strength": strongest, **_spread("strong", mean(at[strongest], "ra"))}
            if 0.0 in x:
                line |= _spread("base", mean(at[0.0], "ra"))
            if 0.0 in x and strongest > 0:
                ends = [at[strength].assign(attack=kind) for strength in (strongest, 0.0)]
                part = paired(ends[0], ends[1], "ra")[0]
                line |= _spread("difference", part)
                line |= _spread("asr_difference", paired(ends[0], ends[1], "asr")[0])
                if not own["control"].any():
                    falls += [f"{_name(entry)} {_points(part)}"] * (_side(part) < 0)
                    rises += [f"{_name(entry)} {_points(part)}"] * (_side(part) > 0)
            lines.append(line)
        works = [strength for strength, here in worlds.items() if here["implanted"].astype(bool).mean() > 0.5]
        tested = [line for line in lines if line["attack"] == kind and not line["control"] and "difference" in line]
        said.append(
            f"{markdown(kind)} (implanted in most seeds at {', '.join(f'{value:g}' for value in works)}): against its base "
            "attack, RA "
            f"falls for {len(falls)} of {len(tested)} defenses ({_few(falls)}) and rises for {len(rises)} ({_few(rises)})."
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
    about = f"{_MEANS}; differences to strength 0 paired by seed, where both implanted"
    note = "Strengths at which most seeds implant, those seeds. Bands: 95 % intervals over seeds."
    figure = Lines((*top, *bottom), len(kinds), note)
    return Shown(" ".join(said), frame, columns, about, figure)


# -- boards --------------------------------------------------------------------------------------------------------------------


def _board(rows: pd.DataFrame) -> pd.DataFrame:
    """The leaderboards of all tracks under the selection each is judged by, one after the other; controls once."""
    parts = []
    for track in stats.tracks(rows):
        board = stats.leaderboard(rows, track, stats.headline(rows, track))
        if len(board):
            parts.append(board.assign(track=track, selection=stats.headline(rows, track)))
    if not parts:
        raise Missing(f"no attack implanted, so no defense can be judged ({gate_words(rows)})")
    every: pd.DataFrame = pd.concat(parts, ignore_index=True)
    competing = every["role"] == "defense"
    return pd.concat([every[competing], every[~competing].drop_duplicates(ENTRY)], ignore_index=True)


def _part(line: Mapping[str, Any] | pd.Series, name: str) -> Interval:
    return Interval(*(float(line[f"{name}{end}"]) for end in ("", "_low", "_high")))


_BOARD = (Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
          Column("", "text", "role"))  # fmt: skip


def _board_dots(board: pd.DataFrame, title: str, xlabel: str, names: Sequence[str], *, signed: bool = False) -> DotPanel:
    called = [_called((line["defense"], line["scope"])) + ("" if line["role"] == "defense" else f" ({line['role']})")
              for _, line in board.iterrows()]  # fmt: skip
    series = tuple((name.upper().replace("D_", "d"), tuple(_part(line, name) for _, line in board.iterrows())) for name in names)
    return DotPanel(title, xlabel, tuple(called), series, signed)


def size(source: Source) -> Shown:
    """Larger images: who takes ASR down, and who reaches what the clean images give without the attacked model."""
    board = _board(source.rows)
    ranked = board[(board["role"] == "defense") & (board["cells_ok"] > 0)]
    below = ranked[ranked["asr"] < IMPLANTED_ASR].sort_values("asr", kind="stable")
    table = _good(source.rows)
    scratch = [entry for entry in stats.entries(table) if entry[0].startswith(_SCRATCH)]
    said = [
        f"{_of(len(below), len(ranked)).capitalize()} entries take the mean ASR below {100 * IMPLANTED_ASR:g} %"
        + (": " + ", ".join(f"{_name((line['defense'], line['scope']))} to {_percent(line['asr'])} at ACC {_percent(line['acc'])}"
                            for _, line in below.iterrows()) if len(below) else "")
        + "."
    ]  # fmt: skip
    if scratch:
        parts = [paired(_entry(table, entry), _entry(table, scratch[0]), "ra")[0] for entry in _competing(table)]
        said.append(
            "RA is above that of training from scratch on the clean images for "
            f"{_of(sum(_side(part) > 0 for part in parts), len(parts))} "
            f"entries and below it for {sum(_side(part) < 0 for part in parts)}."
        )
    columns = (*_BOARD, *_FIGURES, Column("dACC", "difference", "d_acc"), Column("Cells", "count", "cells_ok"))
    figure = Dots((_board_dots(board, "RA and ASR", "%", ("ra", "asr")),), "Bars: 95 % intervals over seeds.")
    return Shown(" ".join(said), board, columns, _MEANS, figure)


def performance(source: Source) -> Shown:
    """What each defense costs in accuracy, with intervals."""
    board = _board(source.rows)
    ranked = board[(board["role"] == "defense") & (board["cells_ok"] > 0)]
    sides = [(line, _side(_part(line, "d_acc"))) for _, line in ranked.sort_values("d_acc", kind="stable").iterrows()]
    loses = [f"{_name((line['defense'], line['scope']))} {_points(_part(line, 'd_acc'))}" for line, side in sides if side < 0]
    gains = sum(side > 0 for _, side in sides)
    working = ranked[ranked["asr"] < IMPLANTED_ASR]
    free = [_name((line["defense"], line["scope"])) for _, line in working.iterrows() if _side(_part(line, "d_acc")) >= 0]
    said = [
        f"{_of(len(loses), len(ranked)).capitalize()} entries lose accuracy{_told(loses)}; {gains} gain some; the others are not "
        "told "
        "apart from no change."
    ]
    said.append(
        f"Of the {len(working)} that take the mean ASR below {100 * IMPLANTED_ASR:g} %, {len(free)} do so without a loss that "
        "can be "
        f"told{_told(free)}."
        if len(working)
        else f"None takes the mean ASR below {100 * IMPLANTED_ASR:g} %, so no accuracy was kept beside a removed backdoor."
    )
    columns = (*_BOARD, Column("dACC", "difference", "d_acc"), *_FIGURES)
    panel = _board_dots(board, "ACC after minus ACC before", "points", ("d_acc",), signed=True)
    figure = Dots((panel,), "Bars: 95 % intervals over seeds.")
    about = f"{_MEANS}; dACC: to the undefended model of the same scenario and seed"
    return Shown(" ".join(said), board, columns, about, figure)


def pruned(source: Source) -> Shown:
    """How many units every pruning defense removed, and how the semi-supervised ones were trained."""
    table = stats.implanted_worlds(source.rows)
    table = table[(table["status"] == "ok")]
    lines = []
    for (track, defense, scope_), mine in table.groupby(["track", *ENTRY], sort=False):
        if not (mine["pruned"] > 0).any():
            continue
        line: dict[str, Any] = {"track": track, "defense": defense, "scope": scope_,
                                "control": "control" if mine["control"].any() else "", "units": float(mine["units"].mean())}
        for name in ("default", "validation"):
            part = mine[mine["selection"] == name].assign(share=lambda rows: rows["pruned"] / rows["units"])
            line |= {name: float(part["pruned"].mean()) if len(part) else math.nan, **_spread(f"{name}_share", mean(part, "share"))}
        lines.append({**line, "preset": " / ".join(dict.fromkeys(mine["preset"]))})
    if not lines:
        raise Missing("no defense pruned anything")
    frame = pd.DataFrame(lines)
    competing = frame[frame["control"] == ""]
    shares = competing["default_share"]
    untold = int(((table["pruned"] > 0) & (table["units"] == 0)).sum())
    said = [
        "Every row that prunes says how many units of how many."
        if not untold
        else f"{untold} rows prune units of an unknown number.",
        f"At the published default, pruning defenses remove between {_percent(float(shares.min()))} and "
        f"{_percent(float(shares.max()))} of the units in scope (means)." if len(shares.dropna()) else "",
    ]  # fmt: skip
    semi = {c.defense_label: c for c in source.matrix.cells if hasattr(c.defense, "semi_epochs")}
    if semi:
        told = [f"{markdown(label)} ({markdown(c.preset)})" for label, c in semi.items()]
        said.append(f"Semi-supervised training, by MixMatch as each method's file says: {_listed(told)}.")
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"), Column("Units in scope", "number", "units"), Column("Pruned, default", "number", "default"),
        Column("share", "interval", "default_share"), Column("Pruned, validation", "number", "validation"),
        Column("share ", "interval", "validation_share"), Column("Preset", "text", "preset"),
    )  # fmt: skip
    return Shown(" ".join(filter(None, said)), frame, columns, _MEANS)


# -- natural -------------------------------------------------------------------------------------------------------------------


def natural(source: Source) -> Shown:
    """A trigger searched for on a benign model: kept, and found again on the defended model."""
    table = _good(source.rows)
    table = table[table["asr_recraft"].notna()]
    if table.empty:
        raise Missing("no trigger that is computed on the model implanted")
    every = _undefended(source.rows)
    lines, panels, kept, found = [], [], [], []
    said = []
    for attack, worlds in every.groupby("attack", sort=False):
        said.append(
            f"On {len(worlds)} models that nobody poisoned, {markdown(attack)} reaches an ASR of {_share(mean(worlds, 'asr'))}; "
            f"{_implanted(worlds)} pass the gate."
        )
        mine = table[table["attack"] == attack]
        entries = stats.entries(mine)
        for entry in entries:
            own = _entry(mine, entry)
            difference = own.assign(gap=own["asr_recraft"] - own["asr"])
            lines.append({
                "attack": attack, "defense": entry[0], "scope": entry[1], "control": "control" if own["control"].any() else "",
                **_measured(own, ("acc", "asr", "ra", "asr_recraft", "ra_recraft")), **_spread("gap", mean(difference, "gap")),
            })  # fmt: skip
            if entry[0] != stats.UNDEFENDED and not own["control"].any():
                kept.append(lines[-1]["asr"] < IMPLANTED_ASR)
                found.append(lines[-1]["asr_recraft"] < IMPLANTED_ASR)
        if len(mine):
            series = tuple((words, tuple(mean(_entry(mine, entry), name) for entry in entries))
                           for words, name in (("trigger kept", "asr"), ("found again", "asr_recraft")))  # fmt: skip
            panels.append(DotPanel(str(attack), "ASR in %", tuple(_shown(mine, entries)), series))
    if kept:
        tail = (
            "what they remove is one trigger, not the weakness." if sum(found) < sum(kept) else "what they remove stays removed."
            if sum(kept) else "they remove nothing of it."
        )  # fmt: skip
        said.append(
            "Defenses, which have no backdoor to find here, take the ASR of the trigger that is kept below "
            f"{100 * IMPLANTED_ASR:g} % in "
            f"{_of(sum(kept), len(kept))} cases, and of a trigger found again on the defended model in "
            f"{_of(sum(found), len(found))}: {tail}"
        )
    columns = (
        Column("Attack", "text", "attack"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"), Column("ACC", "interval", "acc"), Column("ASR, trigger kept", "interval", "asr"),
        Column("ASR, found again", "interval", "asr_recraft"), Column("Difference", "difference", "gap"),
        Column("RA, kept", "share", "ra"), Column("RA, found again", "share", "ra_recraft"),
    )  # fmt: skip
    about = f"{_MEANS} (implanted: as many triggered images reach the target as the gate asks of a backdoor)"
    return Shown(" ".join(said), pd.DataFrame(lines), columns, about, Dots(tuple(panels), "Bars: 95 % intervals over seeds."))


# -- what any matrix can answer ------------------------------------------------------------------------------------------------


def controls(source: Source) -> Shown:
    """Every track's leader against the plainest classifiers on an extractor and training from scratch."""
    plain = {c.defense_label for c in source.matrix.cells if c.extractor is not None and c.defense.control}
    words = "a plain classifier or training from scratch"
    return _against(source, lambda label: label in plain or label.startswith(_SCRATCH), words)


def _against(source: Source, wanted: Callable[[str], bool], words: str) -> Shown:
    rows, lines, panels = source.rows, [], []
    table = _good(rows)
    known = stats.entries(table[table["control"].astype(bool)])
    entries = [entry for entry in known if wanted(entry[0]) and entry[0] != stats.UNDEFENDED]
    for track in stats.tracks(rows):
        board = stats.leaderboard(rows, track, stats.headline(rows, track))
        ranked = board[(board["place"] == 1) & (board["cells_ok"] > 0)] if len(board) else board
        if ranked.empty:
            continue
        leader = (str(ranked.iloc[0]["defense"]), str(ranked.iloc[0]["scope"]))
        own = _entry(table[table["track"] == track], leader)
        here = []
        for entry in entries:
            control = _entry(table, entry)
            control = control[control["track"] == control["track"].iloc[0]]
            difference, pairs = paired(own, control, "ra")
            here.append({"track": track, "leader": _called(leader), "ra": mean(own, "ra").mean, "control": _called(entry),
                         "control_ra": mean(control, "ra").mean, **_spread("difference", difference), "pairs": pairs})  # fmt: skip
        lines += here
        if here:
            parts = tuple(_part(pd.Series(line), "difference") for line in here)
            title = f"{track}: RA of {_called(leader)} minus RA of"
            names = tuple(str(line["control"]) for line in here)
            panels.append(DotPanel(title, "points", names, (("difference", parts),), signed=True))
    if not lines:
        raise Missing("no such control finished beside a defense")
    frame = pd.DataFrame(lines)
    sides = [_side(_part(line, "difference")) for _, line in frame.iterrows()]
    said = (
        f"Of {len(frame)} pairs of a track's leader and {words}, the leader is ahead in {sides.count(1)}, behind in "
        f"{sides.count(-1)}, and "
        f"{sides.count(0)} are not told apart."
    )
    columns = (
        Column("Track", "text", "track"), Column("Best average rank", "text", "leader"), Column("its RA", "share", "ra"),
        Column("Control", "text", "control"), Column("its RA ", "share", "control_ra"),
        Column("Difference", "difference", "difference"),
        Column("Pairs", "count", "pairs"),
    )  # fmt: skip
    about = f"{_MEANS}; differences paired by attacked model; leader: best average rank of RA, picked on the same models"
    return Shown(said, frame, columns, about, Dots(tuple(panels), "Bars: 95 % intervals over seeds, of paired differences."))


def significance(source: Source) -> Shown:
    """Rank tests where there are enough scenarios, and every leader against every control."""
    shown = _against(source, lambda label: True, "a control")
    said = []
    for track in stats.tracks(source.rows):
        test = stats.significance(source.rows, track, stats.headline(source.rows, track))
        if test is not None:
            apart = sum(p < 0.05 for _, _, p in test.pairs)
            said.append(f"Track {markdown(track)}: Friedman's test over {test.blocks} scenarios, p = {test.friedman:.3g}; "
                        f"{_of(apart, len(test.pairs))} pairs apart at 5 % (Wilcoxon, Holm).")  # fmt: skip
    blocks = int(stats.scenarios(source.rows)["implanted"].sum())
    none = (
        f"No rank test is claimed: it takes {stats.MIN_BLOCKS} implanted scenarios, and there are {blocks}."
        if blocks < stats.MIN_BLOCKS
        else "No track has three complete, differing defenses to test."
    )
    seeds = sorted(set(source.rows["seed"]))
    return Shown(
        f"{' '.join(said) or none} {shown.answer} Intervals resample {len(seeds)} seeds within scenarios and speak of seeds alone.",
        shown.frame, shown.columns, shown.about, shown.figure,
    )  # fmt: skip


def detectors(source: Source) -> Shown:
    """Of the training samples that defenses single out, how many are poisoned, against the base rate."""
    parts = [found.assign(track=track) for track in stats.tracks(source.rows) if len(found := stats.detectors(source.rows, track))]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    table = table[table["implanted"].astype(bool)] if len(table) else table
    if table.empty:
        raise Missing("no defense singled out training samples")
    rows = stats.implanted_worlds(source.rows)
    rows = rows[(rows["selection"] == "default") & (rows["status"] == "ok")]
    lines = []
    for (track, defense, scope_), mine in table.groupby(["track", *ENTRY], sort=False):
        own = rows[(rows["track"] == track) & (rows["defense"] == defense) & (rows["scope"] == scope_)]
        own = own.assign(above=own["precision"] - own["realised_rate"])
        lines.append({"track": track, "defense": defense, "scope": scope_, "isolated": float(mine["isolated"].mean()),
                      **_measured(own, ("precision", "recall", "above")), "base": mean(own, "realised_rate").mean})  # fmt: skip
    frame = pd.DataFrame(lines)
    sides = [_side(_part(line, "above")) for _, line in frame.iterrows()]
    better = [
        f"{_name((line['defense'], line['scope']))} (precision {_percent(line['precision'])}, recall {_percent(line['recall'])})"
        for (_, line), side in zip(frame.iterrows(), sides, strict=True)
        if side > 0
    ]  # fmt: skip
    said = (
        f"{_of(len(better), len(frame)).capitalize()} defenses that single out samples do so with a precision above the base rate "
        f"({_few(better)}); {sides.count(-1)} with one below it."
    )
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("Samples singled out", "number", "isolated"), Column("Precision", "interval", "precision"),
        Column("Recall", "interval", "recall"), Column("Base rate", "share", "base"),
        Column("Precision - base rate", "difference", "above"),
    )  # fmt: skip
    names = tuple(_called((line["defense"], line["scope"])) for _, line in frame.iterrows())
    series = tuple((words, tuple(_part(line, words) for _, line in frame.iterrows())) for words in ("precision", "recall"))
    base = ("base rate", tuple(Interval(float(line["base"]), math.nan, math.nan) for _, line in frame.iterrows()))
    panel = DotPanel("Training samples singled out", "%", names, (*series, base))
    about = f"{_MEANS}; counted against the roles, which no defense sees"
    return Shown(said, frame, columns, about, Dots((panel,), "Default selection."))


def validity(source: Source) -> Shown:
    """Did the attacks work, and as strongly as in the literature?"""
    every = _undefended(source.rows).assign(victims=lambda rows: _victims(rows))
    if every.empty:
        raise Missing("there is no attack")
    lines = []
    for place, here in every.groupby(SCENARIO, sort=False):
        lines.append({**dict(zip(SCENARIO, place, strict=True)), "victims": here["victims"].iloc[0],
                      "rate": float(here["rate"].iloc[0]), "implanted": _implanted(here), **_measured(here, ("acc", "asr", "loss")),
                      "literature": " / ".join(dict.fromkeys(here["literature"]))})  # fmt: skip
    frame = pd.DataFrame(lines)
    found = stats.scenarios(source.rows)
    said = [
        f"{_of(int(found['implanted'].sum()), len(found)).capitalize()} scenarios implant (ASR at least {100 * IMPLANTED_ASR:g} "
        "% and ACC at "
        f"most {100 * MAX_ACC_LOSS:g} points below the benign twin's, in most seeds); the others are shown and never counted."
    ]
    weak = [f"{markdown(line['attack'])} on {markdown(line['backbone'])} ({_percent(line['asr'])})" for _, line in frame.iterrows()
            if line["asr"] < IMPLANTED_ASR]  # fmt: skip
    if weak:
        said.append(f"ASR below the line: {_few(weak)}.")
    verdicts = every["literature"].value_counts()
    with_reference = {name: int(count) for name, count in sorted(verdicts.items()) if name != "no reference"}
    said.append(
        f"Against published figures of the same protocol: {', '.join(f'{name} {n}' for name, n in with_reference.items())}."
        if with_reference
        else "None has a published figure of the same data, network, recipe, attack and rate to stand beside; the table claims "
        "none."
    )
    own = every[every["features"] == ""]
    frozen = every[every["features"] != ""]
    both = [attack for attack in dict.fromkeys(frozen["attack"]) if attack in set(own["attack"])]
    for attack in both:
        for victims, mine in frozen[frozen["attack"] == attack].groupby("victims", sort=False):
            for backbone, other in own[own["attack"] == attack].groupby("backbone", sort=False):
                if str(mine["backbone"].iloc[0]).startswith(str(backbone)):
                    gap, _ = paired(mine.assign(backbone=backbone), other, "asr")
                    words = f"{markdown(attack)} on victims {markdown(victims)} minus the same trained end to end"
                    said.append(f"{words}, ASR: {_points(gap)}.")
    columns = (
        Column("Dataset", "text", "dataset"), Column("Backbone", "text", "backbone"), Column("Attack", "text", "attack"),
        Column("Rate", "share", "rate"), Column("Victims", "text", "victims"), Column("Implanted", "text", "implanted"),
        Column("ACC", "interval", "acc"), Column("ACC, loss to the benign twin", "difference", "loss"),
        Column("ASR", "interval", "asr"), Column("Literature", "text", "literature"),
    )  # fmt: skip
    names = tuple(f"{line['attack']} on {line['backbone']}" for _, line in frame.iterrows())
    series = tuple((name.upper(), tuple(_part(line, name) for _, line in frame.iterrows())) for name in ("asr", "acc"))
    figure = Dots((DotPanel("Undefended models", "%", names, series),), "Means over all seeds, implanted or not.")
    return Shown(" ".join(said), frame, columns, "means over all seeds, implanted or not, 95 % intervals over seeds", figure)


def benign(source: Source) -> Shown:
    """Whether every table reads the same benign accuracy and the same undefended figures."""
    every = [c.scenario for c in source.matrix.cells]
    recipes = {(s.backbone_label, s.attack_label): digest(s.recipe.spec())[:8] for s in every}
    rows = source.rows[source.rows["attack"] != stats.NO_ATTACK]
    rows = rows.assign(recipe=[recipes.get(place, "") for place in zip(rows["backbone"], rows["attack"], strict=True)])
    lines = []
    for (dataset, backbone, recipe), mine in rows.groupby(["dataset", "backbone", "recipe"], sort=False):
        values = mine.groupby("seed")["acc_benign"].nunique(dropna=False)
        lines.append({"dataset": dataset, "backbone": backbone, "recipe": recipe,
                      "attacks": ", ".join(dict.fromkeys(mine["attack"])), "seeds": len(values),
                      "distinct": int(values.max()), "rows": len(mine),
                      **_spread("benign", stats.interval([mine.groupby("seed")["acc_benign"].first().to_list()]))})  # fmt: skip
    frame = pd.DataFrame(lines)
    if frame.empty:
        raise Missing("there is no attack")
    split = frame[frame["distinct"] > 1]
    worlds = rows.groupby(WORLD)[["acc_undefended", "asr_undefended", "ra_undefended"]].nunique(dropna=False).max(axis=1)
    unrated = int(rows["rate"].isna().sum())
    said = [
        f"One benign accuracy per backbone, recipe and seed in all {len(rows)} rows: what differs between lines of the table "
        "below is the "
        "backbone or the recipe."
        if split.empty
        else f"Benign accuracies differ within {len(split)} of {len(frame)} combinations of backbone and recipe: the rows do not "
        "belong "
        "together.",
        f"Undefended figures are the same for every defense in {_of(int((worlds == 1).sum()), len(worlds))} attacked models.",
        "Every row states its poisoning rate." if not unrated else f"{unrated} rows lack a poisoning rate.",
    ]
    columns = (
        Column("Dataset", "text", "dataset"), Column("Backbone", "text", "backbone"), Column("Recipe", "text", "recipe"),
        Column("Attacks", "text", "attacks"), Column("Seeds", "count", "seeds"), Column("Benign ACC", "interval", "benign"),
        Column("Distinct values per seed", "count", "distinct"), Column("Rows", "count", "rows"),
    )  # fmt: skip
    return Shown(" ".join(said), frame, columns, "recipe: first digits of the hash of its settings; one benign twin per recipe")


def _range(line: pd.Series) -> str:
    return f"{line['least']}" if line["least"] == line["most"] else f"{line['least']} to {line['most']}"


def replaced(source: Source) -> Shown:
    """Whether the poisoned training set is larger than the clean one."""
    sizes = source.manifest.get("datasets", {})
    pools = {c.scenario.clean_fraction for c in source.matrix.cells}
    rows = source.rows[(source.rows["train_images"] > 0) & (source.rows["attack"] != stats.NO_ATTACK)]
    lines = []
    for dataset, mine in rows.groupby("dataset", sort=False):
        if dataset not in sizes or len(pools) != 1:
            continue
        whole, pool = int(sizes[dataset]["train"]), round(next(iter(pools)) * int(sizes[dataset]["train"]))
        received = mine[mine["used"].str.contains("train")]
        if received.empty:
            continue
        lines.append({"dataset": dataset, "whole": whole, "pool": pool, "clean": whole - pool,
                      "least": int(received["train_images"].min()), "most": int(received["train_images"].max()),
                      "models": len(received.drop_duplicates(WORLD)), "poison": float(received["realised_rate"].max())})
    if not lines:
        raise Missing("no defense used the training set, or the manifest does not tell its size")
    frame = pd.DataFrame(lines)
    equal = bool(((frame["least"] == frame["clean"]) & (frame["most"] == frame["clean"])).all())
    told = "; ".join(
        f"{markdown(line['dataset'])}: {line['clean']} clean images left to the attacker, {_range(line)} as published"
        for _, line in frame.iterrows()
    )
    said = (
        f"No: poisoned samples replace clean ones, |D'| = |D| in all {int(frame['models'].sum())} attacked models ({told})."
        if equal
        else f"Sizes differ: {told}."
    )
    columns = (
        Column("Dataset", "text", "dataset"), Column("Training images released", "count", "whole"),
        Column("held out as clean budget", "count", "pool"), Column("|D|: left to the attacker", "count", "clean"),
        Column("|D'|: published, least", "count", "least"), Column("most", "count", "most"),
        Column("Attacked models", "count", "models"), Column("Largest share poisoned", "share", "poison"),
    )  # fmt: skip
    return Shown(said, frame, columns, "counted where a defense received the training set as published")


_DEFINITIONS = (
    ("ACC", "clean test images, all", "classified as their true class", "acc"),
    ("ASR", "triggered test images whose true class is not the target", "classified as the target", "asr"),
    ("RA", "the same triggered images", "classified as their true class", "ra"),
)


def robust(source: Source) -> Shown:
    """One definition of robust accuracy, and whether the rows keep to it."""
    table = source.rows[(source.rows["status"] == "ok") & source.rows["asr"].notna()]
    if table.empty:
        raise Missing("no finished row has an ASR")
    over = int((table["asr"] + table["ra"] > 1 + 1e-6).sum())
    third = 1 - table["asr"] - table["ra"]
    frame = pd.DataFrame([
        {"metric": metric, "images": images, "share": share, "least": float(table[name].min()), "most": float(table[name].max())}
        for metric, images, share, name in _DEFINITIONS
    ])  # fmt: skip
    said = (
        "RA is the share of triggered images, those of the target class left out, that are given their true class; ASR is taken "
        "over "
        f"the same images, so that ASR + RA is at most 100 %, which {'holds in all' if not over else f'fails in {over} of'} "
        f"{len(table)} rows. "
        f"RA is not 100 % minus ASR: on average {_percent(float(third.mean()))} of these images go to a third class, at most "
        f"{_percent(float(third.max()))}."
    )
    columns = (Column("Metric", "text", "metric"), Column("Images", "text", "images"), Column("Share", "text", "share"),
               Column("Least in the rows", "share", "least"), Column("Most", "share", "most"))  # fmt: skip
    return Shown(said, frame, columns, "over all finished rows, every selection")
