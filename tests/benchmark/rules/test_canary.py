"""Canaries: what they are, that they take, and that choosing by them reads nothing of the attack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attacks import ATTACKS
from attacks.adaptive import Adaptive
from attacks.base import PoisonedSet, PoisonedTest
from benchmark.rules.canary import CANARIES, Canary, Planted, Planting, canaries_for, plant
from benchmark.rules.metrics import Score
from benchmark.rules.selection import CandidateScore, Selection, choose
from benchmark.run import defend as pipeline
from benchmark.run.defend import defend, read_canary
from benchmark.run.victim import Victim, read_victim
from benchmark.run.world import World, defender_seed, world
from benchmark.settings.cells import Cell, Matrix
from benchmark.settings.load import load_matrix
from benchmark.storage.store import Store
from defenses.base import Candidate, DefenderView, Defense, Knowledge
from models.images import to_float
from models.training import predict

TINY = """
title = "tiny"
canary = true
seeds = [0]
[dataset]
source = "digits"
clean_fraction = 0.2
[recipe]
epochs = 6
batch = 64
lr = 0.1
nesterov = true
schedule = "one-cycle"
crop = 1
flip = false
[[backbone]]
name = "vgg11-bn"
width = 4
hidden = 16
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model", "model+clean"]
[[defense]]
name = "anp"
tracks = ["model+clean"]
iterations = 5
batch = 32
grid = [0.5, 0.9]
[[defense]]
name = "training-from-scratch"
epochs = 1
"""


@pytest.mark.parametrize("canary", CANARIES, ids=[canary.name for canary in CANARIES])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_a_stamp_is_a_pure_function_that_changes_few_pixels_or_all(canary: Canary, shape: tuple[int, int, int]) -> None:
    images = torch.rand(20, *shape, generator=torch.Generator().manual_seed(1))
    stamp = canary.stamp(shape, 7)
    stamped = stamp(images)
    assert torch.equal(stamped, canary.stamp(shape, 7)(images))
    assert not torch.equal(stamped, canary.stamp(shape, 8)(images))
    assert stamped.shape == images.shape
    assert 0 <= float(stamped.min()) <= float(stamped.max()) <= 1
    touched = float((stamped != images).any(0).any(0).double().mean())
    assert touched < 0.3 if canary.local else touched > 0.9


def test_families_in_use_are_left_out() -> None:
    assert [canary.name for canary in canaries_for([])] == ["patch", "blend"]
    assert [canary.name for canary in canaries_for(["badnets", "blended", "wanet"])] == ["frame", "ripple"]
    assert [canary.name for canary in canaries_for(["sig"])] == ["patch", "blend"]
    assert [canary.name for canary in canaries_for(["blended", "sig"])] == ["patch"]
    names = {attack.name for attack in ATTACKS}
    assert all(canary.like <= names for canary in CANARIES), "a name that no attack has keeps nothing away"


def test_an_adaptive_attack_counts_as_the_one_it_is_built_on(tmp_path: Path) -> None:
    adaptive = next(attack for attack in ATTACKS if issubclass(attack, Adaptive))
    (tmp_path / "m.toml").write_text(TINY.replace('name = "badnets"', f'name = "{adaptive.name}"\nbase = "blended"'))
    assert [canary.name for canary in load_matrix(tmp_path / "m.toml").cells[0].canaries] == ["patch", "ripple"]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    path = tmp_path_factory.mktemp("canary") / "m.toml"
    path.write_text(TINY)
    return load_matrix(path)


@dataclass(frozen=True)
class Place:
    folder: Path
    cell: Cell
    w: World
    victim: Victim
    store: Store

    def planted(self, canary: Canary) -> Planted:
        return read_canary(self.cell, self.w, self.victim.net, self.store, canary)


@pytest.fixture(scope="module")
def place(matrix: Matrix, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("store")
    cell = next(cell for cell in matrix.cells if cell.defense.name == "anp")
    store = Store(folder / "store")
    return Place(folder, cell, world(cell.scenario, folder), read_victim(cell.scenario, store, folder), store)


def test_who_is_chosen_for_by_canaries(matrix: Matrix) -> None:
    assert [(cell.defense_label, cell.track.name) for cell in matrix.cells if cell.canaried] == [
        ("clp", "model+clean"), ("anp", "model+clean"),
    ]  # fmt: skip
    plain = {cell.defense_label: cell.spec() for cell in matrix.cells}
    assert "canaries" in plain["anp"]
    assert "canaries" not in plain["none"]


def test_a_canary_takes_and_leaves_the_rest_of_the_network_as_it_was(place: Place) -> None:
    w, net = place.w, place.victim.net
    for canary in place.cell.canaries:
        planted = place.planted(canary)
        assert planted.asr(planted.net) > Planting().reached
        assert planted.asr(net) < 0.5
        agree = (predict(planted.net, w.data.test.images) == predict(net, w.data.test.images)).double().mean()
        assert agree > 0.9
        # Every probe comes from the clean budget and none from the target class.
        stamp = canary.stamp(w.clean.shape, _pattern_seed(place, canary))
        held = torch.cat([w.clean.images, w.validation.images])
        stamped = stamp(to_float(held)).mul(255).round().to(torch.uint8).flatten(1)
        labels = torch.cat([w.clean.labels, w.validation.labels])
        owners = [(stamped == probe.flatten()).all(1).nonzero().flatten().tolist() for probe in planted.probes[::10]]
        assert all(owners)
        assert all(labels[owner] != planted.target for found in owners for owner in found)


def _pattern_seed(place: Place, canary: Canary) -> int:
    from models.spec import derive_seed

    seed = pipeline.derive_seed(defender_seed(place.cell.scenario), "canary", canary.name)
    return derive_seed(seed, "pattern")


def test_planting_again_gives_the_same_copy(place: Place) -> None:
    canary = place.cell.canaries[0]
    again = plant(canary, place.victim.net, place.w.clean, place.w.validation, place.cell.scenario.recipe, 3)
    other = plant(canary, place.victim.net, place.w.clean, place.w.validation, place.cell.scenario.recipe, 3)
    for name, value in again.net.state_dict().items():
        assert torch.equal(value, other.net.state_dict()[name])


class _Guarded:
    """Raises for whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"canary selection reached for {name}")


