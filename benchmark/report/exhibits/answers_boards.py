"""Answers that any matrix's rows can give: accuracy kept, units pruned, controls, tests, detectors, validity, and that one
definition and one benign twin hold throughout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from benchmark.analysis import intervals, rank_tests, stats
from benchmark.analysis.intervals import Interval
from benchmark.analysis.stats import ENTRY, SCENARIO, SCRATCH, WORLD
from benchmark.report.exhibits.evidence import (
    FIGURES,
    MEANS,
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
    few,
    finished,
    implanted_words,
    in_brackets,
    interval_of,
    interval_words,
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
from benchmark.report.figures import DotPanel, Dots
from benchmark.report.text import markdown
from benchmark.report.words import GATE_WORDS, gate_words, scenario_words
from benchmark.rules.metrics import IMPLANTED_ASR
from defenses.hid import HID
from models.spec import digest

__all__ = [
    "benign", "controls", "detectors", "performance", "pruned", "replaced", "robust", "significance", "size", "validity",
]  # fmt: skip


# -- defenses ----------------------------------------------------------------------------------------------------------------------

_BOARD = (Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
          Column("", "text", "role"))  # fmt: skip


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


def _board_dots(board: pd.DataFrame, title: str, xlabel: str, names: Sequence[str], *, signed: bool = False) -> DotPanel:
    called = [entry_words((line["defense"], line["scope"])) + ("" if line["role"] == "defense" else f" ({line['role']})")
              for _, line in board.iterrows()]  # fmt: skip
    series = tuple(
        (name.upper().replace("D_", "d"), tuple(interval_of(line, name) for _, line in board.iterrows())) for name in names
    )
    return DotPanel(title, xlabel, tuple(called), series, signed)


def size(source: Source) -> Shown:
    """Larger images: who takes ASR down, and who reaches what the clean images give without the attacked model."""
    board = _board(source.rows)
    ranked = board[(board["role"] == "defense") & (board["cells_ok"] > 0)]
    below = ranked[ranked["asr"] < IMPLANTED_ASR].sort_values("asr", kind="stable")
    table = finished(source.rows)
    scratch = [entry for entry in stats.entries(table) if entry[0].startswith(SCRATCH)]
    reached = [
        f"{entry_markdown((line['defense'], line['scope']))} to {percent_words(line['asr'])} at ACC {percent_words(line['acc'])}"
        for _, line in below.iterrows()
    ]
    every = before_defense(source.rows)
    said = [
        f"{listed([markdown(attack) for attack in dict.fromkeys(every['attack'])])}: {implanted_words(every)} attacked models pass "
        f"the gate, at an ACC of {interval_words(mean(every, 'acc'))} and an ASR of {interval_words(mean(every, 'asr'))}.",
        f"{out_of(len(below), len(ranked)).capitalize()} entries take the mean ASR below {100 * IMPLANTED_ASR:g} %"
        f"{after_colon(reached)}.",
    ]
    if scratch:
        parts = [paired_gap(of_entry(table, entry), of_entry(table, scratch[0]), "ra")[0] for entry in competitors(table)]
        said.append(
            "RA is above that of training from scratch on the clean images for "
            f"{out_of(sum(verdict(part) > 0 for part in parts), len(parts))} "
            f"entries and below it for {sum(verdict(part) < 0 for part in parts)}."
        )
    columns = (*_BOARD, *FIGURES, Column("dACC", "difference", "d_acc"), Column("Cells", "count", "cells_ok"))
    figure = Dots((_board_dots(board, "RA and ASR", "%", ("ra", "asr")),), "Bars: 95 % intervals over seeds.")
    return Shown(" ".join(said), board, columns, MEANS, figure)


def performance(source: Source) -> Shown:
    """What each defense costs in accuracy, with intervals."""
    board = _board(source.rows)
    ranked = board[(board["role"] == "defense") & (board["cells_ok"] > 0)]
    sides = [(line, verdict(interval_of(line, "d_acc"))) for _, line in ranked.sort_values("d_acc", kind="stable").iterrows()]
    loses = [
        f"{entry_markdown((line['defense'], line['scope']))} {points_words(interval_of(line, 'd_acc'))}"
        for line, side in sides
        if side < 0
    ]
    gains = sum(side > 0 for _, side in sides)
    working = ranked[ranked["asr"] < IMPLANTED_ASR]
    kept = [line for _, line in working.iterrows() if verdict(interval_of(line, "d_acc")) >= 0]
    free = [entry_markdown((line["defense"], line["scope"])) for line in kept]
    said = [
        f"{out_of(len(loses), len(ranked)).capitalize()} entries lose accuracy{after_colon(loses)}; {gains} gain some; the "
        "others are not "
        "told apart from no change."
    ]
    said.append(
        f"Of the {len(working)} that take the mean ASR below {100 * IMPLANTED_ASR:g} %, {len(free)} do so without a loss that "
        f"can be told{after_colon(free)}."
        if len(working)
        else f"None takes the mean ASR below {100 * IMPLANTED_ASR:g} %, so no accuracy was kept beside a removed backdoor."
    )
    columns = (*_BOARD, Column("dACC", "difference", "d_acc"), *FIGURES)
    panel = _board_dots(board, "ACC after minus ACC before", "points", ("d_acc",), signed=True)
    figure = Dots((panel,), "Bars: 95 % intervals over seeds.")
    about = f"{MEANS}; dACC: to the undefended model of the same scenario and seed"
    return Shown(" ".join(said), board, columns, about, figure)


def pruned(source: Source) -> Shown:
    """How many units every pruning defense removed, and how the semi-supervised ones were trained."""
    table = stats.implanted_worlds(source.rows)
    table = table[(table["status"] == "ok")]
    pruners = set(table.loc[table["pruned"] > 0, "defense"])
    pruners |= {c.defense_label for c in source.matrix.cells if c.defense.writer is not None}
    lines = []
    for (track, defense, scope_), mine in table.groupby(["track", *ENTRY], sort=False):
        if defense not in pruners:
            continue
        line: dict[str, Any] = {"track": track, "defense": defense, "scope": scope_,
                                "control": "control" if mine["control"].any() else "", "units": float(mine["units"].mean())}
        for name in ("default", "validation"):
            part = mine[mine["selection"] == name].assign(share=lambda rows: rows["pruned"] / rows["units"])
            line |= bounded(f"{name}_share", mean(part, "share"))
            line[name] = float(part["pruned"].mean()) if len(part) else math.nan
            line[f"{name}_none"] = int((part["pruned"] == 0).sum()) if len(part) else math.nan
        line["cells"] = mine["cell"].nunique()
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
        f"At the published default, pruning defenses remove between {percent_words(float(shares.min()))} and "
        f"{percent_words(float(shares.max()))} of the units in scope (means)." if len(shares.dropna()) else "",
    ]  # fmt: skip
    idle = [
        f"{entry_markdown((line['defense'], line['scope']))} in {line['default_none']:.0f} of {line['cells']}"
        for _, line in competing.iterrows() if line["default_none"] > 0
    ]  # fmt: skip
    if idle:
        said.append(f"Cells in which the published default prunes nothing: {few(idle, 8)}.")
    said.append(_hid(source, table))
    semi = {c.defense_label: c for c in source.matrix.cells if hasattr(c.defense, "semi_epochs")}
    if semi:
        told = [f"{markdown(label)} ({markdown(c.preset)})" for label, c in semi.items()]
        said.append(f"Semi-supervised training, by MixMatch as each method's file says: {listed(told)}.")
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("", "text", "control"), Column("Units in scope", "number", "units"), Column("Pruned, default", "number", "default"),
        Column("Share, default", "interval", "default_share"), Column("Pruned, validation", "number", "validation"),
        Column("Share, validation", "interval", "validation_share"), Column("Cells", "count", "cells"),
        Column("Nothing pruned, default", "count", "default_none"), Column("Nothing pruned, validation", "count",
        "validation_none"),
        Column("Preset", "text", "preset"),
    )  # fmt: skip
    return Shown(" ".join(filter(None, said)), frame, columns, MEANS)


def _hid(source: Source, table: pd.DataFrame) -> str:
    """HID beside HID without its pruning step, paired; nothing where the matrix has not both."""
    known = {c.defense_label: c.defense for c in source.matrix.cells if isinstance(c.defense, HID)}
    bare = [label for label, defense in known.items() if defense.rule == "none"]
    whole = [label for label, defense in known.items() if defense.rule != "none"]
    mine = table[table["selection"] == "default"]
    one, other = (mine[mine["defense"].isin(labels)] for labels in (whole[:1], bare[:1]))
    if one.empty or other.empty:
        return ""
    difference, pairs = paired_gap(one, other, "ra")
    counts = [int(part) for note in one["note"] for found in re.findall(r"pruned ([0-9, and]+) of", note)
              for part in re.findall(r"[0-9]+", found)]  # fmt: skip
    steps = f" Its Hölder step pruned nothing in {counts.count(0)} of {len(counts)} rounds." if counts else ""
    words = {1: "so the pruning helps", -1: "so the pruning harms", 0: "so the pruning is not told apart from none"}
    return (
        f"RA of {markdown(whole[0])} minus RA of {markdown(bare[0])}: {points_words(difference)} over {pairs} attacked models, "
        f"{words[verdict(difference)]}.{steps}"
    )


# -- controls and tests ------------------------------------------------------------------------------------------------------------

def controls(source: Source) -> Shown:
    """Every track's leader against the plainest classifiers on an extractor and training from scratch."""
    plain = {c.defense_label for c in source.matrix.cells if c.extractor is not None and c.defense.control}
    words = "a plain classifier or training from scratch"
    return _against(source, lambda label: label in plain or label.startswith(SCRATCH), words)


