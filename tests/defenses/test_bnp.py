from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from defenses.base import Inapplicable, Scope
from defenses.bnp import BNP, divergences, gaussian_kl
from models.backbone import GlobalAverage, Network, Normalise
from models.cost import metered
from models.images import to_float
from models.resnet import PreActResNet18, ResNet8
from models.spec import BadInput
from models.units import unit_layers


def norms_of(net):
    return [layer for layer in unit_layers(net) if layer.kind == "norm"]


@pytest.mark.parametrize("pair", [(0.3, 1.2, -0.5, 2.0), (1.0, 0.2, 1.0, 3.0), (0.0, 4.0, 2.0, 0.5)])
def test_the_divergence_is_the_integral(pair):
    m1, v1, m2, v2 = pair
    p, q = norm(m1, math.sqrt(v1)), norm(m2, math.sqrt(v2))
    expected, _ = quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), m1 - 12 * math.sqrt(v1), m1 + 12 * math.sqrt(v1))
    found = gaussian_kl(*(torch.tensor(value, dtype=torch.float64) for value in pair))
    assert float(found) == pytest.approx(expected, rel=1e-6)
    zero = torch.zeros(())
    assert gaussian_kl(found, found, found, zero) == gaussian_kl(found, zero, found, found) == torch.inf
    assert gaussian_kl(found, zero, found, zero) == 0
    assert gaussian_kl(found, zero, found + 1, zero) == torch.inf


def test_two_channels_by_hand():
    """Pixels 0, 1 and 1, 0 in channel 1: mean 1/2, variance 1/3 with 4 - 1 in the denominator. Channel 2: 1, 1, 1, 0."""
    images = torch.tensor([[[[0, 255]], [[255, 255]]], [[[255, 0]], [[255, 0]]]], dtype=torch.uint8)
    features = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), GlobalAverage())
    net = Network(Normalise([0.0] * 2, [1.0] * 2), features, nn.Sequential(nn.Linear(2, 3))).eval()
    features[0].running_mean.copy_(torch.tensor([1.5, 0.75]))
    features[0].running_var.copy_(torch.tensor([1 / 3, 1.0]))
    found = divergences(net, norms_of(net), images)["features.0"]
    first = (1 / 3 + 1.0) / (2 / 3) - 0.5  # equal variances: the log is 0
    second = math.log(1.0 / 0.5) + 0.25 / 2 - 0.5  # variance (3 * 1/16 + 9/16) / 3 = 1/4, equal means
    assert found.tolist() == pytest.approx([first, second], rel=1e-6)
    assert first == pytest.approx(1.5)


def brute_force(net, images, u):
    """Statistics of each norm's input by numpy, one channel at a time."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach().double().numpy()))
        for name, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    net(to_float(images))
    for hook in hooks:
        hook.remove()
    masks = {}
    for name, x in seen.items():
        module = net.get_submodule(name)
        scores = []
        for k in range(x.shape[1]):
            values = x[:, k].ravel()
            m1, v1 = values.mean(), values.var(ddof=1)
            m2, v2 = float(module.running_mean[k]), float(module.running_var[k])
            scores.append(math.log(math.sqrt(v2) / math.sqrt(v1)) + (v1 + (m1 - m2) ** 2) / (2 * v2) - 0.5)
        masks[name] = np.array(scores) > np.mean(scores) + u * np.std(scores, ddof=1)
    return masks


@pytest.mark.parametrize("backbone", [ResNet8(width=8), PreActResNet18(width=4)], ids=lambda backbone: backbone.name)
def test_masks_equal_the_statistics_of_a_loop(backbone, data_of, view_of):
    net = backbone.build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 1).eval()
    defense, data = BNP(grid=(0.5, 1.0, 2.0)), data_of(1)
    offered = list(defense.candidates(view_of(defense, net)))
    assert [candidate.dial for candidate in offered] == [0.5, 1, 2, 3]
    assert [candidate.is_default for candidate in offered] == [False, False, False, True]
    for candidate in offered:
        twin = brute_force(net, data.images, candidate.dial)
        assert set(candidate.masks) == set(twin)
        for name, mask in candidate.masks.items():
            np.testing.assert_array_equal(mask.numpy(), twin[name])
    assert offered[0].pruned > offered[2].pruned > 0


def test_several_batches_are_one(net_of, data_of, monkeypatch):
    from defenses import bnp

    net, images = net_of(), data_of(1).images
    whole, real = divergences(net, norms_of(net), images), bnp.in_batches
    monkeypatch.setattr(bnp, "in_batches", lambda step, images, batch, device: real(step, images, 7, device))
    with metered() as cost:
        parts = divergences(net, norms_of(net), images)
    assert (cost.forward, cost.backward) == (len(images), 0)
    for name, scores in whole.items():
        torch.testing.assert_close(parts[name], scores)


def test_statistics_of_the_same_samples_score_nothing(net_of, data_of):
    net, data = net_of(), data_of(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
            net(to_float(data.images))  # layer by layer: the next norm sees what this one lets through in evaluation mode
            module.eval()
    for scores in divergences(net, norms_of(net), data.images).values():
        torch.testing.assert_close(scores, torch.zeros_like(scores), atol=1e-5, rtol=0)


def test_a_constant_channel_is_pruned_or_scores_nothing(net_of, data_of, view_of):
    net, defense = net_of(), BNP()
    with torch.no_grad():
        net.features[0].weight[1:3] = 0.0
        net.features[1].running_mean[1:3] = 0.0
    net.features[1].running_var[2] = 0.0  # channel 1 is constant on the clean samples, channel 2 on both sides
    scores = divergences(net, norms_of(net), data_of(1).images)["features.1"]
    assert scores[1] == torch.inf
    assert scores[2] == 0
    candidate = next(c for c in defense.candidates(view_of(defense, net)) if c.is_default)
    assert candidate.masks["features.1"].tolist() == [False, True, False, False]


def test_gamma_is_written_and_nothing_else(net_of, view_of):
    defense, net = BNP(u=0.5), net_of()
    candidate = next(c for c in defense.candidates(view_of(defense, net)) if c.is_default)
    assert candidate.pruned > 0
    expected = net.state_dict()
    for name, mask in candidate.masks.items():
        expected[f"{name}.weight"][mask] = 0
    assert all(torch.equal(value, expected[name]) for name, value in candidate.model.state_dict().items())


def test_refusals(net_of, data_of, view_of):
    defense = BNP()
    with pytest.raises(Inapplicable, match="no batch norm"):
        list(defense.candidates(view_of(defense, net_of(norm=False))))
    with pytest.raises(Inapplicable, match="clean budget"):
        list(defense.candidates(view_of(defense, clean=data_of(size=0))))
    assert BNP.scopes == (Scope.WHOLE,)
    assert BNP(u=2.5).z_threshold == 2.5
    with pytest.raises(BadInput, match="bnp: u = -1"):
        BNP(u=-1)
