from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from defenses.base import Inapplicable, Scope
from defenses.fst import FST, _Shifted, classifier, redraw
from models.cost import metered
from models.images import to_float
from models.recipe import Recipe
from models.resnet import ResNet9
from models.spec import BadInput, generator
from models.training import fit
from models.vgg import VGG11


def only(defense, view):
    (candidate,) = defense.candidates(view)
    return candidate.model


def test_the_gradient_of_the_shift_is_alpha_times_the_victims_weight(net_of):
    net, other = net_of(), net_of(1)
    victims = classifier(other).weight.detach().clone()
    logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    module = _Shifted(net, Recipe(), 0.3, victims)
    (gradient,) = torch.autograd.grad(module.loss(logits, labels, labels), classifier(net).weight)
    torch.testing.assert_close(gradient, 0.3 * victims)
    pairs = zip(classifier(net).weight.flatten().tolist(), victims.flatten().tolist(), strict=True)
    assert module.loss(logits, labels, labels).item() == pytest.approx(math.log(4) + 0.3 * sum(a * b for a, b in pairs), rel=1e-5)


def test_a_redrawn_layer_is_uniform_within_one_over_the_root_of_its_inputs(net_of):
    layer = torch.nn.Linear(400, 50)
    redraw(layer, generator(0, "redraw"))
    values = layer.weight.detach().flatten() * 20
    assert values.abs().max() <= 1
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.var()) - 1 / 3) < 0.02
    assert layer.bias.abs().max() <= 1 / 20
    before = layer.weight.detach().clone()
    redraw(layer, generator(0, "redraw"))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("hidden", [0, 10])
def test_the_length_of_the_weight_is_the_victims_after_every_step(hidden, net_of, view_of, monkeypatch):
    net, lengths = net_of(hidden=hidden), []
    length = float(classifier(net).weight.detach().norm())
    step = _Shifted.after_step

    def watched(self):
        step(self)
        lengths.append(float(classifier(self.net).weight.detach().norm()))

    monkeypatch.setattr(_Shifted, "after_step", watched)
    defense = FST(epochs=3, batch=8, lr=0.1)
    tuned = only(defense, view_of(defense, net))
    assert len(lengths) == 1 + 3 * 3
    assert lengths == pytest.approx([length] * 10, rel=1e-5)
    assert float(classifier(tuned).weight.detach().norm()) == pytest.approx(length, rel=1e-5)


def test_two_steps_equal_the_formula(net_of, data_of):
    """Momentum and weight decay on CE + alpha <W, W_victim>, then W scaled to the victim's length; full batches, no norm."""
    recipe = Recipe(epochs=2, batch=24, lr=0.1, weight_decay=0.01, crop=0, flip=False)
    data, tuned, twin = data_of(1), net_of(norm=False), net_of(norm=False)
    victims = classifier(twin).weight.detach().clone()
    for net in (tuned, twin):
        redraw(classifier(net), generator(0, "head"))
    fit(_Shifted(tuned, recipe, 0.5, victims), data, recipe, 0)
    images, names = to_float(data.images), [name for name, _ in twin.named_parameters()]
    weights = dict(twin.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    length, own = float(victims.norm()), names[-2]
    assert weights[own] is classifier(twin).weight
    with torch.no_grad():
        weights[own].mul_(length / weights[own].norm())
    for lr in (0.1, 0.05):
        gradients = dict(zip(names, torch.autograd.grad(cross_entropy(twin(images), data.labels), weights.values()), strict=True))
        gradients[own] = gradients[own] + 0.5 * victims
        with torch.no_grad():
            for name, p in weights.items():
                velocity[name] = 0.9 * velocity[name] + gradients[name] + 0.01 * p
                p.sub_(lr * velocity[name])
            weights[own].mul_(length / weights[own].norm())
    for p, q in zip(tuned.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_larger_alpha_turns_the_classifier_further_away(net_of, view_of):
    defense = FST(epochs=5, batch=8, alpha=0.1, alphas=(0.0, 1.0))
    offered = list(defense.candidates(view_of(defense)))
    assert [(one.dial, one.is_default, one.strength) for one in offered] == [(0.0, False, 0.0), (0.1, True, 0.1), (1.0, False, 1.0)]
    victims = classifier(net_of()).weight.flatten()
    turned = [float(cosine_similarity(classifier(one.model).weight.flatten(), victims, 0).detach()) for one in offered]
    assert turned[0] > turned[1] > turned[2]
    assert turned[0] > 0 > turned[2]


def test_the_new_classifier_does_not_depend_on_the_victims_direction(net_of, view_of):
    """Without the shift the victim's weight gives its length alone."""
    net, flipped, defense = net_of(), net_of(), FST(epochs=2, batch=8, alpha=0.0)
    with torch.no_grad():
        classifier(flipped).weight.neg_()
        classifier(flipped).bias.add_(1.0)
    a, b = (only(defense, view_of(defense, one)).state_dict() for one in (net, flipped))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("backbone", [ResNet9(width=2, hidden=0), VGG11(width=2, hidden=8)], ids=lambda b: b.name)
def test_networks_of_the_catalogue_move_as_a_whole(backbone, view_of):
    net, defense = backbone.build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 1).eval(), FST(epochs=1, batch=8)
    tuned = only(defense, view_of(defense, net))
    still = [name for name, p in tuned.named_parameters() if torch.equal(p, net.get_parameter(name))]
    assert not still


def test_cost_is_that_of_fine_tuning(view_of):
    defense = FST(epochs=2, batch=8)
    with metered() as cost:
        only(defense, view_of(defense))
    assert (cost.forward, cost.backward) == (48, 48)


def test_without_samples_or_epochs_it_is_refused(view_of, data_of):
    assert FST.scopes == (Scope.WHOLE,)
    for defense, clean in ((FST(), data_of(size=0)), (FST(epochs=0), data_of())):
        with pytest.raises(Inapplicable, match="new classifier"):
            list(defense.candidates(view_of(defense, clean=clean)))


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"alphas": (-1.0,)}, {"epochs": -1}, {"lr": 11.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"fst: {next(iter(wrong))}"):
        FST(**wrong)