def _against(source: Source, wanted: Callable[[str], bool], words: str) -> Shown:
    rows, lines, panels = source.rows, [], []
    table = finished(rows)
    known = stats.entries(table[table["control"].astype(bool)])
    entries = [entry for entry in known if wanted(entry[0]) and entry[0] != stats.UNDEFENDED]
    for track in stats.tracks(rows):
        board = stats.leaderboard(rows, track, stats.headline(rows, track))
        ranked = board[(board["place"] == 1) & (board["cells_ok"] > 0)] if len(board) else board
        if ranked.empty:
            continue
        leader = (str(ranked.iloc[0]["defense"]), str(ranked.iloc[0]["scope"]))
        own = of_entry(table[table["track"] == track], leader)
        here = []
        for entry in entries:
            control = of_entry(table, entry)
            control = control[control["track"] == control["track"].iloc[0]]
            difference, pairs = paired_gap(own, control, "ra")
            here.append({"track": track, "leader": entry_words(leader), "ra": mean(own, "ra").mean, "control": entry_words(entry),
                         "control_ra": mean(control, "ra").mean, **bounded("difference", difference), "pairs": pairs})  # fmt: skip
        lines += here
        if here:
            parts = tuple(interval_of(pd.Series(line), "difference") for line in here)
            title = f"{track}: RA of {entry_words(leader)} minus a control's"
            names = tuple(str(line["control"]) for line in here)
            panels.append(DotPanel(title, "points", names, (("difference", parts),), signed=True))
    if not lines:
        raise Missing("no such control finished beside a defense")
    frame = pd.DataFrame(lines)
    sides = [verdict(interval_of(line, "difference")) for _, line in frame.iterrows()]
    ahead = [
        f"{markdown(line['leader'])} of {markdown(line['control'])}"
        for (_, line), side in zip(frame.iterrows(), sides, strict=True)
        if side > 0
    ]
    said = (
        f"Of {len(frame)} pairs of a track's leader and {words}, the leader is ahead in {sides.count(1)}, behind in "
        f"{sides.count(-1)}, and {sides.count(0)} are not told apart. Ahead: {few(ahead)}. Controls may hold what a track "
        "withholds; what, stands beside each leaderboard."
    )
    columns = (
        Column("Track", "text", "track"), Column("Best average rank", "text", "leader"), Column("Control", "text", "control"),
        Column("RA, leader", "share", "ra"), Column("RA, control", "share", "control_ra"),
        Column("Difference", "difference", "difference"),
        Column("Pairs", "count", "pairs"),
    )  # fmt: skip
    about = f"{MEANS}; differences paired by attacked model; leader: best average rank of RA, picked on the same models"
    return Shown(said, frame, columns, about, Dots(tuple(panels), "Bars: 95 % intervals over seeds, of paired differences."))


