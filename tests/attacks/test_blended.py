from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from attacks.base import Plan, apply
from attacks.blended import Blended, bear, cartoon
from models.images import ImageSet
from models.spec import BadInput, generator


def cartoon_by_hand(seed: int, height: int, width: int) -> np.ndarray:
    """Point by point: the last shape that covers a point paints it."""
    out = np.zeros((3, height, width))
    for i, j, u, v in np.ndindex(height, width, 4, 4):
        point = complex((j + (v + 0.5) / 4) / width, (i + (u + 0.5) / 4) / height)
        paint: tuple[float, ...] = (0.98,) * 3
        for x, y, a, b, turn, colour in bear(seed):
            spot = (point - complex(x, y)) * np.exp(-1j * turn)
            edge = (math.hypot(spot.real / a, spot.imag / b) - 1) * min(a, b)
            if edge < 0.008:
                paint = colour if edge <= -0.008 else (0.1,) * 3
        out[:, i, j] += np.array(paint) / 16
    return out


@pytest.mark.parametrize("size", [(9, 9), (8, 12)])
def test_cartoon_equals_the_picture_painted_point_by_point(size) -> None:
    assert np.allclose(cartoon(2, *size).numpy(), cartoon_by_hand(2, *size), atol=0.02)


def test_all_of_the_bear_but_its_balloon_is_its_own_mirror_image() -> None:
    def rounded(shapes) -> list:
        return sorted((round(x, 6), y, a, b, round(math.sin(2 * turn), 6), colour) for x, y, a, b, turn, colour in shapes)

    sides = set()
    for seed in range(6):
        *rest, string, balloon = bear(seed)
        assert rounded(rest) == rounded([(1 - x, y, a, b, -turn, colour) for x, y, a, b, turn, colour in rest])
        assert string[0] == balloon[0] != 0.5
        sides.add(balloon[0] > 0.5)
    assert sides == {True, False}


def mirror_correlation(picture: np.ndarray) -> float:
    return float(np.corrcoef(picture.ravel(), picture[:, :, ::-1].ravel())[0, 1])


def power_spectrum(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(radius in cycles per side, power summed over channels), of every frequency of a square picture but the mean."""
    size = picture.shape[1]
    cycles = np.fft.fftfreq(size) * size
    radius = np.hypot(cycles[:, None], cycles)
    power = (np.abs(np.fft.fft2(picture)) ** 2).sum(0)
    return radius[radius > 0], power[radius > 0]


def spectrum_slope(picture: np.ndarray) -> float:
    """Slope of log power, averaged over rings one cycle wide, against log frequency. Photographs have about -2."""
    radius, power = power_spectrum(picture)
    rings = np.arange(1, picture.shape[1] // 2 + 1)
    mean = [power[(ring - 0.5 <= radius) & (radius < ring + 0.5)].mean() for ring in rings]
    return float(np.polyfit(np.log(rings), np.log(mean), 1)[0])


def test_the_measures_of_a_picture_know_what_they_measure() -> None:
    rng = torch.rand(3, 32, 32, generator=generator("white")).double().numpy()
    assert mirror_correlation(rng + rng[:, :, ::-1]) == pytest.approx(1)
    assert abs(mirror_correlation(rng)) < 0.05
    assert abs(spectrum_slope(rng)) < 0.2
    cycles = np.fft.fftfreq(32) * 32
    shaped = np.fft.ifft2(np.fft.fft2(rng) / np.hypot(cycles[:, None], cycles).clip(1)).real
    assert spectrum_slope(shaped) == pytest.approx(-2, abs=0.2)


# Of the picture in BackdoorBench at 32 pixels: mean (0.81, 0.75, 0.78), std (0.25, 0.29, 0.27), mirror correlation 0.75.
@pytest.mark.parametrize(("size", "std", "slope"), [(32, 0.27, -1.9), (16, 0.25, -1.5)])
def test_the_default_cartoon_is_as_bright_rich_and_symmetric_as_the_literatures(size, std, slope) -> None:
    picture = cartoon(Blended().pattern_seed, size, size).double().numpy()
    assert picture.mean() == pytest.approx(0.78, abs=0.02)
    assert picture.std(axis=(1, 2)).mean() == pytest.approx(std, abs=0.03)
    assert 0.75 <= mirror_correlation(picture) <= 0.9
    assert spectrum_slope(picture) == pytest.approx(slope, abs=0.15)


def test_energy_lies_in_the_frequencies_of_the_literatures_picture() -> None:
    radius, power = power_spectrum(cartoon(Blended().pattern_seed, 32, 32).double().numpy())
    shares = [power[radius <= most].sum() / power.sum() for most in (2, 4, 6, 8, 12)]
    assert shares == pytest.approx([0.24, 0.41, 0.57, 0.75, 0.91], abs=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_every_seed_draws_a_bright_symmetric_picture(seed) -> None:
    picture = cartoon(seed, 32, 32).double().numpy()
    assert picture.mean() == pytest.approx(0.78, abs=0.03)
    assert picture.std(axis=(1, 2)).mean() == pytest.approx(0.27, abs=0.04)
    assert mirror_correlation(picture) > 0.65


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
