from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from defenses.base import Inapplicable, Scope
from defenses.unit import UNIT, size, spreads
from models.backbone import Network
from models.bounded import BoundedReLU, relus, with_bounds
from models.cost import metered
from models.images import to_float
from models.spec import BadInput, generator
from models.training import predict
from models.weights import load_weights, read_state, save_weights


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def own_labels(net, data):
    """``data`` as ``net`` classifies them, so that the accuracy is 1 before."""
    return dataclasses.replace(data, labels=predict(net, data.images))


def offered(defense, view):
    return {one.dial: one for one in defense.candidates(view)}


# -- the bounds at the start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["position", "channel"])
def test_means_and_deviations_equal_numpy(per):
    layers = {"map": nn.ReLU(), "units": nn.ReLU()}
    maps = torch.randn(11, 3, 4, 5, generator=generator("maps")) + 1
    units = torch.randn(11, 6, generator=generator("units"))

    def run():
        for start in (0, 4, 8):
            layers["map"](maps[start : start + 4])
            layers["units"](units[start : start + 4])

    found = spreads(run, layers, per)
    a, b = np.maximum(maps.double().numpy(), 0), np.maximum(units.double().numpy(), 0)
    axes = 0 if per == "position" else (0, 2, 3)
    shape = (3, 4, 5) if per == "position" else (3, 1, 1)
    np.testing.assert_allclose(found["map"][0], a.mean(axes).reshape(shape), rtol=1e-6)
    np.testing.assert_allclose(found["map"][1], a.std(axes, ddof=1).reshape(shape), rtol=1e-5)
    np.testing.assert_allclose(found["units"][0], b.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["units"][1], b.std(0, ddof=1), rtol=1e-5)
    run()
    assert not layers["map"]._forward_hooks


def test_the_size_is_the_sum_of_layer_means():
    bounds = [torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]]), torch.tensor([-1.0, 4.0])]
    assert float(size(bounds)) == pytest.approx(3.0 + 1.5)


# -- the search against plain loops --------------------------------------------------------------------------------------------


def positive(x):
    """max(x, 0) without a gradient at 0: a unit that is silent on all images starts with a bound of exactly 0."""
    return torch.where(x > 0, x, torch.zeros_like(x))


def clipped(net, x, bounds, scope):
    """The tiny network of conftest.py, written out, with its three activations clipped; the first two not at scope HEAD."""
    for number, (conv, norm) in enumerate(((0, 1), (3, 4))):
        x = net.features[norm](net.features[conv](net.normalise(x) if number == 0 else x))
        x = positive(x)
        if scope is Scope.WHOLE and bounds is not None:
            b = positive(bounds[number])
            x = torch.where(x < b, x, b.expand_as(x))
        acts.append(x)
    x = net.head[0](x.mean((2, 3)))
    x = positive(x)
    if bounds is not None:
        b = positive(bounds[-1])
        x = torch.where(x < b, x, b.expand_as(x))
    acts.append(x)
    return net.head[2](x)


acts: list[torch.Tensor] = []


def slow_search(method, net, fit, check, scope):
    """Full batches, its own Adam and counters, in float64: (size, bounds) by tolerance."""
    net = net.double().requires_grad_(False)
    x, y = fit.images.double() / 255, fit.labels
    v, w = check.images.double() / 255, check.labels

    def accuracy(bounds):
        return np.mean([int(row.argmax()) == int(label) for row, label in zip(clipped(net, v, bounds, scope), w, strict=True)])

    acts.clear()
    clipped(net, x, None, scope)
    chosen = acts if scope is Scope.WHOLE else acts[-1:]
    bounds = []
    for act in chosen:
        axes = (0, 2, 3) if method.per == "channel" and act.ndim == 4 else (0,)
        bounds.append((act.mean(axes, keepdim=True) + method.spread * act.std(axes, keepdim=True))[0])
    first, second = ([torch.zeros_like(b) for b in bounds] for _ in range(2))
    weight, up, down, found, plain = method.weight, 0, 0, {}, accuracy(None)
    for step in range(method.iterations + 1):
        if step:
            leaves = [b.clone().requires_grad_() for b in bounds]
            total = -torch.log_softmax(clipped(net, x, leaves, scope), 1)[range(len(y)), y].mean()
            gradients = torch.autograd.grad(total + weight * sum(leaf.mean() for leaf in leaves), leaves)
            for number, g in enumerate(gradients):
                first[number] = 0.5 * first[number] + 0.5 * g
                second[number] = 0.9 * second[number] + 0.1 * g * g
                ahead = first[number] / (1 - 0.5**step) / ((second[number] / (1 - 0.9**step)).sqrt() + 1e-8)
                bounds[number] = bounds[number] - method.lr * ahead
        now, kept = float(sum(b.mean() for b in bounds)), accuracy(bounds)
        for level in (method.tolerance, *method.tolerances):
            if kept >= plain - level - 1e-9 and now < found.get(level, (math.inf,))[0]:
                found[level] = now, [b.clone() for b in bounds]
        if step:
            up, down = (up + 1, 0) if kept >= plain - method.tolerance - 1e-9 else (0, down + 1)
            if up == method.patience:
                weight, up = (method.weight if weight < method.weight else 2 * weight), 0
            if down == method.patience:
                weight, down = weight / 2**1.5, 0
    return found


QUICK = {"iterations": 15, "lr": 0.05, "weight": 0.5, "patience": 2, "batch": 7, "tolerances": (0.0, 0.1, 0.5)}


