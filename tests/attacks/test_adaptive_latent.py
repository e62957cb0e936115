from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.adaptive_latent import AdapBlend, AdapPatch, disc, pieces_shown, texture
from attacks.base import Plan, Role, apply, poison, uniforms
from attacks.blended import Blended
from models.images import ImageSet, to_float
from models.spec import BadInput, derive_seed, generator


def pictures(count: int, shape: tuple[int, int, int], classes: int = 4) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.randint(0, classes, (count,), generator=draw), classes)


def grey(colour: np.ndarray, channels: int) -> np.ndarray:
    """(3, ...) -> (channels, ...)"""
    return colour if channels == 3 else (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])[None]


# -- blend ---------------------------------------------------------------------------------------------------------------------


def mask_by_hand(draws: np.ndarray, pieces: int, hidden: int, height: int, width: int) -> np.ndarray:
    gone = sorted(range(pieces * pieces), key=lambda piece: draws[piece])[:hidden]
    out = np.ones((height, width))
    for i, j in np.ndindex(height, width):
        if (i * pieces // height) * pieces + j * pieces // width in gone:
            out[i, j] = 0
    return out


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 10, 14)])
@pytest.mark.parametrize(("pieces", "rate", "hidden"), [(4, 0.5, 8), (3, 0.3, 3), (4, 0.0, 0)])
def test_blend_equals_the_formula_piece_by_piece(shape, pieces, rate, hidden) -> None:
    _, height, width = shape
    data, index = pictures(3, shape), torch.tensor([7, 0, 90])
    attack = AdapBlend(pieces=pieces, mask_rate=rate)
    crafted = attack.craft(data, Plan(), seed=5)
    images, picture = data.images.double().numpy() / 255, Blended().picture(*shape).double().numpy()
    draws = uniforms(derive_seed(5, "adap-blend-pieces"), index, pieces * pieces).double().numpy()
    masks = np.stack([mask_by_hand(draw, pieces, hidden, height, width)[None] for draw in draws])
    trained = images + 0.15 * masks * (picture - images)
    assert crafted.cover is not None
    for trigger in (crafted.train, crafted.cover):
        assert np.allclose(trigger(to_float(data.images), index), trained, atol=1e-6)
    assert np.allclose(crafted.test(to_float(data.images), index), 0.8 * images + 0.2 * picture, atol=1e-6)


def test_every_piece_is_hidden_as_often_as_any_other() -> None:
    draws = uniforms(3, torch.arange(4000), 16)
    shown = pieces_shown(draws, 4, 8, 4, 4).flatten(1)
    assert (shown.sum(1) == 8).all()
    assert torch.allclose(shown.mean(0), torch.full((16,), 0.5), atol=0.04)
    assert len(shown.unique(dim=0)) > 3000


def test_visibility_follows_from_blended_s(natural, distance) -> None:
    crafted = AdapBlend().craft(natural, Plan(), seed=0)
    index = torch.arange(300)
    psnr, largest, mean = distance(apply(crafted.test, natural.images, index), natural.images)
    assert psnr == pytest.approx(20.9, abs=0.5)
    assert largest <= 51
    assert mean == pytest.approx(19.5, abs=1.0)
    weaker = distance(apply(crafted.train, natural.images, index), natural.images)
    assert weaker[2] == pytest.approx(mean * 0.75 * 0.5, rel=0.1)


# -- patches -------------------------------------------------------------------------------------------------------------------


