from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.badnets import BadNets, patch
from attacks.base import Plan, apply
from models.images import ImageSet
from models.spec import BadInput


def by_hand(images: np.ndarray, grid: bool, size: int, margin: int) -> np.ndarray:
    out = images.copy()
    _, channels, height, width = images.shape
    for n in range(len(images)):
        for c in range(channels):
            for i in range(size):
                for j in range(size):
                    a, b = int(i * 3 / size), int(j * 3 / size)
                    bright = not grid or (a, b) in {(0, 2), (1, 1), (2, 0), (2, 2)}
                    out[n, c, height - margin - size + i, width - margin - size + j] = 255 if bright else 0
    return out


@pytest.mark.parametrize("kind", ["white-corner", "grid-corner"])
@pytest.mark.parametrize(
    ("shape", "settings", "side", "gap"),
    [
        ((3, 32, 32), {}, 3, 0),
        ((1, 16, 16), {}, 3, 0),
        ((3, 64, 64), {}, 6, 0),
        ((3, 64, 64), {"margin": 1}, 6, 2),
        ((3, 48, 64), {"size": 4}, 6, 0),
        ((1, 20, 12), {"size": 5, "margin": 2}, 5, 2),
    ],
)
def test_equals_the_patch_written_pixel_by_pixel(kind, shape, settings, side, gap) -> None:
    images = torch.randint(0, 256, (4, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    data = ImageSet(images, torch.zeros(4, dtype=torch.int64), 2)
    crafted = BadNets(kind, **settings).craft(data, Plan(), seed=0)
    expected = by_hand(images.numpy(), kind == "grid-corner", side, gap)
    assert np.array_equal(apply(crafted.test, images, torch.arange(4)).numpy(), expected)


def test_black_pixels_belong_to_the_patch() -> None:
    mask, values = patch(torch.zeros(3, 3), 3, 0, 8, 8)
    assert int(mask.sum()) == 9
    assert float(values.sum()) == 0


def test_visibility_is_the_published_one(natural, distance) -> None:
    crafted = BadNets().craft(natural, Plan(), seed=0)
    triggered = apply(crafted.test, natural.images, torch.arange(300))
    psnr, _, mean = distance(triggered, natural.images)
    assert float((triggered != natural.images).double().mean()) == pytest.approx(9 / 1024, rel=0.15)  # some are white already
    assert psnr == pytest.approx(27.7, abs=1.0)  # nine pixels of an image: the mean depends on what stands in the corner
    assert mean == pytest.approx(1.2, abs=0.2)


def test_a_patch_larger_than_the_image_is_refused() -> None:
    data = ImageSet(torch.zeros(2, 1, 6, 40, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(BadInput, match="7 pixels do not fit images of 6 x 40"):
        BadNets(size=5, margin=2).craft(data, Plan(), seed=0)


@pytest.mark.parametrize("settings", [{"patch": "white"}, {"size": 0}, {"margin": -1}])
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"badnets: {next(iter(settings))} = "):
        BadNets(**settings)
