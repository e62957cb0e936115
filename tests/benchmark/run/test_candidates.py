"""What the benchmark makes of the candidates a defense offers: knobs and their budget, the untouched model, what was changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmark.run.defend import defend
from benchmark.run.outcome import cell_rows
from benchmark.run.victim import Victim, read_victim
from benchmark.run.world import World, world
from benchmark.settings.cells import CANDIDATES, Cell
from benchmark.settings.load import load_matrix
from benchmark.storage.store import Entry, Store
from defenses.base import Candidate, DefenderView, Defense, Knowledge
from models.backbone import Network
from models.spec import BadInput, generator
from models.units import Scope, unit_layers

TINY = """
title = "tiny"
seeds = [0]
[dataset]
source = "digits"
clean_fraction = 0.2
train_limit = 300
test_limit = 60
[recipe]
epochs = 2
batch = 32
lr = 0.05
crop = 1
flip = false
[[backbone]]
name = "vgg11-bn"
width = 2
hidden = 8
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model+clean"]
"""


@dataclass(frozen=True)
class Knobbed(Defense):
    """Scales the head's last layer; its knob has three settings."""

    name: ClassVar[str] = "knobbed"
    knob_name: ClassVar[str] = "force"

    force: float = 1.0

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL

    @property
    def knob(self) -> float | None:
        return self.force

    @property
    def knobs(self) -> tuple[Defense, ...]:
        return (self, replace(self, force=0.5), replace(self, force=0.25))

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        for dial in (0.0, 1.0, 2.0):
            net = view.model
            with torch.no_grad():
                net.head[-1].weight.mul_(1 - self.force * dial)  # type: ignore[operator, union-attr]
            yield Candidate(net, dial, dial == 1.0, dial)


@dataclass(frozen=True)
class Other(Defense):
    """Offers a wider network of the same family, trained nowhere; and the isolated samples it is told to."""

    name: ClassVar[str] = "other"

    isolated: ClassVar[torch.Tensor | None] = None
    suspicion: ClassVar[torch.Tensor | None] = None

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        net = view.fresh(1)
        head = torch.nn.Sequential(torch.nn.Linear(16, 40), torch.nn.ReLU(), torch.nn.Linear(40, view.num_classes))
        yield Candidate(Network(net.normalise, net.features, head).eval(), isolated=self.isolated, suspicion=self.suspicion)


@dataclass(frozen=True)
class Place:
    cells: tuple[Cell, ...]
    w: World
    victim: Victim

    def run(self, defense: Defense, **changes: Any) -> dict[str, Any]:
        return defend(replace(self.cells[1], defense=defense, **changes), self.w, self.victim)

    def rows(self, outcome: dict[str, Any], defense: Defense) -> dict[str, Any]:
        """Its rows by selection."""
        costs = {"seconds": 0.0, "peak_mib": 0.0, "victim_seconds": 0.0}
        cell = replace(self.cells[1], defense=defense)
        victim, twin = Entry(self.victim.outcome, {}), Entry({"acc": 0.9}, {})
        return {row.selection: row for row in cell_rows("m", "d", cell, "f", Entry({**outcome, **costs}, {}), victim, twin).rows}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("candidates")
    (folder / "m.toml").write_text(TINY)
    cells = load_matrix(folder / "m.toml").cells
    scenario = cells[0].scenario
    return Place(cells, world(scenario, folder), read_victim(scenario, Store(folder / "store"), folder))


def test_every_setting_of_the_knob_is_tried_and_one_default_is_the_published_one(place: Place) -> None:
    outcome = place.run(Knobbed())
    made = [(entry["knob"], entry["dial"]) for entry in outcome["candidates"]]
    assert made == [(force, dial) for force in (1.0, 0.5, 0.25) for dial in (0.0, 1.0, 2.0)] + [(None, None)]
    assert [entry["is_default"] for entry in outcome["candidates"]].index(True) == 1
    assert sum(entry["is_default"] for entry in outcome["candidates"]) == 1
    assert sum(entry["starts"] for entry in outcome["candidates"]) == 3


@pytest.mark.parametrize(("budget", "made"), [(1, 3), (3, 3), (4, 4), (5, 5), (8, 8), (80, 9)])
def test_the_budget_of_candidates_cuts_further_settings_and_never_the_published_dial(place: Place, budget: int, made: int) -> None:
    outcome = place.run(Knobbed(), candidates=budget)
    assert outcome["status"] == "ok"
    assert len(outcome["candidates"]) == made + 1


