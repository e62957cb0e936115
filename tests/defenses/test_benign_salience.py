from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses.base import Inapplicable, Scope
from defenses.benign_salience import BenignSalience, penalty, salience, selected, updated
from defenses.fine_tuning import Tuned, tune
from models.images import to_float
from models.recipe import Recipe
from models.spec import BadInput, derive_seed

POINTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def only(defense, view):
    (candidate,) = defense.candidates(view)
    return candidate.model


def r(w: float) -> float:
    """R by hand."""
    return abs(w) if abs(w) <= 1 else math.exp(abs(w) - 1)


def r_slope(w: float) -> float:
    """R' by hand."""
    return math.copysign(max(1.0, math.exp(abs(w) - 1)), w) if w else 0.0


def test_penalty_and_its_slope_by_hand_at_seven_points():
    w = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    value = penalty(w)
    (slope,) = torch.autograd.grad(value.sum(), w)
    np.testing.assert_allclose(value.detach(), [math.e, 1, 0.5, 0, 0.5, 1, math.e], rtol=1e-12)
    np.testing.assert_allclose(slope, [-math.e, -1, -1, 0, 1, 1, math.e], rtol=1e-12)
    np.testing.assert_allclose(value.detach(), [r(x) for x in POINTS], rtol=1e-12)
    np.testing.assert_allclose(slope, [r_slope(x) for x in POINTS], rtol=1e-12)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_penalty_is_smooth_at_one_and_never_overflows(sign):
    step = 1e-9
    w = (sign * torch.tensor([1 - step, 1 + step, 500.0], dtype=torch.float64)).requires_grad_()
    value = penalty(w)
    (slope,) = torch.autograd.grad(value.sum(), w)
    assert value[0].item() == pytest.approx(value[1].item(), abs=1e-8)
    assert slope[0].item() == pytest.approx(slope[1].item(), abs=1e-8)
    assert value[2].item() == pytest.approx(math.exp(20) * (1 + 479))
    assert slope[2].item() == pytest.approx(sign * math.exp(20))
    assert torch.isfinite(penalty(torch.tensor([3e4 * sign]))).all()


def test_what_the_released_script_does_instead():
    """Its mask spares nobody within [-1, 1], and below -1 descending on it drives a weight away from 0."""

    def released(w, mask):
        v = w * mask
        return torch.where(v > 1, (v - 1).exp(), torch.where(v < -1, -(-v - 1).exp(), w.abs()))

    w = torch.linspace(-0.9, 0.95, 24, dtype=torch.float64).view(6, 4).requires_grad_()
    mask = (torch.arange(24) % 3 == 0).view(6, 4)
    theirs = torch.autograd.grad(released(w, mask).sum(), w)[0]
    ours = torch.autograd.grad(penalty(w)[mask].sum(), w)[0]
    assert torch.equal(theirs, w.sign())
    assert torch.equal(ours, w.sign() * mask)
    low = torch.tensor([-1.6], dtype=torch.float64, requires_grad=True)
    chosen = torch.ones(1, dtype=torch.bool)
    assert torch.autograd.grad(released(low, chosen).sum(), low)[0].item() == pytest.approx(math.exp(0.6))
    assert torch.autograd.grad(penalty(low)[chosen].sum(), low)[0].item() == pytest.approx(-math.exp(0.6))


def double_net(net_of, data_of):
    data = data_of(1)
    return net_of(2).double(), data, to_float(data.images).double()


def test_salience_is_what_setting_a_small_entry_to_zero_costs(net_of, data_of):
    """L(w_j = 0) - L(w), one entry at a time, against -g w; the second-order rest shrinks with w squared."""
    net, data, images = double_net(net_of, data_of)
    entry = net.head[0].weight
    with torch.no_grad():
        entry.mul_(1e-4)

    def loss():
        return cross_entropy(net(images), data.labels)

    (gradient,) = torch.autograd.grad(loss(), entry)
    estimate = updated(torch.zeros_like(entry), entry, gradient, 0.0)
    with torch.no_grad():
        base = loss()
        for j in range(0, entry.numel(), 7):
            kept = entry.view(-1)[j].item()
            entry.view(-1)[j] = 0.0
            cost = (loss() - base).item()
            entry.view(-1)[j] = kept
            assert estimate.view(-1)[j].item() == pytest.approx(cost, rel=1e-2, abs=1e-9)
    assert estimate.abs().max() > 1e-6


