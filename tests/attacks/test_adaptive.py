"""The adaptive attackers: at strength 0 the base attack; above, the same backdoor with a flatter signature."""

from __future__ import annotations

import pytest
import torch

from attacks.adaptive import Adaptive
from attacks.badnets import BadNets
from attacks.base import Attack, Plan, Power, apply, poison
from attacks.feature_shift import FeatureShift
from attacks.flat_holder import FlatHolder
from attacks.flat_lipschitz import FlatLipschitz
from attacks.rescaled import Rescaled
from attacks.sig import SIG
from attacks.wanet import WaNet
from models.backbone import Network
from models.recipe import Recipe
from models.spec import BadInput
from models.training import fit

PLAN = Plan(rate=0.25, target=1)
RECIPE = Recipe(epochs=2, batch=16, lr=0.05, crop=1)
KINDS = [FlatLipschitz, FlatHolder, Rescaled, FeatureShift]


@pytest.fixture
def trained(pictures, net_of):
    """The whole of an attack: its victim and its triggered images."""

    def run(attack: Attack) -> tuple[Network, torch.Tensor]:
        data = pictures()
        crafted = attack.craft(data, PLAN, 5, net_of(3) if attack.needs_surrogate else None)
        module = attack.victim(net_of(1), RECIPE, crafted, PLAN, 5)
        given = data if attack.poisons_batches else poison(data, attack, crafted, PLAN, 5).visible
        net = fit(module, given, RECIPE, 7).net
        crafted = attack.finished(module, crafted)
        return net, apply(crafted.test, data.images, torch.arange(len(data)))

    return run


@pytest.mark.parametrize("base", [("badnets", (("size", 2),)), ("wanet", (("s", 2.0),))], ids=lambda base: base[0])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_strength_zero_is_the_base_attack_bit_for_bit(same, trained, kind: type[Adaptive], base) -> None:
    name, settings = base
    plain = BadNets(**dict(settings)) if name == "badnets" else WaNet(**dict(settings))
    expected, images = trained(plain)
    found, theirs = trained(kind(base=name, base_settings=settings, strength=0.0))
    assert same(found, expected)
    assert torch.equal(theirs, images)
    if kind is not FeatureShift:
        changed, _ = trained(kind(base=name, base_settings=settings, strength=0.5))
        assert not same(changed, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_poisoned_is_the_bases_business(pictures, net_of, kind: type[Adaptive]) -> None:
    wrapped = kind(base="sig", strength=0.5)
    assert wrapped.clean_label
    assert not wrapped.poisons_batches
    assert wrapped.power is (Power.DATA if kind is FeatureShift else Power.TRAINING)
    dynamic = kind(base="wanet", strength=0.5)
    assert dynamic.poisons_batches
    assert dynamic.cover_rate(PLAN) == WaNet().cover_rate(PLAN) == 0.5
    data = pictures()
    surrogate = net_of() if wrapped.needs_surrogate else None
    result = poison(data, wrapped, wrapped.craft(data, PLAN, 0, surrogate), PLAN, 0)
    assert torch.equal(result.visible.labels, data.labels)


def test_a_base_whose_numbers_changed_changes_the_key(monkeypatch) -> None:
    wrapped = FlatLipschitz(base="sig")
    before = wrapped.spec()
    assert before["revision"] == 1
    assert "base_revision" not in before, "keys on bases that were never revised do not change"
    monkeypatch.setattr(SIG, "revision", 2)
    assert wrapped.spec() == {**before, "base_revision": 2}


def test_a_base_must_be_there_be_no_adaptation_and_know_its_settings() -> None:
    with pytest.raises(BadInput, match="unknown attack 'badnet'; did you mean 'badnets'"):
        FlatLipschitz(base="badnet")
    with pytest.raises(BadInput, match="a trigger of its own"):
        FlatLipschitz(base="rescaled")
    with pytest.raises(BadInput, match="badnets has no setting 'szie'; did you mean 'size'"):
        FlatLipschitz(base_settings=(("szie", 2),))
    with pytest.raises(BadInput, match="strength = 2"):
        Rescaled(strength=2.0)
