from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from defenses.base import Inapplicable
from defenses.fine_tuning import FineTuning
from defenses.fmp import FMP, changed, feature_maps, lowest, orders, silence
from models.backbone import GlobalAverage, Network, Normalise
from models.cost import metered
from models.images import to_float
from models.resnet import WRN16, PreActResNet18, ResNet8
from models.spec import BadInput, generator


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def frozen(net):
    return net.requires_grad_(False)


def signs(images, seed=0):
    return 2.0 * torch.randint(0, 2, images.shape, generator=generator(seed, "start")) - 1


def test_the_step_for_a_linear_conv_by_hand():
    """A 1x1 conv: F(x') - F(x) = eps / 2 sum_c w_c s_c =: g at every pixel, so the gradient to channel c has the sign of g w_c."""
    conv = nn.Conv2d(2, 3, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[2.0, -1.0], [0.5, 3.0], [-1.0, 0.0]]).view(3, 2, 1, 1))
    net = Network(Normalise([0.0] * 2, [1.0] * 2), nn.Sequential(conv, GlobalAverage()), nn.Sequential(nn.Linear(3, 4)))
    images = torch.full((1, 2, 1, 2), 0.5)
    start = torch.tensor([[[[1.0, 1.0]], [[-1.0, 1.0]]]])
    found = {unit: x for _, unit, x in changed(frozen(net), feature_maps(net), images, start, 0.2)}
    # By pixel: s = (1, -1) and (1, 1), so g is positive, positive; negative, positive; negative, negative.
    steps = {0: [[1, 1], [-1, -1]], 1: [[-1, 1], [-1, 1]], 2: [[1, 1], [0, 0]]}
    for unit, step in steps.items():
        expected = 0.5 + 0.1 * start[0, :, 0] + 0.1 * torch.tensor(step)
        torch.testing.assert_close(found[unit][0, :, 0], expected)


def test_changed_images_move_their_map_and_stay_in_range(net_of, data_of):
    net, images = frozen(net_of()), to_float(data_of(1).images)
    images[:, :, 0, :4] = torch.tensor([0.0, 1.0, 0.002, 0.999])
    eps, start = 0.1, signs(images)
    for name, unit, x in changed(net, feature_maps(net), images, start, eps):
        assert float((x - images).abs().max()) <= eps + 1e-6
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
        part = net.features[: int(name.split(".")[1]) + 1]
        moved, begun = (
            (part(net.normalise(each)) - part(net.normalise(images)))[:, unit].square().mean()
            for each in (x, (images + eps / 2 * start).clamp(0, 1))
        )
        assert moved > begun


def brute_force(net, images, labels, start, eps):
    """Accuracy and cross-entropy under every map's images: whole passes, mean squared error, one map at a time."""
    scores = {}
    for name, module in net.features.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        for unit in range(module.out_channels):
            seen = []
            hook = module.register_forward_hook(lambda _m, _i, output, unit=unit, seen=seen: seen.append(output[:, unit]))
            net(images)
            x = (images + eps / 2 * start).clamp(0, 1).requires_grad_()
            net(x)
            hook.remove()
            mse_loss(seen[1], seen[0].detach()).backward()
            logits = net((x.detach() + eps / 2 * x.grad.sign()).clamp(0, 1))
            guesses = [int(guess == label) for guess, label in zip(logits.argmax(1), labels, strict=True)]
            scores.setdefault(f"features.{name}", []).append((sum(guesses), -float(cross_entropy(logits, labels)), unit))
    return {name: [unit for _, _, unit in sorted(rows)] for name, rows in scores.items()}


@pytest.mark.parametrize("eps", [1 / 255, 0.3])
def test_orders_equal_one_network_pass_for_each_map(net_of, data_of, eps):
    net, data = frozen(net_of()), data_of(1)
    images = to_float(data.images)
    start = signs(images)
    with metered() as cost:
        found = orders(net, images, data.labels, start, eps)
    assert {name: order.tolist() for name, order in found.items()} == brute_force(net, images, data.labels, start, eps)
    assert cost.forward == (2 + 4 + 6) * len(data), "one pass as they are, one from the start, one for each map"
    assert cost.backward == (4 + 6) * len(data)


def test_accuracy_comes_before_cross_entropy_and_that_before_the_index(net_of, data_of, monkeypatch):
    from defenses import fmp

    net, labels = frozen(net_of()), torch.zeros(2, dtype=torch.int64)
    # Logits of two samples by channel: right and right, wrong and right, right and right (less sure), wrong and right (worse).
    logits = [[[9, 0], [9, 0]], [[0, 1], [9, 0]], [[2, 0], [2, 0]], [[0, 5], [9, 0]], [[9, 0], [9, 0]], [[0, 1], [0, 1]]]
    monkeypatch.setattr(fmp, "feature_maps", lambda _: feature_maps(net)[1:])
    rows = [("features.3", unit, torch.tensor(row, dtype=torch.float32)) for unit, row in enumerate(logits)]
    monkeypatch.setattr(fmp, "changed", lambda *_: iter(rows))
    found = orders(nn.Identity(), torch.zeros(2, 3, 8, 8), labels, torch.zeros(2, 3, 8, 8), 0.1)
    assert found["features.3"].tolist() == [5, 3, 1, 2, 0, 4]


