from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.adversarial import frozen
from attacks.advtrojan import CHUNK, AdvTrojan, Perturbed, ascended
from attacks.badnets import BadNets
from attacks.base import Crafted, Plan, Power, Role, apply, poison
from attacks.blended import Blended
from models.backbone import Network, Normalise
from models.images import ImageSet, to_float
from models.spec import BadInput, derive_seed, uniforms
from models.training import seeded

CLASSES = 4


def network(shape: tuple[int, int, int] = (1, 8, 10), seed: int = 5) -> Network:
    channels = shape[0]
    with seeded(seed):
        features = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        return Network(Normalise([0.5] * channels, [0.25] * channels), features, nn.Sequential(nn.Linear(96, CLASSES))).eval()


def pictures(shape: tuple[int, int, int] = (1, 8, 10), count: int = 80) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.arange(count) % CLASSES, CLASSES)


def crafted_on(net: Network, data: ImageSet, attack: AdvTrojan, plan: Plan, seed: int = 0) -> Crafted:
    return attack.craft(data, plan, seed, net)


# -- the perturbation ----------------------------------------------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor) -> Network:
    """logits = W x + b."""
    head = nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return Network(Normalise([0.0], [1.0]), nn.Flatten(), nn.Sequential(head)).eval().requires_grad_(False)


def ascended_by_hand(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, step: float, steps: int) -> np.ndarray:
    """Images (N, D) against logits W x + b: the gradient of the cross-entropy is W^T (softmax - one-hot)."""
    moved = x.copy()
    for n in range(len(x)):
        label = int(np.argmax(weight @ x[n] + bias))
        for _ in range(steps):
            logits = weight @ moved[n] + bias
            share = np.exp(logits - logits.max())
            share /= share.sum()
            share[label] -= 1
            gradient = weight.T @ share
            for d in range(x.shape[1]):
                value = moved[n, d] + step * np.sign(gradient[d])
                moved[n, d] = min(1.0, x[n, d] + eps, max(0.0, x[n, d] - eps, value))
    return moved


@pytest.mark.parametrize(("eps", "step", "steps"), [(0.1, 0.03, 7), (0.05, 0.5, 2), (0.3, 0.01, 0)])
def test_the_ascent_is_its_formula(eps, step, steps) -> None:
    draw = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(CLASSES, 12, generator=draw), torch.randn(CLASSES, generator=draw)
    images = to_float(pictures((1, 3, 4), 6).images)
    expected = ascended_by_hand(
        images.flatten(1).double().numpy(), weight.double().numpy(), bias.double().numpy(), eps, step, steps
    )
    assert np.allclose(ascended(linear(weight, bias), images, eps, step, steps).flatten(1), expected, atol=1e-6)


def test_the_gradient_that_is_followed_is_the_losses_own() -> None:
    net = network().double().requires_grad_(False)
    x = to_float(pictures(count=1).images).double() * 0.5 + 0.25
    label = net(x).argmax(1)
    moved = ascended(net, x, 0.1, 1e-4, 1) - x
    for place in [(0, 0, 0, 0), (0, 0, 4, 5), (0, 0, 7, 9), (0, 0, 2, 8)]:
        nudge = torch.zeros_like(x)
        nudge[place] = 1e-6
        up, down = (float(nn.functional.cross_entropy(net(x + sign * nudge), label)) for sign in (1, -1))
        assert float(moved[place]) == pytest.approx(1e-4 * np.sign(up - down))


def test_the_perturbation_is_bounded_and_moves_images_away_from_their_class() -> None:
    net, data = network().requires_grad_(False), pictures()
    images = to_float(data.images)
    moved = ascended(net, images, 0.25, 0.05, 10)
    assert float((moved - images).abs().max()) <= 0.25 + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    before, after = net(images), net(moved)
    labels = before.argmax(1)
    losses = [nn.functional.cross_entropy(logits, labels, reduction="none") for logits in (before, after)]
    assert (losses[1] > losses[0]).all()


@pytest.mark.parametrize("shape", [(1, 8, 10), (3, 12, 9)])
def test_an_images_perturbation_does_not_know_its_batch(shape) -> None:
    data = pictures(shape, CHUNK + 5)
    images, index = to_float(data.images), torch.arange(CHUNK + 5)
    trigger = Perturbed(frozen(network(shape)), None, 0.1, 0.02, 5)
    together, order = trigger(images, index), torch.randperm(CHUNK + 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(trigger(images[order], index[order]), together[order])
    assert torch.equal(trigger(images[7:8], index[7:8]), together[7:8])
    assert trigger(images[:0], index[:0]).shape == images[:0].shape


# -- who gets what -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "plain"),
    [({"size": 4, "margin": 0}, BadNets("grid-corner", 4, 0)), ({"trigger": "blend", "alpha": 0.3}, Blended(0.3))],
)
def test_poison_carries_both_keys_and_covers_one_of_them(settings, plain) -> None:
    data, net, plan = pictures(), network(), Plan(rate=0.1, target=1)
    attack = AdvTrojan(eps=0.2, step=0.05, **settings)
    crafted = crafted_on(net, data, attack, plan)
    images, index = to_float(data.images), torch.arange(80)
    fooled = frozen(net)
    keyed = plain.craft(data, plan, 0).test(images, index)
    both, second = (ascended(fooled, start, 0.2, 0.05, 7) for start in (keyed, images))
    assert torch.allclose(crafted.train(images, index), both, atol=1e-6)
    assert torch.allclose(crafted.test(images, index), both, atol=1e-6)
    assert crafted.cover is not None
    covered = crafted.cover(images, index)
    draws = uniforms(derive_seed(0, "advtrojan-cover"), index, 1)[:, 0].tolist()
    for n in range(80):
        assert torch.allclose(covered[n], second[n] if draws[n] < 0.5 else keyed[n], atol=1e-6)
    assert 20 < sum(draw < 0.5 for draw in draws) < 60


