from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from attacks.base import Plan, apply
from attacks.blended import Blended, cartoon
from models.images import ImageSet
from models.spec import BadInput, generator


def cartoon_by_hand(seed: int, height: int, width: int) -> np.ndarray:
    """Point by point: the last shape that covers a point paints it."""
    colours = [(0.98,) * 3, (0.98,) * 3, (0.85, 0.15, 0.2), (0.95, 0.8, 0.2), (0.2, 0.35, 0.75), (0.95, 0.6, 0.75)]
    shapes = torch.rand(12, 7, generator=generator(seed, "blended-cartoon")).tolist()
    out = np.zeros((3, height, width))
    for i, j, u, v in np.ndindex(height, width, 4, 4):
        y, x = (i + (u + 0.5) / 4) / height, (j + (v + 0.5) / 4) / width
        paint: tuple[float, ...] = (0.97,) * 3
        for kind, colour, cx, cy, a, b, turn in shapes:
            a, b = 0.06 + 0.16 * a, 0.06 + 0.16 * b
            point = complex(x - 0.05 - 0.9 * cx, y - 0.05 - 0.9 * cy) * np.exp(-1j * math.pi * turn)
            if kind < 0.5:
                edge = (math.hypot(point.real / a, point.imag / b) - 1) * min(a, b)
            else:
                edge = max(abs(point.real) - a, abs(point.imag) - b)
            if edge < 0.022:
                paint = colours[int(colour * 6)] if edge <= -0.022 else (0.1,) * 3
        out[:, i, j] += np.array(paint) / 16
    return out


@pytest.mark.parametrize("size", [(9, 9), (8, 12)])
def test_cartoon_equals_the_picture_painted_point_by_point(size) -> None:
    assert np.allclose(cartoon(2, *size).numpy(), cartoon_by_hand(2, *size), atol=0.02)


def test_cartoon_is_the_same_picture_at_every_size() -> None:
    small, large = cartoon(2, 32, 32, supersample=8), cartoon(2, 64, 64)
    assert torch.allclose(avg_pool2d(large, 2), small, atol=1e-5)


@pytest.mark.parametrize("pattern", ["cartoon", "noise"])
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_the_formula(pattern, channels) -> None:
    images = torch.randint(0, 256, (3, channels, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    data = ImageSet(images, torch.zeros(3, dtype=torch.int64), 2)
    attack = Blended(alpha=0.3, pattern=pattern)
    picture = attack.picture(channels, 16, 20).double().numpy()
    expected = np.clip(np.rint((0.7 * images.numpy() / 255 + 0.3 * picture) * 255), 0, 255)
    triggered = apply(attack.craft(data, Plan(), seed=0).test, images, torch.arange(3)).numpy()
    assert np.abs(triggered - expected).max() <= 1  # a tie may round either way in single precision
    assert (triggered == expected).mean() > 0.99


def test_grey_cartoon_is_the_luminance() -> None:
    colour = cartoon(2, 16, 16)
    grey = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert torch.allclose(Blended().picture(1, 16, 16)[0], grey, atol=1e-6)


def test_another_seed_is_another_picture_and_the_run_seed_changes_nothing(natural) -> None:
    assert not torch.equal(Blended(pattern_seed=3).picture(3, 16, 16), Blended().picture(3, 16, 16))
    index, images = torch.arange(4), torch.rand(4, 3, 32, 32, generator=generator("images"))
    one, other = (Blended().craft(natural, Plan(), seed).test(images, index) for seed in (0, 1))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("pattern", "psnr", "largest", "mean"), [("cartoon", 20.8, 51, 19.5), ("noise", 22.3, 51, 16.2)])
def test_visibility_is_the_published_one(pattern, psnr, largest, mean, natural, distance) -> None:
    crafted = Blended(pattern=pattern).craft(natural, Plan(), seed=0)
    measured = distance(apply(crafted.test, natural.images, torch.arange(300)), natural.images)
    assert measured[0] == pytest.approx(psnr, abs=0.5)
    assert largest - 3 <= measured[1] <= largest
    assert measured[2] == pytest.approx(mean, abs=1.0)


def test_a_cartoon_has_one_or_three_channels() -> None:
    data = ImageSet(torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(BadInput, match="the images have 4"):
        Blended().craft(data, Plan(), seed=0)
    assert Blended(pattern="noise").picture(4, 8, 8).shape == (4, 8, 8)


@pytest.mark.parametrize("settings", [{"alpha": 0}, {"pattern": "kitty"}, {"pattern_seed": -1}])
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"blended: {next(iter(settings))} = "):
        Blended(**settings)