def significance(source: Source) -> Shown:
    """Rank tests where there are enough scenarios, and every leader against every control."""
    shown = _against(source, lambda label: True, "a control")
    said = []
    for track in stats.tracks(source.rows):
        test = rank_tests.significance(source.rows, track, stats.headline(source.rows, track))
        if test is not None:
            apart = sum(p < 0.05 for _, _, p in test.pairs)
            said.append(f"Track {markdown(track)}: Friedman's test over {test.blocks} scenarios, p = {test.friedman:.3g}; "
                        f"{out_of(apart, len(test.pairs))} pairs apart at 5 % (Wilcoxon, Holm).")  # fmt: skip
    blocks = int(stats.scenarios(source.rows)["implanted"].sum())
    none = (
        f"No rank test is claimed: it takes {rank_tests.MIN_BLOCKS} implanted scenarios, and there are {blocks}."
        if blocks < rank_tests.MIN_BLOCKS
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
                      **means_of(own, ("precision", "recall", "above")), "base": mean(own, "realised_rate").mean,
                      "failed": int((own["mark"] == "mechanism failed").sum()), "cells": len(own)})  # fmt: skip
    frame = pd.DataFrame(lines)
    sides = [verdict(interval_of(line, "above")) for _, line in frame.iterrows()]
    better = [
        f"{entry_markdown((line['defense'], line['scope']))} (precision {percent_words(line['precision'])}, recall "
        f"{percent_words(line['recall'])})"
        for (_, line), side in zip(frame.iterrows(), sides, strict=True)
        if side > 0
    ]  # fmt: skip
    said = (
        f"{out_of(len(better), len(frame)).capitalize()} defenses that single out samples do so with a precision above the base "
        "rate"
        f"{in_brackets(better)}; {sides.count(-1)} with one below it."
    )
    failed = [
        f"{entry_markdown((line['defense'], line['scope']))} in {line['failed']:.0f} of {line['cells']}"
        for _, line in frame.iterrows() if line["failed"] > 0
    ]  # fmt: skip
    if failed:
        said += f" Cells marked *mechanism failed*, since the set is no more poisoned than the training set: {few(failed, 6)}."
    columns = (
        Column("Track", "text", "track"), Column("Defense", "text", "defense"), Column("Scope", "text", "scope"),
        Column("Samples singled out", "number", "isolated"), Column("Precision", "interval", "precision"),
        Column("Recall", "interval", "recall"), Column("Base rate", "share", "base"),
        Column("Precision - base rate", "difference", "above"), Column("Mechanism failed", "count", "failed"),
        Column("Cells", "count", "cells"),
    )  # fmt: skip
    names = tuple(entry_words((line["defense"], line["scope"])) for _, line in frame.iterrows())
    series = tuple((words, tuple(interval_of(line, words) for _, line in frame.iterrows())) for words in ("precision", "recall"))
    base = ("base rate", tuple(Interval(float(line["base"]), math.nan, math.nan) for _, line in frame.iterrows()))
    panel = DotPanel("Training samples singled out", "%", names, (*series, base))
    about = f"{MEANS}; counted against the roles, which no defense sees"
    return Shown(said, frame, columns, about, Dots((panel,), "Default selection."))


