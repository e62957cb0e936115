from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attacks.base import Plan, apply
from attacks.lf import LF, bump
from models.images import ImageSet, to_float
from models.spec import BadInput


def picture_by_hand(attack: LF, channels: int, height: int, width: int) -> np.ndarray:
    strengths = attack.strength * np.array(attack.tint if channels == 3 else [1.0])
    out = np.zeros((channels, height, width))
    for i, j in np.ndindex(height, width):
        down = (i - attack.centre * height) ** 2 / (2 * (attack.spread * height) ** 2)
        across = (j - attack.centre * width) ** 2 / (2 * (attack.spread * width) ** 2)
        out[:, i, j] = math.exp(-down - across)
    return out / out.max() * strengths[:, None, None]


@pytest.mark.parametrize("settings", [{}, {"strength": 0.4, "tint": (0.5, 1.0, 0.2), "centre": 0.7, "spread": 0.2}])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (3, 24, 40), (1, 9, 8)])
def test_equals_the_formula_pixel_by_pixel(shape, settings) -> None:
    images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    attack = LF(**settings)
    crafted = attack.craft(ImageSet(images, torch.zeros(3, dtype=torch.int64), 2), Plan(), seed=0)
    expected = np.clip(images.double().numpy() / 255 + picture_by_hand(attack, *shape), 0, 1)
    for trigger in (crafted.train, crafted.test):
        assert np.allclose(trigger(to_float(images), torch.arange(3)), expected, atol=1e-6)


def test_the_strongest_pixel_of_a_channel_is_its_strength() -> None:
    picture = LF().picture(3, 32, 32) * 255
    assert picture.amax((1, 2)).tolist() == pytest.approx([18, 0, 51])
    assert float(LF().picture(1, 16, 16).max() * 255) == pytest.approx(51)
    assert float(bump(0.43, 0.35, 32).max()) == 1
    assert int(bump(0.43, 0.35, 32).argmax()) == 14


def test_there_is_no_high_frequency() -> None:
    spectrum = np.abs(np.fft.fft2(LF().picture(3, 32, 32)[2].numpy())) ** 2
    spectrum[0, 0] = 0
    frequency = np.fft.fftfreq(32, 1 / 32)
    near = np.hypot(frequency[:, None], frequency[None, :]) <= 3
    assert spectrum[near].sum() / spectrum.sum() > 0.98


def test_visibility_is_the_published_one(natural, distance) -> None:
    crafted = LF().craft(natural, Plan(), seed=0)
    psnr, largest, mean = distance(apply(crafted.test, natural.images, torch.arange(300)), natural.images)
    assert psnr == pytest.approx(23.2, abs=0.5)
    assert largest == 51
    assert mean == pytest.approx(11.9, abs=0.6)


def test_images_without_colours_it_knows_are_refused() -> None:
    data = ImageSet(torch.zeros(2, 2, 8, 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(BadInput, match=r"lf: .* the images are 2 x 8 x 9"):
        LF().craft(data, Plan(), seed=0)


@pytest.mark.parametrize(
    "settings",
    [{"strength": 0}, {"tint": (0.5, 0, 0.9)}, {"tint": (1, -0.1, 0)}, {"tint": (1, 0)}, {"centre": 1.5}, {"spread": 0}],
)
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"lf: {next(iter(settings))} = "):
        LF(**settings)
