"""Flat Hölder constants: the estimate and its peak by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attacks.badnets import BadNets
from attacks.base import Attack, Plan
from attacks.flat_holder import FlatHolder, peakedness, responses
from models.images import to_float
from models.recipe import Recipe
from models.training import fit
from models.units import capture, unit_layers

PLAN = Plan(rate=0.25, target=1)


def test_responses_by_hand(pictures, net_of) -> None:
    net, data = net_of(2), pictures(6)
    layers, images = unit_layers(net), to_float(data.images)
    sizes, steps = responses(net, layers, images, data.labels, 0.05)
    x = images.clone().requires_grad_(True)
    nn.functional.cross_entropy(net(x), data.labels).backward()
    moved = (images + 0.05 * x.grad.sign()).clamp(0, 1)
    with torch.no_grad(), capture(net, layers) as seen:
        net(images)
        before = {name: value.clone() for name, value in seen.items()}
        net(moved)
        after = dict(seen)
    for layer, size in zip(layers, sizes, strict=True):
        for sample in range(6):
            for unit in range(layer.size):
                gap = (after[layer.name][sample, unit] - before[layer.name][sample, unit]).double().numpy()
                assert float(size[sample, unit].detach()) == pytest.approx(float(np.sqrt((gap**2).sum())), rel=1e-3, abs=2e-6)
    for sample in range(6):
        assert float(steps[sample]) == pytest.approx(float(np.linalg.norm((moved - images)[sample].numpy())), rel=1e-4)


def test_peakedness_by_hand() -> None:
    sizes = [torch.tensor([[1.0, 2.0, 3.0, 8.0], [2.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0], [5.0]])]
    steps, alphas, share = torch.tensor([1.0, 4.0]), (0.5, 1.0), 0.5
    total = 0.0
    for alpha in alphas:
        for size in sizes:
            constants = sorted(max(float(size[i, k]) / float(steps[i]) ** alpha for i in range(2)) for k in range(size.shape[1]))
            count = max(1, round(share * len(constants)))
            total += (sum(constants[-count:]) / count) / (sum(constants) / len(constants)) - 1
    assert float(peakedness(sizes, steps, alphas, share)) == pytest.approx(total / 4, rel=1e-5)
    assert float(peakedness([torch.ones(2, 6)], steps, alphas, 0.1)) == pytest.approx(0, abs=1e-6)


def test_measuring_for_the_penalty_leaves_running_statistics_alone(pictures, net_of) -> None:
    """They must follow the batches alone, as in the base attack; the weights differ."""
    data = pictures(16)
    recipe = Recipe(epochs=1, batch=16, lr=0.0, weight_decay=0.0, crop=0)

    def statistics(attack: Attack) -> list[torch.Tensor]:
        crafted = attack.craft(data, PLAN, 0)
        net = fit(attack.victim(net_of(1), recipe, crafted, PLAN, 0), data, recipe, 0).net
        return [module.running_mean for module in net.modules() if isinstance(module, nn.BatchNorm2d)]

    plain, adapted = statistics(BadNets(size=2)), statistics(FlatHolder(base_settings=(("size", 2),), strength=1.0))
    assert all(torch.equal(one, other) for one, other in zip(plain, adapted, strict=True))
