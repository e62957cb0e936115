"""What a matrix expands to: scenarios (attacked models) and cells (a scenario, a defense, a track and a scope)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from attacks.base import Attack, Plan
from benchmark.data.datasets import DatasetSpec
from benchmark.rules.canary import Canary
from benchmark.rules.tracks import Track
from defenses.base import Defense, Knowledge, Scope
from defenses.controls import NoDefense
from models.backbone import Backbone
from models.extractors import Extractor
from models.recipe import Recipe
from models.spec import Spec, check, derive_seed, digest

__all__ = ["CANDIDATES", "Cell", "Frozen", "Matrix", "Scenario", "settings_hash"]

CANDIDATES = 80
"""Models that a defense may offer in a cell, over all settings of its knob: as many as ANP's twenty thresholds at four radii."""


@dataclass(frozen=True)
class Frozen(Spec):
    """How a victim on given features is trained: its head alone, with Adam at a constant rate on the features of the poisoned set.

    Attributes:
        extractor: what gives the features; its head is left out.
        label: its label in the matrix.
        epochs, lr, batch: of training the head (our choice: as for the heads that Hölder pruning inspects).
    """

    name: ClassVar[str] = "frozen"

    extractor: Extractor
    label: str
    epochs: int = 50
    lr: float = 1e-3
    batch: int = 256

    def __post_init__(self) -> None:
        check(self, "epochs", 0 <= self.epochs <= 10_000, "between 0 and 10000")
        check(self, "lr", 0 <= self.lr <= 10, "between 0 and 10")
        check(self, "batch", 1 <= self.batch <= 65_536, "between 1 and 65536 samples")

    def spec(self) -> dict[str, Any]:
        return {key: value for key, value in super().spec().items() if key != "label"}


@dataclass(frozen=True)
class Scenario:
    """An attacked model, before any defense. ``attack`` None = the benign twin; ``frozen`` None = trained end to end."""

    dataset: DatasetSpec
    clean_fraction: float
    backbone: Backbone
    backbone_label: str
    recipe: Recipe
    attack: Attack | None
    attack_label: str
    plan: Plan
    seed: int
    frozen: Frozen | None = None
    weights_seed: int | None = None
    """Seed of the initial weights and the batches alone; None = ``seed``."""

    def spec(self) -> dict[str, Any]:
        """All that determines the trained victim; labels are left out."""
        return {
            **({"frozen": self.frozen.spec()} if self.frozen else {}),
            **({} if self.weights_seed is None else {"weights_seed": self.weights_seed}),
            "dataset": self.dataset.spec(),
            "clean_fraction": self.clean_fraction,
            "backbone": self.backbone.spec(),
            "recipe": self.recipe.spec(),
            "attack": self.attack.spec() if self.attack else None,
            "plan": self.plan.spec() if self.attack else None,
            "seed": self.seed,
        }

    def twin(self) -> Scenario:
        """The same scenario without the attack."""
        return dataclasses.replace(self, attack=None, attack_label="none")

    def surrogate(self) -> Scenario | None:
        """The scenario that trains the attack's surrogate; None for attacks that need none.

        It is the benign twin, or a network that the attacker trains end to end on the same images with another seed.
        """
        if self.attack is None or not self.attack.needs_surrogate:
            return None
        own = self.attack.own_surrogate(self.backbone)
        if own is None:
            return self.twin()
        seed = derive_seed(self.seed, "surrogate")
        return dataclasses.replace(self.twin(), backbone=own, backbone_label=own.name, frozen=None, weights_seed=seed)


@dataclass(frozen=True)
class Cell:
    """One run of a defense: the scenario, the defense, its track and the scope that it may edit."""

    scenario: Scenario
    defense: Defense
    defense_label: str
    track: Track
    scope: Scope
    preset: str
    tau: float
    extractor: Extractor | None = None
    extractor_label: str = ""
    budget: float | None = None
    """The clean budget as a share of the training images; None = all images that the scenario holds out."""
    candidates: int = CANDIDATES
    """Models that the defense may offer over all settings of its knob; the published setting's dial is never cut short."""
    curve_images: int | None = None
    """Test images, and as many triggered ones, on which candidates are scored that no rule selects; None = all of them."""
    canaries: tuple[Canary, ...] = ()
    """What the canary rule plants; empty = the matrix does not use that rule."""

    @property
    def on_part(self) -> bool:
        """Whether some candidates are scored on a part of the test images: the matrix says so and the defense offers several."""
        return self.curve_images is not None and (bool(self.defense.dial_name) or len(self.defense.knobs) > 1)

    @property
    def canaried(self) -> bool:
        """Whether the canary rule runs: the defense edits the model with the clean budget alone, so it can be run on a copy."""
        both = Knowledge.MODEL | Knowledge.CLEAN
        edits = Knowledge.MODEL in self.defense.needs and not self.defense.needs & ~both
        return bool(self.canaries) and both in self.grants and edits and not isinstance(self.defense, NoDefense)

    @property
    def grants(self) -> Knowledge:
        """What the defender is given: what the track grants, and the extractor of this cell."""
        return self.track.grants | (Knowledge.EXTRACTOR if self.extractor else Knowledge.NONE)

    @property
    def extractors(self) -> tuple[Extractor, ...]:
        """Every extractor of the defense: the one it is given, and the one it trains."""
        return tuple(one for one in (self.extractor, self.defense.extractor) if one is not None)

    def spec(self) -> dict[str, Any]:
        return {
            **({"extractor": self.extractor.spec()} if self.extractor else {}),
            **({"budget": self.budget} if self.budget is not None else {}),
            **({"candidates": self.candidates} if len(self.defense.knobs) > 1 else {}),
            **({"curve_images": self.curve_images} if self.on_part else {}),
            **({"canaries": [canary.spec() for canary in self.canaries]} if self.canaried else {}),
            "scenario": self.scenario.spec(),
            "defense": self.defense.spec(),
            "track": self.track.spec(),
            "scope": self.scope.value,
            "tau": self.tau,
        }


@dataclass(frozen=True)
class Matrix:
    """A checked matrix.

    Attributes:
        name: of the file, without the suffix. path: of the file.
        title, about: its texts. settings: the text of the whole file.
        scenarios, cells: in the order of the file's tables.
        plugins: (file name, sha256) of every plug-in that was loaded.
    """


    name: str
    path: Path
    title: str
    about: str
    settings: str
    scenarios: tuple[Scenario, ...]
    cells: tuple[Cell, ...]
    plugins: tuple[tuple[str, str], ...]


def settings_hash(matrix: Matrix) -> str:
    """sha256 (hex) over the settings of all cells: it identifies a matrix's results."""
    return digest([cell.spec() for cell in matrix.cells])
