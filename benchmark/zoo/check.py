"""Computes the figures of every card again from its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attacks.base import poison_test
from benchmark.rules.metrics import Score, score
from benchmark.run.local import single_thread
from benchmark.run.world import world
from benchmark.storage.machine import arithmetic, versions
from benchmark.storage.zoo import names
from benchmark.zoo.load import made_again, opened
from models.spec import BadInput
from models.training import arithmetic as at_precision

__all__ = ["TOLERANCE", "Checked", "check", "judged"]

TOLERANCE = 0.002
"""How far a share may lie from the card's on another machine type, or on images that another decoder read (0.002 = 0.2 points)."""
SHARES = ("acc", "asr", "ra")


@dataclass(frozen=True)
class Checked:
    """A card and what its file gives here.

    Attributes:
        name: of the victim.
        card: ACC, ASR and RA of the card; NaN where there are none.
        again: the same, measured here.
        verdict: ``identical``, ``within`` the tolerance of another machine type, or ``differs``.
    """

    name: str
    card: Score
    again: Score
    verdict: str


def judged(name: str, card: Score, again: Score, *, exact: bool) -> Checked:
    """Compares two scores; ``exact``: they come from the same images and the same machine type."""
    pairs = [(getattr(card, share), getattr(again, share)) for share in SHARES]
    apart = [0.0 if math.isnan(one) and math.isnan(other) else abs(one - other) for one, other in pairs]
    if all(gap == 0 for gap in apart):
        return Checked(name, card, again, "identical")
    near = not exact and all(gap <= TOLERANCE + 1e-9 for gap in apart)  # a gap to NaN is NaN, and not near
    return Checked(name, card, again, "within" if near else "differs")


def check(folder: Path, cache: Path, console: Console) -> bool:
    """Measures every victim of a zoo again and prints a table; whether all cards are confirmed.

    Args:
        folder: of the zoo.
        cache: folder of decoded images.
        console: where the table is printed.

    Raises:
        BadInput: there is no card; a file is damaged; the data are not there.
    """
    if not names(folder):
        raise BadInput(f"{folder}: no victims there")
    single_thread()
    checked = [_checked(folder, name, cache) for name in names(folder)]
    table = Table("victim", *(f"{share.upper()}{word}" for share in SHARES for word in ("", " again")), "verdict")
    for one in checked:
        pairs = [_percent(getattr(source, share)) for share in SHARES for source in (one.card, one.again)]
        table.add_row(escape(one.name), *pairs, one.verdict)
    console.print(table)
    wrong = [one.name for one in checked if one.verdict == "differs"]
    count = {word: sum(one.verdict == word for one in checked) for word in ("identical", "within", "differs")}
    console.print(
        f"{len(checked)} cards: {count['identical']} identical, {count['within']} within {100 * TOLERANCE:g} points on another "
        f"machine type, {count['differs']} differ{': ' + ', '.join(wrong) if wrong else ''}",
        highlight=False, markup=False,
    )  # fmt: skip
    return not wrong


def _checked(folder: Path, name: str, cache: Path) -> Checked:
    card, scenario = opened(folder, name)
    w = world(scenario, cache)
    net, crafted = made_again(card, scenario, w)
    with at_precision(scenario.recipe.precision):
        triggered = None if crafted is None else poison_test(w.data.test, crafted, scenario.plan)
        again = score(net, w.data.test, triggered)
    same = w.data.fingerprint == card.content["dataset"]["fingerprint"] and _here(card.content["manifest"])
    return judged(name, _score(card.path, card.content["measured"]), again, exact=same)


def _here(manifest: Mapping[str, Any]) -> bool:
    """Whether this is the machine type of a manifest."""
    return manifest.get("arithmetic") == arithmetic() and manifest.get("versions") == versions()


def _score(path: Path, measured: Mapping[str, Any]) -> Score:
    try:
        return Score(*(math.nan if measured[share] is None else float(measured[share]) for share in SHARES))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a card of the zoo: measured: {error}") from error


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.2f}"
