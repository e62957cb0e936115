from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from defenses.base import Inapplicable, Scope
from defenses.clp import CLP
from models.resnet import PreActResNet18, ResNet8
from models.spec import BadInput, generator
from models.units import unit_layers
from models.vgg import VGG11BN


def looks_trained(backbone, seed):
    net = backbone.build(4, (3, 32, 32), [0.5] * 3, [0.25] * 3, seed).eval()
    draw = generator(seed, "norms")
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Log-normal scales: a few channels stand out, as u between 1 and 5 needs.
                module.weight.copy_(torch.randn(module.num_features, generator=draw).mul(1.2).exp())
                module.bias.copy_(torch.randn(module.num_features, generator=draw))
                module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.1)
    return net


def brute_force(net, layers, u):
    """One SVD per channel, in float64."""
    masks = {}
    for layer in layers:
        module = net.get_submodule(layer.name)
        scores = []
        for k in range(layer.size):
            square = 0.0
            for path in layer.writers:
                kernel = net.get_submodule(path).weight.detach().double().numpy()[k]
                square += np.linalg.svd(kernel.reshape(len(kernel), -1))[1].max() ** 2
            score = np.sqrt(square)
            if isinstance(module, nn.BatchNorm2d):
                score *= abs(float(module.weight.detach()[k])) / np.sqrt(float(module.running_var[k]))
            scores.append(score)
        scores = np.array(scores)
        masks[layer.name] = scores > scores.mean() + u * scores.std(ddof=1)
    return masks


@pytest.mark.parametrize("pairing", ["dataflow", "registration"])
@pytest.mark.parametrize("backbone", [ResNet8(width=8), VGG11BN(width=4), PreActResNet18(width=4)], ids=lambda b: b.name)
def test_masks_equal_one_svd_per_channel(backbone, pairing, view_of):
    net = looks_trained(backbone, 1)
    layers = unit_layers(net, Scope.WHOLE, pairing)
    defense = CLP(pairing=pairing, grid=(1.0, 2.0, 3.0, 4.0, 5.0))
    offered = list(defense.candidates(view_of(defense, net)))
    assert [candidate.dial for candidate in offered] == [1, 2, 3, 4, 5]
    for candidate in offered:
        twin = brute_force(net, layers, candidate.dial)
        assert list(candidate.masks) == list(twin)
        for name, mask in candidate.masks.items():
            np.testing.assert_array_equal(mask.numpy(), twin[name])
    counts = [candidate.pruned for candidate in offered]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > 0


def test_pairings_differ_on_preactivation_nets(view_of):
    net = looks_trained(PreActResNet18(width=4), 2)
    found = {}
    for pairing in ("dataflow", "registration"):
        defense = CLP(pairing=pairing, grid=(1.0,))
        found[pairing] = next(c.masks for c in defense.candidates(view_of(defense, net)) if c.dial == 1)
    shared = set(found["dataflow"]) & set(found["registration"])
    assert any(not torch.equal(found["dataflow"][name], found["registration"][name]) for name in shared)


def test_gamma_and_beta_are_written_and_nothing_else(net_of, view_of):
    defense, net = CLP(u=0.5), net_of()
    candidate = next(c for c in defense.candidates(view_of(defense, net)) if c.is_default)
    assert candidate.pruned > 0
    changed = {}
    after = candidate.model.state_dict()
    for name, value in net.state_dict().items():
        if not torch.equal(value, after[name]):
            changed[name] = after[name]
    for name, mask in candidate.masks.items():
        for part in ("weight", "bias"):
            if mask.any():
                assert not changed.pop(f"{name}.{part}")[mask].any()
    assert not changed


def test_a_channel_without_variance_is_pruned_and_spares_the_others(net_of, view_of):
    net, defense = net_of(), CLP()
    net.features[1].running_var[2] = 0.0
    candidate = next(c for c in defense.candidates(view_of(defense, net)) if c.is_default)
    assert candidate.masks["features.1"].tolist() == [False, False, True, False]


def test_a_linear_head_is_refused_at_head_scope(net_of, view_of):
    defense = CLP()
    with pytest.raises(Inapplicable, match="no hidden units"):
        list(defense.candidates(view_of(defense, net_of(hidden=0), Scope.HEAD)))


def test_settings_out_of_range_are_named():
    with pytest.raises(BadInput, match="clp: u = -1"):
        CLP(u=-1)
    with pytest.raises(BadInput, match="pairing"):
        CLP(pairing="order")
