"""Flat Lipschitz bounds: the differentiable bounds are the defense's own, and the penalty lowers what stands out of them."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.base import Plan, poison
from attacks.flat_lipschitz import FlatLipschitz, bounds, outstanding
from models import BACKBONES
from models.recipe import Recipe
from models.training import fit
from models.units import unit_layers, weight_bounds

PLAN = Plan(rate=0.25, target=1)


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda kind: kind.name)
def test_differentiable_bounds_are_the_defenses_own(net_of, backbone) -> None:
    net = net_of(backbone=backbone, shape=(3, 16, 16))
    layers = unit_layers(net)
    theirs = weight_bounds(net, layers, norm_epsilon=True)
    for layer, bound in zip(layers, bounds(net, layers), strict=True):
        assert torch.allclose(bound, theirs[layer.name], rtol=1e-4, atol=1e-5), layer.name


def test_outstanding_by_hand() -> None:
    layers = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, 4.0])]
    margin, total = 0.1, 0.0
    for layer in layers:
        values = [float(value) for value in layer]
        mean = sum(values) / len(values)
        total += sum(max(0.0, math.log(value) - math.log(mean) - margin) for value in values) / len(values)
    assert float(outstanding(layers, margin)) == pytest.approx(total / 2, rel=1e-5)
    assert float(outstanding([torch.ones(5)], 0.0)) == 0


def test_the_penalty_flattens_bounds(pictures, net_of) -> None:
    data = pictures(128)

    def peak(strength: float) -> float:
        attack = FlatLipschitz(base_settings=(("size", 2),), strength=strength)
        crafted = attack.craft(data, PLAN, 0)
        recipe = Recipe(epochs=6, batch=16, lr=0.05, crop=0)
        net = fit(attack.victim(net_of(1), recipe, crafted, PLAN, 0), poison(data, attack, crafted, PLAN, 0).visible, recipe, 0).net
        return float(outstanding(bounds(net, unit_layers(net)), 0.0).detach())

    assert peak(3.0) < 0.5 * peak(0.0)
