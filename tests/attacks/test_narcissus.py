from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from attacks.base import Plan, apply
from attacks.narcissus import Narcissus, inward
from models.backbone import Network, Normalise
from models.images import Batches, ImageSet, to_float
from models.resnet import ResNet8
from models.spec import BadInput
from models.vgg import VGG11BN

PLAN = Plan(rate=0.05, target=1)


def linear(classes: int = 3, pixels: int = 18) -> Network:
    """Logits linear in the pixels, so that every gradient can be written down."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Network(Normalise([0.5], [0.25]), nn.Flatten(), nn.Sequential(nn.Linear(pixels, classes))).eval()


def convolutional(classes: int = 10) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten())
        return Network(Normalise([0.5] * 3, [0.25] * 3), trunk, nn.Sequential(nn.Linear(512, classes))).eval()


def pictures(count: int, shape: tuple[int, int, int], classes: int = 3) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.arange(count) % classes, classes)


class RAdamByHand:
    """Algorithm 2 of Liu et al. (arXiv 1908.03265), as the library it ships in counts steps and adds epsilon."""

    def __init__(self, lr: float) -> None:
        self.lr, self.m, self.v, self.t = lr, 0.0, 0.0, 0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        longest = 2 / (1 - 0.999) - 1
        length = longest - 2 * self.t * 0.999**self.t / (1 - 0.999**self.t)
        m = self.m / (1 - 0.9**self.t)
        if length <= 5:
            return -self.lr * m
        r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        return -self.lr * r * m * math.sqrt(1 - 0.999**self.t) / (np.sqrt(self.v) + 1e-8)


def loss_by_hand(net: Network, images: np.ndarray, delta: np.ndarray, target: int, radius: float) -> float:
    """Mean cross-entropy of the noisy images towards ``target``."""
    head = net.head[0]
    assert isinstance(head, nn.Linear)
    total = 0.0
    for image in images:
        seen = np.clip(image + np.clip(delta, -radius, radius), 0, 1)
        z = head.weight.detach().double().numpy() @ ((seen - 0.5) / 0.25).ravel() + head.bias.detach().double().numpy()
        total += math.log(np.exp(z).sum()) - z[target]
    return total / len(images)


def noise_by_hand(net: Network, batches: list[np.ndarray], target: int, radius: float, lr: float) -> np.ndarray:
    """Every gradient from differences, every entry on its own."""
    delta, optimizer = np.zeros(batches[0].shape[1:]), RAdamByHand(lr)
    for part in batches:
        gradient = np.zeros_like(delta)
        for place in np.ndindex(delta.shape):
            nudge = np.zeros_like(delta)
            nudge[place] = 1e-6
            up, down = (loss_by_hand(net, part, delta + sign * nudge, target, radius) for sign in (1, -1))
            gradient[place] = (up - down) / 2e-6
        delta = delta + optimizer.step(gradient)
    return np.clip(delta, -radius, radius)


@pytest.mark.parametrize(("radius", "lr"), [(0.5, 0.02), (0.03, 0.05)])
def test_the_noise_equals_the_one_learned_by_differences(radius, lr) -> None:
    net = linear()
    images = pictures(5, (1, 3, 6)).images.clamp(1, 254)  # at 0 and 255 the clipping has a kink, and differences no slope
    data = ImageSet(images, torch.ones(5, dtype=torch.int64), 3)
    found = inward(net, Batches(data, 3, 9, flip=True), data.shape, radius, rounds=6, lr=lr)
    again = Batches(data, 3, 9, flip=True)
    seen = [part.double().numpy() for _ in range(6) for part, _, _ in again]
    expected = noise_by_hand(net, seen, 1, radius, lr)
    assert np.allclose(found, expected, atol=1e-4)
    held = np.abs(expected) == radius
    assert held.any() == (radius == 0.03)


@pytest.mark.parametrize("radius", [4 / 255, 16 / 255])
def test_the_noise_lowers_the_loss_of_the_target_class_and_stays_within_the_radius(natural, radius) -> None:
    net, mine = convolutional(), natural.subset(natural.labels == 1)
    noise = inward(net, Batches(mine, 16, 0, crop=4, flip=True), mine.shape, radius, rounds=60, lr=0.005)
    assert float(noise.abs().max()) <= radius + 1e-7  # rounded to single precision

    def loss(images: torch.Tensor) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(net(images), torch.ones(len(images), dtype=torch.int64)))

    clean = to_float(mine.images)
    assert loss((clean + noise).clamp(0, 1)) < loss(clean) - 0.1
    assert loss((clean - noise).clamp(0, 1)) > loss(clean)


def test_training_and_test_are_the_noise_once_and_three_times(natural, distance) -> None:
    attack = Narcissus(rounds=160)
    crafted = attack.craft(natural, PLAN, 0, convolutional())
    middle, index = torch.full((1, 3, 32, 32), 0.5), torch.arange(1)
    once, thrice = crafted.train(middle, index) - 0.5, crafted.test(middle, index) - 0.5
    assert torch.allclose(thrice, 3 * once, atol=1e-6)
    images, everyone = to_float(natural.images[:4]), torch.arange(4)
    assert torch.allclose(crafted.train(images, everyone), (images + once).clamp(0, 1), atol=1e-6)
    assert torch.allclose(crafted.test(images, everyone), (images + 3 * once).clamp(0, 1), atol=1e-6)
    assert crafted.cover is None
    # Nearly saturated, as the released noise: 24.1 and 14.5 dB where every entry is, a little more where images clip.
    for trigger, bound, psnr in ((crafted.train, 16, 24.6), (crafted.test, 48, 15.3)):
        measured = distance(apply(trigger, natural.images, torch.arange(300)), natural.images)
        assert measured[0] == pytest.approx(psnr, abs=1.5)
        assert measured[1] <= bound


def test_the_same_seed_gives_the_same_noise_and_another_one_another(natural) -> None:
    net, index = convolutional(), torch.arange(300)
    attack = Narcissus(rounds=8, batch=8, warmup=1)
    one, same, other = (apply(attack.craft(natural, PLAN, seed, net).test, natural.images, index) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_surrogate_is_left_as_it_was(natural, warmup) -> None:
    net = convolutional().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    Narcissus(rounds=3, warmup=warmup).craft(natural, PLAN, 0, net)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_the_warm_up_sees_the_target_class_alone_and_changes_the_noise(natural) -> None:
    net, index = convolutional(), torch.arange(300)
    others = natural.labels != 1
    images = natural.images.clone()
    images[others] = 255 - images[others]
    changed = ImageSet(images, natural.labels, 10)
    cold, warm = Narcissus(rounds=8), Narcissus(rounds=8, warmup=2, warmup_lr=0.01)
    noises = [
        apply(attack.craft(data, PLAN, 0, net).test, natural.images, index)
        for attack, data in ((cold, natural), (warm, natural), (warm, changed))
    ]
    assert not torch.equal(noises[0], noises[1])
    assert torch.equal(noises[1], noises[2])


@pytest.mark.parametrize("warmup", [0, 1])
def test_images_are_cropped_and_mirrored_in_the_warm_up_and_under_the_noise(natural, warmup, monkeypatch) -> None:
    seen: list[tuple[int, bool]] = []
    made = Batches.__init__

    def watched(self, *args, **settings) -> None:
        seen.append((settings["crop"], settings["flip"]))
        made(self, *args, **settings)

    monkeypatch.setattr(Batches, "__init__", watched)
    Narcissus(rounds=1, warmup=warmup).craft(natural, PLAN, 0, convolutional())
    assert seen == [(4, True)] * (warmup + 1)
    noises = []
    for attack in (Narcissus(rounds=8), Narcissus(rounds=8, crop=0), Narcissus(rounds=8, flip=False)):
        trigger = attack.craft(natural, PLAN, 0, convolutional()).test
        noises.append(trigger(torch.full((1, 3, 32, 32), 0.5), torch.arange(1)))
    assert not torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])


def test_its_surrogate_is_trained_apart_in_the_victims_architecture_or_another() -> None:
    victim = ResNet8(width=4, hidden=16)
    assert Narcissus().own_surrogate(victim) == victim
    assert Narcissus(surrogate="vgg11-bn").own_surrogate(victim) == VGG11BN(width=4, hidden=16)
    with pytest.raises(BadInput, match="unknown backbone 'resnet7'; did you mean 'resnet"):
        Narcissus(surrogate="resnet7")


def test_what_it_needs_is_asked_for(natural) -> None:
    with pytest.raises(BadInput, match="narcissus: learns its noise on a network"):
        Narcissus().craft(natural, PLAN, 0)
    none_left = natural.subset(natural.labels != 1)
    with pytest.raises(BadInput, match="no image of the target class 1"):
        Narcissus().craft(none_left, PLAN, 0, convolutional())


def test_a_single_image_of_the_target_class_is_enough() -> None:
    data = pictures(3, (3, 32, 32))
    crafted = Narcissus(rounds=8, warmup=1, warmup_lr=0.001).craft(data, PLAN, 0, convolutional(3))
    assert (apply(crafted.test, data.images, torch.arange(3)) != data.images).any()


@pytest.mark.parametrize(
    "settings",
    [{"radius": 0}, {"scale": -3}, {"rounds": 0}, {"lr": 0}, {"batch": 1}, {"warmup": -1}, {"warmup_lr": 2}, {"crop": -1}],
)
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"narcissus: {next(iter(settings))} = "):
        Narcissus(**settings)
