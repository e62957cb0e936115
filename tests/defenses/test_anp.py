from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call

from defenses.anp import ANP, ascend, scaled
from defenses.base import Inapplicable, Scope
from models.images import to_float
from models.recipe import Recipe
from models.spec import BadInput, generator
from models.units import UnitLayer, unit_layers

QUICK = {"iterations": 6, "batch": 8}


def learned(defense, view):
    return defense.learn(view.model, unit_layers(view.model, view.scope), view)


@pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
def test_without_perturbation_and_rate_masks_stay_one(view_of, scope):
    defense = ANP(eps=0.0, alpha=1.0, lr=0.0, **QUICK)
    mask = learned(defense, view_of(defense, scope=scope))
    assert torch.equal(mask, torch.ones_like(mask))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_masks_of_one_are_the_network_itself(net_of, data_of, training, norm):
    net, x = net_of(norm=norm).train(training), to_float(data_of(1).images)
    layers = unit_layers(net)
    units = sum(layer.size for layer in layers)
    assert units == 4 + 6 + 10
    expected = net(x)
    assert torch.equal(functional_call(net, scaled(net, layers, torch.ones(units)), (x,)), expected)
    both = scaled(net, layers, torch.ones(units), torch.zeros(units))
    assert torch.equal(functional_call(net, both, (x,)), expected)


def test_scaled_names_gamma_and_beta_by_the_formula(net_of):
    net = net_of(norm=False)
    layers = unit_layers(net)
    draw = generator(0, "scaled")
    scale, shift = torch.rand(20, generator=draw), torch.rand(20, generator=draw)
    named = scaled(net, layers, scale, shift)
    start = 0
    for layer in layers:
        module = net.get_submodule(layer.name)
        for k in range(layer.size):
            assert torch.equal(named[f"{layer.name}.weight"][k], scale[start + k] * module.weight[k])
            assert torch.equal(named[f"{layer.name}.bias"][k], (1 + shift[start + k]) * module.bias[k])
        start += layer.size


def test_the_gradient_of_one_channel_equals_the_formula():
    """y = (m + delta) gamma x^ + (1 + xi) beta, logits (v y, 0): d CE / d m = (p - 1) v gamma x^, d CE / d xi = (p - 1) v beta."""
    norm = nn.BatchNorm2d(1).eval()
    net = nn.Sequential(norm, nn.Flatten(), nn.Linear(1, 2, bias=False))
    gamma, beta, mean, var, v, x, m, delta, xi = 1.3, 0.4, 0.2, 0.7, 0.9, 1.1, 0.8, 0.25, -0.3
    with torch.no_grad():
        norm.weight.fill_(gamma)
        norm.bias.fill_(beta)
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(var)
        net[2].weight.copy_(torch.tensor([[v], [0.0]]))
    layers = [UnitLayer("0", "norm", 1, False, ())]
    mask, shift = torch.tensor([m], requires_grad=True), torch.tensor([xi], requires_grad=True)
    logits = functional_call(net, scaled(net, layers, mask + delta, shift), (torch.full((1, 1, 1, 1), x),))
    loss = nn.functional.cross_entropy(logits, torch.tensor([0]))
    found = torch.autograd.grad(loss, [mask, shift])
    hat = (x - mean) / math.sqrt(var + norm.eps)
    y = (m + delta) * gamma * hat + (1 + xi) * beta
    p = 1 / (1 + math.exp(-v * y))
    assert float(found[0]) == pytest.approx((p - 1) * v * gamma * hat, rel=1e-5)
    assert float(found[1]) == pytest.approx((p - 1) * v * beta, rel=1e-5)


@pytest.mark.parametrize(("project", "bound"), [(False, 0.8), (True, 0.4)])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_range_of_the_perturbation(project, bound, steps):
    draw = generator(0, "noise")
    start = 0.4 * (2 * torch.rand((2, 1000), generator=draw) - 1)
    direction = torch.randn(1000, generator=draw).sign()
    mask = torch.ones(1000)
    delta, xi = ascend(lambda d, x: (direction * d).sum() - (direction * x).sum(), mask, start[0], start[1], 0.4, steps, project)
    expected = start[0] + 0.4 * direction
    torch.testing.assert_close(delta, expected.clamp(-0.4, 0.4) if project else expected)
    for value in (delta, xi):
        assert float(value.abs().max()) <= bound + 1e-6
        assert float(value.abs().max()) > 0.95 * bound


@pytest.mark.parametrize("alpha", [0.2, 0.9])
@pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
def test_two_iterations_equal_finite_differences(net_of, data_of, view_of, scope, alpha):
    """At eps 0 alpha drops out: v <- 0.9 v + dL/dm, m <- clip(m - lr v, 0, 1); the batch is one image, repeated."""
    defense, data = ANP(eps=0.0, iterations=2, batch=4, lr=0.5, alpha=alpha), data_of(1).subset(torch.tensor([1, 1, 1]))
    view = view_of(defense, scope=scope, clean=data, recipe=Recipe(crop=0, flip=False))
    found = learned(defense, view)
    net = net_of().double().train(scope is Scope.WHOLE)
    layers, x, y = unit_layers(net, scope), to_float(data.images).double(), data.labels

    @torch.no_grad()
    def loss(mask):
        return float(nn.functional.cross_entropy(functional_call(net, scaled(net, layers, mask), (x,)), y))

    mask = torch.ones(len(found), dtype=torch.float64)
    velocity = torch.zeros_like(mask)
    for _ in range(2):
        slope = [(loss(mask + 1e-6 * unit) - loss(mask - 1e-6 * unit)) / 2e-6 for unit in torch.eye(len(mask)).double()]
        velocity = 0.9 * velocity + torch.tensor(slope).double()
        mask = (mask - 0.5 * velocity).clamp(0, 1)
    torch.testing.assert_close(found.double(), mask, rtol=1e-4, atol=1e-5)
    assert float(mask.min()) < 0.99


@pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
def test_the_worst_case_is_learned_against(net_of, data_of, view_of, scope):
    """One iteration by the formula: uniform start, sign step by eps, then alpha L(m) + (1 - alpha) L(m + delta, xi); all slopes by
    finite differences in float64."""
    defense, data = ANP(iterations=1, batch=4, lr=0.5), data_of(1).subset(torch.tensor([1, 1, 1]))
    view = view_of(defense, scope=scope, clean=data, recipe=Recipe(crop=0, flip=False))
    found = learned(defense, view)
    net = net_of().double().train(scope is Scope.WHOLE)
    layers, x, y = unit_layers(net, scope), to_float(data.images).double(), data.labels
    units = len(found)
    draw = generator(view.seed, "anp", "draws")
    torch.randint(0, 3, (4,), generator=draw)  # the batch
    delta, xi = (0.4 * (2 * torch.rand((2, units), generator=draw) - 1)).double()

    @torch.no_grad()
    def loss(scale, shift):
        return float(nn.functional.cross_entropy(functional_call(net, scaled(net, layers, scale, shift), (x,)), y))

    def slopes(of):
        return torch.tensor([(of(1e-6 * unit) - of(-1e-6 * unit)) / 2e-6 for unit in torch.eye(units).double()]).double()

    one = torch.ones(units).double()
    up = slopes(lambda step: loss(one + delta + step, xi)), slopes(lambda step: loss(one + delta, xi + step))
    signs = [torch.where(slope.abs() > 1e-9, slope.sign(), 0.0) for slope in up]
    delta, xi = delta + 0.4 * signs[0], xi + 0.4 * signs[1]
    slope = slopes(lambda step: 0.2 * loss(one + step, 0 * xi) + 0.8 * loss(one + delta + step, xi))
    torch.testing.assert_close(found.double(), (one - 0.5 * slope).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert float(found.min()) < 0.99


def test_learning_leaves_weights_alone_and_lowers_some_masks(net_of, view_of):
    defense = ANP(lr=0.5, iterations=20, batch=8)
    view = view_of(defense)
    net = view.model
    mask = defense.learn(net, unit_layers(net), view)
    before = dict(net_of().named_parameters())
    assert all(torch.equal(value.cpu(), before[name]) for name, value in net.named_parameters())
    assert float(mask.min()) < 0.9
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1


def test_pruned_sets_grow_with_the_threshold_and_are_written_to_the_victim(net_of, view_of):
    defense, net = ANP(lr=0.8, iterations=20, batch=8), net_of()
    offered = list(defense.candidates(view_of(defense, net)))
    assert [candidate.dial for candidate in offered] == [pytest.approx(0.05 * step) for step in range(19)]
    assert [candidate.dial for candidate in offered if candidate.is_default] == [0.2]
    for fewer, more in pairwise(offered):
        assert all(bool((~mask | more.masks[name]).all()) for name, mask in fewer.masks.items())
    assert offered[-1].pruned > 0
    last = offered[-1]
    for name, value in net.named_buffers():
        assert torch.equal(value, last.model.get_buffer(name))  # statistics drifted on a copy only
    for name in ("features.1", "features.4"):
        module, mask = last.model.get_submodule(name), last.masks[name]
        assert not module.weight[mask].any()
        assert torch.equal(module.bias, net.get_submodule(name).bias)


def test_a_threshold_off_the_grid_is_one_more_candidate(view_of):
    defense = ANP(threshold=0.33, **QUICK)
    offered = list(defense.candidates(view_of(defense, scope=Scope.HEAD)))
    assert len(offered) == 20
    assert [candidate.dial for candidate in offered if candidate.is_default] == [0.33]


def test_refusals(net_of, view_of):
    defense = ANP(**QUICK)
    with pytest.raises(Inapplicable, match="no hidden units"):
        list(defense.candidates(view_of(defense, net_of(hidden=0), Scope.HEAD)))
    with pytest.raises(BadInput, match="alpha"):
        ANP(alpha=1.5)
    with pytest.raises(BadInput, match="threshold"):
        ANP(threshold=-0.1)


def test_smaller_radii_are_tried_after_the_published_one():
    method = ANP(iterations=7, radii=(0.1, 0.9, 0.4, 0.2))
    assert [variant.knob for variant in method.knobs] == [0.4, 0.2, 0.1]
    assert method.knobs[0] is method
    assert all(variant == replace(method, eps=variant.eps, radii=()) for variant in method.knobs[1:])
    assert ANP(radii=()).knobs == (ANP(radii=()),)


def test_pruning_by_number_takes_the_smallest_masks_first(net_of, view_of):
    """The released script's second sweep; by hand: units ordered by mask, over all layers jointly."""
    settings = {"iterations": 6, "batch": 8, "lr": 0.5}
    defense = ANP(**settings, by="number", number=3, step=4, most=9)
    learned = ANP(**settings).learn(net_of(), unit_layers(net_of(), Scope.WHOLE), view_of(ANP(**settings)))
    order = torch.argsort(learned, stable=True).tolist()
    offered = list(defense.candidates(view_of(defense)))
    assert [candidate.dial for candidate in offered] == [0, 3, 4, 8]
    assert [candidate.is_default for candidate in offered] == [False, True, False, False]
    assert defense.dial_name == "units pruned"
    for candidate in offered:
        flat = torch.cat(list(candidate.masks.values()))
        assert sorted(flat.nonzero().flatten().tolist()) == sorted(order[: int(candidate.dial)])