def test_the_average_of_two_batches_by_hand(net_of, data_of):
    net, data = net_of(2), data_of(1)
    entries = {"head.2.weight": net.head[2].weight, "head.2.bias": net.head[2].bias}
    found = salience(net, entries, data, eta=0.9, batch=12)
    for name, entry in entries.items():
        expected = np.zeros(entry.shape)
        for start in (0, 12):
            loss = cross_entropy(net(to_float(data.images[start : start + 12])), data.labels[start : start + 12])
            (gradient,) = torch.autograd.grad(loss, entry)
            expected = 0.9 * expected - 0.1 * gradient.numpy() * entry.detach().numpy()
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("layer", ["features.0", "head.0"])
def test_a_neuron_is_the_sum_over_its_row_and_bias(layer, net_of, data_of):
    """sum over incoming weights and bias of g w = sum over samples (and positions) of z dL/dz, z before ReLU."""
    net = net_of(2, norm=False).double()
    data = data_of(1)
    module = net.get_submodule(layer)
    seen = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    loss = cross_entropy(net(to_float(data.images).double()), data.labels)
    handle.remove()
    z = seen[0]
    (dz,) = torch.autograd.grad(loss, z, retain_graph=True)
    unit = -(z * dz).sum((0, *range(2, z.ndim)))
    gradients = torch.autograd.grad(loss, [module.weight, module.bias])
    found = {
        f"{layer}.{key}": updated(torch.zeros_like(entry), entry, gradient, 0.0)
        for (key, entry), gradient in zip(module.named_parameters(), gradients, strict=True)
    }
    summed = found[f"{layer}.weight"].flatten(1).sum(1) + found[f"{layer}.bias"]
    torch.testing.assert_close(summed, unit.detach(), rtol=1e-9, atol=1e-12)
    masks = selected(found, 0.5, "neuron")
    lowest = torch.zeros(len(unit), dtype=torch.bool)
    lowest[np.argsort(unit.detach().numpy(), kind="stable")[: round(0.5 * len(unit))]] = True
    assert torch.equal(masks[f"{layer}.bias"], lowest)
    assert torch.equal(masks[f"{layer}.weight"].flatten(1), lowest[:, None].expand(-1, module.weight[0].numel()))


def test_entries_are_ranked_layer_by_layer_weights_apart_from_biases():
    found = {"a.weight": torch.tensor([[3.0, -1.0], [0.0, 2.0]]), "a.bias": torch.tensor([5.0, 4.0]), "b.weight": -torch.ones(1, 4)}
    masks = selected(found, 0.5, "param")
    assert masks["a.weight"].tolist() == [[False, True], [True, False]]
    assert masks["a.bias"].tolist() == [False, True]
    assert masks["b.weight"].tolist() == [[True, True, False, False]]


def test_the_schedule_reaches_its_end_or_its_limit():
    assert [BenignSalience().share(e) for e in (1, 10)] == pytest.approx([0.55, 1.0])
    assert [BenignSalience(r_max=0.6).share(e) for e in (1, 2, 10)] == pytest.approx([0.55, 0.6, 0.6])


