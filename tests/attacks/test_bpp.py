from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attacks.base import Plan, Power, Role, apply, poison, uniforms
from attacks.bpp import Bpp, dithered, squeezed
from attacks.dynamic import DynamicVictim, another, batch_roles
from models.backbone import Network, Normalise
from models.classifier import Classifier
from models.images import ImageSet, to_float
from models.recipe import Recipe
from models.spec import BadInput, derive_seed
from models.training import fit, seeded


def nearest_level(value: float, levels: int) -> float:
    return min((j / (levels - 1) for j in range(levels)), key=lambda level: abs(level - value))


def squeezed_by_hand(images: np.ndarray, levels: int) -> np.ndarray:
    out = np.zeros_like(images)
    for at in np.ndindex(*images.shape):
        out[at] = nearest_level(images[at], levels)
    return out


def dithered_by_hand(images: np.ndarray, levels: int) -> np.ndarray:
    """Row by row, left to right, pushing the error on."""
    work = images.astype(np.float64).copy()
    out = np.zeros_like(work)
    count, channels, height, width = images.shape
    for n, c in np.ndindex(count, channels):
        for y in range(height):
            for x in range(width):
                out[n, c, y, x] = nearest_level(work[n, c, y, x], levels)
                error = work[n, c, y, x] - out[n, c, y, x]
                for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    if y + down < height and 0 <= x + right < width:
                        work[n, c, y + down, x + right] += error * share / 16
    return out


def pictures(count: int, shape: tuple[int, int, int], classes: int = 4) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.randint(0, classes, (count,), generator=draw), classes)


@pytest.mark.parametrize("levels", [2, 8, 32])
@pytest.mark.parametrize("shape", [(3, 9, 14), (1, 8, 8), (2, 1, 5), (1, 6, 1)])
def test_triggers_equal_the_formula_pixel_by_pixel(shape, levels) -> None:
    images = to_float(pictures(3, shape).images)
    assert np.allclose(squeezed(images, levels), squeezed_by_hand(images.numpy(), levels), atol=1e-6)
    # float64, so that both round sums at the edge between two levels alike
    exact = images.double()
    assert np.allclose(dithered(exact, levels), dithered_by_hand(exact.numpy(), levels), atol=1e-9)


@pytest.mark.parametrize("dither", [False, True])
def test_stored_images_hold_the_levels_and_nothing_else(dither) -> None:
    data, index = pictures(20, (3, 10, 10)), torch.arange(20)
    stored = apply(Bpp(dither=dither).craft(data, Plan(), 0).test, data.images, index)
    assert stored.unique().tolist() == [0, 36, 73, 109, 146, 182, 219, 255]
    if not dither:
        again = apply(Bpp().craft(data, Plan(), 0).test, stored, index)
        assert torch.equal(again, stored), "8-bit storage loses nothing of the trigger"


def test_dithering_keeps_the_mean_of_a_flat_area() -> None:
    grey = torch.full((1, 1, 32, 32), 0.4)
    assert float(dithered(grey, 2).mean()) == pytest.approx(0.4, abs=0.02)
    assert float(squeezed(grey, 2).mean()) == 0.0


@pytest.mark.parametrize(
    ("levels", "dither", "psnr", "largest", "mean"),
    [(8, False, 27.8, 18, 8.9), (8, True, 26.2, 36, 10.3), (32, False, 40.6, 4, 2.0), (32, True, 39.4, 8, 2.2)],
)
def test_visibility_is_the_published_one(natural, distance, levels, dither, psnr, largest, mean) -> None:
    crafted = Bpp(levels=levels, dither=dither).craft(natural, Plan(), 0)
    measured = distance(apply(crafted.test, natural.images, torch.arange(300)), natural.images)
    # Photographs have more pixels at black and white, where dithering makes its largest errors, than made-up ones.
    assert measured[0] == pytest.approx(psnr, abs=0.8)
    assert measured[1] <= largest + 1
    assert measured[2] == pytest.approx(mean, rel=0.1)


