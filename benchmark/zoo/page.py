"""README.md of a zoo and its picture, from the cards and the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from attacks.base import apply
from benchmark.report.charts import trigger_sheet
from benchmark.report.figures import Gallery
from benchmark.report.render import draw
from benchmark.report.text import DASH, markdown, percent_text, pipe_table, plain
from benchmark.rules.metrics import nan_of
from benchmark.run.world import world
from benchmark.storage.files import write_text
from benchmark.storage.zoo import LIMIT, Card, names, read_card
from benchmark.zoo.load import made_again, opened
from models.spec import BadInput

__all__ = ["write_page", "write_picture"]

PICTURE = "triggers"
COLUMNS = 7
HEAD = ("victim", "network", "attack", "ACC", "ASR", "RA", "ASR of the twin", "implanted", "MB")


def write_page(folder: Path) -> Path:
    """Writes README.md from the cards of ``folder``; returns its path.

    Raises:
        BadInput: there is no card, or one cannot be read.
    """
    cards = [read_card(folder, name) for name in names(folder)]
    if not cards:
        raise BadInput(f"{folder}: no victims there")
    attacked = [card for card in cards if card.content["scenario"].get("attack")]
    sizes = [card.weights.stat().st_size for card in cards]
    lines = [_line(card, size) for card, size in zip(cards, sizes, strict=True)]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text = environment.get_template("page.md.j2").render(
        example=(attacked or cards)[0].name,
        table=pipe_table(HEAD, lines, left=3),
        data=markdown(", ".join(sorted({str(card.content["dataset"].get("name")) for card in cards}))),
        count=len(cards),
        total=f"{sum(sizes) / 1e6:.1f}",
        limit=f"{LIMIT / 1e6:g}",
        picture=f"{PICTURE}.png" if (folder / f"{PICTURE}.png").is_file() else "",
    )
    path = folder / "README.md"
    write_text(path, text)
    return path


def _line(card: Card, size: int) -> list[str]:
    measured: Mapping[str, Any] = card.content["measured"]
    shares = [percent_text(nan_of(measured.get(name))) for name in ("acc", "asr", "ra", "asr_benign")]
    verdict = {True: "yes", False: "no"}.get(measured.get("implanted", ""), DASH)
    words = [markdown(card.content[name]) for name in ("backbone_label", "attack_label")]
    return [f"`{card.name}`", *words, *shares, verdict, f"{size / 1e6:.2f}"]


def write_picture(folder: Path, cache: Path) -> Path | None:
    """Draws one clean test image, the same under the trigger of every victim, and the difference; None where the data are not here.

    Raises:
        BadInput: a file is damaged.
    """
    items: list[tuple[str, np.ndarray, np.ndarray]] = []
    for name in names(folder):
        card, scenario = opened(folder, name)
        if scenario.attack is None:
            continue
        try:
            w = world(scenario, cache)
        except BadInput:
            return None
        _, crafted = made_again(card, scenario, w)
        assert crafted is not None
        first = (w.data.test.labels != scenario.plan.target).nonzero().flatten()[:1]
        clean = w.data.test.images[first]
        items.append((name, clean.numpy(), apply(crafted.test, clean, first).numpy()))
    if not items:
        return None
    panels = tuple((plain(item[0]), words, image) for item in items for image, words in [trigger_sheet(item)])
    note = "Absolute difference between triggered and clean image, multiplied as stated; pixels as the victim sees them (8 bit)."
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Gallery(panels, math.ceil(len(panels) / rows), note, ("clean", "triggered", "difference"), 1.25, 3.9)
    return draw(figure, "One test image under the trigger of every victim", folder / PICTURE, colours=None)[0]