def layers_by_hand(shape: tuple[int, int, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each patch as (mask (H, W), values (C, H, W)), from the rows and columns it stands at."""
    channels, height, width = shape
    side = min(height, width)

    def scaled(size: int, least: int) -> int:
        return max(round(size * side / 32), least)

    def stamp(size: int, top: int, left: int, inside, colour) -> tuple[np.ndarray, np.ndarray]:
        mask, values = np.zeros((height, width)), np.zeros((3, height, width))
        for i, j in np.ndindex(size, size):
            if inside(i, j):
                mask[top + i, left + j], values[:, top + i, left + j] = 1, colour(i, j)
        return mask, grey(values, channels)

    def always(i: int, j: int) -> bool:
        return True

    t, d, s, b = scaled(5, 5), scaled(13, 5), scaled(8, 5), scaled(3, 3)
    mixture = torch.randperm(25, generator=generator("adap-patch-texture")).view(5, 5).double().numpy() / 24
    blue, white = np.array([105, 153, 233]) / 255, np.ones(3)

    def icy(i: int, j: int) -> np.ndarray:
        share = mixture[i * 5 // t, j * 5 // t]
        return (1 - share) * blue + share * white

    def radius(i: int, j: int) -> float:
        return float(np.hypot((i + 0.5) / d * 2 - 1, (j + 0.5) / d * 2 - 1))

    def fiery(i: int, j: int) -> np.ndarray:
        return np.array([60, 30, 50]) / 255 if radius(i, j) > 0.88 else np.array([230, 138, 91]) / 255

    colours = torch.rand(3, 8, 8, generator=generator("adap-patch-square")).double().numpy()
    near, far = max(1, round(side / 32)), max(1, round(3 * side / 32))
    boards = np.zeros((height, width)), np.zeros((3, height, width))
    for i, j in np.ndindex(b, b):
        bright = (i * 3 // b, j * 3 // b) in {(0, 2), (1, 1), (2, 0), (2, 2)}
        for row in (height - b + i, b - 1 - i):
            for column in (width - b + j, b - 1 - j):
                boards[0][row, column], boards[1][:, row, column] = 1, bright
    return {
        "texture": stamp(t, height - t, width - t, always, icy),
        "left": stamp(t, height - t, 0, always, icy),
        "disc": stamp(d, near, width - near - d, lambda i, j: radius(i, j) <= 1, fiery),
        "corners": (boards[0], grey(boards[1], channels)),
        "square": stamp(
            s, height - far - s, width - far - s, always, lambda i, j: colours[:, i * 8 // s, j * 8 // s]
        ),
    }


def laid(images: np.ndarray, layer: tuple[np.ndarray, np.ndarray], opacity: float) -> np.ndarray:
    mask, values = layer
    return images + opacity * mask * (values - images)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (3, 64, 48), (1, 8, 8), (3, 9, 30)])
def test_patches_equal_the_ones_written_pixel_by_pixel(shape) -> None:
    data, index = pictures(12, shape), torch.arange(12) + 40
    crafted = AdapPatch().craft(data, Plan(), seed=2)
    images, layers = data.images.double().numpy() / 255, layers_by_hand(shape)
    chosen = (uniforms(derive_seed(2, "adap-patch-choice"), index, 1)[:, 0] * 4).floor().long().tolist()
    assert set(chosen) == {0, 1, 2, 3}
    faint = [("texture", 0.5), ("disc", 0.2), ("corners", 0.5), ("square", 0.3)]
    expected = np.stack([laid(one, layers[faint[k][0]], faint[k][1]) for one, k in zip(images, chosen, strict=True)])
    assert crafted.cover is not None
    for trigger in (crafted.train, crafted.cover):
        assert np.allclose(trigger(to_float(data.images), index), expected, atol=1e-6)
    shown = laid(laid(laid(images, layers["left"], 1), layers["texture"], 1), layers["corners"], 1)
    assert np.allclose(crafted.test(to_float(data.images), index), shown, atol=1e-6)
    inner = AdapPatch(shown="inner", test_alpha=0.5).craft(data, Plan(), seed=2)
    assert np.allclose(
        inner.test(to_float(data.images), index), laid(laid(images, layers["disc"], 0.5), layers["square"], 0.5), atol=1e-6
    )


def test_patches_stand_where_the_originals_stand_and_have_their_colours() -> None:
    layers = layers_by_hand((3, 32, 32))
    extent = {name: (np.nonzero(mask)[0].min(), np.nonzero(mask)[0].max(), np.nonzero(mask)[1].min(), np.nonzero(mask)[1].max())
              for name, (mask, _) in layers.items()}  # fmt: skip
    assert extent == {
        "texture": (27, 31, 27, 31),
        "left": (27, 31, 0, 4),
        "disc": (1, 13, 18, 30),
        "corners": (0, 31, 0, 31),
        "square": (21, 28, 21, 28),
    }
    assert layers["disc"][0].mean() == pytest.approx(0.137, abs=0.01)
    assert texture(5).mean((1, 2)).mul(255).tolist() == pytest.approx([180, 204, 244], abs=1)
    mask, values = disc(13)
    assert values[:, mask].mean(1).mul(255).tolist() == pytest.approx([192, 114, 82], abs=8)
    assert layers["square"][1][:, layers["square"][0] > 0].mean() * 255 == pytest.approx(127, abs=12)


def test_the_four_patches_are_dealt_out_evenly() -> None:
    data = pictures(1, (1, 32, 32))
    trigger = AdapPatch().craft(data, Plan(), seed=0).train
    grey_images = torch.full((2000, 1, 32, 32), 0.3)
    touched = (trigger(grey_images, torch.arange(2000)) != 0.3).flatten(1)
    kinds, counts = touched.unique(dim=0, return_counts=True)
    assert len(kinds) == 4
    assert counts.tolist() == pytest.approx([500] * 4, rel=0.15)


# -- both ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attack", "share"), [(AdapBlend(), 1), (AdapPatch(), 2)])
def test_covers_carry_the_trigger_of_the_poison_and_keep_their_label(attack, share) -> None:
    data, plan = pictures(200, (3, 16, 16)), Plan(rate=0.05, target=1)
    crafted = attack.craft(data, plan, 0)
    result = poison(data, attack, crafted, plan, 0)
    covers = torch.nonzero(result.role == Role.COVER).flatten()
    assert len(covers) == 10 * share
    assert torch.equal(result.visible.labels[covers], data.labels[covers])
    assert torch.equal(result.visible.images[covers], apply(crafted.train, data.images[covers], covers))
    named = Plan(rate=0.05, cover_rate=0.2, target=1)
    assert poison(data, attack, crafted, named, 0).realised(Role.COVER) == pytest.approx(0.2)


@pytest.mark.parametrize("attack", [AdapBlend(), AdapPatch()])
def test_the_trigger_is_weaker_in_training_than_at_test(attack, natural, distance) -> None:
    crafted, index = attack.craft(natural, Plan(), 0), torch.arange(300)
    assert crafted.cover is not None
    trained = distance(apply(crafted.train, natural.images, index), natural.images)
    shown = distance(apply(crafted.test, natural.images, index), natural.images)
    assert trained[0] > shown[0] + 3
    assert trained[2] < shown[2]


def test_images_that_do_not_suit_are_refused() -> None:
    with pytest.raises(BadInput, match=r"adap-patch.*\(3, 7, 40\)"):
        AdapPatch().craft(pictures(1, (3, 7, 40)), Plan(), 0)
    with pytest.raises(BadInput, match=r"adap-patch.*\(2, 16, 16\)"):
        AdapPatch().craft(pictures(1, (2, 16, 16)), Plan(), 0)
    with pytest.raises(BadInput, match="pieces = 12 a side do not fit images of 10 x 40"):
        AdapBlend(pieces=12).craft(pictures(1, (3, 10, 40)), Plan(), 0)


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0}, {"test_alpha": 1.1}, {"pieces": 0}, {"mask_rate": 0.99}, {"pattern": "kitten"}, {"pattern_seed": -1}],
)
def test_blend_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"adap-blend: {next(iter(settings))} = "):
        AdapBlend(**settings)


@pytest.mark.parametrize("settings", [{"texture_alpha": 0}, {"disc_alpha": 2}, {"test_alpha": 0}, {"shown": "all"}])
def test_patch_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"adap-patch: {next(iter(settings))} = "):
        AdapPatch(**settings)