def test_the_budget_is_a_setting_of_the_matrix_and_of_the_keys_it_concerns(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(f"candidates = 7\n{TINY}")
    cell = load_matrix(tmp_path / "m.toml").cells[1]
    assert cell.candidates == 7
    assert CANDIDATES == 80
    assert "candidates" not in cell.spec(), "one setting of the knob: the budget changes nothing"
    assert replace(cell, defense=Knobbed()).spec()["candidates"] == 7
    (tmp_path / "m.toml").write_text(f"candidates = 0\n{TINY}")
    with pytest.raises(BadInput, match="candidates = 0 should be greater than or equal to 1"):
        load_matrix(tmp_path / "m.toml")


def test_only_what_a_rule_selects_is_scored_on_all_test_images(place: Place) -> None:
    whole, part = place.run(Knobbed()), place.run(Knobbed(), curve_images=20)
    coarse = [entry.get("on_part", False) for entry in part["candidates"]]
    assert any(coarse), "else nothing is spared"
    assert not coarse[1], "the published default"
    for fine, entry, on_part in zip(whole["candidates"], part["candidates"], coarse, strict=True):
        measured = ("acc", "asr", "ra")
        if not on_part:
            assert [entry[name] for name in measured] == [fine[name] for name in measured]
        else:
            assert all(abs(entry[name] * 20 - round(entry[name] * 20)) < 1e-6 for name in measured), "counted on twenty images"
        assert [entry[name] for name in ("val_acc", "dial", "knob")] == [fine[name] for name in ("val_acc", "dial", "knob")]
    fine, coarse_rows = place.rows(whole, Knobbed()), place.rows(part, Knobbed())
    for rule in ("default", "validation", "strongest"):
        assert fine[rule] == coarse_rows[rule], "rules that read no test image select the same and get the same figures"
    assert coarse_rows["oracle"].ra >= max(coarse_rows[rule].ra for rule in ("default", "validation", "strongest", "leaky"))


def test_a_part_of_the_images_is_a_setting_of_the_keys_it_concerns(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(f"curve_images = 30\n{TINY}")
    none, clp = load_matrix(tmp_path / "m.toml").cells
    assert clp.spec()["curve_images"] == 30
    assert "curve_images" not in none.spec(), "one candidate: nothing to spare"
    assert "curve_images" not in replace(clp, curve_images=None).spec()


def test_what_was_changed_is_read_off_the_weights(place: Place) -> None:
    outcome = place.run(Knobbed())
    assert [entry["changed"] for entry in outcome["candidates"]] == [False, True, True] * 3 + [False]
    own = {name: place.victim.outcome[name] for name in ("acc", "asr", "ra")}
    for entry in outcome["candidates"]:
        if not entry["changed"]:
            assert {name: entry[name] for name in own} == own
    assert outcome["candidates"][-1]["kept"]


def test_a_row_says_that_nothing_was_changed_or_that_the_model_was_kept(place: Place) -> None:
    outcome = place.run(Knobbed())
    rows = place.rows(outcome, Knobbed())
    assert rows["default"].mark == ""
    assert not rows["default"].kept
    assert rows["oracle"].ra == max(entry["ra"] for entry in outcome["candidates"])
    still = [{**entry, "changed": False} for entry in outcome["candidates"]]
    assert place.rows({**outcome, "candidates": still}, Knobbed())["default"].mark == "no change"
    broken = [{**entry, "val_loss": 0.0 if entry["kept"] else 0.9} for entry in outcome["candidates"]]
    kept = place.rows({**outcome, "candidates": broken}, Knobbed())["validation"]
    assert kept.kept
    assert (kept.acc, kept.asr, kept.mark) == (kept.acc_undefended, kept.asr_undefended, "no change")


def test_units_are_those_of_the_model_that_was_chosen(place: Place) -> None:
    train = replace(place.cells[1].track, grants=Knowledge.TRAIN)
    outcome = place.run(Other(), track=train, scope=Scope.WHOLE)
    counted = outcome["candidates"][0]["units"]
    assert counted == sum(layer.size for layer in unit_layers(place.victim.net, Scope.WHOLE)) + 40 - 8
    assert not any(entry["kept"] for entry in outcome["candidates"]), "a defense that trains anew has no model to keep"


@pytest.mark.parametrize(("hits", "taken", "failed"), [(0, 0, True), (0, 20, True), (2, 20, True), (3, 20, False), (20, 20, False)])
def test_a_detector_that_is_no_better_than_chance_is_marked(place: Place, hits: int, taken: int, failed: bool) -> None:
    role = place.victim.poisoned.role
    isolated = torch.zeros(len(role), dtype=torch.bool)
    isolated[torch.nonzero(role == 1).flatten()[:hits]] = True
    isolated[torch.nonzero(role == 0).flatten()[: taken - hits]] = True
    Other.isolated = isolated
    outcome = place.run(Other(), track=replace(place.cells[1].track, grants=Knowledge.TRAIN))
    base = place.victim.outcome["realised_rate"]
    assert base == pytest.approx(0.1, abs=0.005)
    row = place.rows(outcome, Other())["default"]
    assert row.mark == ("mechanism failed" if failed else "")
    assert failed == (not (taken and hits / taken > base))
    poisoned, clean = int((role == 1).sum()), int((role != 1).sum())
    assert row.auroc == pytest.approx((hits / poisoned + 1 - (taken - hits) / clean) / 2)


def test_the_order_of_suspicion_has_its_auroc(place: Place) -> None:
    """Against a count of pairs; ties are half."""
    role = place.victim.poisoned.role
    Other.isolated = torch.zeros(len(role), dtype=torch.bool)
    Other.suspicion = torch.randint(0, 9, (len(role),), generator=generator(0, "suspicion")).float()
    try:
        row = place.rows(place.run(Other(), track=replace(place.cells[1].track, grants=Knowledge.TRAIN)), Other())["default"]
        pairs = [float(a > b) + 0.5 * float(a == b) for a in Other.suspicion[role == 1] for b in Other.suspicion[role != 1]]
    finally:
        Other.suspicion = None
    assert row.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert place.rows(place.run(Knobbed()), Knobbed())["default"].auroc != row.auroc


def test_an_unfinished_default_is_a_failure_with_its_reason(place: Place) -> None:
    @dataclasses.dataclass(frozen=True)
    class Twice(Knobbed):
        def candidates(self, view: DefenderView) -> Iterator[Candidate]:
            yield from (Candidate(view.model, 0.0), Candidate(view.model, 1.0))

    outcome = place.run(Twice())
    assert outcome["status"] == "failed"
    assert "must mark exactly one default among its 2 candidates" in outcome["reason"]