@pytest.mark.parametrize(
    ("settings", "scope"),
    [
        ({}, Scope.WHOLE),
        ({"per": "channel", "spread": 1.0}, Scope.WHOLE),
        ({"tolerance": 0.2, "spread": 2.0, "patience": 1}, Scope.WHOLE),
        ({"spread": 0.5}, Scope.HEAD),
    ],
)
def test_the_search_equals_its_slow_twin(settings, scope, net_of, data_of, view_of):
    method = UNIT(**{**QUICK, **settings})
    fit, check = own_labels(net_of(), data_of(1)), own_labels(net_of(), data_of(2, 12))
    twin = slow_search(method, net_of(), fit, check, scope)
    found = offered(method, view_of(method, scope=scope, clean=fit, validation=check))
    assert set(found) == {method.tolerance, *method.tolerances}
    sizes = []
    for level, candidate in sorted(found.items()):
        layers = [module.bound for module in candidate.model.modules() if isinstance(module, BoundedReLU)]
        assert (len(layers) > 0) == (level in twin)
        sizes.append(float(size(layers).detach()) if layers else math.inf)
        if layers:
            assert sizes[-1] == pytest.approx(twin[level][0], rel=1e-3)
            for mine, theirs in zip(layers, twin[level][1], strict=True):
                # Adam moves a bound without a gradient of note either way: where the size alone counts, by rounding.
                torch.testing.assert_close(mine.detach().double(), theirs, rtol=1e-2, atol=1e-2)
            kept = float((predict(candidate.model, check.images) == check.labels).double().mean())
            assert kept >= 1 - level - 1e-9
    assert sizes == sorted(sizes, reverse=True), "a larger tolerance is never looser"
    assert sizes[-1] < sizes[0]


# -- what a run gives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [Scope.WHOLE, Scope.HEAD])
def test_no_weight_changes_and_the_result_is_a_network_that_can_be_saved(scope, net_of, data_of, view_of, tmp_path):
    method = UNIT(**{**QUICK, "tolerance": 0.2})
    candidate = offered(method, view_of(method, scope=scope))[0.2]
    state, before = candidate.model.state_dict(), net_of().state_dict()
    extra = [name for name in state if name not in before]
    expected = [f"{path}.bound" for path in relus(net_of(), scope)]
    assert extra == expected
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert type(candidate.model) is Network
    assert candidate.strength == 0.2
    file = tmp_path / "unit.safetensors"
    save_weights(candidate.model, file)
    again = with_bounds(net_of(), read_state(file))
    load_weights(again, file)
    x = to_float(data_of(9).images)
    assert torch.equal(again.eval()(x), candidate.model(x))


def test_bounds_that_clean_images_never_reach_change_nothing_for_them(net_of, data_of, view_of):
    method = UNIT(spread=1000.0, iterations=0)
    (candidate, *_) = method.candidates(view_of(method))
    x = to_float(data_of(1).images)
    assert torch.equal(candidate.model(x), net_of()(x))
    assert not same(candidate.model, net_of())


def test_where_nothing_keeps_within_the_tolerance_the_model_stays(net_of, data_of, view_of):
    """Bounds at the mean, and the images are those that it costs."""
    method = UNIT(spread=0.0, iterations=0, tolerance=0.0, tolerances=(1.0,))
    images = own_labels(net_of(), data_of(2, 40))
    found = offered(method, view_of(method, validation=images))
    assert same(found[0.0].model, net_of())
    assert found[0.0].note == "no bounds keep within the tolerance: the model is as it was given"
    assert found[0.0].is_default
    assert not same(found[1.0].model, net_of())
    assert found[1.0].note.startswith("sum of the layers' mean bounds: ")


def test_fewer_images_per_step_are_drawn_anew(net_of, view_of):
    """With ``samples`` the result is repeatable, and another one than with all images."""
    runs = [
        offered(method, view_of(method))[1.0].model
        for method in (UNIT(**{**QUICK, "iterations": 4, "samples": count, "tolerance": 1.0}) for count in (8, 8, 0, 24))
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert same(runs[2], runs[3])


@pytest.mark.parametrize(("scope", "forward", "backward"), [(Scope.WHOLE, 12 + 24 + 6 * 12 + 5 * 24, 5 * 24), (Scope.HEAD, 36, 0)])
def test_passes_are_counted(scope, forward, backward, view_of):
    """24 images to fit on and 12 to validate on, 5 steps; at scope HEAD images are embedded once."""
    method = UNIT(**{**QUICK, "iterations": 5})
    with metered() as cost:
        list(method.candidates(view_of(method, scope=scope)))
    assert (cost.forward, cost.backward) == (forward, backward)


class _Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)

    def forward(self, x):
        return torch.relu(self.conv(x)).mean((2, 3))


def test_what_cannot_be_bounded_is_refused_with_the_reason(net_of, data_of, view_of):
    method = UNIT(**QUICK)
    with pytest.raises(Inapplicable, match="scope 'head': it has no ReLU"):
        list(method.candidates(view_of(method, net_of(hidden=0), Scope.HEAD)))
    net = net_of()
    net.features = _Functional()
    with pytest.raises(Inapplicable, match="features calls relu as a function"):
        list(method.candidates(view_of(method, net)))
    assert len(list(method.candidates(view_of(method, net, Scope.HEAD)))) == 4
    for parts in ({"clean": data_of(size=0)}, {"validation": data_of(size=0)}):
        with pytest.raises(Inapplicable, match="both parts of the clean budget"):
            list(method.candidates(view_of(method, **parts)))


@pytest.mark.parametrize(
    "wrong",
    [{"tolerance": 1.5}, {"tolerances": (-0.1,)}, {"per": "layer"}, {"spread": -1.0}, {"iterations": -1}, {"lr": 11.0},
     {"samples": -1}, {"batch": 1}, {"weight": -1.0}, {"patience": 0}, {"factor": 1.0}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"unit: {next(iter(wrong))}"):
        UNIT(**wrong)
