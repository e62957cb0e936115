from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attacks.base import Plan, Power, Role, apply, poison
from attacks.dfst import DFST, DetoxVictim, neighbourhoods, ssim, stylised, sunrise
from attacks.dynamic import DynamicVictim
from models.backbone import GlobalAverage, Network, Normalise
from models.classifier import Classifier
from models.images import ImageSet, to_float
from models.recipe import Recipe
from models.spec import BadInput
from models.training import fit

PLAN = Plan(rate=0.1, target=1)
RECIPE = Recipe(epochs=3, batch=32, lr=0.01, crop=1, flip=True)


def pictures(count: int, shape: tuple[int, int, int], classes: int = 4) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.randint(0, classes, (count,), generator=draw), classes)


def tiny(channels: int = 3, classes: int = 4, units: int = 6) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Conv2d(channels, units, 3, padding=1), nn.BatchNorm2d(units), nn.ReLU(), GlobalAverage())
        return Network(Normalise([0.5] * channels, [0.25] * channels), trunk, nn.Sequential(nn.Linear(units, classes)))


def victim_of(attack: DFST, data: ImageSet, plan: Plan = PLAN, seed: int = 0, recipe: Recipe = RECIPE) -> DetoxVictim:
    victim = attack.victim(tiny(data.shape[0], data.num_classes), recipe, attack.craft(data, plan, seed), plan, seed)
    assert isinstance(victim, DetoxVictim)
    return victim


# -- the style -----------------------------------------------------------------------------------------------------------------


def sky_by_hand(height: int) -> np.ndarray:
    """(3, H)"""
    top, middle, bottom = np.array([0.35, 0.15, 0.40]), np.array([0.95, 0.50, 0.15]), np.array([0.08, 0.04, 0.06])
    rows = []
    for i in range(height):
        y = (i + 0.5) / height
        rows.append(top + y / 0.55 * (middle - top) if y < 0.55 else middle + (y - 0.55) / 0.45 * (bottom - middle))
    sky = np.array(rows).T
    return sky - sky.mean(1, keepdims=True)


def style_by_hand(images: np.ndarray) -> np.ndarray:
    grey = np.array([0.299, 0.587, 0.114])
    mean, std, sky = np.array([0.64, 0.31, 0.24]), np.array([0.28, 0.20, 0.15]), sky_by_hand(images.shape[2])
    if images.shape[1] == 1:
        mean, std, sky = np.array([grey @ mean]), np.array([grey @ std]), (grey @ sky)[None]
    out = np.zeros_like(images)
    for n, c in np.ndindex(*images.shape[:2]):
        channel = images[n, c]
        moved = (channel - channel.mean()) / max(channel.std(), 1 / 255) * std[c] + mean[c]
        out[n, c] = np.clip(moved + 0.35 * sky[c][:, None], 0, 1)
    return out


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 12)])
def test_the_trigger_equals_the_formula_image_by_image(shape) -> None:
    data = pictures(4, shape)
    data.images[0] = 90  # an even image has no spread to scale
    images = data.images.double().numpy() / 255
    expected = style_by_hand(images)
    assert np.allclose(stylised(to_float(data.images)), expected, atol=1e-5)
    crafted = DFST(alpha=0.3).craft(data, PLAN, 0)
    for trigger in (crafted.train, crafted.test):
        assert np.allclose(trigger(to_float(data.images), torch.arange(4)), 0.7 * images + 0.3 * expected, atol=1e-5)
    assert crafted.cover is None


def test_the_sky_is_purple_above_orange_at_the_horizon_and_dark_below() -> None:
    red, green, blue = sunrise(100)[:, :, 0]
    assert blue.argmax() == 0
    assert red.argmax() in (54, 55)
    assert green.argmax() in (54, 55)
    assert float(red[-1]) == float(red.min())
    assert sunrise(100).mean(1).abs().max() < 1e-6


