"""Why a row is as it is: why its scenario counts, and why its candidate was chosen. Pure functions of stored rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

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
    asr, twin, effect = (percent_text(float(gate[name])) for name in ("asr", "asr_benign", "effect"))
    seeds = int(gate["seeds"])
    mean = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    if math.isnan(gate["asr_benign"]):
        why = f"ASR {asr} ({mean}) against at least {100 * IMPLANTED_ASR:g}; the ASR of the benign twin was not measured"
    elif gate["adversarial"]:
        why = (
            f"the trigger works on the benign twin, too: its ASR is {twin}, above {100 * ADVERSARIAL_ASR:g} ({mean}), so the "
            "trigger is an adversarial perturbation"
        )
    else:
        why = (
            f"ASR {asr} (at least {100 * IMPLANTED_ASR:g}), {effect} points above the benign twin's {twin} (at least "
            f"{100 * IMPLANTED_EFFECT:g}); {mean}"
        )
    loss, least = (float(gate[name]) for name in ("acc_loss", "acc_loss_low"))
    sure = f", with 95 % confidence more than {percent_text(least)}" if least > 0 else ", which may be chance"
    cost = f"It costs {percent_text(loss)} points of ACC{sure}" if loss > 0 else "It costs no ACC"
    counts = "It counts." if gate["implanted"] else "It does not count: it is shown and never ranked."
    return f"{scenario_words(gate)}: {why}. {cost}. {counts} This seed: {plain(row['gate'])}."


def _setting(line: pd.Series) -> str:
    if line["kept"]:
        return "the untouched model"
    parts = [f"{name} {number_text(float(line[name]))}" for name in ("dial", "knob") if not math.isnan(line[name])]
    return ", ".join(parts) or "the method's only model"


def _loss(line: pd.Series) -> str:
    error = "" if math.isnan(line["val_loss_se"]) else f" (standard error {percent_text(float(line['val_loss_se']))})"
    return f"loses {percent_text(float(line['val_loss']), signed=True)} points{error} on the validation images"


def _row(row: pd.Series, offered: pd.DataFrame) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {plain(row['reason'])}."
    if not offered["is_default"].any():
        why = f"Chosen: {_setting(row)}."  # its candidates are not recorded
    elif len(offered) == 1:
        why = "There is one model and nothing to choose."
    else:
        why = _RULES[str(row["selection"])](row, offered)
    figures = f"ACC {percent_text(row['acc'])}, ASR {percent_text(row['asr'])}, RA {percent_text(row['ra'])}"
    mark = f" Mark: {row['mark']}." if row["mark"] else ""
    return f"{why} {figures}; {number_text(float(row['cost_epochs']))} standard epochs.{mark}"


# -- why this candidate: one function per rule, from the chosen row and the candidates -------------------------------------------


def _validation(row: pd.Series, offered: pd.DataFrame) -> str:
    start = offered[offered["is_default"]].iloc[0]
    if not row["kept"] and _setting(start) == _setting(row):
        return f"The published default ({_setting(row)}) {_loss(start)}, within {_TAU}: it is chosen."
    first = f"The published default ({_setting(start)}) {_loss(start)}, more than {_TAU}."
    if row["kept"]:
        return f"{first} No weaker setting stays within {_TAU}, so the untouched model is kept."
    where = "along the dial" if start["knob"] == row["knob"] or math.isnan(start["knob"]) else "to another knob"
    return f"{first} Weakened {where}: {_setting(row)} {_loss(row)}, within {_TAU}."


def _strongest(row: pd.Series, offered: pd.DataFrame) -> str:
    if row["kept"]:
        return f"No candidate stays within {_TAU} points on the validation images, so the untouched model is kept."
    return f"The strongest of those within {_TAU} points: {_setting(row)} {_loss(row)}."


def _canary(row: pd.Series, offered: pd.DataFrame) -> str:
    same_knob = (offered["knob"] == row["knob"]) | math.isnan(row["knob"])
    best = offered[offered["kept"]] if row["kept"] else offered[(offered["dial"] == row["dial"]) & same_knob]
    left = ""
    if len(best) and not math.isnan(best["canary_asr"].iloc[0]):
        before, after = (percent_text(float(of["canary_asr"].iloc[0])) for of in (offered[offered["kept"]], best))
        left = f" The mean ASR of the canaries falls from {before} to {after}."
    return f"Of the settings within {_TAU} points, the one that removes the planted canaries best: {_setting(row)}.{left}"


_TAU = f"{100 * TAU:g}"
_RULES: dict[str, Callable[[pd.Series, pd.DataFrame], str]] = {
    "default": lambda row, offered: f"The published default: {_setting(row)}.",
    "validation": _validation,
    "strongest": _strongest,
    "canary": _canary,
    "oracle": lambda row, offered: f"With the test set: the highest RA of {len(offered)} candidates, {_setting(row)}.",
    "leaky": lambda row, offered: (
        f"With the test set: the lowest ASR among those that keep {100 - 100 * LEAKY_TOLERANCE:g} % of the ACC, {_setting(row)}."
    ),
}