# -- attacks and the rules of the comparison ---------------------------------------------------------------------------------------

def validity(source: Source) -> Shown:
    """Did the attacks work, and as strongly as in the literature?"""
    every = before_defense(source.rows).assign(victims=lambda rows: victims_words(rows))
    if every.empty:
        raise Missing("there is no attack")
    lines = []
    for place, here in every.groupby(SCENARIO, sort=False):
        lines.append({**dict(zip(SCENARIO, place, strict=True)), "victims": here["victims"].iloc[0],
                      "rate": float(here["rate"].iloc[0]), "implanted": implanted_words(here),
                      **means_of(here, ("acc", "asr", "loss", "asr_benign", "effect")),
                      "literature": " / ".join(dict.fromkeys(here["literature"]))})  # fmt: skip
    frame = pd.DataFrame(lines)
    found = stats.scenarios(source.rows)
    frame["verdict"] = [scenario_words(line) for _, line in found.iterrows()]
    frame["loss_low"] = list(found["acc_loss_low"])
    said = [f"{gate_words(source.rows).capitalize()}. The gate: {GATE_WORDS}."]
    weak = [
        f"{markdown(line['attack'])} on {markdown(line['backbone'])} ({percent_words(line['asr'])})"
        for _, line in frame.iterrows()
        if line["asr"] < IMPLANTED_ASR
    ]
    if weak:
        said.append(f"ASR below {100 * IMPLANTED_ASR:g} %: {few(weak)}.")
    for state, words in (("adversarial", "Adversarial, since the twin answers the trigger, too"), ("costs ACC", "Costs ACC")):
        named = [f"{markdown(line['attack'])} on {markdown(line['backbone'])}" for _, line in frame.iterrows()
                 if str(line["verdict"]).endswith(state)]  # fmt: skip
        if named:
            said.append(f"{words}: {few(named)}.")
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
                    gap, _ = paired_gap(mine.assign(backbone=backbone), other, "asr")
                    words = f"ASR of {markdown(attack)}, victims {markdown(victims)} minus victims trained end to end"
                    said.append(f"{words}: {points_words(gap)}.")
    columns = (
        Column("Dataset", "text", "dataset"), Column("Backbone", "text", "backbone"), Column("Attack", "text", "attack"),
        Column("Rate", "share", "rate"), Column("Victims", "text", "victims"), Column("Verdict", "text", "verdict"),
        Column("Seeds that pass by themselves", "text", "implanted"), Column("ASR", "interval", "asr"),
        Column("ASR, benign twin", "interval", "asr_benign"), Column("Effect", "difference", "effect"),
        Column("ACC", "interval", "acc"), Column("ACC, loss to the benign twin", "difference", "loss"),
        Column("at least", "points", "loss_low"), Column("Literature", "text", "literature"),
    )  # fmt: skip
    names = tuple(f"{line['attack']} on {line['backbone']}" for _, line in frame.iterrows())
    called = (("ASR", "asr"), ("ASR of the benign twin", "asr_benign"), ("ACC", "acc"))
    series = tuple((words, tuple(interval_of(line, name) for _, line in frame.iterrows())) for words, name in called)
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
                      **bounded("benign", intervals.interval([mine.groupby("seed")["acc_benign"].first().to_list()]))})  # fmt: skip
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
        "belong together.",
        f"Undefended figures are the same for every defense in {out_of(int((worlds == 1).sum()), len(worlds))} attacked models.",
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
        f"over the same images, so that ASR + RA is at most 100 %, which {'holds in all' if not over else f'fails in {over} of'} "
        f"{len(table)} rows. "
        f"RA is not 100 % minus ASR: on average {percent_words(float(third.mean()))} of these images go to a third class, at most "
        f"{percent_words(float(third.max()))}."
    )
    columns = (Column("Metric", "text", "metric"), Column("Images", "text", "images"), Column("Share", "text", "share"),
               Column("Least in the rows", "share", "least"), Column("Most", "share", "most"))  # fmt: skip
    return Shown(said, frame, columns, "over all finished rows, every selection")
