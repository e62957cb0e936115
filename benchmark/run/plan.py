"""The plan of a run: every stage that the rows of a matrix need, made once.

A stage trains a victim, trains an extractor, or runs the defense of a cell. It carries its key in the store and the keys of the
stages it waits for, so executors only execute. A worker process makes the same plan from the matrix file and finds its stage by
key. Surrogates and canaries are no stages of their own: the stage that needs one trains and stores it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmark.run.defend import run_cell
from benchmark.run.keys import cell_key, extractor_key, victim_key
from benchmark.run.victim import run_extractor, run_victim
from benchmark.settings.cells import Cell, Matrix, Scenario
from benchmark.storage.store import Store
from models.extractors import Extractor
from models.spec import canonical
from models.training import arithmetic

__all__ = ["Kind", "Plan", "Stage"]

Kind = Literal["victim", "extractor", "defended"]
"""What a stage makes, which is also its folder in the store."""


@dataclass(frozen=True)
class Stage:
    """One piece of work; the store keeps its outcome.

    Attributes:
        kind: what it makes.
        key: its key in the store; no two stages of a plan share one.
        label: its name in messages.
        scenario: the scenario whose victim is trained, or whose images and architecture it uses.
        extractor: what a stage of kind ``extractor`` trains.
        cell: what a stage of kind ``defended`` runs.
        after: keys of the stages whose outcomes it reads.
        victims: of a cell, the keys of its victim and of its benign twin. Its rows are computed from these two and its own outcome.
    """

    kind: Kind
    key: str
    label: str
    scenario: Scenario
    extractor: Extractor | None = None
    cell: Cell | None = None
    after: tuple[str, ...] = ()
    victims: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of a cell: its name in rows.csv, the first 12 hex digits of its key."""
        return self.key[:12]

    def run(self, store: Store, cache: Path) -> None:
        """Computes and stores the outcome; does nothing when it is cached.

        What is computed outside a training (scores, estimates, searches) has the precision of the victim's recipe.

        Raises:
            Busy: another process is computing it, and ``store`` is not patient.
        """
        with arithmetic(self.scenario.recipe.precision):
            if self.cell is not None:
                run_cell(self.cell, store, cache)
            elif self.extractor is not None:
                run_extractor(self.extractor, self.scenario, store, cache)
            else:
                run_victim(self.scenario, store, cache)


class Plan:
    """The stages of a matrix.

    Args:
        matrix: the loaded matrix.
        fingerprints: fingerprint of each data set, by the canonical text of its spec.

    Attributes:
        stages: every stage by its key, in an order in which one process can run them.
        cells: the stage of every cell, in matrix order. Cells that differ in their labels alone share a key.
    """

    def __init__(self, matrix: Matrix, fingerprints: Mapping[str, str]) -> None:
        self.matrix, self.fingerprints = matrix, fingerprints
        self._victim_keys: dict[Scenario, str] = {}  # many cells meet one victim, and a key takes a millisecond
        victims: dict[str, Scenario] = {}
        for scenario in [*(scenario.twin() for scenario in matrix.scenarios), *matrix.scenarios]:
            victims.setdefault(self._victim_key(scenario), scenario)
        uses = [(scenario.frozen.extractor, scenario) for scenario in victims.values() if scenario.frozen]
        uses += [(extractor, cell.scenario) for cell in matrix.cells for extractor in cell.extractors]
        extractors: dict[str, Stage] = {}
        for extractor, scenario in uses:
            if extractor.reads != "nothing":
                stage = self._extractor(extractor, scenario)
                extractors.setdefault(stage.key, stage)
        self.cells = [self._cell(cell) for cell in matrix.cells]
        ordered = [
            *(stage for stage in extractors.values() if not stage.after),
            *(self._victim(key, scenario) for key, scenario in victims.items()),
            *(stage for stage in extractors.values() if stage.after),
            *self.cells,
        ]
        self.stages = {stage.key: stage for stage in ordered}

    def fingerprint(self, scenario: Scenario) -> str:
        """Fingerprint of the scenario's data set."""
        return self.fingerprints[canonical(scenario.dataset)]

    def missing(self, cells: Iterable[Stage], store: Store) -> list[Stage]:
        """The stages that the rows of ``cells`` need and the store does not have, each after those it waits for."""
        needed: set[str] = set()

        def need(key: str) -> None:
            stage = self.stages[key]
            if key in needed or store.read(stage.kind, key, tensors=False) is not None:
                return
            needed.add(key)
            for other in stage.after:
                need(other)

        for key in {key: None for cell in cells for key in (cell.key, *cell.victims)}:
            need(key)
        return [stage for key, stage in self.stages.items() if key in needed]

    def is_cached(self, cell: Stage, store: Store) -> bool:
        """Whether everything that the rows of ``cell`` are computed from is in the store, undamaged."""
        return all(store.read(self.stages[key].kind, key, tensors=False) is not None for key in (cell.key, *cell.victims))

    def _victim_key(self, scenario: Scenario) -> str:
        if scenario not in self._victim_keys:
            self._victim_keys[scenario] = victim_key(scenario, self.fingerprint(scenario))
        return self._victim_keys[scenario]

    def _extractor_keys(self, extractors: Iterable[Extractor], scenario: Scenario) -> list[str]:
        """Keys of those that are trained."""
        return [extractor_key(one, scenario, self.fingerprint(scenario)) for one in extractors if one.reads != "nothing"]

    def _features(self, scenario: Scenario) -> list[str]:
        """Key of the extractor whose features a victim is given; nothing where it is trained end to end."""
        return self._extractor_keys([scenario.frozen.extractor], scenario) if scenario.frozen else []

    def _victim(self, key: str, scenario: Scenario) -> Stage:
        twin = self._victim_key(scenario.twin())  # each victim is compared with its twin
        after = [*self._features(scenario), *([twin] if twin != key else [])]
        return Stage("victim", key, f"train {_name(scenario)}", scenario, after=tuple(after))

    def _extractor(self, extractor: Extractor, scenario: Scenario) -> Stage:
        (key,) = self._extractor_keys([extractor], scenario)
        on_clean = extractor.reads == "clean"
        of = f"{scenario.backbone_label} / seed {scenario.seed}" if on_clean else _name(scenario)
        after = () if on_clean else (self._victim_key(scenario),)  # the poisoned images are stored with the victim
        return Stage("extractor", key, f"extractor {extractor.origin}: {of}", scenario, extractor, after=after)

    def _cell(self, cell: Cell) -> Stage:
        scenario = cell.scenario
        victims = self._victim_key(scenario), self._victim_key(scenario.twin())
        after = (*self._extractor_keys(cell.extractors, scenario), *self._features(scenario), victims[0])
        label = f"{cell.defense_label} ({cell.scope.value}) on {_name(scenario)}"
        return Stage("defended", cell_key(cell, self.fingerprint(scenario)), label, scenario, None, cell, after, victims)


def _name(scenario: Scenario) -> str:
    return f"{scenario.backbone_label} / {scenario.attack_label} / seed {scenario.seed}"
