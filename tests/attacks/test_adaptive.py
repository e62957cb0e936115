"""The adaptive attackers: at strength 0 the base attack; above, the same backdoor with a flatter signature."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from attacks.adaptive import Adaptive
from attacks.badnets import BadNets
from attacks.base import Attack, Plan, Power, apply, poison
from attacks.feature_shift import FeatureShift, distance
from attacks.flat_holder import FlatHolder, peakedness, responses
from attacks.flat_lipschitz import FlatLipschitz, bounds, outstanding
from attacks.rescaled import Rescaled, readers, rescale
from attacks.wanet import WaNet
from models import BACKBONES
from models.backbone import Network
from models.images import ImageSet, to_float
from models.resnet import ResNet8
from models.spec import BadInput, generator
from models.training import Recipe, fit
from models.units import capture, unit_layers, weight_bounds
from models.vgg import VGG11BN

PLAN = Plan(rate=0.25, target=1)
RECIPE = Recipe(epochs=2, batch=16, lr=0.05, crop=1)
KINDS = [FlatLipschitz, FlatHolder, Rescaled, FeatureShift]


def pictures(count: int = 64, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 4) -> ImageSet:
    labels = torch.arange(count) % classes
    noise = torch.randint(0, 90, (count, *shape), generator=generator("adaptive", count))
    return ImageSet((noise + 40 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, classes)


def net_of(seed: int = 0, backbone: type = ResNet8, shape: tuple[int, int, int] = (1, 8, 8)) -> Network:
    """With norms that look trained."""
    net = backbone(width=4, hidden=8).build(4, shape, [0.5] * shape[0], [0.25] * shape[0], seed)
    draw = generator("norms", seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.num_features, generator=draw) + 0.3)
                module.bias.copy_(torch.randn(module.num_features, generator=draw) * 0.2)
                module.running_mean.copy_(torch.randn(module.num_features, generator=draw) * 0.1)
                module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
    return net.eval()


def trained(attack: Attack) -> tuple[Network, torch.Tensor]:
    """The whole of an attack: its victim and its triggered images."""
    data = pictures()
    crafted = attack.craft(data, PLAN, 5, net_of(3) if attack.needs_surrogate else None)
    module = attack.victim(net_of(1), RECIPE, crafted, PLAN, 5)
    given = data if attack.poisons_batches else poison(data, attack, crafted, PLAN, 5).visible
    net = fit(module, given, RECIPE, 7).net
    crafted = attack.finished(module, crafted)
    return net, apply(crafted.test, data.images, torch.arange(len(data)))


def same(one: Network, other: Network) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("base", [("badnets", (("size", 2),)), ("wanet", (("s", 2.0),))], ids=lambda base: base[0])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_strength_zero_is_the_base_attack_bit_for_bit(kind: type[Adaptive], base) -> None:
    name, settings = base
    plain = BadNets(**dict(settings)) if name == "badnets" else WaNet(**dict(settings))
    expected, images = trained(plain)
    found, theirs = trained(kind(base=name, base_settings=settings, strength=0.0))
    assert same(found, expected)
    assert torch.equal(theirs, images)
    if kind is not FeatureShift:
        changed, _ = trained(kind(base=name, base_settings=settings, strength=0.5))
        assert not same(changed, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_poisoned_is_the_bases_business(kind: type[Adaptive]) -> None:
    wrapped = kind(base="sig", strength=0.5)
    assert wrapped.clean_label
    assert not wrapped.poisons_batches
    assert wrapped.power is (Power.DATA if kind is FeatureShift else Power.TRAINING)
    dynamic = kind(base="wanet", strength=0.5)
    assert dynamic.poisons_batches
    assert dynamic.cover_rate(PLAN) == WaNet().cover_rate(PLAN) == 0.5
    data = pictures()
    surrogate = net_of() if wrapped.needs_surrogate else None
    result = poison(data, wrapped, wrapped.craft(data, PLAN, 0, surrogate), PLAN, 0)
    assert torch.equal(result.visible.labels, data.labels)


def test_a_base_must_be_there_be_no_adaptation_and_know_its_settings() -> None:
    with pytest.raises(BadInput, match="unknown attack 'badnet'; did you mean 'badnets'"):
        FlatLipschitz(base="badnet")
    with pytest.raises(BadInput, match="a trigger of its own"):
        FlatLipschitz(base="rescaled")
    with pytest.raises(BadInput, match="badnets has no setting 'szie'; did you mean 'size'"):
        FlatLipschitz(base_settings=(("szie", 2),))
    with pytest.raises(BadInput, match="strength = 2"):
        Rescaled(strength=2.0)


# -- flat Lipschitz bounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda kind: kind.name)
def test_differentiable_bounds_are_the_defenses_own(backbone) -> None:
    net = net_of(backbone=backbone, shape=(3, 16, 16))
    layers = unit_layers(net)
    theirs = weight_bounds(net, layers, norm_epsilon=True)
    for layer, bound in zip(layers, bounds(net, layers), strict=True):
        assert torch.allclose(bound, theirs[layer.name], rtol=1e-4, atol=1e-5), layer.name


def test_outstanding_by_hand() -> None:
    layers = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, 4.0])]
    margin, total = 0.1, 0.0
    for layer in layers:
        values = [float(value) for value in layer]
        mean = sum(values) / len(values)
        total += sum(max(0.0, math.log(value) - math.log(mean) - margin) for value in values) / len(values)
    assert float(outstanding(layers, margin)) == pytest.approx(total / 2, rel=1e-5)
    assert float(outstanding([torch.ones(5)], 0.0)) == 0


def test_the_penalty_flattens_bounds() -> None:
    data = pictures(128)

    def peak(strength: float) -> float:
        attack = FlatLipschitz(base_settings=(("size", 2),), strength=strength)
        crafted = attack.craft(data, PLAN, 0)
        recipe = Recipe(epochs=6, batch=16, lr=0.05, crop=0)
        net = fit(attack.victim(net_of(1), recipe, crafted, PLAN, 0), poison(data, attack, crafted, PLAN, 0).visible, recipe, 0).net
        return float(outstanding(bounds(net, unit_layers(net)), 0.0).detach())

    assert peak(3.0) < 0.5 * peak(0.0)


# -- flat Hölder constants -----------------------------------------------------------------------------------------------------


def test_responses_by_hand() -> None:
    net, data = net_of(2), pictures(6)
    layers, images = unit_layers(net), to_float(data.images)
    sizes, steps = responses(net, layers, images, data.labels, 0.05)
    x = images.clone().requires_grad_(True)
    nn.functional.cross_entropy(net(x), data.labels).backward()
    moved = (images + 0.05 * x.grad.sign()).clamp(0, 1)
    with torch.no_grad(), capture(net, layers) as seen:
        net(images)
        before = {name: value.clone() for name, value in seen.items()}
        net(moved)
        after = dict(seen)
    for layer, size in zip(layers, sizes, strict=True):
        for sample in range(6):
            for unit in range(layer.size):
                gap = (after[layer.name][sample, unit] - before[layer.name][sample, unit]).double().numpy()
                assert float(size[sample, unit].detach()) == pytest.approx(float(np.sqrt((gap**2).sum())), rel=1e-3, abs=2e-6)
    for sample in range(6):
        assert float(steps[sample]) == pytest.approx(float(np.linalg.norm((moved - images)[sample].numpy())), rel=1e-4)


def test_peakedness_by_hand() -> None:
    sizes = [torch.tensor([[1.0, 2.0, 3.0, 8.0], [2.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0], [5.0]])]
    steps, alphas, share = torch.tensor([1.0, 4.0]), (0.5, 1.0), 0.5
    total = 0.0
    for alpha in alphas:
        for size in sizes:
            constants = sorted(max(float(size[i, k]) / float(steps[i]) ** alpha for i in range(2)) for k in range(size.shape[1]))
            count = max(1, round(share * len(constants)))
            total += (sum(constants[-count:]) / count) / (sum(constants) / len(constants)) - 1
    assert float(peakedness(sizes, steps, alphas, share)) == pytest.approx(total / 4, rel=1e-5)
    assert float(peakedness([torch.ones(2, 6)], steps, alphas, 0.1)) == pytest.approx(0, abs=1e-6)


def test_measuring_for_the_penalty_leaves_running_statistics_alone() -> None:
    """They must follow the batches alone, as in the base attack; the weights differ."""
    data = pictures(16)
    recipe = Recipe(epochs=1, batch=16, lr=0.0, weight_decay=0.0, crop=0)

    def statistics(attack: Attack) -> list[torch.Tensor]:
        crafted = attack.craft(data, PLAN, 0)
        net = fit(attack.victim(net_of(1), recipe, crafted, PLAN, 0), data, recipe, 0).net
        return [module.running_mean for module in net.modules() if isinstance(module, nn.BatchNorm2d)]

    plain, adapted = statistics(BadNets(size=2)), statistics(FlatHolder(base_settings=(("size", 2),), strength=1.0))
    assert all(torch.equal(one, other) for one, other in zip(plain, adapted, strict=True))


# -- rescaling -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda kind: kind.name)
def test_rescaling_keeps_the_function_and_sets_the_bounds(backbone, strength) -> None:
    net = net_of(backbone=backbone, shape=(3, 16, 16))
    other = copy.deepcopy(net)
    rescale(other, strength)
    images = torch.rand(5, 3, 16, 16, generator=generator("images"))
    with torch.no_grad():
        assert torch.allclose(other(images), net(images), rtol=1e-3, atol=1e-4)
    passing = readers(net)
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        assert not passing
        return
    assert passing, "every backbone has a norm that feeds a conv through ReLU alone"
    assert not same(net, other)
    # Layer by layer, in the order of the forward pass, so that a reader's own rows are judged after what was done to its columns.
    layers = [layer for layer in unit_layers(net) if layer.name in passing]
    before, after = weight_bounds(net, layers), weight_bounds(other, layers)
    first = layers[0].name
    expected = before[first] * (before[first].median() / before[first]) ** strength
    assert torch.allclose(after[first], expected, rtol=1e-4)


def test_norms_that_feed_a_residual_sum_are_left_alone() -> None:
    passing = readers(net_of())
    assert set(passing) == {"features.bn1", "features.layer1.0.bn1", "features.layer2.0.bn1", "features.layer3.0.bn1"} - {
        # the stem's ReLU feeds the first block's conv and its identity shortcut, a sum
        "features.bn1"
    }
    assert passing["features.layer2.0.bn1"] == ("features.layer2.0.conv2",)
    vgg = readers(VGG11BN(width=4, hidden=8).build(4, (3, 16, 16), [0.5] * 3, [0.25] * 3, 0))
    assert len(vgg) == 8
    assert any(path.startswith("head.") for reached in vgg.values() for path in reached), "the last norm is read by the head"


# -- feature shift -------------------------------------------------------------------------------------------------------------


def test_the_perturbation_moves_features_to_the_target_and_stays_within_its_bound() -> None:
    data, net = pictures(80), net_of(4)
    attack = FeatureShift(base_settings=(("size", 2),), strength=0.1, steps=30, batch=20)
    before = copy.deepcopy(net)
    crafted = attack.craft(data, PLAN, 0, net)
    assert same(net, before)
    base = BadNets(size=2).craft(data, PLAN, 0)
    index = torch.nonzero(data.labels != 1).flatten()
    images = to_float(data.images[index])
    plain, shifted = base.test(images, index), crafted.test(images, index)
    assert 0.05 < float((shifted - plain).abs().max()) <= 0.1 + 1e-6
    with torch.no_grad():
        ours = net.embed(to_float(data.images[data.labels == 1]))
        centre = torch.nn.functional.normalize(torch.nn.functional.normalize(ours).mean(0), dim=0)
        assert float(distance(net.embed(shifted), centre)) < 0.9 * float(distance(net.embed(plain), centre))


def test_distance_by_hand() -> None:
    z, centre = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0])
    assert float(distance(z, centre)) == pytest.approx((((0.6 - 1) ** 2 + 0.8**2) + (1 + 1)) / 2)


def test_one_perturbation_leads_to_one_class() -> None:
    with pytest.raises(BadInput, match="all-to-one"):
        FeatureShift().craft(pictures(), Plan(label_mode="all-to-all"), 0, net_of())
    with pytest.raises(BadInput, match="target = 3"):
        FeatureShift(strength=0.1).craft(pictures(3), Plan(target=3), 0, net_of())