def test_one_step_is_that_of_the_total_loss_and_salience_ignores_the_penalty(net_of, data_of, view_of, monkeypatch):
    """CE + alpha sum of R over the least salient entries, one full batch, head only: w - lr times its gradient, by hand."""
    data = data_of(1)
    defense = BenignSalience(alpha_reg=0.3, epochs=1, batch=24, lr=0.1, beta=0.25, r_max=0.4)
    view = view_of(defense, scope=Scope.HEAD, clean=data, recipe=Recipe(crop=0, flip=False))
    kept = []
    original = selected
    monkeypatch.setattr("defenses.benign_salience.selected", lambda *given: kept.append(given[0]) or original(*given))
    model = only(defense, view)
    twin = net_of()
    names = ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    entries = {name: twin.get_parameter(name) for name in names}
    first = salience(twin, entries, data, 0.9)
    loss = cross_entropy(twin(to_float(data.images)), data.labels)
    gradients = dict(zip(names, torch.autograd.grad(loss, list(entries.values())), strict=True))
    for name, entry in entries.items():
        flat = entry.detach().double().view(-1).numpy()
        order = np.argsort(first[name].view(-1).numpy(), kind="stable")
        slope = np.zeros(len(flat))
        for j in order[: round(0.4 * len(flat))]:
            slope[j] = r_slope(flat[j])
        expected = flat - 0.1 * (gradients[name].double().view(-1).numpy() + 0.3 * slope)
        np.testing.assert_allclose(model.get_parameter(name).detach().view(-1), expected, rtol=1e-4, atol=1e-6)
        after = 0.9 * first[name] - 0.1 * gradients[name] * entry.detach()
        torch.testing.assert_close(kept[0][name], after, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("granularity", ["param", "neuron"])
def test_without_penalty_it_is_fine_tuning_bit_for_bit(scope, granularity, net_of, data_of, view_of):
    defense = BenignSalience(alpha_reg=0.0, epochs=2, batch=8, granularity=granularity)
    view = view_of(defense, scope=scope)
    recipe = Recipe(epochs=2, batch=8, lr=0.01, momentum=0, weight_decay=0, schedule="constant", crop=1)
    twin = tune(Tuned(net_of(), recipe, scope), data_of(1), derive_seed(view.seed, "benign-salience")).state_dict()
    purified = only(defense, view).state_dict()
    assert all(torch.equal(value, twin[name]) for name, value in purified.items())
    strong = only(BenignSalience(alpha_reg=0.1, epochs=2, batch=8, granularity=granularity), view_of(defense, scope=scope))
    moved = {name for name, value in strong.state_dict().items() if not torch.equal(value, twin[name])}
    assert "head.0.weight" in moved


def test_scope_and_granularity_decide_which_layers_are_penalised(net_of):
    net = net_of()
    everything = {f"{m}.{k}" for m, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
                  for k, _ in module.named_parameters()}  # fmt: skip
    assert set(BenignSalience().entries(net, Scope.WHOLE)) == everything
    assert set(BenignSalience().entries(net, Scope.HEAD)) == {name for name in everything if name.startswith("head.")}
    neurons = BenignSalience(granularity="neuron")
    assert set(neurons.entries(net, Scope.WHOLE)) == everything - {"head.2.weight", "head.2.bias"}
    with pytest.raises(Inapplicable, match="classes"):
        neurons.entries(net_of(hidden=0), Scope.HEAD)


def test_a_strong_penalty_shrinks_the_selected_layers(net_of, view_of):
    defense = BenignSalience(alpha_reg=5.0, epochs=4, batch=8)
    purified = only(defense, view_of(defense))
    for name in ("features.3.weight", "head.0.weight"):
        assert purified.get_parameter(name).abs().mean() < 0.5 * net_of().get_parameter(name).abs().mean()


@pytest.mark.parametrize(
    "wrong",
    [{"granularity": "layer"}, {"alpha_reg": -1.0}, {"eta": 1.0}, {"beta": 1.5}, {"r_max": -0.1}, {"epochs": -1}, {"lr": 11.0},
     {"batch": 1}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"benign-salience: {next(iter(wrong))}"):
        BenignSalience(**wrong)


def test_the_published_configuration_penalises_the_output_layer_and_trains_everything(net_of, data_of, view_of):
    method = BenignSalience(penalised="last", epochs=1, batch=8)
    net = net_of()
    last = [name for name, _ in net.named_parameters()][-2:]
    assert sorted(method.entries(net, Scope.WHOLE)) == sorted(last)
    (candidate,) = method.candidates(view_of(method, net))
    before = dict(net.named_parameters())
    moved = [name for name, value in candidate.model.named_parameters() if not torch.equal(value, before[name])]
    assert set(moved) == {name for name, _ in net.named_parameters()}
    with pytest.raises(BadInput, match="penalised"):
        BenignSalience(penalised="last", granularity="neuron")
