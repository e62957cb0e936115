from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attacks.base import Plan, apply
from attacks.sig import SIG
from models.images import ImageSet
from models.spec import BadInput


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (3, 24, 40)])
def test_equals_the_formula_pixel_by_pixel(shape) -> None:
    images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    data = ImageSet(images, torch.zeros(3, dtype=torch.int64), 2)
    attack = SIG(delta=0.2, frequency=5)
    triggered = attack.craft(data, Plan(), seed=0).test(images.float() / 255, torch.arange(3)).numpy()
    for n, c, i, j in np.ndindex(*images.shape):
        value = images[n, c, i, j].item() / 255 + 0.2 * math.sin(2 * math.pi * 5 * j / shape[2])
        assert triggered[n, c, i, j] == pytest.approx(min(1.0, max(0.0, value)), abs=1e-5)


def test_stripes_are_vertical_six_cycles_and_the_same_in_every_channel() -> None:
    grey = torch.full((1, 3, 32, 32), 0.5)
    data = ImageSet(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 2)
    added = SIG().craft(data, Plan(), seed=0).test(grey, torch.arange(1))[0] - 0.5
    assert torch.equal(added, added[:1, :1].expand_as(added))
    spectrum = torch.fft.rfft(added[0, 0]).abs()
    assert int(spectrum.argmax()) == 6
    assert float(spectrum[6]) == pytest.approx(16 * 40 / 255, rel=1e-4)


@pytest.mark.parametrize(("delta", "psnr", "mean"), [(40, 19.4, 23.9), (30, 21.8, 18.1), (20, 25.4, 12.2)])
def test_visibility_is_the_published_one(delta, psnr, mean, natural, distance) -> None:
    crafted = SIG(delta=delta / 255).craft(natural, Plan(), seed=0)
    measured = distance(apply(crafted.test, natural.images, torch.arange(300)), natural.images)
    assert measured[0] == pytest.approx(psnr, abs=0.3)
    assert measured[1] == delta
    assert measured[2] == pytest.approx(mean, abs=0.8)


@pytest.mark.parametrize("settings", [{"delta": 0}, {"delta": 40}, {"frequency": -1}])
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"sig: {next(iter(settings))} = "):
        SIG(**settings)
