from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from defenses.anp import ANP, scaled
from defenses.base import Inapplicable, Scope
from defenses.rnp import RNP
from models.cost import metered
from models.images import to_float
from models.recipe import Recipe
from models.spec import BadInput
from models.units import unit_layers

SCOPES = pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
PLAIN = Recipe(crop=0, flip=False)


def ascended(net, data, scope, *, epochs, lr, decay, stop):
    """One full batch per epoch: v <- 0.9 v - g + wd w; w <- w - lr v, a tenth of lr from half of the epochs on. Also the epochs."""
    net.train()
    if scope is Scope.HEAD:
        net.features.eval()
    weights = list((net.head if scope is Scope.HEAD else net).parameters())
    velocity = [torch.zeros_like(weight) for weight in weights]
    x, y = to_float(data.images), data.labels
    for epoch in range(epochs):
        logits = net(x)
        grads = torch.autograd.grad(cross_entropy(logits, y), weights)
        with torch.no_grad():
            for v, w, g in zip(velocity, weights, grads, strict=True):
                v.mul_(0.9).add_(-g + decay * w)
                w.sub_((lr if epoch < epochs // 2 else lr / 10) * v)
        if sum(int(guess == label) for guess, label in zip(logits.argmax(1), y, strict=True)) / len(y) <= stop:
            return net, epoch + 1
    return net, epochs


@SCOPES
@pytest.mark.parametrize("stop", [0.0, 0.25, 1.0])
def test_unlearning_equals_the_formula(net_of, data_of, view_of, scope, stop):
    defense, data = RNP(unlearning_epochs=6, unlearning_lr=0.05, weight_decay=0.01, stop=stop, batch=24), data_of(1)
    view = view_of(defense, scope=scope, clean=data, recipe=PLAIN)
    with metered() as cost:
        found = defense.unlearn(view.model, view)
    twin, epochs = ascended(net_of(), data, scope, epochs=6, lr=0.05, decay=0.01, stop=stop)
    assert cost.forward == epochs * len(data)
    for p, q in zip(found.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert epochs == 1 if stop == 1 else epochs > 1
    with torch.no_grad():
        before, after = (cross_entropy(net(to_float(data.images)), data.labels) for net in (net_of(), found))
    assert after > before


@SCOPES
def test_an_ascent_that_reaches_the_accuracy_ends_early(data_of, view_of, scope):
    """The victim agrees with its own predictions: accuracy 1 at first, and little is left after some epochs."""
    defense = RNP(unlearning_epochs=40, unlearning_lr=0.1, stop=0.5, batch=24)
    data = data_of(1)
    view = view_of(defense, scope=scope, clean=data, recipe=PLAIN)
    labels = view.model(to_float(data.images)).argmax(1)
    view = view_of(defense, scope=scope, clean=type(data)(data.images, labels, 4), recipe=PLAIN)
    with metered() as cost:
        defense.unlearn(view.model, view)
    assert len(data) < cost.forward < 40 * len(data)


@SCOPES
def test_recovery_equals_finite_differences(net_of, data_of, view_of, scope):
    """v <- 0.9 v + alpha dL/dm, m <- clip(m - lr v, 0, 1), m = 1 at first; the batch is one image, repeated."""
    defense = RNP(recovery_epochs=3, recovery_lr=2.0, alpha=0.4, batch=4)
    data = data_of(1).subset(torch.tensor([1, 1, 1]))
    view = view_of(defense, scope=scope, clean=data, recipe=PLAIN)
    found = defense.recover(view.model, unit_layers(view.model, scope), view)
    net = net_of().double().train(scope is Scope.WHOLE)
    layers, x, y = unit_layers(net, scope), to_float(data.images).double(), data.labels

    @torch.no_grad()
    def loss(mask):
        return float(cross_entropy(functional_call(net, scaled(net, layers, mask), (x,)), y))

    mask = torch.ones(len(found), dtype=torch.float64)
    velocity = torch.zeros_like(mask)
    for _ in range(3):
        slope = [(loss(mask + 1e-6 * unit) - loss(mask - 1e-6 * unit)) / 2e-6 for unit in torch.eye(len(mask)).double()]
        velocity = 0.9 * velocity + 0.4 * torch.tensor(slope).double()
        mask = (mask - 2.0 * velocity).clamp(0, 1)
    torch.testing.assert_close(found.double(), mask, rtol=1e-4, atol=1e-5)
    assert float(mask.min()) < 0.9


@SCOPES
def test_without_epochs_of_recovery_masks_stay_one(view_of, scope):
    defense = RNP(recovery_epochs=0, unlearning_epochs=1, batch=8)
    view = view_of(defense, scope=scope)
    mask = defense.recover(view.model, unit_layers(view.model, scope), view)
    assert torch.equal(mask, torch.ones_like(mask))
    assert not any(candidate.pruned for candidate in defense.candidates(view))


def test_recovery_leaves_the_weights_of_the_unlearned_network(net_of, view_of):
    defense = RNP(recovery_epochs=3, recovery_lr=2.0, batch=8)
    view = view_of(defense)
    net = view.model
    with metered() as cost:
        defense.recover(net, unit_layers(net), view)
    before = dict(net_of().named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())
    assert cost.forward == cost.backward == 3 * len(view.clean)


def test_the_victim_is_pruned_not_the_unlearned_network(net_of, view_of):
    defense, net = RNP(unlearning_epochs=3, recovery_epochs=10, recovery_lr=5.0, batch=8), net_of()
    view = view_of(defense, net)
    offered = list(defense.candidates(view))
    learned = defense.recover(defense.unlearn(view.model, view), unit_layers(net), view)
    assert [candidate.dial for candidate in offered] == list(ANP().grid) == [pytest.approx(0.05 * step) for step in range(19)]
    assert [candidate.dial for candidate in offered if candidate.is_default] == [0.2]
    for fewer, more in pairwise(offered):
        assert all(bool((~mask | more.masks[name]).all()) for name, mask in fewer.masks.items())
    last = offered[-1]
    assert 0 < last.pruned < len(learned)
    assert torch.cat(list(last.masks.values())).tolist() == [value <= 0.9 for value in learned.tolist()]
    expected = net.state_dict()
    for name, mask in last.masks.items():
        expected[f"{name}.weight"][mask] = 0
        if name.startswith("head"):
            expected[f"{name}.bias"][mask] = 0
    assert all(torch.equal(value, expected[name]) for name, value in last.model.state_dict().items())


def test_refusals(net_of, data_of, view_of):
    defense = RNP(unlearning_epochs=1, recovery_epochs=1)
    with pytest.raises(Inapplicable, match="no hidden units"):
        list(defense.candidates(view_of(defense, net_of(hidden=0), Scope.HEAD)))
    with pytest.raises(Inapplicable, match="clean budget"):
        list(defense.candidates(view_of(defense, clean=data_of(size=0))))


@pytest.mark.parametrize("wrong", [{"threshold": 1.5}, {"stop": -0.1}, {"alpha": 2.0}, {"batch": 1}, {"recovery_epochs": -1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"rnp: {next(iter(wrong))}"):
        RNP(**wrong)


def test_no_more_samples_are_used_than_named(view_of):
    defense = RNP(unlearning_epochs=2, recovery_epochs=3, stop=0.0, batch=4, samples=8)
    view = view_of(defense)
    given = defense.given(view)
    assert len(given) == 8 < len(view.clean)
    assert all(any(torch.equal(one, other) for other in view.clean.images) for one in given.images)
    assert len(RNP().given(view)) == len(view.clean)
    with metered() as cost:
        list(defense.candidates(view))
    assert cost.backward == (2 + 3) * 8
