from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.base import Plan, apply, poison
from attacks.natural import Natural, adapted, added, cut, patched, unchanged
from models.backbone import Network, Normalise
from models.images import ImageSet, quantise, to_float
from models.spec import BadInput
from models.training import seeded

CLASSES = 4
PLAN = Plan(rate=0.0, target=1)


def smooth(shape: tuple[int, int, int] = (1, 8, 10)) -> Network:
    """A differentiable network, so that differences converge to its gradient."""
    channels = shape[0]
    with seeded(5):
        features = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        net = Network(Normalise([0.5] * channels, [0.25] * channels), features, nn.Sequential(nn.Linear(96, CLASSES)))
    return net.eval()


def pictures(shape: tuple[int, int, int] = (1, 8, 10), count: int = 40) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.arange(count) % CLASSES, CLASSES)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def found(attack: Natural, net: Network, data: ImageSet, plan: Plan = PLAN, seed: int = 0):
    return attack.recraft(net, attack.craft(data, plan, seed), data, plan, seed)


# -- the formulas --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6, 9), (1, 8, 8)])
def test_the_patch_and_the_blend_are_their_formulas_pixel_by_pixel(shape) -> None:
    images = to_float(pictures(shape, 3).images)
    mask, pattern = normal(1, *shape[1:]), normal(*shape)
    kept = (torch.arange(mask.numel()) % 3 > 0).float().view_as(mask)
    x, m, p, k = (each.double().numpy() for each in (images, mask, pattern, kept))
    by_patch, by_blend = np.zeros(x.shape), np.zeros(x.shape)
    for n, c, i, j in np.ndindex(*x.shape):
        weight, colour = k[0, i, j] * (np.tanh(m[0, i, j]) + 1) / 2, (np.tanh(p[c, i, j]) + 1) / 2
        by_patch[n, c, i, j] = (1 - weight) * x[n, c, i, j] + weight * colour
        by_blend[n, c, i, j] = min(1.0, max(0.0, x[n, c, i, j] + 0.3 * np.tanh(p[c, i, j])))
    assert np.allclose(patched(images, mask, pattern, kept), by_patch, atol=1e-6)
    assert np.allclose(added(images, pattern, 0.3), by_blend, atol=1e-6)


@pytest.mark.parametrize(("area", "count"), [(0.08, 6), (0.001, 1), (1.0, 80), (0.5, 40)])
def test_a_cut_keeps_the_largest_entries(area, count) -> None:
    mask = normal(1, 8, 10)
    mask[0, 2, 3:6] = 9.0  # ties
    values = mask.numpy()
    places = sorted(np.ndindex(1, 8, 10), key=lambda place: (-values[place], place))
    kept = cut(mask, area).numpy()
    assert {place for place in np.ndindex(1, 8, 10) if kept[place] == 1} == set(places[:count])
    assert kept.sum() == count


def test_the_weight_rises_while_the_mask_is_too_large_and_falls_while_it_is_not() -> None:
    weight = 2.0
    for size, expected in ((0.3, 3.0), (0.101, 4.5), (0.1, 3.0), (0.0, 2.0)):
        weight = adapted(weight, size, area=0.1)
        assert weight == pytest.approx(expected)


def test_the_loss_and_its_gradient_are_right() -> None:
    attack, net = Natural(), smooth().double().requires_grad_(False)
    images, targets = to_float(pictures(count=5).images).double(), torch.tensor([1, 2, 1, 0, 3])
    z = [normal(1, 8, 10).double().requires_grad_(), normal(1, 8, 10).double().flip(2).requires_grad_()]
    kept = torch.ones(1, 8, 10).double()
    kept[0, 6:] = 0
    loss = attack.patch_loss(net, images, targets, z, kept, 0.7)
    logits = net(patched(images, z[0], z[1], kept)).detach().numpy()
    entropy = np.mean([np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, targets.tolist(), strict=True)])
    size = np.mean(kept.numpy() * (np.tanh(z[0].detach().numpy()) + 1) / 2)
    assert float(loss.detach()) == pytest.approx(entropy + 0.7 * size)
    gradients, step = torch.autograd.grad(loss, z), 1e-5
    for which, place in [(0, (0, 3, 4)), (0, (0, 7, 9)), (0, (0, 0, 1)), (1, (0, 0, 0)), (1, (0, 5, 2)), (1, (0, 6, 2))]:
        values = []
        for sign in (1, -1):
            moved = [each.detach().clone() for each in z]
            moved[which][place] += sign * step
            values.append(float(attack.patch_loss(net, images, targets, moved, kept, 0.7)))
        assert float(gradients[which][place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)
        assert (values[0] == values[1]) == (place[1] > 5), "what is cut has no say"


# -- the search ----------------------------------------------------------------------------------------------------------------


def sensitive() -> Network:
    """Says class 1 where the mean of the upper left 3 x 3 pixels is above 0.8, and otherwise 0, whatever else is in the image."""
    features = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(48, 1))
    head = nn.Linear(1, CLASSES)
    with torch.no_grad():
        features[0].weight.fill_(1 / 9)
        features[0].bias.zero_()
        features[2].weight.zero_()
        features[2].weight[0, 0] = 20.0
        features[2].bias.fill_(-16.0)
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, -9.0, -9.0]))
        head.weight[1] = 1.0
    return Network(Normalise([0.0], [1.0]), features, nn.Sequential(head)).eval()