def test_visibility_is_that_of_a_strong_style(natural, distance) -> None:
    def psnr(alpha: float) -> float:
        trigger = DFST(alpha=alpha).craft(natural, PLAN, 0).test
        return distance(apply(trigger, natural.images, torch.arange(300)), natural.images)[0]

    assert psnr(0.6) == pytest.approx(17.3, abs=1.5)
    assert psnr(0.3) == pytest.approx(23.4, abs=1.5)


# -- the filter's parts --------------------------------------------------------------------------------------------------------


def around_by_hand(images: np.ndarray, reach: int) -> np.ndarray:
    n, c, height, width = images.shape
    out = np.zeros((n, 4 * c, height, width))
    for k, i, j in np.ndindex(c, height, width):
        window = images[:, k, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1].reshape(n, -1)
        for place, value in enumerate((images[:, k, i, j], window.max(1), window.min(1), window.mean(1))):
            out[:, place * c + k, i, j] = value
    return out


@pytest.mark.parametrize(("shape", "reach"), [((3, 9, 13), 2), ((1, 8, 8), 5)])
def test_neighbourhoods_equal_the_windows_cut_by_hand(shape, reach) -> None:
    images = to_float(pictures(2, shape).images)
    assert np.allclose(neighbourhoods(images, reach), around_by_hand(images.double().numpy(), reach), atol=1e-6)


def ssim_by_hand(one: np.ndarray, other: np.ndarray, size: int) -> float:
    bell = np.exp(-((np.arange(size) - size // 2) ** 2) / 4.5)
    weights = np.outer(bell, bell) / bell.sum() ** 2
    found = []
    for n, c, i, j in np.ndindex(*one.shape[:2], one.shape[2] - size + 1, one.shape[3] - size + 1):
        a, b = one[n, c, i : i + size, j : j + size], other[n, c, i : i + size, j : j + size]
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        both = (weights * (a - mean_a) * (b - mean_b)).sum()
        found.append(
            (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4) / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
        )
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("shape", "window", "size"),
    [((3, 12, 14), {}, 5), ((1, 4, 9), {}, 3), ((3, 12, 14), {"window": 11}, 11), ((1, 8, 20), {"window": 11}, 7)],
)
def test_ssim_equals_the_formula_window_by_window(shape, window, size) -> None:
    one = to_float(pictures(2, shape).images)
    other = (one * 0.6 + 0.3 * one.flip(3)).clamp(0, 1)
    by_hand = ssim_by_hand(one.double().numpy(), other.double().numpy(), size)
    assert float(ssim(one, other, **window)) == pytest.approx(by_hand, abs=1e-4)
    assert float(ssim(one, one, **window)) == pytest.approx(1, abs=1e-5)
    assert float(ssim(one, 1 - one, **window)) < 0


# -- detoxification ------------------------------------------------------------------------------------------------------------


def ready(attack: DFST, data: ImageSet) -> DetoxVictim:
    """A victim that has seen its data and nothing else."""
    victim = victim_of(attack, data)
    victim.loader(data, 0)
    victim.net.eval()
    return victim


def test_compromised_neurons_are_those_whose_mean_rises_most() -> None:
    data = pictures(40, (3, 10, 10))
    victim = ready(DFST(share=0.5, neurons=0.5), data)
    assert victim.held is not None
    assert len(victim.held) == 20
    rise = np.zeros(6)
    with torch.no_grad():
        for image in to_float(victim.held.images):
            styled = victim.crafted.train(image[None], torch.zeros(1, dtype=torch.int64))
            rise += (victim.net.embed(styled) - victim.net.embed(image[None]))[0].double().numpy()
    assert victim.compromised().tolist() == sorted(range(6), key=lambda unit: -rise[unit])[:3]
    assert len(ready(DFST(), data).compromised()) == 1


def test_the_loss_is_the_sum_of_its_terms_and_each_has_a_gradient() -> None:
    data = pictures(12, (3, 10, 10))
    neurons, targets = torch.tensor([0, 4]), torch.ones(12, dtype=torch.int64)
    images = to_float(data.images)
    weight = (torch.eye(3, 12) + 0.05 * torch.randn(3, 12, generator=torch.Generator().manual_seed(1))).double()
    direction = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).double()
    slopes = []
    for ssim_weight, activation_weight in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.1, 0.3)):
        victim = ready(DFST(ssim_weight=ssim_weight, activation_weight=activation_weight), data)
        net = victim.net.double()

        def value(at: torch.Tensor, victim=victim) -> torch.Tensor:
            return victim.detox_loss(at, images.double(), targets, neurons)

        filtered = (weight @ neighbourhoods(images.double(), 5).flatten(2)).view(12, 3, 10, 10).clamp(0, 1)
        shown = 0.4 * images.double() + 0.6 * filtered
        with torch.no_grad():
            z = net.embed(shown)
            spelled = nn.functional.cross_entropy(net.head(z), targets)
            spelled = spelled - ssim_weight * ssim(images.double(), shown) - activation_weight * (z[:, 0] + z[:, 4]).mean() / 2
        assert float(value(weight).detach()) == pytest.approx(float(spelled), abs=1e-6)
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), [leaf])
        with torch.no_grad():
            measured = float(value(weight + 1e-6 * direction) - value(weight - 1e-6 * direction)) / 2e-6
        slopes.append(float((gradient * direction).sum()))
        assert slopes[-1] == pytest.approx(measured, rel=1e-3, abs=1e-6)
    assert min(abs(slopes[0]), abs(slopes[1] - slopes[0]), abs(slopes[2] - slopes[0])) > 1e-4
    assert slopes[3] == pytest.approx(slopes[1] + slopes[2] - slopes[0], abs=1e-6)


