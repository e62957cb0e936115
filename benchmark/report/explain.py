"""Why a row says what it says: why its scenario counts, and why its candidate was chosen. Pure functions of stored rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.text import number_text, percent_text, plain
from benchmark.report.words import scenario_words
from benchmark.rules.metrics import ADVERSARIAL_ASR, IMPLANTED_ASR, IMPLANTED_EFFECT
from benchmark.rules.selection import LEAKY_TOLERANCE, TAU
from models.spec import BadInput, nearest

__all__ = ["AXES", "explain", "pick"]

AXES = ("dataset", "backbone", "attack", "seed", "track", "scope", "defense")
MOST = 20
"""Cells explained at once."""


def pick(rows: pd.DataFrame, only: str) -> pd.DataFrame:
    """The rows that ``"attack=badnets|sig,seed=0"`` names: bars between values, all axes must agree.

    Raises:
        BadInput: an unknown axis or a value that no row has, with the nearest right one.
    """
    for part in only.split(","):
        axis, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or axis not in AXES:
            raise BadInput(f"--only {part.strip()!r}: write axis=value{nearest(axis, AXES)}")
        values = [str(value) for value in dict.fromkeys(rows[axis])]
        wanted = [text] if text in values else [piece.strip() for piece in text.split("|")]
        for value in wanted:
            if value not in values:
                raise BadInput(f"--only {axis}={value}: no such row{nearest(value, values)}")
        rows = rows[rows[axis].astype(str).isin(wanted)]
    if rows.empty:
        raise BadInput(f"--only {only}: no cell has all of these")
    return rows


def explain(rows: pd.DataFrame, curves: pd.DataFrame, only: str) -> Iterator[str]:
    """A paragraph per cell that ``only`` names, in plain text; at most twenty, then how many more there are.

    Args:
        rows, curves: of the whole matrix, as :func:`benchmark.storage.rows.read` returns them.
    """
    cells = list(dict.fromkeys(pick(rows, only)["cell"]))
    gates = {tuple(line[stats.SCENARIO]): line for _, line in stats.scenarios(rows).iterrows()}
    for cell in cells[:MOST]:
        mine = rows[rows["cell"] == cell]
        first = mine.iloc[0]
        head = (
            f"{first['defense']} ({first['scope']}), track {first['track']}, against {first['attack']} on {first['backbone']}, "
            f"{first['dataset']}, seed {first['seed']}"
        )
        gate = gates.get(tuple(first[stats.SCENARIO]))
        parts = [plain(head), "  scenario: " + ("no attack." if gate is None else _scenario(gate, first))]
        ranked = stats.headline(rows, str(first["track"]))
        offered = curves[curves["cell"] == cell]
        for _, row in mine.iterrows():
            parts.append(f"  {row['selection']}{' (ranked)' if row['selection'] == ranked else ''}: {_row(row, offered)}")
        yield "\n".join(parts)
    if len(cells) > MOST:
        yield f"... and {len(cells) - MOST} more cells; name more axes: {', '.join(AXES)}"


def _scenario(gate: pd.Series, row: pd.Series) -> str:
    """Why a scenario counts or not: its figures on the mean over seeds beside the gate's, and this seed's."""
    asr, twin, effect = (float(gate[name]) for name in ("asr", "asr_benign", "effect"))
    seeds = int(gate["seeds"])
    mean = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    if math.isnan(twin):
        why = (
            f"ASR {percent_text(asr)} ({mean}) against at least {100 * IMPLANTED_ASR:g}; what the benign twin answers was not "
            "measured"
        )
    elif gate["adversarial"]:
        why = (
            f"the benign twin answers the trigger, too: its ASR is {percent_text(twin)}, above {100 * ADVERSARIAL_ASR:g} "
            f"({mean}), so the "
            "trigger is an adversarial perturbation"
        )
    else:
        why = (
            f"ASR {percent_text(asr)} (at least {100 * IMPLANTED_ASR:g}), of which the poison explains {percent_text(effect)} "
            "points (at "
            f"least {100 * IMPLANTED_EFFECT:g}; the twin's ASR is {percent_text(twin)}); {mean}"
        )
    loss, least = (float(gate[name]) for name in ("acc_loss", "acc_loss_low"))
    sure = f", surely more than {percent_text(least)}" if least > 0 else ", which may be chance"
    cost = f"It costs {percent_text(loss)} points of ACC{sure}" if loss > 0 else "It costs no ACC"
    counts = "It counts." if gate["implanted"] else "It does not count: it is shown and never ranked."
    return f"{scenario_words(gate)}: {why}. {cost}. {counts} This seed: {plain(row['gate'])}."


def _setting(line: pd.Series) -> str:
    if line["kept"]:
        return "the untouched model"
    dial = "" if math.isnan(line["dial"]) else f"dial {number_text(float(line['dial']))}"
    knob = "" if math.isnan(line["knob"]) else f"knob {number_text(float(line['knob']))}"
    return ", ".join(part for part in (dial, knob) if part) or "the method's only model"


def _loss(line: pd.Series) -> str:
    error = "" if math.isnan(line["val_loss_se"]) else f" (standard error {percent_text(float(line['val_loss_se']))})"
    return f"loses {percent_text(float(line['val_loss']), signed=True)} points{error} on the validation images"


def _row(row: pd.Series, offered: pd.DataFrame) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {plain(row['reason'])}."
    figures = f"ACC {percent_text(row['acc'])}, ASR {percent_text(row['asr'])}, RA {percent_text(row['ra'])}"
    mark = f" Mark: {row['mark']}." if row["mark"] else ""
    return f"{_why(row, offered)} {figures}; {number_text(float(row['cost_epochs']))} standard epochs.{mark}"


def _why(row: pd.Series, offered: pd.DataFrame) -> str:
    """Why this candidate: the rule, walked through over the stored candidates."""
    rule, chosen, tau = str(row["selection"]), _setting(row), f"{100 * TAU:g}"
    if not offered["is_default"].any():
        return f"Chosen: {chosen}."  # its candidates are not stored
    if len(offered) == 1:
        return "There is one model and nothing to choose."
    if rule == "default":
        return f"The published default: {chosen}."
    if rule == "validation":
        start = offered[offered["is_default"]].iloc[0]
        if not row["kept"] and _setting(start) == _setting(row):
            return f"The published default ({chosen}) {_loss(start)}, within {tau}: it is taken as it is."
        told = f"The published default ({_setting(start)}) {_loss(start)}, more than {tau}."
        if row["kept"]:
            return f"{told} No gentler setting stays within {tau}, so the untouched model is kept."
        gone = "back along the dial" if start["knob"] == row["knob"] or math.isnan(start["knob"]) else "on to a gentler knob"
        return f"{told} Stepped {gone}: {chosen} {_loss(row)}, within {tau}."
    if rule == "strongest":
        if row["kept"]:
            return f"No candidate stays within {tau} points on the validation images, so the untouched model is kept."
        return f"The strongest of those within {tau} points: {chosen} {_loss(row)}."
    if rule == "canary":
        best = offered[(offered["dial"] == row["dial"]) & ((offered["knob"] == row["knob"]) | math.isnan(row["knob"]))]
        best = offered[offered["kept"]] if row["kept"] else best
        left = "" if best.empty or math.isnan(best["canary_asr"].iloc[0]) else (
            f" It leaves the canaries an ASR of {percent_text(float(best['canary_asr'].iloc[0]))} (mean), from "
            f"{percent_text(float(offered.loc[offered['kept'], 'canary_asr'].iloc[0]))}."
        )  # fmt: skip
        return f"Of the settings within {tau} points, the one that removes the planted canaries best: {chosen}.{left}"
    if rule == "oracle":
        return f"With the test set: the highest RA of {len(offered)} candidates, {chosen}."
    return f"With the test set: the lowest ASR among those that keep {100 - 100 * LEAKY_TOLERANCE:g} % of the ACC, {chosen}."
