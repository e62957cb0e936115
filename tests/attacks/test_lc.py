from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from attacks.adversarial import pgd
from attacks.base import Plan, Role, apply, poison
from attacks.lc import LC, corner_signs
from models.backbone import Network, Normalise
from models.images import ImageSet, quantise, to_float
from models.spec import BadInput

RIGHT = {(0, 2): 1, (1, 1): 1, (2, 0): 1, (2, 2): 1}
"""Bright places of the pattern at the right edge, (row, column); the other five are dark."""


def signs_by_hand(height: int, width: int, size: int, everywhere: bool) -> np.ndarray:
    signs = np.zeros((height, width))
    for i, j in np.ndindex(size, size):
        sign = RIGHT.get((i * 3 // size, j * 3 // size), -1)
        signs[height - size + i, width - size + j] = sign
        if everywhere:
            signs[i, width - size + j] = sign
            signs[i, size - 1 - j] = sign
            signs[height - size + i, size - 1 - j] = sign
    return signs


def pictures(shape: tuple[int, int, int], count: int = 20, classes: int = 4) -> ImageSet:
    draw = torch.Generator().manual_seed(6)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.arange(count) % classes, classes)


def linear(shape: tuple[int, int, int], classes: int = 4) -> Network:
    """Logits = W (x - 0.5) / 0.25 + b."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        head = nn.Sequential(nn.Linear(int(np.prod(shape)), classes))
    return Network(Normalise([0.5] * shape[0], [0.25] * shape[0]), nn.Flatten(), head).eval()


def convolutional(classes: int = 4) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten())
        head = nn.Sequential(nn.Linear(4 * 64, classes))
    return Network(Normalise([0.5] * 3, [0.25] * 3), features, head)


def pgd_by_hand(net: Network, images: np.ndarray, label: int, eps: float, step: float, steps: int) -> np.ndarray:
    """For :func:`linear`: the gradient of the cross-entropy by its formula, one pixel after the other."""
    layer = net.head[0]
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    out = images.astype(np.float64)
    for n in range(len(images)):
        x = out[n].ravel()
        start = x.copy()
        for _ in range(steps):
            logits = weight @ ((x - 0.5) / 0.25) + bias
            share = np.exp(logits - logits.max())
            share /= share.sum()
            moved = x.copy()
            for pixel in range(len(x)):
                gradient = sum((share[k] - (k == label)) * weight[k, pixel] / 0.25 for k in range(len(weight)))
                wanted = x[pixel] + step * np.sign(gradient)
                moved[pixel] = min(max(wanted, start[pixel] - eps, 0.0), start[pixel] + eps, 1.0)
            x = moved
        out[n] = x.reshape(out[n].shape)
    return out


# -- the pattern ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 3), (16, 16, 3), (6, 9, 3), (8, 40, 3), (64, 64, 6), (48, 64, 4), (48, 33, 3)]
)
def test_signs_equal_the_pattern_written_pixel_by_pixel(height, width, size) -> None:
    assert np.array_equal(corner_signs("all", height, width), signs_by_hand(height, width, size, True))
    assert np.array_equal(corner_signs("lower-right", height, width), signs_by_hand(height, width, size, False))


def test_a_flip_changes_nothing_and_every_padded_crop_leaves_a_corner_whole() -> None:
    signs = corner_signs("all", 32, 32)
    assert torch.equal(signs.flip(1), signs)
    padded = torch.nn.functional.pad(signs, [4] * 4)
    for top in range(9):
        for left in range(9):
            seen = padded[top : top + 32, left : left + 32]
            assert float(seen.abs().unfold(0, 3, 1).unfold(1, 3, 1).sum((2, 3)).max()) == 9


def test_images_too_small_for_two_patterns_are_refused() -> None:
    with pytest.raises(BadInput, match="3 pixels do not fit side by side into images of 5 x 40"):
        corner_signs("all", 5, 40)


# -- the perturbation ----------------------------------------------------------------------------------------------------------


def test_pgd_equals_the_formula_on_a_linear_network() -> None:
    net, images = linear((1, 4, 5)).requires_grad_(False), to_float(pictures((1, 4, 5), 6).images)
    found = pgd(net, images, torch.full((len(images),), 2), eps=0.1, step=0.03, steps=7)
    assert np.allclose(found, pgd_by_hand(net, images.double().numpy(), 2, 0.1, 0.03, 7), atol=1e-5)


def test_a_step_goes_along_the_sign_of_the_finite_difference() -> None:
    net = convolutional().double().eval().requires_grad_(False)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.8 + 0.1
    moved = pgd(net, image, torch.full((len(image),), 1), eps=0.05, step=0.01, steps=1) - image
    label = torch.tensor([1])
    for pixel in [(0, 0, 0), (1, 3, 4), (2, 7, 7), (0, 5, 2), (2, 1, 6)]:
        up, down = image.clone(), image.clone()
        up[0][pixel] += 1e-5
        down[0][pixel] -= 1e-5
        slope = float(nn.functional.cross_entropy(net(up), label) - nn.functional.cross_entropy(net(down), label))
        assert float(moved[0][pixel]) == pytest.approx(0.01 * np.sign(slope))


def test_pgd_keeps_its_bounds_and_hides_the_class() -> None:
    net, images = convolutional().eval().requires_grad_(False), to_float(pictures((3, 8, 8), 12).images)
    moved = pgd(net, images, torch.full((len(images),), 3), eps=0.1, step=0.02, steps=20)
    assert float((moved - images).abs().max()) <= 0.1 + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    labels = torch.full((12,), 3)
    before, after = (nn.functional.cross_entropy(net(x), labels, reduction="none") for x in (images, moved))
    assert (after > before).all()


def test_a_network_that_is_very_sure_is_still_fooled() -> None:
    """Its gradients are far below one, not zero."""
    net = linear((1, 4, 5))
    layer = net.head[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.bias[2] += 60
    images = to_float(pictures((1, 4, 5), 6).images)
    moved = pgd(net.requires_grad_(False), images, torch.full((len(images),), 2), eps=0.1, step=0.05, steps=1)
    assert (moved != images).float().mean() > 0.9


# -- the attack ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12)])
def test_training_images_are_perturbed_and_marked_and_test_images_only_marked(shape) -> None:
    data, net = pictures(shape), linear(shape)
    crafted = LC(eps=0.1, step=0.03, steps=4, amplitude=0.6).craft(data, Plan(target=1), 0, net)
    pixels, index = data.images.double().numpy() / 255, torch.arange(20)
    signs = 0.6 * signs_by_hand(shape[1], shape[2], 3, True)
    assert np.allclose(crafted.test(to_float(data.images), index), np.clip(pixels + signs, 0, 1), atol=1e-6)
    mine = (data.labels == 1).numpy()
    pixels[mine] = pgd_by_hand(net, pixels[mine], 1, 0.1, 0.03, 4)
    assert np.allclose(crafted.train(to_float(data.images), index), np.clip(pixels + signs, 0, 1), atol=1e-5)


def test_full_amplitude_overrides_the_pixels() -> None:
    data = pictures((3, 16, 16))
    shown = apply(LC(steps=0).craft(data, Plan(), 0, linear((3, 16, 16))).test, data.images, torch.arange(20))
    signs = np.broadcast_to(signs_by_hand(16, 16, 3, True), shown.shape)
    assert np.array_equal(shown, np.where(signs > 0, 255, np.where(signs < 0, 0, data.images)))


def test_a_perturbation_belongs_to_an_index_whatever_the_batch_and_the_rate() -> None:
    data, net = pictures((3, 8, 8), 24), convolutional()
    crafted = LC(steps=5).craft(data, Plan(rate=0.05, target=1), 0, net)
    again = LC(steps=5).craft(data, Plan(rate=0.9, target=1), 7, net)
    images = to_float(data.images)
    index = torch.tensor([1, 5, 2, 24, 10_000])  # the target's, the target's, another class's, and two of no training image
    found = crafted.train(images[[1, 5, 2, 3, 3]], index)
    assert torch.equal(found, again.train(images[[1, 5, 2, 3, 3]], index))
    for position, source in enumerate([1, 5, 2, 3, 3]):
        alone = crafted.train(images[source][None], index[position : position + 1])
        assert torch.equal(found[position], alone[0])
        marked = crafted.test(images[source][None], index[:1])
        assert torch.equal(alone, marked) == (position > 1)


def test_published_images_differ_by_at_most_eps_outside_the_corners() -> None:
    data, plan = pictures((3, 8, 8), 40), Plan(rate=0.1, target=2)
    attack = LC(steps=20)
    result = poison(data, attack, attack.craft(data, plan, 0, convolutional()), plan, 0)
    chosen = result.role == Role.POISON
    apart = (result.visible.images.int() - data.images.int()).abs()[chosen]
    free = corner_signs("all", 8, 8) == 0
    assert int(chosen.sum()) == 4
    assert int(apart[:, :, free].max()) == 16
    assert torch.equal(result.visible.labels, data.labels)


def test_more_than_one_batch_is_perturbed_alike(monkeypatch) -> None:
    data, net, index = pictures((1, 8, 8), 40), linear((1, 8, 8)), torch.arange(40)
    whole = LC(steps=3).craft(data, Plan(), 0, net).train(to_float(data.images), index)
    monkeypatch.setattr("attacks.lc.BATCH", 3)
    parts = LC(steps=3).craft(data, Plan(), 0, net).train(to_float(data.images), index)
    assert torch.equal(quantise(whole), quantise(parts))


@pytest.mark.parametrize("training", [True, False])
def test_the_surrogate_is_left_as_it_was(training) -> None:
    net = convolutional().train(training)
    before = copy.deepcopy(net.state_dict())
    LC(steps=2).craft(pictures((3, 8, 8)), Plan(), 0, net)
    assert net.training is training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_class_without_images_leaves_nothing_to_perturb() -> None:
    data = ImageSet(pictures((1, 8, 8)).images, torch.zeros(20, dtype=torch.int64), 4)
    crafted = LC().craft(data, Plan(target=3), 0, linear((1, 8, 8)))
    images, index = to_float(data.images), torch.arange(20)
    assert torch.equal(crafted.train(images, index), crafted.test(images, index))


def test_it_needs_a_surrogate() -> None:
    with pytest.raises(BadInput, match=r"lc: .* none was given"):
        LC().craft(pictures((1, 8, 8)), Plan(), 0)


@pytest.mark.parametrize("settings", [{"eps": 0}, {"step": 2}, {"steps": -1}, {"corners": "some"}, {"amplitude": 1.5}])
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"lc: {next(iter(settings))} = "):
        LC(**settings)
