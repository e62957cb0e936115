"""The page of a trial of ``doctor``: its figures in sentences, a picture, and a line per network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark.analysis.intervals import Interval
from benchmark.doctor.signs import SIGNS
from benchmark.doctor.treatment import COSTS
from benchmark.doctor.trial import REMOVED, Figures, figures
from benchmark.doctor.verdict import most_probable
from benchmark.report.figures import DotPanel, Dots, Mark
from benchmark.report.render import draw
from benchmark.report.text import csv_text, markdown, number_text, percent_text, pipe_table
from benchmark.storage.files import write_text

__all__ = ["picture", "write_trial"]

COLUMNS = {
    "name": "network", "acc": "ACC", "asr": "ASR", "strength": "largest deviation [SD]", "p": "p", "class_found": "class found",
    "recommended": "recommended", "acc_after": "ACC after", "asr_after": "ASR after",
}  # fmt: skip
MARKS = {
    "patch": Mark("#0072B2", "o"), "additive": Mark("#D55E00", "s"), "weights": Mark("#009E73", "^"),
    "statistics": Mark("#CC79A7", "D"),
}  # fmt: skip
CUT = (-5.0, 50.0)
"""Standard deviations at which the picture ends."""


def _named(lines: pd.DataFrame) -> pd.DataFrame:
    """Attacked networks by their strength, then benign ones, each with a ``name``."""
    kinds = lines["attack"].where(lines["asr"].notna(), "benign")
    named = lines.assign(name=kinds + ", seed " + lines["seed"].astype(str), benign=lines["asr"].isna())
    return named.sort_values(["benign", "strength"], ascending=[True, False], kind="stable")


def picture(lines: pd.DataFrame) -> Dots:
    """Every network's signs, in standard deviations from the benign networks."""
    named = _named(lines)
    series = tuple(
        (label, tuple(Interval(float(value), math.nan, math.nan) for value in named[f"sd_{name}"].clip(*CUT)))
        for name, label in SIGNS.items()
    )
    panel = DotPanel("", "standard deviations from the mean of the benign networks", tuple(named["name"]), series, unit=1)
    note = f"Every network is compared with all benign ones but itself. Values are cut at {CUT[0]:.0f} and {CUT[1]:.0f}."
    return Dots((panel,), note, marks={label: MARKS[name] for name, label in SIGNS.items()}, row=0.3)


def _auroc(found: Figures) -> tuple[str, str]:
    mean, low, high = (number_text(value) for value in found.auroc)
    return mean, f"{low} to {high}"


def _sentences(lines: pd.DataFrame) -> list[str]:
    named = _named(lines)
    bad, good = named[~named["benign"]], named[named["benign"]]
    found, (auroc, between) = figures(lines), _auroc(figures(lines))
    missed = ", ".join(bad["name"][~bad["flagged"]]) or "none"
    left = ", ".join(bad["name"][~bad["removed"]]) or "none"
    most = percent_text(most_probable(1 / (1 + len(good))))
    return [
        f"AUROC {auroc} (95 % interval {between}). Cross-entropy of the probability: {number_text(found.cross_entropy)} nats; that "
        f"of a coin is {number_text(math.log(2))}. The probability is never below one half, and with so few benign networks never "
        f"above {most} %, so a cross-entropy near 0 is out of reach.",
        f"{int(bad['flagged'].sum())} of {len(bad)} attacked networks have stronger signs than every benign one, and "
        f"{int(good['flagged'].sum())} of {len(good)} benign networks than every other benign one. Attacked, but not: {missed}.",
        f"The recommended defense leaves an ASR below {100 * REMOVED:.0f} % and costs at most {100 * COSTS:.0f} points of ACC in "
        f"{int(bad['removed'].sum())} of {len(bad)} attacked networks. Not in: {left}.",
    ]  # fmt: skip


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return markdown(value)
    if math.isnan(value):
        return ""
    return percent_text(value) if name.startswith(("acc", "asr")) else number_text(value)


def write_trial(lines: pd.DataFrame, matrix: str, backbone: str, folder: Path) -> None:
    """Writes ``README.md``, ``networks.csv``, ``networks.png`` and ``networks.svg``.

    Args:
        lines: as :func:`benchmark.doctor.trial.table` gives them. matrix, backbone: of the networks. folder: where to.
    """
    draw(picture(lines), f"Signs of attacked and benign networks: {backbone}, {matrix}", folder / "networks")
    write_text(folder / "networks.csv", csv_text(lines))
    attacked = int(lines["asr"].notna().sum())
    scores = [("largest deviation of the four", *_auroc(figures(lines)))]
    scores += [(label, *_auroc(figures(lines, name))) for name, label in SIGNS.items()]
    body = [[_cell(name, line[name]) for name in COLUMNS] for _, line in _named(lines).iterrows()]
    about = (
        f"{attacked} attacked and {len(lines) - attacked} benign networks (backbone {backbone}, matrix `{matrix}`), each examined "
        "without knowing trigger or target. Each is compared with all benign ones but itself."
    )
    last = (
        "Percent; SD: standard deviations from the mean of the benign networks. Class found: whether the class with the largest "
        "anomaly index is the attacker's target. Written by `python -m benchmark.doctor.trial`; all figures: "
        "[networks.csv](networks.csv)."
    )
    parts = [
        "# How good is `doctor`?", about, "\n".join(f"- {one}" for one in _sentences(lines)),
        "![Signs of every network](networks.png)", pipe_table(["sign", "AUROC", "95 % interval"], scores, left=1),
        pipe_table(list(COLUMNS.values()), body, left=1), last,
    ]  # fmt: skip
    write_text(folder / "README.md", "\n\n".join(part.rstrip() for part in parts) + "\n")