def test_the_filter_lowers_its_loss_and_leaves_the_network_as_it_was() -> None:
    data = pictures(60, (3, 10, 10))
    victim = ready(DFST(share=0.5), data)
    victim.net.train()
    before = {name: value.clone() for name, value in victim.net.state_dict().items()}
    weight = victim.injector()
    assert torch.equal(weight, victim.injector())
    assert victim.net.training
    assert all(torch.equal(value, before[name]) for name, value in victim.net.state_dict().items())
    assert all(parameter.grad is None for parameter in victim.net.parameters())
    victim.net.eval()
    assert victim.held is not None
    images, targets = to_float(victim.held.images), torch.ones(30, dtype=torch.int64)
    with torch.no_grad():
        start, end = (victim.detox_loss(at, images, targets, victim.compromised()) for at in (torch.eye(3, 12), weight))
    assert float(end) < float(start)
    assert torch.equal(ready(DFST(detox_epochs=0), data).injector(), torch.eye(3, 12))


class AdamByHand:
    """Algorithm 1 of Kingma and Ba (ICLR 2015, arXiv 1412.6980)."""

    def __init__(self, lr: float, betas: tuple[float, float]) -> None:
        self.lr, self.betas, self.m, self.v, self.t = lr, betas, torch.zeros(()), torch.zeros(()), 0

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        self.t += 1
        first, second = self.betas
        self.m = first * self.m + (1 - first) * gradient
        self.v = second * self.v + (1 - second) * gradient**2
        return -self.lr * (self.m / (1 - first**self.t)) / ((self.v / (1 - second**self.t)).sqrt() + 1e-8)


def test_the_filter_takes_the_steps_of_the_authors_optimizer() -> None:
    victim = ready(DFST(share=0.5, detox_epochs=3), pictures(60, (3, 10, 10)))
    assert victim.held is not None
    images, targets = to_float(victim.held.images), torch.ones(30, dtype=torch.int64)

    def walked(betas: tuple[float, float]) -> torch.Tensor:
        weight, adam = torch.eye(3, 12), AdamByHand(0.01, betas)
        for _ in range(3):
            leaf = weight.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(victim.detox_loss(leaf, images, targets, victim.compromised()), [leaf])
            weight = weight + adam.step(gradient)
        return weight

    assert len(images) <= victim.recipe.batch  # one step an epoch
    assert torch.allclose(victim.injector(), walked((0.5, 0.9)), atol=1e-5)
    assert not torch.allclose(victim.injector(), walked((0.9, 0.999)), atol=1e-3)


