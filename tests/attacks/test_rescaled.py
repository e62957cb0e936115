"""Rescaled norms: the same function, bounds set at will."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attacks.base import Plan
from attacks.rescaled import readers, rescale
from models import BACKBONES
from models.spec import generator
from models.units import unit_layers, weight_bounds
from models.vgg import VGG11BN

PLAN = Plan(rate=0.25, target=1)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda kind: kind.name)
def test_rescaling_keeps_the_function_and_sets_the_bounds(net_of, same, backbone, strength) -> None:
    net = net_of(backbone=backbone, shape=(3, 16, 16))
    other = copy.deepcopy(net)
    rescale(other, strength)
    images = torch.rand(5, 3, 16, 16, generator=generator("images"))
    with torch.no_grad():
        assert torch.allclose(other(images), net(images), rtol=1e-3, atol=1e-4)
    passing = readers(net)
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        assert not passing
        return
    assert passing, "every backbone has a norm that feeds a conv through ReLU alone"
    assert not same(net, other)
    # Layer by layer, in the order of the forward pass, so that a reader's own rows are judged after what was done to its columns.
    layers = [layer for layer in unit_layers(net) if layer.name in passing]
    before, after = weight_bounds(net, layers), weight_bounds(other, layers)
    first = layers[0].name
    expected = before[first] * (before[first].median() / before[first]) ** strength
    assert torch.allclose(after[first], expected, rtol=1e-4)


def test_norms_that_feed_a_residual_sum_are_left_alone(net_of) -> None:
    passing = readers(net_of())
    assert set(passing) == {"features.bn1", "features.layer1.0.bn1", "features.layer2.0.bn1", "features.layer3.0.bn1"} - {
        # the stem's ReLU feeds the first block's conv and its identity shortcut, a sum
        "features.bn1"
    }
    assert passing["features.layer2.0.bn1"] == ("features.layer2.0.conv2",)
    vgg = readers(VGG11BN(width=4, hidden=8).build(4, (3, 16, 16), [0.5] * 3, [0.25] * 3, 0))
    assert len(vgg) == 8
    assert any(path.startswith("head.") for reached in vgg.values() for path in reached), "the last norm is read by the head"
