from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses.base import Inapplicable, Scope
from defenses.fine_tuning import Tuned, tune
from defenses.nad import NAD, _Student, attention
from models.cost import metered
from models.images import to_float
from models.recipe import Recipe
from models.resnet import PreActResNet18, ResNet9
from models.spec import BadInput, derive_seed, generator
from models.training import fit
from models.vgg import VGG11BN


def only(defense, view):
    (candidate,) = defense.candidates(view)
    return candidate.model


def features(seed, shape=(3, 5, 4, 6)):
    return torch.randn(shape, generator=generator(seed, "features"))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_attention_equals_the_formula_position_by_position(p):
    f = features(0)
    ours = attention(f, p).numpy()
    for n, image in enumerate(f.double().numpy()):
        raw = np.zeros(image.shape[1:])
        for channel in image:
            for i in range(raw.shape[0]):
                for j in range(raw.shape[1]):
                    raw[i, j] += abs(channel[i, j]) ** p
        np.testing.assert_allclose(ours[n], raw / (np.sqrt((raw**2).sum()) + 1e-6), rtol=1e-5)


def test_attention_ignores_the_scale_and_is_one_on_a_single_position():
    torch.testing.assert_close(attention(7 * features(1)), attention(features(1)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention(features(2, (3, 5, 1, 1))), torch.ones(3, 1, 1))
    assert not attention(torch.zeros(2, 3, 4, 4)).any()


def slow_loss(student, teacher, images, labels, betas):
    """Cross-entropy and attention losses, from features run module by module, teacher in evaluation mode."""

    def walk(net):
        x, found = net.normalise(images), {}
        for module in net.features:
            x = module(x)
            if x.ndim == 4 and x.shape[2] * x.shape[3] > 1:
                found[x.shape[2:]] = x
        return list(found.values()), net.head(x)

    own, logits = walk(student)
    with torch.no_grad():
        wanted, _ = walk(teacher)
    total = cross_entropy(logits, labels)
    for beta, mine, theirs in zip(reversed(betas), reversed(own), reversed(wanted), strict=False):
        total = total + beta * (attention(mine) - attention(theirs)).square().mean()
    return total


@pytest.mark.parametrize("backbone", [ResNet9(width=2), VGG11BN(width=2), PreActResNet18(width=2)], ids=lambda b: b.name)
def test_the_loss_equals_the_formula_on_networks_of_the_catalogue(backbone):
    student, teacher = (backbone.build(4, (3, 32, 32), [0.5] * 3, [0.25] * 3, seed).train() for seed in (1, 2))
    teacher.eval()
    images = torch.rand((4, 3, 32, 32), generator=generator(0, "images"))
    labels = torch.arange(4)
    betas = NAD().weights(student, (3, 32, 32), 1.0)
    assert list(betas.values()) == [500, 1000, 1000]
    module = _Student(student, Recipe(), teacher, betas, 2.0).train()
    loss = module.training_step((images, labels, labels), 0)
    twin = slow_loss(student, teacher, images, labels, NAD().betas)
    torch.testing.assert_close(loss, twin, rtol=1e-5, atol=1e-5)
    assert float((loss - cross_entropy(student(images), labels)).detach()) > 0.1, "the attention losses are a part of it"
    assert not any(p.grad is not None for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_a_student_that_is_its_teacher_has_no_attention_loss(net_of, data_of):
    data, net = data_of(1), net_of()
    module = _Student(net, Recipe(), net_of(), {"features.5": 1000.0}, 2.0).eval()
    loss = module.training_step((to_float(data.images), data.labels, data.labels), 0)
    torch.testing.assert_close(loss, cross_entropy(net(to_float(data.images)), data.labels))


def test_factor_zero_is_fine_tuning_by_the_same_schedule(view_of):
    defense = NAD(factor=0.0, epochs=3, teacher_epochs=1, batch=8)
    view = view_of(defense)
    ours = only(defense, view).state_dict()
    plain = Tuned(view.model, defense.recipe(3, view), Scope.WHOLE)
    twin = tune(plain, view.clean, derive_seed(view.seed, "nad", "student")).state_dict()
    assert all(torch.equal(ours[name], twin[name]) for name in twin)
    assert not all(torch.equal(only(NAD(epochs=3, teacher_epochs=1, batch=8), view).state_dict()[n], twin[n]) for n in twin)


def test_steps_equal_the_formula_of_nesterov_momentum_at_one_rate(net_of, data_of, view_of):
    """v <- 0.9 v + g + wd w; w <- w - lr (g + wd w + 0.9 v), one full batch per epoch."""
    defense = NAD(batch=24, lr=0.05, weight_decay=0.01)
    recipe = replace(defense.recipe(20, view_of(defense)), crop=0, flip=False)
    data, tuned, twin = data_of(1), net_of(norm=False), net_of(norm=False)
    fit(Tuned(tuned, recipe, Scope.WHOLE), data, recipe, 0)
    images, velocity = to_float(data.images), [torch.zeros_like(p) for p in twin.parameters()]
    for _ in range(20):
        grads = torch.autograd.grad(cross_entropy(twin(images), data.labels), list(twin.parameters()))
        with torch.no_grad():
            for v, p, g in zip(velocity, twin.parameters(), grads, strict=True):
                decayed = g + 0.01 * p
                v.mul_(0.9).add_(decayed)
                p.sub_(0.05 * (decayed + 0.9 * v))
    for p, q in zip(tuned.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_a_larger_factor_ends_closer_to_the_teacher(view_of, net_of):
    defense = NAD(factors=(0.0, 10.0), epochs=10, teacher_epochs=3, batch=8, lr=0.002)
    view = view_of(defense)
    teacher = Tuned(view.model, defense.recipe(3, view), Scope.WHOLE)
    tune(teacher, view.clean, derive_seed(view.seed, "nad", "teacher"))
    x = teacher.net.normalise(to_float(view.clean.images))
    distance = {}
    for one in defense.candidates(view):
        with torch.no_grad():
            a, b = (attention(net.features[:6](x)) for net in (one.model, teacher.net))
        distance[one.dial] = float((a - b).square().mean())
    assert list(distance) == [0.0, 1.0, 10.0]
    assert distance[10.0] < distance[1.0] < distance[0.0]


def test_cost_counts_teacher_and_student_once_per_step(view_of):
    defense = NAD(epochs=2, teacher_epochs=1, batch=8)
    with metered() as cost:
        only(defense, view_of(defense))
    assert (cost.forward, cost.backward) == (24 + 2 * 2 * 24, 24 + 2 * 24)


def test_a_network_without_maps_is_refused(net_of, view_of):
    net, defense = net_of(), NAD(epochs=1, batch=8)
    net.features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6))
    with pytest.raises(Inapplicable, match="more than one position"):
        list(defense.candidates(view_of(defense, net)))


@pytest.mark.parametrize("wrong", [{"factor": -1.0}, {"factors": (-1.0,)}, {"betas": (-1.0,)}, {"p": 0.5}, {"teacher_epochs": -1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"nad: {next(iter(wrong))}"):
        NAD(**wrong)
