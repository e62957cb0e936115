from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from defenses.base import Scope
from defenses.fine_tuning import FineTuning, fine_tuned
from models.images import to_float
from models.recipe import Recipe
from models.spec import BadInput


def only(defense, view):
    (candidate,) = defense.candidates(view)
    return candidate.model


def test_without_a_rate_no_parameter_moves(net_of, view_of):
    defense = FineTuning(epochs=2, lr=0.0, batch=8)
    tuned = only(defense, view_of(defense))
    before = dict(net_of().named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in tuned.named_parameters())


def test_whole_scope_moves_every_layer(net_of, view_of):
    defense = FineTuning(epochs=1, batch=8)
    tuned = only(defense, view_of(defense)).state_dict()
    before = net_of().state_dict()
    moved = {name for name in before if not torch.equal(before[name], tuned[name])}
    assert {"features.0.weight", "features.1.running_mean", "head.0.weight", "head.2.bias"} <= moved


def test_head_scope_leaves_features_and_running_statistics(net_of, view_of):
    defense = FineTuning(epochs=2, batch=8)
    tuned = only(defense, view_of(defense, scope=Scope.HEAD))
    before = net_of().state_dict()
    moved = {name for name, value in tuned.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    assert all(parameter.requires_grad for parameter in tuned.parameters())


def test_an_empty_budget_is_the_identity(net_of, data_of):
    tuned = fine_tuned(net_of(), data_of(size=0), Recipe(epochs=2), Scope.WHOLE, 0)
    before = net_of().state_dict()
    assert all(torch.equal(before[name], value) for name, value in tuned.state_dict().items())


def test_two_steps_equal_the_formula_of_sgd(net_of, data_of):
    """v <- 0.9 v + g + wd w; w <- w - lr v, one full batch per epoch, cosine by epoch, head only."""
    recipe = Recipe(epochs=2, batch=24, lr=0.1, weight_decay=0.01, crop=0, flip=False)
    data = data_of(1)
    tuned = fine_tuned(net_of(), data, recipe, Scope.HEAD, 0)
    twin = net_of()
    z = twin.embed(to_float(data.images)).detach()
    velocity = [torch.zeros_like(p) for p in twin.head.parameters()]
    for lr in (0.1, 0.05):
        grads = torch.autograd.grad(cross_entropy(twin.head(z), data.labels), list(twin.head.parameters()))
        with torch.no_grad():
            for v, p, g in zip(velocity, twin.head.parameters(), grads, strict=True):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(lr * v)
    for p, q in zip(tuned.head.parameters(), twin.head.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 11.0}, {"batch": 1}, {"weight_decay": -0.1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"fine-tuning: {next(iter(wrong))}"):
        FineTuning(**wrong)
