"""The catalogues of defenses and attacks as tables, for the console and for the README.md files of their folders.

Everything is read off the classes: what they need from their default settings, the paper from the first paragraph of their module.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import attacks
import defenses
from attacks import ATTACKS
from attacks.adaptive import Adaptive
from attacks.base import Attack, Power
from benchmark.rules.tracks import CONTROL, TRACKS
from benchmark.storage.files import write_block
from defenses import DEFENSES
from defenses.base import Defense
from models.spec import Spec

__all__ = ["BLOCK", "Paper", "Table", "attack_table", "defense_table", "markdown", "paper_of", "write_tables"]

BLOCK = "table"
"""The tables are between the lines ``<!-- table:begin -->`` and ``<!-- table:end -->`` of a README.md."""
COMMAND = "python -m benchmark list --write"
"""What writes them."""


@dataclass(frozen=True)
class Paper:
    """What a module's first paragraph cites: a title, where it appeared, and its arXiv number, if it has one."""

    title: str
    where: str
    arxiv: str

    @property
    def words(self) -> str:
        return ", ".join(part for part in (f'"{self.title}"', self.where, self.arxiv and f"arXiv {self.arxiv}") if part)

    @property
    def link(self) -> str:
        """As Markdown."""
        title = f"[{self.title}](https://arxiv.org/abs/{self.arxiv})" if self.arxiv else self.title
        return f"{title}, {self.where}" if self.where else title


Table = tuple[tuple[str, ...], list[tuple[str | Paper, ...]]]
"""Column heads, and a row for every method."""


def paper_of(cls: type[Spec]) -> Paper | None:
    """The paper of a method; None for controls and for attacks that wrap another one, which cite what they compare or aim at."""
    if issubclass(cls, Adaptive) or (issubclass(cls, Defense) and cls.control):
        return None
    opening = " ".join((sys.modules[cls.__module__].__doc__ or "").split("\n\n")[0].split())
    cited = re.search(r'"([^"]+)",? ?(.*)', opening)
    if cited is None:
        return None
    arxiv = re.search(r"arXiv (\d{4}\.\d{4,5})", cited[2])
    where = re.split(r",? ?arXiv \d|\.(?: |$)", cited[2])[0].strip(" .")
    return Paper(cited[1], where, arxiv[1] if arxiv else "")


def _track(defense: Defense) -> str:
    """Of the tracks that grant all that a defense needs, the one that grants least."""
    if defense.control:
        return CONTROL.name
    enough = [track for track in TRACKS if not defense.needs & ~track.grants]
    return min(enough, key=lambda track: len(track.grants)).name if enough else CONTROL.name


def defense_table(catalogue: Sequence[type[Defense]] = DEFENSES) -> Table:
    """Every defense at its default settings."""
    rows: list[tuple[str | Paper, ...]] = []
    for cls in catalogue:
        one = cls()
        cost = one.cost.format_map(vars(one))
        rows.append((one.name, one.family or "-", _track(one), one.needs.words, cost or "-", paper_of(cls) or "-"))
    return ("defense", "family", "track", "needs", "cost", "paper"), rows


def _attack_needs(attack: Attack) -> str:
    needs = ["the training images"]
    if attack.needs_surrogate:
        needs.append("a cleanly trained network")
    if attack.power is Power.TRAINING:
        needs.append("the victim's training")
    if attack.needs_model_at_test:
        needs.append("the attacked model")
    return ", ".join(needs)


def _attack_family(attack: Attack) -> str:
    if not attack.injects:
        return "no poison"
    if isinstance(attack, Adaptive):
        return "adaptive, wraps another attack"
    kind = "training control" if attack.power is Power.TRAINING else "poisoning"
    return f"{kind}, labels kept" if attack.clean_label else kind


def attack_table(catalogue: Sequence[type[Attack]] = ATTACKS) -> Table:
    """Every attack at its default settings."""
    rows: list[tuple[str | Paper, ...]] = []
    for cls in catalogue:
        one = cls()
        covers = f"{one.cover_share:g} per poisoned image" if one.cover_share else "none"
        rows.append((one.name, _attack_family(one), _attack_needs(one), covers, paper_of(cls) or "-"))
    return ("attack", "family", "needs", "covers", "paper"), rows


def markdown(table: Table) -> str:
    """The table in Markdown, papers as links."""
    heads, rows = table
    lines = [heads, ("---",) * len(heads), *(tuple(cell.link if isinstance(cell, Paper) else cell for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def write_tables(defended: Path | None = None, attacked: Path | None = None) -> list[Path]:
    """Writes both tables between the markers of the README.md files; returns the pages that changed.

    Args:
        defended: the page with the table of defenses; by default that of the package.
        attacked: the page with the table of attacks, likewise.
    """
    pages = {
        defended or Path(defenses.__file__).parent / "README.md": markdown(defense_table()),
        attacked or Path(attacks.__file__).parent / "README.md": markdown(attack_table()),
    }
    return [page for page, table in pages.items() if write_block(page, BLOCK, table.__str__)]
