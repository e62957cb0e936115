from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses.base import Inapplicable
from defenses.npd import NPD, _Polarizing, insert, place, runner_up
from models import BACKBONES
from models.cost import metered
from models.images import to_float
from models.recipe import Recipe
from models.resnet import WRN16, PreActResNet18, ResNet8, ResNet9
from models.spec import BadInput, generator
from models.training import predict
from models.units import unit_layers
from models.variants import Variants
from models.vgg import VGG11


def only(defense, view):
    (candidate,) = defense.candidates(view)
    return candidate.model


def built(backbone, side=8):
    net = backbone.build(4, (3, side, side), [0.5] * 3, [0.25] * 3, 3).eval()
    draw = generator(0, "norms")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=draw))
            module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
    return net


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (PreActResNet18(width=2), "layer4.1.conv1"),  # as published
        (WRN16(width=2), "layer3.1.conv1"),
        (ResNet8(width=2), "layer3.0.conv1"),
        (ResNet9(width=2), "16.conv1"),
        (VGG11(width=2), "15"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_place_in_known_networks(backbone, expected):
    assert place(built(backbone)) == f"features.{expected}"


def test_the_layer_never_comes_first(net_of):
    assert place(net_of()) == "features.3"  # of two convolutions
    net = net_of()
    net.features = net.features[:3]
    with pytest.raises(Inapplicable, match="between two convolutions"):
        place(net)


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda kind: kind.name)
def test_the_layer_begins_as_the_identity(backbone, data_of):
    net, twin, data = (*(built(backbone(width=2)) for _ in range(2)), data_of(1))
    path, state = place(net), torch.random.get_rng_state()
    seen = []
    twin.get_submodule(path).register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].double().numpy()))
    layer = insert(net, path, data.images)
    with torch.no_grad():
        torch.testing.assert_close(net(to_float(data.images)), twin(to_float(data.images)), rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_allclose(layer[1].running_mean.numpy(), seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer[1].running_var.numpy(), seen[0].var((0, 2, 3)), rtol=1e-3, atol=1e-6)
    rest = {name.replace(f"{path}.2.", f"{path}."): value for name, value in net.state_dict().items()}
    assert all(torch.equal(rest[name], value) for name, value in twin.state_dict().items())
    assert not net.training


def test_the_runner_up_is_the_largest_of_the_others():
    logits, labels = torch.randn((20, 4), generator=generator(0, "logits")), torch.arange(20) % 4
    twin = [max((value, k) for k, value in enumerate(row) if k != y)[1] for row, y in zip(logits.tolist(), labels, strict=True)]
    assert runner_up(logits, labels).tolist() == twin


def polarizing(net_of, data, method, factor=1.0):
    """A training whose layer is no longer the identity, and the module path."""
    net = net_of()
    path = place(net)
    layer = insert(net, path, data.images)
    with torch.no_grad():
        layer[0].weight.add_(0.2 * torch.randn(layer[0].weight.shape, generator=generator(0, "layer")))
    module = _Polarizing(net, Recipe(batch=24), method, path, factor)
    module.trainable()
    return module.train()


def slow_logits(module, x):
    """The tiny network by hand: conv-norm-ReLU, the layer by its running statistics, conv-norm-ReLU, mean, head."""
    features = module.net.features
    z = features[2](features[1](features[0](module.net.normalise(x))))
    linear, norm, conv = features[3]
    z = torch.einsum("oc,nchw->nohw", linear.weight[:, :, 0, 0], z)
    view = (1, -1, 1, 1)
    z = (z - norm.running_mean.view(view)) / (norm.running_var.view(view) + norm.eps).sqrt()
    z = torch.relu(features[4](conv(z * norm.weight.view(view) + norm.bias.view(view))))
    return module.net.head(z.mean((2, 3)))


def slow_perturbed(module, x, targets, method):
    """Steps of the gradient's sign, image by image, until enough of the batch are taken for their target."""
    shifts = [torch.zeros_like(image) for image in x.split(1)]
    for _ in range(method.steps):
        moved = [torch.clamp(image + d, 0, 1) for image, d in zip(x.split(1), shifts, strict=True)]
        hits = sum(int(slow_logits(module, one).argmax()) == int(t) for one, t in zip(moved, targets, strict=True))
        if hits / len(x) > method.reached:
            break
        for number, (image, target) in enumerate(zip(x.split(1), targets.split(1), strict=True)):
            d = shifts[number].requires_grad_()
            (up,) = torch.autograd.grad(cross_entropy(slow_logits(module, torch.clamp(image + d, 0, 1)), target), d)
            d = d.detach() - method.step * torch.sign(up)
            length = math.sqrt(float((d**2).sum()))
            shifts[number] = d * method.bound / length if length > method.bound else d
    return torch.cat([torch.clamp(image + d, 0, 1) for image, d in zip(x.split(1), shifts, strict=True)])


@pytest.mark.parametrize("reached", [0.05, 0.6, 1.0])
def test_the_perturbation_equals_projected_sign_steps_image_by_image(net_of, data_of, reached):
    data, method = data_of(1), NPD(bound=0.5, steps=4, step=0.02, reached=reached)
    module = polarizing(net_of, data, method)
    x = to_float(data.images)
    targets = (data.labels + 1) % 4
    moved = module.perturbed(x, targets)
    assert not moved.requires_grad
    torch.testing.assert_close(moved, slow_perturbed(module, x, targets, method), rtol=1e-4, atol=1e-5)
    assert float((moved - x).flatten(1).norm(dim=1).max()) <= 0.5 + 1e-5
    with torch.no_grad():
        assert cross_entropy(module(moved), targets) <= cross_entropy(module(x), targets)
    assert torch.equal(polarizing(net_of, data, NPD(steps=0)).perturbed(x, targets), x)


def test_fewer_steps_are_taken_once_enough_are_reached(net_of, data_of):
    data = data_of(1)
    x, targets = to_float(data.images), (data.labels + 1) % 4

    def cost(reached):
        module = polarizing(net_of, data, NPD(bound=0.5, steps=4, step=0.02, reached=reached))
        with metered() as cost:
            module.perturbed(x, targets)
        return cost.forward

    assert cost(0.0) == 24  # some are taken for it already
    assert cost(1.0) == 4 * 24


def test_the_loss_equals_the_formula(net_of, data_of):
    data, method = data_of(1), NPD(bound=1.0, steps=2, l_target=0.3, l_right=0.5, l_wrong=0.7)
    module = polarizing(net_of, data, method, factor=1.5)
    x, y = to_float(data.images), data.labels
    rows, mean = torch.arange(24), module.layer[1].running_mean.clone()
    logits = slow_logits(module, x)
    others = logits.detach().clone()
    others[rows, y] = -math.inf
    targets, own = others.argmax(1), logits.argmax(1)
    assert (own != y).any()
    loss = module.training_step((x, y, y), 0)
    assert torch.equal(module.layer[1].running_mean, mean)
    p = slow_logits(module, slow_perturbed(module, x, targets, method)).softmax(1)
    wrong = torch.stack([torch.cat([row[:label], row[label + 1 :]]).max() for row, label in zip(p, y, strict=True)])
    on_moved = -0.3 * torch.log(1 - p[rows, targets]) - 0.5 * torch.log(p[rows, own]) - 0.7 * torch.log(1 - wrong)
    torch.testing.assert_close(loss, cross_entropy(logits, y) + 1.5 * on_moved.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", [ResNet9(width=2), PreActResNet18(width=2), VGG11(width=2)], ids=lambda b: b.name)
def test_only_the_layer_is_trained_and_the_network_is_left_bit_for_bit(backbone, view_of):
    net, defense = built(backbone), NPD(epochs=1, batch=12, steps=1)
    tuned, path = only(defense, view_of(defense, net)), place(net)
    left = {name.replace(f"{path}.2.", f"{path}."): value for name, value in tuned.state_dict().items()}
    assert all(torch.equal(left.pop(name), value) for name, value in net.state_dict().items())
    linear, norm = tuned.get_submodule(path)[:2]
    assert {f"{path}.0.weight", f"{path}.1.weight", f"{path}.1.bias"} <= set(left)
    assert not torch.equal(linear.weight, torch.eye(len(linear.weight)).view_as(linear.weight))
    assert int(norm.num_batches_tracked) == 0  # in evaluation mode throughout


@pytest.mark.parametrize("backbone", [ResNet9(width=2), PreActResNet18(width=2), VGG11(width=2)], ids=lambda b: b.name)
def test_what_comes_before_the_layer_can_be_shared_and_its_units_are_found(backbone, data_of):
    """The benchmark runs every candidate through :mod:`models.variants` and counts its prunable units."""
    victim, net, images = built(backbone), built(backbone), data_of(1).images
    path = place(net)
    layer = insert(net, path, images)
    variants = Variants(victim, {"images": images})
    assert torch.equal(variants.predict(victim, "images"), predict(victim, images))
    with torch.no_grad():
        layer[0].weight.mul_(-1.0)
    assert torch.equal(variants.predict(net, "images"), predict(net, images))
    before, after = ({layer.name for layer in unit_layers(one)} for one in (victim, net))
    assert f"{path}.1" in after - before


def test_factor_zero_makes_no_perturbation_and_a_larger_one_protects_more(view_of, data_of):
    defense = NPD(factor=0.0, factors=(3.0,), epochs=8, batch=24, lr=0.05, bound=1.0, reached=1.0)
    view, data, losses, costs = view_of(defense), data_of(1), [], []
    offered = defense.candidates(view)
    for _ in range(2):
        with metered() as cost:
            one = next(offered)
        costs.append((cost.forward, cost.backward))
        module = _Polarizing(one.model, Recipe(), defense, place(view.model), 1.0)
        module.trainable()
        module.eval()
        x = to_float(data.images)
        targets = runner_up(module(x), data.labels)
        losses.append(cross_entropy(module(module.perturbed(x, targets)), targets).item())
    assert losses[1] > losses[0]  # less is taken for the target
    # One pass for the statistics; in each of 8 epochs one clean pass, and where images are perturbed two and one more.
    assert costs == [(24 * (1 + 8), 24 * 8), (24 * (1 + 8 * 4), 24 * 8 * 4)]


def test_without_epochs_the_layer_stays_the_identity(view_of):
    defense = NPD(epochs=0, factors=(0.5,))
    view = view_of(defense)
    offered = list(defense.candidates(view))
    assert [(one.dial, one.is_default, one.strength) for one in offered] == [(0.5, False, 0.5), (1.0, True, 1.0)]
    x = to_float(view.clean.images)
    with torch.no_grad():
        torch.testing.assert_close(offered[0].model(x), view.model(x), rtol=1e-4, atol=1e-5)


def test_an_empty_budget_is_refused(view_of, data_of):
    with pytest.raises(Inapplicable, match="budget is empty"):
        list(NPD().candidates(view_of(NPD(), clean=data_of(size=0))))


@pytest.mark.parametrize("wrong", [{"factor": -1.0}, {"l_right": -1.0}, {"bound": -1.0}, {"steps": -1}, {"reached": 1.5}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"npd: {next(iter(wrong))}"):
        NPD(**wrong)