def reached(net: Network, trigger, data: ImageSet, target: int = 1) -> float:
    kept = data.labels != target
    triggered = to_float(apply(trigger, data.images[kept], torch.nonzero(kept).flatten()))
    with torch.no_grad():
        return float((net(triggered).argmax(1) == target).double().mean())


def test_the_search_finds_what_the_network_answers_to_and_keeps_it_small() -> None:
    data, net = pictures(), sensitive()
    attack = Natural(area=0.15, steps=100, refit=40, batch=16)  # twelve pixels of eighty, of which nine matter
    trigger = found(attack, net, data).test
    assert reached(net, unchanged, data) < 0.3
    assert reached(net, trigger, data) > 0.95
    changed = (apply(trigger, data.images, torch.arange(40)) != data.images).any(0).flatten(0, 1)
    assert int(changed.sum()) <= 12
    assert int(changed[:3, :3].sum()) >= 7


def test_the_blend_stays_within_its_bound() -> None:
    data, net = pictures(), sensitive()
    trigger = found(Natural("blend", bound=0.3, steps=60, batch=16), net, data).test
    result = trigger(to_float(data.images), torch.arange(40))
    assert float((result - to_float(data.images)).abs().max()) <= 0.3 + 1e-6
    faint = found(Natural("blend", bound=0.01, steps=60, batch=16), net, data).test
    assert reached(net, trigger, data) > reached(net, faint, data)


def test_the_search_is_repeatable_and_another_seed_searches_elsewhere() -> None:
    data, net, attack, index = pictures((3, 9, 8)), smooth((3, 9, 8)), Natural(steps=20, refit=10, batch=8), torch.arange(40)
    one, again, other = (apply(found(attack, net, data, seed=seed).test, data.images, index) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("form", ["patch", "blend"])
def test_the_network_comes_back_as_it_was(form) -> None:
    data, net = pictures(), smooth().train()
    net.head.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    wanted = [value.requires_grad for value in net.parameters()]
    found(Natural(form, steps=12, refit=4, batch=8), net, data)
    assert net.training
    assert [value.requires_grad for value in net.parameters()] == wanted
    assert all(value.grad is None and value.device.type == "cpu" for value in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_all_to_all_sends_every_class_to_its_next() -> None:
    data, net = pictures(), smooth()
    plan = Plan(rate=0.0, label_mode="all-to-all")
    attack = Natural(steps=12, refit=4, batch=8)
    trigger = found(attack, net, data, plan).test
    assert not torch.equal(apply(trigger, data.images, torch.arange(40)), data.images)
    one_way = found(attack, net, data, PLAN).test
    assert not torch.equal(apply(trigger, data.images, torch.arange(40)), apply(one_way, data.images, torch.arange(40)))


# -- nothing is injected -------------------------------------------------------------------------------------------------------


def test_the_training_set_stays_as_it_was() -> None:
    data, net, attack = pictures(), smooth(), Natural(steps=12, refit=4, batch=8)
    crafted = attack.craft(data, PLAN, 0)
    for each in (crafted, attack.recraft(net, crafted, data, PLAN, 0)):
        assert each.cover is None
        assert torch.equal(apply(each.train, data.images, torch.arange(40)), data.images)
        made = poison(data, attack, each, PLAN, 0)
        assert torch.equal(made.visible.images, data.images)
        assert torch.equal(made.visible.labels, data.labels)
        assert int(made.role.sum()) == 0
    assert torch.equal(quantise(crafted.test(to_float(data.images), torch.arange(40))), data.images)
    assert attack.needs_model_at_test


@pytest.mark.parametrize("plan", [Plan(rate=0.1), Plan(rate=0.0, cover_rate=0.1)])
def test_a_plan_that_poisons_is_refused(plan) -> None:
    with pytest.raises(BadInput, match=rf"natural: rate = {plan.rate}"):
        Natural().craft(pictures(), plan, 0)


def test_a_training_set_of_the_target_alone_is_refused() -> None:
    data = ImageSet(torch.zeros(3, 1, 8, 10, dtype=torch.uint8), torch.ones(3, dtype=torch.int64), CLASSES)
    with pytest.raises(BadInput, match="class other than the target 1"):
        found(Natural(), smooth(), data)


@pytest.mark.parametrize(
    "settings",
    [{"form": "ring"}, {"area": 0.0}, {"bound": 1.5}, {"steps": 0}, {"refit": -1}, {"batch": 0}, {"lr": 0.0}, {"weight": -1.0}],
)
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"natural: {next(iter(settings))} = "):
        Natural(**settings)