@pytest.mark.parametrize("dither", [False, True])
def test_covers_carry_the_rounding_error_of_another_image(dither) -> None:
    data, index = pictures(7, (2, 6, 9)), torch.tensor([5, 0, 3])
    crafted = Bpp(dither=dither).craft(data, Plan(), seed=3)
    pixels = to_float(data.images).double().numpy()
    quantised = dithered_by_hand(pixels, 8) if dither else squeezed_by_hand(pixels, 8)
    draws = uniforms(derive_seed(3, "bpp-negative"), index, 1)[:, 0].tolist()
    expected = []
    for own, draw in zip(index.tolist(), draws, strict=True):
        others = [(own + step) % 7 for step in range(1, 7)]
        other = others[int(draw * 6)]
        expected.append(np.clip(pixels[own] + quantised[other] - pixels[other], 0, 1))
    assert crafted.cover is not None
    found = crafted.cover(to_float(data.images[index]), index)
    # A dithered sum at the edge between two levels may fall to either side in another precision.
    assert np.mean(np.abs(found.numpy() - np.stack(expected)) > 1e-5) <= (0.02 if dither else 0)


def test_the_other_image_is_never_the_image_itself_and_changes_with_the_epoch() -> None:
    index = torch.arange(5000) % 50
    visits = index + ((torch.arange(5000) // 50 + 1) << 32)
    chosen = another(7, visits, 50)
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < 50
    assert not bool((chosen == index).any())
    assert len(chosen[index == 3].unique()) > 35
    assert torch.equal(another(7, visits[[4, 99]], 50), chosen[[4, 99]])
    assert another(7, torch.arange(1), 1).tolist() == [0]


RECIPE = Recipe(epochs=2, batch=32, lr=0.05, crop=1, flip=True)


def victim_of(attack: Bpp, data: ImageSet, plan: Plan) -> Classifier:
    with seeded(0):
        net = Network(Normalise([0.5], [0.5]), nn.Flatten(), nn.Sequential(nn.Linear(64, 4)))
    return attack.victim(net, RECIPE, attack.craft(data, plan, 0), plan, 0)


def test_power_follows_the_mode() -> None:
    data = pictures(10, (1, 8, 8))
    assert Bpp().power is Power.TRAINING
    assert type(victim_of(Bpp(), data, Plan())) is DynamicVictim
    assert Bpp(mode="static").power is Power.DATA
    assert type(victim_of(Bpp(mode="static"), data, Plan())) is Classifier


def test_a_batch_is_poisoned_as_its_roles_say() -> None:
    data, plan = pictures(60, (1, 8, 8)), Plan(rate=0.2, target=1)
    attack = Bpp(rounding="floor")
    crafted, victim = attack.craft(data, plan, 0), victim_of(attack, data, plan)
    assert victim.before_augment is not None
    index = torch.arange(60)
    images, labels = victim.before_augment(to_float(data.images), data.labels, index, 2)
    visit = index + (3 << 32)
    role = batch_roles(uniforms(derive_seed(0, "dynamic-roles"), visit, 2), 0.2, 0.2, "floor")
    poisoned, covers, clean = role == Role.POISON, role == Role.COVER, role == Role.CLEAN
    assert (int(poisoned.sum()), int(covers.sum())) == (12, 12)
    assert torch.equal(images[poisoned], to_float(apply(crafted.train, data.images[poisoned], visit[poisoned])))
    assert crafted.cover is not None
    assert torch.equal(images[covers], to_float(apply(crafted.cover, data.images[covers], visit[covers])))
    assert torch.equal(images[clean], to_float(data.images[clean]))
    assert (labels[poisoned] == 1).all()
    assert torch.equal(labels[~poisoned], data.labels[~poisoned])


def test_training_is_reproducible_and_reports_what_it_realised() -> None:
    data, plan = pictures(96, (1, 8, 8)), Plan(rate=0.1, target=1)
    victims = [victim_of(Bpp(rounding="floor"), data, plan) for _ in range(2)]
    nets = [fit(victim, data, RECIPE, seed=7).net for victim in victims]
    weights = [torch.cat([value.flatten() for value in net.state_dict().values()]) for net in nets]
    assert torch.equal(*weights)
    assert isinstance(victims[0], DynamicVictim)
    assert victims[0].realised == {"poison": 3 / 32, "cover": 3 / 32}


def test_the_exported_set_holds_poison_and_negatives_and_a_cover_rate_of_0_leaves_them_out() -> None:
    data, attack = pictures(100, (1, 8, 8)), Bpp(mode="static")
    for plan, shares in ((Plan(rate=0.1), [0.8, 0.1, 0.1]), (Plan(rate=0.1, cover_rate=0.0), [0.9, 0.1, 0.0])):
        made = poison(data, attack, attack.craft(data, plan, 0), plan, 0)
        assert [made.realised(role) for role in Role] == pytest.approx(shares)


@pytest.mark.parametrize("settings", [{"levels": 1}, {"mode": "both"}, {"rounding": "up"}])
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"bpp: {next(iter(settings))} = "):
        Bpp(**settings)
