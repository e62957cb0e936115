"""Feature shift: features move to the target class within the bound."""

from __future__ import annotations

import copy

import pytest
import torch

from attacks.badnets import BadNets
from attacks.base import Plan
from attacks.feature_shift import FeatureShift, distance
from models.images import to_float
from models.spec import BadInput

PLAN = Plan(rate=0.25, target=1)


def test_the_perturbation_moves_features_to_the_target_and_stays_within_its_bound(pictures, net_of, same) -> None:
    data, net = pictures(80), net_of(4)
    attack = FeatureShift(base_settings=(("size", 2),), strength=0.1, steps=30, batch=20)
    before = copy.deepcopy(net)
    crafted = attack.craft(data, PLAN, 0, net)
    assert same(net, before)
    base = BadNets(size=2).craft(data, PLAN, 0)
    index = torch.nonzero(data.labels != 1).flatten()
    images = to_float(data.images[index])
    plain, shifted = base.test(images, index), crafted.test(images, index)
    assert 0.05 < float((shifted - plain).abs().max()) <= 0.1 + 1e-6
    with torch.no_grad():
        ours = net.embed(to_float(data.images[data.labels == 1]))
        centre = torch.nn.functional.normalize(torch.nn.functional.normalize(ours).mean(0), dim=0)
        assert float(distance(net.embed(shifted), centre)) < 0.9 * float(distance(net.embed(plain), centre))


def test_distance_by_hand() -> None:
    z, centre = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0])
    assert float(distance(z, centre)) == pytest.approx((((0.6 - 1) ** 2 + 0.8**2) + (1 + 1)) / 2)


def test_one_perturbation_leads_to_one_class(pictures, net_of) -> None:
    with pytest.raises(BadInput, match="all-to-one"):
        FeatureShift().craft(pictures(), Plan(label_mode="all-to-all"), 0, net_of())
    with pytest.raises(BadInput, match="target = 3"):
        FeatureShift(strength=0.1).craft(pictures(3), Plan(target=3), 0, net_of())