def test_counts_are_floors():
    order = {str(size): torch.randperm(size, generator=generator(0, "order", size)) for size in (8, 63, 64, 127, 512)}
    for p, counts in ((64, [0, 0, 1, 1, 8]), (16, [0, 3, 4, 7, 32])):
        masks = lowest(order, p)
        assert [int(mask.sum()) for mask in masks.values()] == counts
        for name, mask in masks.items():
            assert set(torch.nonzero(mask).flatten().tolist()) == set(order[name][: int(name) // p].tolist())


@pytest.mark.parametrize("backbone", [ResNet8(width=4), PreActResNet18(width=2)], ids=lambda backbone: backbone.name)
def test_filters_and_gamma_of_their_own_norm_are_zero(backbone):
    net = backbone.build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    masks = {layer.name: torch.arange(layer.size) % 2 == 0 for layer in feature_maps(net)}
    silence(net, masks)
    own = {"layer1.0.conv1": "layer1.0.bn1", "layer2.0.conv1": "layer2.0.bn1", "layer2.0.conv2": "layer2.0.bn2"}
    if isinstance(backbone, PreActResNet18):
        own = {"conv1": "layer1.0.bn1", "layer1.0.conv1": "layer1.0.bn2", "layer3.1.conv1": "layer3.1.bn2"}
    for name, mask in masks.items():
        before[f"{name}.weight"][mask] = 0
    for conv, norm in own.items():
        assert not net.get_submodule(f"features.{norm}").weight[masks[f"features.{conv}"]].any()
    changed_gamma = [
        name for name, value in net.state_dict().items()
        if not torch.equal(value, before[name]) and f"{name.rsplit('.', 1)[0]}" not in masks
    ]  # fmt: skip
    assert {f"features.{norm}.weight" for norm in own.values()} <= set(changed_gamma)
    assert all(name.endswith("weight") for name in changed_gamma), "beta stays"
    if isinstance(backbone, PreActResNet18):
        assert "features.layer1.1.bn1.weight" not in changed_gamma, "it reads a sum of several convs"


def test_the_same_maps_are_pruned_and_then_tuned(net_of, data_of, view_of):
    defense, net, data = FMP(p=2, points=(3, 4, 5), epochs=0, map_batch=10, eps=0.1), net_of(), data_of(1)
    view = view_of(defense, net)
    offered = list(defense.candidates(view))
    assert [(c.dial, c.pruned) for c in offered] == [(1 / 2, 5), (1 / 3, 3), (1 / 4, 2), (1 / 5, 1)]
    assert [c.is_default for c in offered] == [True, False, False, False]
    draw = generator(view.seed, "fmp", "draw")
    picked = data.subset(torch.randperm(len(data), generator=draw)[:10])
    images = to_float(picked.images)
    start = 2.0 * torch.randint(0, 2, images.shape, generator=draw) - 1
    order = brute_force(frozen(net_of()), images, picked.labels, start, 0.1)
    for candidate in offered:
        expected = {name: value.clone() for name, value in net.state_dict().items()}
        for conv, norm in (("features.0", "features.1"), ("features.3", "features.4")):
            worst = order[conv][: int(candidate.dial * len(order[conv]) + 1e-9)]
            assert set(torch.nonzero(candidate.masks[conv]).flatten().tolist()) == set(worst)
            expected[f"{conv}.weight"][worst] = 0
            expected[f"{norm}.weight"][worst] = 0
        assert all(torch.equal(value, expected[name]) for name, value in candidate.model.state_dict().items())


def test_pruning_nothing_is_fine_tuning(view_of):
    """In a narrow network the default prunes nothing; a further point that prunes nothing either is not run again."""
    both, tuning = FMP(epochs=2, batch=8), FineTuning(epochs=2, batch=8)
    (found,) = both.candidates(view_of(both))
    (expected,) = tuning.candidates(view_of(tuning))
    assert (found.dial, found.pruned, found.strength) == (1 / 64, 0, 0)
    assert states_equal(found.model, expected.model)


def test_what_was_pruned_may_grow_again(view_of):
    net = WRN16(width=2).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0).eval()
    defense = FMP(p=2, points=(), epochs=1, batch=8, map_batch=2)
    (found,) = defense.candidates(view_of(defense, net))
    name = "features.layer1.0.conv2"
    assert found.model.get_submodule(name).weight[found.masks[name]].any()


def test_refusals(data_of, view_of):
    defense = FMP()
    with pytest.raises(Inapplicable, match="clean budget"):
        list(defense.candidates(view_of(defense, clean=data_of(size=0))))


@pytest.mark.parametrize("wrong", [{"p": 1}, {"points": (0,)}, {"eps": -0.1}, {"map_batch": 1}, {"epochs": -1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"fmp: {next(iter(wrong))}"):
        FMP(**wrong)
