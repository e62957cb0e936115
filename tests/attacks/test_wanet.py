from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.base import Plan, Power, Role, apply, poison, uniforms
from attacks.dynamic import DynamicVictim, batch_roles
from attacks.wanet import WaNet, identity, smooth_field, warp
from models.backbone import Network, Normalise
from models.classifier import Classifier
from models.images import ImageSet, to_float
from models.recipe import Recipe
from models.spec import BadInput, derive_seed, generator
from models.training import fit


def cubic(t: float) -> float:
    """Keys' kernel with a = -0.75."""
    t = abs(t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def upsampled_by_hand(control: np.ndarray, height: int, width: int) -> np.ndarray:
    """(2, k, k) -> (H, W, 2): bicubic, corners aligned, edges repeated."""
    k = control.shape[1]
    out = np.zeros((height, width, 2))
    for i, j in np.ndindex(height, width):
        y, x = i * (k - 1) / (height - 1), j * (k - 1) / (width - 1)
        for a in range(int(y) - 1, int(y) + 3):
            for b in range(int(x) - 1, int(x) + 3):
                weight = cubic(y - a) * cubic(x - b)
                out[i, j] += weight * control[:, min(max(a, 0), k - 1), min(max(b, 0), k - 1)]
    return out


def warped_by_hand(images: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """(N, C, H, W) sampled at (N, H, W, 2) [x, y] in [-1, 1]: bilinear, zeros outside."""
    height, width = images.shape[2:]
    out = np.zeros(images.shape)
    for n, c, i, j in np.ndindex(*images.shape):
        x, y = (grid[n, i, j, 0] + 1) / 2 * (width - 1), (grid[n, i, j, 1] + 1) / 2 * (height - 1)
        for a in (int(np.floor(y)), int(np.floor(y)) + 1):
            for b in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= a < height and 0 <= b < width:
                    out[n, c, i, j] += (1 - abs(y - a)) * (1 - abs(x - b)) * images[n, c, a, b]
    return out


def grids_by_hand(seed: int, s: float, height: int, width: int, index: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The trigger's grid (H, W, 2), and the covers' (N, H, W, 2)."""
    control = (torch.rand(2, 4, 4, generator=generator(seed, "wanet-control")) * 2 - 1).double().numpy()
    field = upsampled_by_hand(control / np.abs(control).mean(), height, width)
    grid = np.zeros((height, width, 2))
    for i, j in np.ndindex(height, width):
        grid[i, j, 0] = -1 + 2 * j / (width - 1) + s * field[i, j, 0] / width
        grid[i, j, 1] = -1 + 2 * i / (height - 1) + s * field[i, j, 1] / height
    grid = np.clip(grid, -1, 1)
    draws = uniforms(derive_seed(seed, "wanet-cover"), torch.tensor(index), height * width * 2).double().numpy()
    noise = draws.reshape(len(index), height, width, 2) * 2 - 1
    return grid, np.clip(grid + noise / np.array([width, height]), -1, 1)


def pictures(count: int, shape: tuple[int, int, int], classes: int = 4) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.randint(0, classes, (count,), generator=draw), classes)


@pytest.mark.parametrize("shape", [(3, 10, 10), (1, 7, 12)])
def test_trigger_and_cover_equal_the_formula_pixel_by_pixel(shape) -> None:
    data, index = pictures(2, shape), [5, 11]
    crafted = WaNet(s=2.0).craft(data, Plan(), seed=3)
    images = to_float(data.images)
    grid, covers = grids_by_hand(3, 2.0, shape[1], shape[2], index)
    pixels = images.double().numpy()
    assert np.allclose(crafted.test(images, torch.tensor(index)), warped_by_hand(pixels, np.stack([grid, grid])), atol=1e-5)
    assert crafted.cover is not None
    assert np.allclose(crafted.cover(images, torch.tensor(index)), warped_by_hand(pixels, covers), atol=1e-5)


def test_the_identity_grid_changes_nothing() -> None:
    images = to_float(pictures(2, (3, 9, 14)).images)
    assert torch.allclose(warp(images, identity(9, 14)), images, atol=1e-5)


def displacement(seed: int, size: int = 32) -> float:
    """Mean per axis, in pixels, at s = 0.5."""
    control = torch.rand(2, 4, 4, generator=generator(seed, "wanet-control")) * 2 - 1
    return float(smooth_field(control, size, size).abs().mean()) * 0.5 / size * (size - 1) / 2


def test_displacement_is_what_the_docstring_says() -> None:
    found = [displacement(seed) for seed in range(60)]
    assert np.mean(found) == pytest.approx(0.39 * 0.5, abs=0.01)
    assert 1.4 < max(found) / min(found) < 1.8
    assert displacement(0, 64) == pytest.approx(displacement(0), rel=0.05)


def test_renorm_gives_every_seed_the_same_mean_displacement() -> None:
    data = ImageSet(torch.zeros(1, 1, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 2)
    ramp = torch.linspace(0, 1, 32)
    across, down = ramp.expand(1, 1, 32, 32), ramp[:, None].expand(1, 1, 32, 32)

    def moved(seed: int, renorm: bool) -> float:
        trigger = WaNet(renorm=renorm).craft(data, Plan(), seed).test
        parts = [(trigger(image.contiguous(), torch.arange(1)) - image).abs()[..., 4:-4, 4:-4] for image in (across, down)]
        return float(torch.stack(parts).mean()) * 31

    spread = [np.ptp([moved(seed, renorm) for seed in range(8)]) for renorm in (False, True)]
    assert spread[1] < spread[0]
    assert np.mean([moved(seed, True) for seed in range(8)]) == pytest.approx(0.79 * 0.25 * 31 / 32, abs=0.02)


def test_visibility_is_the_published_one(natural, distance) -> None:
    index = torch.arange(300)
    measured = []
    for seed in range(10):
        crafted = WaNet().craft(natural, Plan(), seed)
        assert crafted.cover is not None
        measured.append([
            distance(apply(crafted.test, natural.images, index), natural.images)[0],
            distance(apply(crafted.cover, natural.images, index), natural.images)[0],
        ])  # fmt: skip
    trigger, cover = np.mean(measured, axis=0)
    assert trigger == pytest.approx(31.6, abs=1.5)  # the seeds' own spread is 1 dB, and made-up edges are not photographs'
    assert cover == pytest.approx(27.7, abs=1.5)


# -- roles in a batch ----------------------------------------------------------------------------------------------------------


def roles_by_hand(draws: np.ndarray, poisons: int, covers: int) -> list[int]:
    ranked = sorted(range(len(draws)), key=lambda sample: draws[sample, 0])
    return [1 if ranked.index(i) < poisons else 2 if ranked.index(i) < poisons + covers else 0 for i in range(len(draws))]


@pytest.mark.parametrize(
    ("size", "rate", "cover", "rounding", "lift", "expected"),
    [
        (128, 0.1, 0.2, "floor", 0.9, (12, 24)),
        (128, 0.05, 0.1, "floor", 0.9, (6, 12)),
        (128, 0.005, 0.01, "floor", 0.5, (1, 2)),
        (128, 0.005, 0.01, "floor", 0.3, (0, 0)),
        (128, 0.1, 0.2, "stochastic", 0.1, (12, 25)),
        (128, 0.1, 0.2, "stochastic", 0.3, (13, 25)),
        (10, 0.0, 0.0, "floor", 0.9, (0, 0)),
        (10, 0.0, 0.0, "stochastic", 0.9, (0, 0)),
        (10, 0.5, 1.0, "floor", 0.9, (5, 5)),
        (10, 1.0, 1.0, "stochastic", 0.9, (10, 0)),
    ],
)
def test_batch_roles_count_and_rank(size, rate, cover, rounding, lift, expected) -> None:
    draws = torch.rand(size, 2, generator=torch.Generator().manual_seed(2))
    draws[0, 1] = lift
    role = batch_roles(draws, rate, cover, rounding)
    assert role.tolist() == roles_by_hand(draws.numpy(), *expected)


def test_stochastic_rounding_holds_the_rate_on_average() -> None:
    draws = torch.rand(4000, 20, 2, generator=torch.Generator().manual_seed(2))
    counted = torch.stack([torch.bincount(batch_roles(one, 0.12, 0.24, "stochastic").long(), minlength=3) for one in draws])
    clean, poisons, covers = (counted.double().mean(0) / 20).tolist()
    assert (clean, poisons, covers) == pytest.approx((0.64, 0.12, 0.24), abs=0.003)


# -- the training-control victim -----------------------------------------------------------------------------------------------


def tiny(classes: int = 4, channels: int = 1) -> Network:
    features = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Network(Normalise([0.5] * channels, [0.25] * channels), features, nn.Sequential(nn.Linear(16, classes)))


RECIPE = Recipe(epochs=3, batch=32, lr=0.01, crop=1, flip=True)


def victim_of(attack: WaNet, data: ImageSet, plan: Plan, seed: int = 0) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = tiny(data.num_classes, data.shape[0])
    return attack.victim(net, RECIPE, attack.craft(data, plan, seed), plan, seed)


def test_power_follows_the_mode() -> None:
    assert WaNet().power is Power.TRAINING
    assert WaNet(mode="static").power is Power.DATA
    data, plan = pictures(40, (1, 8, 8)), Plan()
    assert type(victim_of(WaNet(mode="static"), data, plan)) is Classifier
    assert isinstance(victim_of(WaNet(), data, plan), DynamicVictim)


@pytest.mark.parametrize("label_mode", ["all-to-one", "all-to-all"])
def test_the_hook_poisons_covers_and_leaves_the_rest(label_mode) -> None:
    data, plan = pictures(60, (3, 8, 12)), Plan(rate=0.2, target=1, label_mode=label_mode)
    attack = WaNet(s=3.0, rounding="floor")
    crafted, victim = attack.craft(data, plan, 0), victim_of(attack, data, plan)
    index = torch.arange(60)
    before = to_float(data.images)
    images, labels = victim.before_augment(before, data.labels, index, 2)
    visit = index + (3 << 32)
    role = batch_roles(uniforms(derive_seed(0, "dynamic-roles"), visit, 2), 0.2, 0.4, "floor")
    poisoned, covers, clean = role == Role.POISON, role == Role.COVER, role == Role.CLEAN
    assert (int(poisoned.sum()), int(covers.sum())) == (12, 24)
    assert torch.equal(images[poisoned], to_float(apply(crafted.train, data.images[poisoned], visit[poisoned])))
    assert torch.equal(labels[poisoned], plan.relabel(data.labels[poisoned], 4))
    assert crafted.cover is not None
    assert torch.equal(images[covers], to_float(apply(crafted.cover, data.images[covers], visit[covers])))
    assert not torch.equal(images[covers], to_float(apply(crafted.cover, data.images[covers], index[covers])))
    assert torch.equal(labels[~poisoned], data.labels[~poisoned])
    assert torch.equal(images[clean], before[clean])
    assert torch.equal(before, to_float(data.images)), "the training set itself must not be written to"


def test_other_samples_are_poisoned_in_every_epoch_and_the_same_ones_when_asked_again() -> None:
    data, plan = pictures(60, (1, 8, 8)), Plan(rate=0.2, target=1)
    victim, again = victim_of(WaNet(), data, plan), victim_of(WaNet(), data, plan)
    index, before = torch.arange(60), to_float(data.images)
    first, second = (victim.before_augment(before, data.labels, index, epoch)[0] for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, again.before_augment(before, data.labels, index, 0)[0])


def trained(rounding: str, batch: int = 32, size: int = 96) -> tuple[DynamicVictim, Tensor]:
    data, plan = pictures(size, (1, 8, 8)), Plan(rate=0.1, target=1)
    victim = victim_of(WaNet(rounding=rounding), data, plan)
    assert isinstance(victim, DynamicVictim)
    fitted = fit(victim, data, RECIPE, seed=7)
    return victim, torch.cat([value.flatten() for value in fitted.net.state_dict().values()])


def test_training_is_reproducible_and_reports_what_it_realised() -> None:
    victim, weights = trained("floor")
    _, again = trained("floor")
    assert torch.equal(weights, again)
    assert victim.realised == {"poison": 3 / 32, "cover": 6 / 32}
    assert sum(victim.counts.values()) == 3 * 96
    stochastic, _ = trained("stochastic")
    assert stochastic.realised["poison"] == pytest.approx(0.1, abs=1 / 32)
    assert stochastic.realised["cover"] == pytest.approx(0.2, abs=1 / 32)


def test_nothing_is_realised_before_training() -> None:
    victim = victim_of(WaNet(), pictures(10, (1, 8, 8)), Plan())
    assert isinstance(victim, DynamicVictim)
    assert victim.realised == {"poison": 0.0, "cover": 0.0}


def test_the_exported_set_holds_poison_and_covers() -> None:
    data, plan = pictures(100, (1, 8, 8)), Plan(rate=0.1)
    attack = WaNet()
    crafted = attack.craft(data, plan, 0)
    exported = poison(data, attack, crafted, plan, 0)
    assert [exported.realised(role) for role in Role] == pytest.approx([0.7, 0.1, 0.2])
    assert exported.realised(Role.COVER) == pytest.approx(attack.cover_rate(plan))
    named = Plan(rate=0.1, cover_rate=0.05)
    assert poison(data, attack, crafted, named, 0).realised(Role.COVER) == pytest.approx(0.05)
    full = Plan(rate=0.5)
    assert poison(data, attack, crafted, full, 0).realised(Role.COVER) == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [{"k": 1}, {"s": 0}, {"mode": "both"}, {"rounding": "up"}])
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"wanet: {next(iter(settings))} = "):
        WaNet(**settings)
