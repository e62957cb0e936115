"""In which order the cells of a matrix tell most for their time: slices for a machine that one has for minutes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmark.settings.cells import Cell, Matrix
from defenses.base import Knowledge
from defenses.controls import NoDefense

__all__ = ["FIRST", "KINDS", "LONG", "TRAINS", "Slice", "kind_of", "slices"]

FIRST = ("badnets", "blended", "wanet", "input-aware", "sig")
"""Attacks whose rows come first: a patch, a blend, a warp, a trigger of its own for each image, and clean labels."""
LONG = ("anp",)
"""Post-training defenses that take longer than the others together: thousands of passes at each value of their knob."""
KINDS = (
    "undefended", "post-training defenses", "long post-training defenses", "abl", "dbd", "controls that train",
    "other in-training defenses",
)  # fmt: skip
"""Kinds of cells, in the order in which they are run."""
TRAINS = KINDS.index("abl")
"""The first kind that trains a network of its own."""


@dataclass(frozen=True)
class Slice:
    """A part of a matrix that is run at once.

    Attributes:
        title: in words.
        cells: positions in the matrix's cells.
    """

    title: str
    cells: tuple[int, ...]

    def only(self, matrix: Matrix) -> str:
        """The filter ``--only`` that takes these cells: all attacks, defenses and seeds that occur among them."""
        mine = [matrix.cells[position] for position in self.cells]
        axes = {
            "seed": [str(cell.scenario.seed) for cell in mine],
            "attack": [cell.scenario.attack_label for cell in mine],
            "defense": [cell.defense_label for cell in mine],
        }
        return ",".join(f"{axis}={'|'.join(dict.fromkeys(values))}" for axis, values in axes.items())


def kind_of(cell: Cell) -> int:
    """Position in :data:`KINDS`."""
    if isinstance(cell.defense, NoDefense):
        return 0
    if Knowledge.MODEL in cell.defense.needs:
        return 2 if cell.defense.name in LONG else 1
    if cell.defense.name in KINDS:
        return KINDS.index(cell.defense.name)
    return KINDS.index("controls that train" if cell.defense.control else "other in-training defenses")


def _place(cell: Cell) -> tuple[int, str, str, int, int]:
    """What a cell is sorted and grouped by: stage, defense of the last stages, attacks in words, seed, kind."""
    attack, kind, seed = cell.scenario.attack, kind_of(cell), cell.scenario.seed
    first = attack is not None and attack.name in FIRST
    which = "the first attacks" if first else "the other attacks"
    if kind < TRAINS:
        return 0 if first else 3, "", which, seed, kind
    if first and KINDS[kind] in ("abl", "dbd"):
        return 1 + kind - TRAINS, "", which, seed, kind
    if KINDS[kind] == "controls that train":
        return 4, "", "all attacks", seed, kind
    return 5, cell.defense_label, "the other attacks" if KINDS[kind] in ("abl", "dbd") else "all attacks", seed, kind


def slices(matrix: Matrix) -> list[Slice]:
    """All cells of a matrix in the order of what they tell for their time.

    Seed by seed, :data:`FIRST` undefended and then under every post-training defense, the :data:`LONG` ones last; ABL on them;
    DBD on them; the other attacks, undefended and under post-training defenses; controls that train; the other in-training
    defenses, one after the other.
    """
    groups: dict[tuple[int, str, str, int, int], list[int]] = {}
    for position, cell in enumerate(matrix.cells):
        groups.setdefault(_place(cell), []).append(position)
    return [
        Slice(f"seed {seed}, {which}, {defense or KINDS[kind]}", tuple(groups[key]))
        for key in sorted(groups)
        for _, defense, which, seed, kind in [key]
    ]