def test_choosing_by_canaries_reads_nothing_of_the_attack_or_the_test_set(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planting and the runs on the copies are made again with the attack, the poisoned set and the test set out of reach."""
    whole = defend(place.cell, place.w, place.victim, planted=place.planted)
    assert whole["status"] == "ok"
    guarded: Any = _Guarded()
    blind = Victim(place.victim.net, PoisonedSet(guarded, torch.zeros(0), torch.zeros(0)), guarded, guarded, {})
    without = replace(place.w, train=replace(place.w.train), data=replace(place.w.data, test=guarded))
    scored = [replace(CandidateScore.read(entry), canary_asr=None, canary_loss=None) for entry in whole["candidates"]]
    copies = [
        plant(canary, place.victim.net, without.clean, without.validation, place.cell.scenario.recipe,
              pipeline.derive_seed(defender_seed(place.cell.scenario), "canary", canary.name))
        for canary in place.cell.canaries
    ]  # fmt: skip
    scenario = replace(place.cell.scenario, attack=guarded, plan=guarded)
    monkeypatch.setattr(pipeline, "score", guarded)
    pipeline._canary_scores(replace(place.cell, scenario=scenario), without, blind, scored, copies)
    assert [one.stored() for one in scored] == whole["candidates"]


def test_its_candidates_are_those_of_the_same_dial(place: Place) -> None:
    outcome = defend(place.cell, place.w, place.victim, planted=place.planted)
    plain = defend(place.cell, place.w, place.victim)
    bare = [{key: value for key, value in entry.items() if not key.startswith("canary")} for entry in outcome["candidates"]]
    assert bare == plain["candidates"]
    offered = [CandidateScore.read(entry) for entry in outcome["candidates"]]
    chosen = choose(Selection.CANARY, offered, Score.read(place.victim.outcome), place.cell.tau)
    assert chosen is not None
    assert offered[-1].kept
    kept = [place.planted(canary) for canary in place.cell.canaries]
    assert offered[-1].canary_asr == tuple(one.asr(one.net) for one in kept)
    assert outcome["canary_forward"] > sum(one.forward for one in kept)
    # By hand: the defense on each copy, setting by setting.
    for number, one in enumerate(kept):
        by_hand = {}
        for variant in place.cell.defense.knobs:
            view = pipeline._view(place.cell, variant, place.w, place.victim, one.net, None)
            by_hand |= {(variant.knob, c.dial): one.asr(c.model) for c in variant.candidates(view)}
        for entry in outcome["candidates"][:-1]:
            assert entry["canary_asr"][number] == by_hand[entry["knob"], entry["dial"]]


@dataclass(frozen=True)
class Drifting(Defense):
    """Its default stands elsewhere on the dial of every model."""

    name: ClassVar[str] = "drifting"
    default: ClassVar[Iterator[float]]

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        default = next(self.default)
        for dial in (0.1, default, 0.9):
            yield Candidate(view.model, dial, dial == default, dial)


def test_a_default_that_is_read_off_the_model_is_compared_with_the_copys_own_default(place: Place) -> None:
    Drifting.default = iter([0.5, 0.3, 0.7])
    copies = {canary: place.planted(canary) for canary in place.cell.canaries}
    outcome = defend(replace(place.cell, defense=Drifting()), place.w, place.victim, planted=copies.__getitem__)
    assert [entry["dial"] for entry in outcome["candidates"]] == [0.1, 0.5, 0.9, None]
    assert all(len(entry["canary_asr"]) == 2 for entry in outcome["candidates"])


def test_a_canary_that_does_not_take_is_no_ground_for_a_choice(place: Place) -> None:
    def nothing(canary: Canary) -> Planted:
        return replace(place.planted(canary), net=place.victim.net)

    outcome = defend(place.cell, place.w, place.victim, planted=nothing)
    assert "did not take" in outcome["canary_reason"]
    assert all("canary_asr" not in entry for entry in outcome["candidates"])


def test_the_triggered_set_is_what_no_rule_without_hindsight_reads(place: Place) -> None:
    """The same cell with the triggered test images' labels exchanged: only rules with hindsight may choose otherwise."""
    outcome = defend(place.cell, place.w, place.victim, planted=place.planted)
    triggered = place.victim.triggered
    assert triggered is not None
    exchanged = PoisonedTest(triggered.images, triggered.target_labels, triggered.true_labels, triggered.source)
    scorer = type(place.victim.scorer)(place.victim.net, place.w.data.test, exchanged, place.w.validation)
    other = defend(place.cell, place.w, replace(place.victim, triggered=exchanged, scorer=scorer), planted=place.planted)
    before = Score.read(place.victim.outcome)
    for how in (Selection.DEFAULT, Selection.VALIDATION, Selection.STRONGEST, Selection.CANARY):
        picks = {choose(how, [CandidateScore.read(entry) for entry in found["candidates"]], before) for found in (outcome, other)}
        assert len(picks) == 1


def test_stored_copies_are_read_and_not_planted_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = place.cell.canaries[0]
    first = place.planted(canary)
    monkeypatch.setattr(pipeline, "plant", lambda *_: pytest.fail("planted again"))
    again = place.planted(canary)
    values: list[tuple[Tensor, Tensor]] = list(zip(first.net.state_dict().values(), again.net.state_dict().values(), strict=True))
    assert all(torch.equal(left, right) for left, right in values)
    assert torch.equal(first.probes, again.probes)
