"""Which network an attack crafts on: the victim's benign twin, or one that the attacker trains apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from attacks.adaptive_latent import AdapBlend
from attacks.base import Attack, Plan, apply
from attacks.flat_lipschitz import FlatLipschitz
from attacks.lc import LC
from attacks.narcissus import Narcissus
from benchmark.data.datasets import DatasetSpec
from benchmark.run.keys import extractor_key, victim_key
from benchmark.run.victim import read_victim, run_victim
from benchmark.run.world import world
from benchmark.settings.cells import Frozen, Scenario
from benchmark.storage.store import Store
from models.classifier import Classifier
from models.extractors import SelfSupervised, Supervised
from models.recipe import Recipe
from models.resnet import ResNet8
from models.spec import derive_seed
from models.training import fit
from models.vgg import VGG11BN

RECIPE = Recipe(epochs=1, batch=32, lr=0.05, crop=1, flip=False)
NARCISSUS = Narcissus(rounds=20, lr=0.1, crop=1, flip=False)


def scene(attack: Attack | None, frozen: Frozen | None = None) -> Scenario:
    data = DatasetSpec("digits", train_limit=100, test_limit=30)
    return Scenario(data, 0.2, ResNet8(width=2, hidden=4), "tiny", RECIPE, attack, "it", Plan(rate=0.05), 3, frozen)


def test_the_twin_serves_unless_the_attack_trains_its_own() -> None:
    assert scene(None).surrogate() is None
    assert scene(AdapBlend()).surrogate() is None
    assert scene(LC()).surrogate() == scene(LC()).twin()
    own = scene(NARCISSUS).surrogate()
    assert own is not None
    assert own == dataclasses.replace(scene(None), attack_label="none", backbone_label="resnet8", weights_seed=own.weights_seed)
    assert own.weights_seed is not None
    wrapped = FlatLipschitz(base="narcissus", base_settings=(("rounds", 20), ("lr", 0.1), ("crop", 1), ("flip", False)))
    assert scene(wrapped).surrogate() == own
    other = scene(dataclasses.replace(NARCISSUS, surrogate="vgg11-bn")).surrogate()
    assert other is not None
    assert other.backbone == VGG11BN(width=2, hidden=4)
    assert "weights_seed" not in scene(None).spec(), "keys of networks of the scenario's own seed do not change"


def test_a_head_on_given_features_is_attacked_through_a_network_trained_end_to_end() -> None:
    given = scene(NARCISSUS, Frozen(Supervised(), "given"))
    assert given.surrogate() == scene(NARCISSUS).surrogate()
    assert scene(LC(), Frozen(Supervised(), "given")).surrogate() == given.twin()


def test_an_extractor_of_poisoned_images_is_keyed_by_the_surrogate_behind_them() -> None:
    reads_poison = SelfSupervised()
    assert reads_poison.reads == "poisoned"
    ours = extractor_key(reads_poison, scene(NARCISSUS), "data")
    other = dataclasses.replace(scene(NARCISSUS), recipe=dataclasses.replace(RECIPE, lr=0.01))
    assert reads_poison.follows(other.recipe) == reads_poison.follows(RECIPE), "the recipe only reaches it through the surrogate"
    assert ours != extractor_key(reads_poison, other, "data")


def test_the_surrogate_sees_the_victims_images_from_other_weights_in_other_batches(tmp_path: Path) -> None:
    store, cache = Store(tmp_path / "store"), tmp_path / "cache"
    scenario = scene(NARCISSUS)
    own = scenario.surrogate()
    assert own is not None
    run_victim(scenario, store, cache)
    w = world(scenario, cache)
    assert store.read("victim", victim_key(own, w.data.fingerprint)) is not None
    seed = own.weights_seed
    net = scenario.backbone.build(10, w.train.shape, w.mean, w.std, derive_seed(scenario.backbone.spec(), seed, "init"))
    by_hand = fit(Classifier(net, RECIPE), w.train, RECIPE, derive_seed(seed, "train")).net
    surrogate, twin = read_victim(own, store, cache), read_victim(scenario.twin(), store, cache)
    for name, value in surrogate.net.state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[name])
    assert torch.equal(surrogate.poisoned.visible.images, twin.poisoned.visible.images)
    assert not torch.equal(surrogate.net.head[0].weight, twin.net.head[0].weight)
    # The noise in the stored images is the one learned on it, not on the twin.
    stored = read_victim(scenario, store, cache)
    assert stored.triggered is not None
    for lent, same in ((surrogate.net, True), (twin.net, False)):
        crafted = NARCISSUS.craft(w.train, scenario.plan, derive_seed(3, "attack"), lent)
        again = apply(crafted.test, w.data.test.images[stored.triggered.source], stored.triggered.source)
        assert torch.equal(again, stored.triggered.images) == same


@pytest.mark.parametrize("attack", [NARCISSUS, LC(steps=1)], ids=lambda attack: attack.name)
def test_a_surrogate_that_diverged_leaves_no_victim(attack: Attack, tmp_path: Path) -> None:
    store, cache = Store(tmp_path / "store"), tmp_path / "cache"
    scenario = scene(attack)
    lent = scenario.surrogate()
    assert lent is not None
    outcome = {"status": "failed", "reason": "it blew up", "train_size": 80}
    store.write("victim", victim_key(lent, world(scenario, cache).data.fingerprint), lent.spec(), outcome, {})
    run_victim(scenario, store, cache)
    outcome = read_victim(scenario, store, cache).outcome
    assert (outcome["status"], outcome["reason"]) == ("failed", "no surrogate: it blew up")