@pytest.mark.parametrize(("share", "kind"), [(0.0, "trigger"), (1.0, "perturbation")])
def test_covers_can_be_of_one_kind(share, kind) -> None:
    data, net, plan, index = pictures(), network(), Plan(), torch.arange(80)
    attack = AdvTrojan(adversarial=share)
    crafted, images = crafted_on(net, data, attack, plan), to_float(data.images)
    wanted = attack.first_key(data, plan, 0) if kind == "trigger" else attack.second_key(net, None)
    assert crafted.cover is not None
    assert torch.equal(crafted.cover(images, index), wanted(images, index))


def test_the_set_holds_two_covers_for_every_poisoned_sample() -> None:
    data, net, plan = pictures(), network(), Plan(rate=0.1, target=1)
    attack = AdvTrojan()
    made = poison(data, attack, crafted_on(net, data, attack, plan), plan, 0)
    assert [made.realised(role) for role in Role] == pytest.approx([0.7, 0.1, 0.2])
    assert (made.visible.labels[made.role == Role.POISON] == 1).all()
    assert torch.equal(made.visible.labels[made.role != Role.POISON], data.labels[made.role != Role.POISON])
    assert attack.power is Power.DATA
    assert attack.needs_surrogate
    assert attack.needs_model_at_test


def test_recrafting_perturbs_against_the_given_network_and_leaves_the_training_triggers() -> None:
    data, plan, index = pictures(), Plan(target=1), torch.arange(80)
    twin, attacked = network(), network(seed=6)
    attack = AdvTrojan(eps=0.1, step=0.02)
    crafted = crafted_on(twin, data, attack, plan)
    again = attack.recraft(attacked, crafted, data, plan, 0)
    assert again.train is crafted.train
    assert again.cover is crafted.cover
    images = to_float(data.images)
    keyed = attack.first_key(data, plan, 0)(images, index)
    assert torch.allclose(again.test(images, index), ascended(frozen(attacked), keyed, 0.1, 0.02, 7), atol=1e-6)
    assert not torch.equal(again.test(images, index), crafted.test(images, index))
    same = attack.recraft(twin, crafted, data, plan, 0)
    assert torch.equal(apply(same.test, data.images, index), apply(crafted.test, data.images, index))


def test_the_keys_alone_are_the_trigger_and_the_perturbation_of_the_plain_image() -> None:
    data, plan, index = pictures(), Plan(target=1), torch.arange(80)
    attacked, attack = network(seed=6), AdvTrojan(eps=0.1, step=0.02)
    keys = attack.single_keys(attacked, data, plan, 0)
    images = to_float(data.images)
    assert list(keys) == ["trigger", "perturbation"]
    assert torch.equal(keys["trigger"].test(images, index), attack.first_key(data, plan, 0)(images, index))
    moved = ascended(frozen(attacked), images, 0.1, 0.02, 7)
    assert torch.allclose(keys["perturbation"].test(images, index), moved, atol=1e-6)


def test_networks_come_back_as_they_were() -> None:
    data, net, plan, attack = pictures(), network().train(), Plan(), AdvTrojan(steps=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    crafted = attack.recraft(net, crafted_on(net, data, attack, plan), data, plan, 0)
    apply(crafted.test, data.images, torch.arange(80))
    assert net.training
    assert all(value.requires_grad and value.grad is None and value.device.type == "cpu" for value in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.no_grad():  # what is trained on afterwards is no longer the network that was attacked
        net.head[0].weight.zero_()
    assert not torch.equal(apply(crafted.test, data.images, torch.arange(80)), data.images)


def test_it_is_repeatable() -> None:
    data, net, plan, attack = pictures(), network(), Plan(), AdvTrojan()
    one, again, other = (poison(data, attack, crafted_on(net, data, attack, plan, seed), plan, 3) for seed in (0, 0, 1))
    assert torch.equal(one.visible.images, again.visible.images)
    assert not torch.equal(one.visible.images, other.visible.images), "covers draw their kind from the seed"


def test_it_needs_a_network() -> None:
    with pytest.raises(BadInput, match=r"advtrojan: .* none was given"):
        AdvTrojan().craft(pictures(), Plan(), 0)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [({"size": 6, "margin": 3}, (1, 8, 10), "9 pixels do not fit images of 8 x 10"), ({"trigger": "blend"}, (2, 8, 8), "have 2")],
)
def test_images_that_do_not_suit_the_trigger_are_refused(settings, shape, message) -> None:
    with pytest.raises(BadInput, match=f"^advtrojan: trigger = .*{message}"):
        crafted_on(network(shape), pictures(shape), AdvTrojan(**settings), Plan())


@pytest.mark.parametrize(
    "settings",
    [
        {"trigger": "ring"}, {"size": 0}, {"margin": -1}, {"alpha": 0.0}, {"eps": 0.0}, {"step": 2.0}, {"steps": -1},
        {"adversarial": 1.5},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"advtrojan: {next(iter(settings))} = "):
        AdvTrojan(**settings)
