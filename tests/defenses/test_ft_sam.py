from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses.base import Scope
from defenses.fine_tuning import FineTuning
from defenses.ft_sam import FTSAM, _Sharp, perturbation, statistics_held
from models.cost import metered
from models.images import to_float
from models.recipe import Recipe
from models.spec import BadInput, generator
from models.training import fit


def only(defense, view):
    (candidate,) = defense.candidates(view)
    return candidate.model


def random_tensors(seed):
    draw = generator(seed, "sam")
    return [torch.randn(shape, generator=draw) for shape in ((3, 4), (5,), (2, 2, 2))]


def test_the_perturbation_equals_the_formula_entry_by_entry():
    weights, gradients = random_tensors(0), random_tensors(1)
    w, g = (np.concatenate([part.double().numpy().ravel() for part in parts]) for parts in (weights, gradients))
    norm = math.sqrt(sum((float(a) * float(b)) ** 2 for a, b in zip(w, g, strict=True)))
    twin = [1.5 * float(a) ** 2 * float(b) / norm for a, b in zip(w, g, strict=True)]
    ours = torch.cat([part.flatten() for part in perturbation(weights, gradients, 1.5)])
    np.testing.assert_allclose(ours.numpy(), twin, rtol=1e-5)


def test_the_scaled_length_is_rho_and_does_not_depend_on_the_scale_of_the_weights():
    weights, gradients = random_tensors(2), random_tensors(3)
    for factor in (1.0, 10.0):
        scaled, inverse = [factor * w for w in weights], [g / factor for g in gradients]  # the same function, other weights
        shift = perturbation(scaled, inverse, 2.0)
        length = torch.cat([(e / w.abs()).flatten() for e, w in zip(shift, scaled, strict=True)]).norm()
        torch.testing.assert_close(length, torch.tensor(2.0))


def test_no_direction_of_that_length_raises_the_linear_loss_more():
    weights, gradients = random_tensors(4), random_tensors(5)
    best = sum(float((e * g).sum()) for e, g in zip(perturbation(weights, gradients, 1.0), gradients, strict=True))
    draw = generator(6, "directions")
    for _ in range(100):
        unit = [torch.randn(w.shape, generator=draw) for w in weights]
        length = torch.cat([part.flatten() for part in unit]).norm()
        gain = sum(float((u / length * w.abs() * g).sum()) for u, w, g in zip(unit, weights, gradients, strict=True))
        assert gain < best


def test_without_a_gradient_nothing_is_perturbed():
    (shift,) = perturbation([torch.ones(3)], [torch.zeros(3)], 2.0)
    assert not shift.any()


@pytest.mark.parametrize("scope", list(Scope))
def test_radius_zero_is_fine_tuning_bit_for_bit(scope, view_of):
    sharp, plain = FTSAM(rho=0.0, epochs=3, batch=8), FineTuning(epochs=3, batch=8)
    a, b = (only(defense, view_of(defense, scope=scope)).state_dict() for defense in (sharp, plain))
    assert all(torch.equal(a[name], b[name]) for name in b)
    moved = only(FTSAM(epochs=3, batch=8), view_of(sharp, scope=scope)).state_dict()
    assert any(not torch.equal(moved[name], b[name]) for name in b)


def test_two_steps_equal_the_formula(net_of, data_of):
    """Gradient at w; gradient at w + eps; momentum and weight decay from w; one full batch per epoch, cosine by epoch; no norm."""
    recipe = Recipe(epochs=2, batch=24, lr=0.1, weight_decay=0.01, crop=0, flip=False)
    data, twin = data_of(1), net_of(norm=False)
    tuned = net_of(norm=False)
    fit(_Sharp(tuned, recipe, Scope.WHOLE, 0.3, 0.0), data, recipe, 0)
    images, velocity = to_float(data.images), [torch.zeros_like(p) for p in twin.parameters()]
    for lr in (0.1, 0.05):
        weights = [p.detach().clone() for p in twin.parameters()]
        first = torch.autograd.grad(cross_entropy(twin(images), data.labels), list(twin.parameters()))
        norm = math.sqrt(sum(float(((w * g) ** 2).sum()) for w, g in zip(weights, first, strict=True)))
        with torch.no_grad():
            for p, w, g in zip(twin.parameters(), weights, first, strict=True):
                p.copy_(w + 0.3 * w * w * g / norm)
        second = torch.autograd.grad(cross_entropy(twin(images), data.labels), list(twin.parameters()))
        with torch.no_grad():
            for v, p, w, g in zip(velocity, twin.parameters(), weights, second, strict=True):
                v.mul_(0.9).add_(g + 0.01 * w)
                p.copy_(w - lr * v)
    for p, q in zip(tuned.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_weights_are_restored_exactly_before_the_step(view_of):
    defense = FTSAM(lr=0.0, epochs=2, batch=8)
    before = dict(view_of(defense).model.named_parameters())
    tuned = only(defense, view_of(defense))
    assert all(torch.equal(value, before[name]) for name, value in tuned.named_parameters())


def test_running_statistics_are_updated_once_per_step_at_the_unperturbed_weights(view_of):
    still, plain = FTSAM(lr=0.0, rho=5.0, epochs=2, batch=8), FineTuning(lr=0.0, epochs=2, batch=8)
    a, b = (only(defense, view_of(defense)).state_dict() for defense in (still, plain))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_held_statistics_are_those_of_the_batch_and_come_back():
    norm, x = nn.BatchNorm2d(2), torch.randn((4, 2, 3, 3), generator=generator(0, "x"))
    twin = nn.BatchNorm2d(2)
    with statistics_held(norm):
        out = norm(x)
    assert torch.equal(out, twin(x))
    assert not norm.running_mean.any()
    assert int(norm.num_batches_tracked) == 0
    norm(x)
    assert torch.equal(norm.running_mean, twin.running_mean)


def test_smoothing_gives_the_other_classes_equal_shares(net_of):
    module = _Sharp(net_of(), Recipe(), Scope.WHOLE, 0.0, 0.1)
    logits, labels = torch.randn((5, 4), generator=generator(0, "logits")), torch.tensor([0, 1, 2, 3, 0])
    target = torch.full((5, 4), 0.1 / 3)
    target[torch.arange(5), labels] = 0.9
    twin = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(module.loss(logits, labels, labels), twin)


def test_a_step_costs_two_passes(view_of):
    for scope, backward in ((Scope.WHOLE, 96), (Scope.HEAD, 0)):
        defense = FTSAM(epochs=2, batch=8)
        with metered() as cost:
            only(defense, view_of(defense, scope=scope))
        assert (cost.forward, cost.backward) == (96, backward)  # 2 epochs, 24 images, 2 passes


def test_further_radii_are_offered_in_order(view_of):
    defense = FTSAM(epochs=1, batch=8, rhos=(4.0, 0.0, 2.0))
    offered = list(defense.candidates(view_of(defense)))
    assert [(one.dial, one.is_default, one.strength) for one in offered] == [(0.0, False, 0.0), (2.0, True, 2.0), (4.0, False, 4.0)]


@pytest.mark.parametrize("wrong", [{"rho": -1.0}, {"rhos": (-0.5,)}, {"smoothing": 0.5}, {"epochs": -1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"ft-sam: {next(iter(wrong))}"):
        FTSAM(**wrong)