def test_detoxicants_come_after_the_first_epoch_with_the_share_asked_for() -> None:
    data = pictures(96, (3, 8, 8))
    attack = DFST(share=0.3, rounding="floor")
    victim = victim_of(attack, data)
    fit(victim, data, RECIPE, seed=7)
    # Batches of 32: three poisoned in each of nine, three covers in each of the six after the first epoch.
    assert victim.realised == {"poison": pytest.approx(27 / 288), "cover": pytest.approx(18 / 288)}
    crafted = attack.finished(victim, attack.craft(data, PLAN, 0))
    assert crafted.cover is not None
    exported = poison(data, attack, crafted, PLAN, 0)
    assert exported.realised(Role.COVER) == pytest.approx(0.1, abs=0.01)
    covers = exported.role == Role.COVER
    assert torch.equal(exported.visible.labels[covers], data.labels[covers])
    assert (exported.visible.images[covers] != data.images[covers]).flatten(1).any(1).all()
    twice = victim_of(attack, data, Plan(rate=0.1, target=1, cover_rate=0.2))
    fit(twice, data, RECIPE, seed=7)
    assert twice.realised["cover"] == pytest.approx(36 / 288)


def test_one_epoch_has_no_detoxicants() -> None:
    data, recipe = pictures(64, (1, 8, 8)), Recipe(epochs=1, batch=32, lr=0.01, crop=0, flip=False)
    attack = DFST()
    victim = victim_of(attack, data, recipe=recipe)
    fit(victim, data, recipe, seed=7)
    assert victim.realised["cover"] == 0
    crafted = attack.finished(victim, attack.craft(data, PLAN, 0))
    assert poison(data, attack, crafted, PLAN, 0).realised(Role.COVER) == 0


def weights(attack: DFST, data: ImageSet) -> torch.Tensor:
    net = fit(victim_of(attack, data), data, RECIPE, seed=7).net
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def test_training_is_reproducible_and_detoxification_changes_it() -> None:
    data = pictures(96, (3, 8, 8))
    one, same, bare = (weights(attack, data) for attack in (DFST(share=0.3), DFST(share=0.3), DFST(detox_share=0.0)))
    assert torch.equal(one, same)
    assert not torch.equal(one, bare)


def test_power_follows_detoxification() -> None:
    data = pictures(40, (1, 8, 8))
    assert DFST().power is Power.TRAINING
    static = DFST(detox=False)
    assert static.power is Power.DATA
    crafted = static.craft(data, PLAN, 0)
    module = static.victim(tiny(1), RECIPE, crafted, PLAN, 0)
    assert type(module) is Classifier
    assert static.finished(module, crafted) is crafted
    assert [poison(data, static, crafted, PLAN, 0).realised(role) for role in Role] == pytest.approx([0.9, 0.1, 0.0])
    assert static.cover_rate(Plan(rate=0.1, cover_rate=0.2)) == 0
    assert isinstance(victim_of(DFST(), data), DynamicVictim)
    assert DFST(detox_share=0.5).cover_rate(PLAN) == pytest.approx(0.05)
    assert DFST().cover_rate(Plan(rate=0.1, cover_rate=0.2)) == 0.2


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(BadInput, match=r"dfst.*\(2, 8, 8\)"):
        DFST().craft(pictures(1, (2, 8, 8)), PLAN, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0}, {"detox_share": -1}, {"neurons": 0}, {"share": 0}, {"reach": 0}, {"detox_epochs": -1}, {"detox_lr": 0},
        {"ssim_weight": -1}, {"activation_weight": -1}, {"rounding": "up"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"dfst: {next(iter(settings))} = "):
        DFST(**settings)
