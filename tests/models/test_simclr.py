"""The contrastive loss against loops and the reference values; views and cutout against their words; one training."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import adjust_hue

from models.augmentations import VIEW_DRAWS, blurred, cutout, hue_turned, simclr_view
from models.backbone import Network
from models.images import ImageSet, to_float
from models.recipe import Recipe
from models.simclr import SimCLR, contrastive_loss
from models.spec import generator, uniforms
from models.training import fit
from models.vgg import VGG11BN


def pairs() -> Tensor:
    z = torch.from_numpy(np.sin(np.arange(1, 61))).float().view(6, 2, 5)
    return z / z.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("temperature", "symmetric", "expected"), [(0.5, False, 2.48467946), (1.0, False, 2.26740742), (0.5, True, 2.48601437)]
)
def test_contrastive_loss_at_the_reference_values(temperature: float, symmetric: bool, expected: float) -> None:
    """Closed-form input; the numbers come from DBD's authors' function and, symmetric, from lightly 1.6."""
    assert contrastive_loss(pairs(), temperature, symmetric=symmetric).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_contrastive_loss_is_that_of_a_loop_and_ignores_length(symmetric: bool) -> None:
    z = pairs().double()
    flat = [*z[:, 0].numpy(), *z[:, 1].numpy()]
    terms = []
    for i in range(12 if symmetric else 6):
        others = sum(np.exp(flat[i] @ flat[k] / 0.3) for k in range(12) if k != i)
        terms.append(np.log(others) - flat[i] @ flat[(i + 6) % 12] / 0.3)
    assert contrastive_loss(z, 0.3, symmetric=symmetric).item() == pytest.approx(np.mean(terms))
    lengths = torch.linspace(0.5, 3, 12, dtype=torch.float64).view(6, 2, 1)
    assert contrastive_loss(z * lengths, 0.3, symmetric=symmetric).item() == pytest.approx(np.mean(terms))


def draws(count: int, seed: int = 0) -> Tensor:
    return uniforms(seed, torch.arange(count), VIEW_DRAWS)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator(0, "noise"))


def test_views_are_drawn_for_each_image_and_stay_images() -> None:
    x = noise(1, 3, 8, 8).expand(64, -1, -1, -1)
    first = simclr_view(x, draws(64), flip=True, blur=0.5)
    assert first.shape == x.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert len({row.numpy().tobytes() for row in first}) == 64


def test_a_view_does_not_depend_on_its_batch() -> None:
    x, u = noise(20, 3, 8, 8), draws(20)
    whole = simclr_view(x, u, flip=True, blur=0.5)
    picked = torch.tensor([7, 3, 19])
    torch.testing.assert_close(simclr_view(x[picked], u[picked], flip=True, blur=0.5), whole[picked])


def test_shares_of_the_views_are_grey_blurred_or_left_in_colour() -> None:
    x = noise(2000, 3, 8, 8)
    seen = simclr_view(x, draws(2000), flip=False, blur=0.0)
    grey = (seen - seen.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-6
    assert 0.15 < grey.double().mean() < 0.25
    x = noise(400, 1, 32, 32)
    sharp, soft = (simclr_view(x, draws(400), flip=False, blur=blur) for blur in (0.0, 0.5))
    assert 0.4 < (sharp != soft).flatten(1).any(1).double().mean() < 0.56
    assert simclr_view(x[:4], draws(4), flip=False, blur=1.0).shape == (4, 1, 32, 32)


def test_only_flipping_views_mirror() -> None:
    """A horizontal ramp keeps its direction under crops and colours; mirrored it falls."""
    ramp = torch.linspace(0.3, 0.6, 8).expand(400, 1, 8, 8).contiguous()

    def falling(flip: bool) -> float:
        seen = simclr_view(ramp, draws(400), flip=flip, blur=0.0)
        return float((seen[..., -1].mean((1, 2)) < seen[..., 0].mean((1, 2))).double().mean())

    assert falling(False) == 0
    assert 0.4 < falling(True) < 0.6


def test_crops_show_between_a_fifth_and_all_of_the_image() -> None:
    """Two ramps tell which window a view shows: its share of the ramp's range is its share of the side."""
    across = torch.linspace(0, 1, 64).expand(64, 64)
    x = torch.stack([across, across.T]).expand(500, -1, -1, -1).contiguous()
    u = draws(500, seed=1)
    u[:, 5] = 0.9  # no jitter
    seen = simclr_view(x, u, flip=False, blur=0.0)
    wide = seen[:, 0].amax((1, 2)) - seen[:, 0].amin((1, 2))
    high = seen[:, 1].amax((1, 2)) - seen[:, 1].amin((1, 2))
    area = wide * high
    assert 0.17 < area.min() < 0.25
    assert area.max() > 0.9
    assert 0.7 < (wide / high).min() < (wide / high).max() < 1.4


def test_without_any_change_a_view_is_its_image() -> None:
    u = draws(3)
    u[:, 0], u[:, 1], u[:, 5], u[:, 10] = 1.0, 0.5, 0.9, 0.9
    x = noise(3, 3, 8, 8)
    torch.testing.assert_close(simclr_view(x, u, flip=False, blur=0.0), x, atol=1e-6, rtol=0)


def test_jitter_by_hand() -> None:
    """Brightness, then contrast about the mean of the grey image, then saturation about grey; no turn of the hue."""
    u = draws(1)
    u[:, 0], u[:, 1], u[:, 5], u[:, 9], u[:, 10] = 1.0, 0.5, 0.1, 0.5, 0.9
    x = noise(1, 3, 8, 8)
    expected = x[0].double().numpy()
    luma = np.array([0.299, 0.587, 0.114])
    bright, contrast, saturation = (0.6 + 0.8 * float(u[0, k]) for k in (6, 7, 8))
    expected = np.clip(bright * expected, 0, 1)
    mean = np.tensordot(luma, expected, 1).mean()
    expected = np.clip(contrast * expected + (1 - contrast) * mean, 0, 1)
    grey = np.tensordot(luma, expected, 1)
    expected = np.clip(saturation * expected + (1 - saturation) * grey, 0, 1)
    np.testing.assert_allclose(simclr_view(x, u, flip=False, blur=0.0)[0], expected, atol=1e-5)


def test_hue_is_that_of_torchvision_and_of_the_standard_library() -> None:
    x = noise(6, 3, 5, 5)
    x[0, :, 0, 0] = 0.4  # grey has no hue
    x[0, :, 0, 1] = torch.tensor([0.7, 0.7, 0.2])  # two channels are the largest
    x[0, :, 0, 2] = torch.tensor([0.7, 0.2, 0.7])
    x[0, :, 0, 3] = torch.tensor([0.2, 0.7, 0.7])
    turn = torch.tensor([-0.1, -0.03, 0.0, 0.02, 0.08, 0.1])
    seen = hue_turned(x, turn)
    for image, out, angle in zip(x, seen, turn.tolist(), strict=True):
        torch.testing.assert_close(out, adjust_hue(image, angle), atol=1e-5, rtol=0)
    hue, saturation, value = colorsys.rgb_to_hsv(*x[4, :, 2, 3].tolist())
    assert seen[4, :, 2, 3].tolist() == pytest.approx(colorsys.hsv_to_rgb((hue + 0.08) % 1, saturation, value), abs=1e-5)


def test_blur_by_loops() -> None:
    x, sigma = noise(2, 2, 5, 6), torch.tensor([0.3, 1.7])
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="edge")
    expected = np.zeros((2, 2, 5, 6))
    for n, s in enumerate(sigma.tolist()):
        weights = np.array([[np.exp(-(i * i + j * j) / (2 * s * s)) for j in range(-3, 4)] for i in range(-3, 4)])
        weights /= weights.sum()
        for c in range(2):
            for i in range(5):
                for j in range(6):
                    expected[n, c, i, j] = (weights * padded[n, c, i : i + 7, j : j + 7]).sum()
    np.testing.assert_allclose(blurred(x, sigma, 3), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cutout_by_loops(size: int) -> None:
    x, u = noise(40, 2, 5, 7) + 0.1, uniforms(3, torch.arange(40), 2)
    expected = x.clone()
    for n in range(40):
        top, left = int(u[n, 0] * 5) - size // 2, int(u[n, 1] * 7) - size // 2
        for i in range(max(0, top), min(5, top + size)):
            for j in range(max(0, left), min(7, left + size)):
                expected[n, :, i, j] = 0
    assert torch.equal(cutout(x, u, size), expected)
    assert len({(row[0] == 0).numpy().tobytes() for row in expected}) > 15


def data_of(size: int = 24) -> ImageSet:
    images = torch.randint(0, 256, (size, 1, 8, 8), generator=generator(0, "images"))
    return ImageSet(images.to(torch.uint8), torch.arange(size) % 4, 4)


def net_of() -> Network:
    return VGG11BN(width=2, hidden=0).build(4, (1, 8, 8), [0.5], [0.25], 0)


class Watched(SimCLR):
    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def views(self, images: Tensor, index: Tensor) -> Tensor:
        both = super().views(images, index)
        self.seen.append((int(self.current_epoch), index.clone(), both))
        return both


def trained(batch: int, seed: int = 1) -> Watched:
    recipe = Recipe(epochs=2, batch=batch, lr=0.1, crop=0, flip=False)
    module = Watched(net_of(), recipe, width=16, temperature=0.5, flip=True, blur=0.5, seed=seed)
    fit(module, data_of(), recipe, 0)
    return module


def views_by_sample(module: Watched) -> dict[tuple[int, int, int], Tensor]:
    return {
        (epoch, view, int(sample)): image
        for epoch, index, both in module.seen
        for view, images in enumerate(both.chunk(2))
        for sample, image in zip(index, images, strict=True)
    }


def test_views_are_keyed_by_seed_epoch_view_and_sample() -> None:
    small, large, other = (views_by_sample(module) for module in (trained(8), trained(24), trained(24, seed=2)))
    assert len(small) == 2 * 2 * 24
    for key, image in small.items():
        torch.testing.assert_close(image, large[key])
    looks = [large[epoch, view, 5] for epoch in range(2) for view in range(2)]
    assert not any(torch.equal(a, b) for k, a in enumerate(looks) for b in looks[:k])
    assert not torch.equal(large[0, 0, 5], other[0, 0, 5])


def test_a_step_is_the_loss_of_projected_features_of_both_views() -> None:
    recipe = Recipe(epochs=1, batch=24, crop=0, flip=False)
    module = SimCLR(net_of(), recipe, width=16, temperature=0.5, flip=False, blur=0.0, seed=4).eval()
    data = data_of()
    both = module.views(to_float(data.images), torch.arange(24))
    with torch.no_grad():
        z = [module.projection(module.net.features(module.net.normalise(part))) for part in both.chunk(2)]
        step = module.training_step((to_float(data.images), data.labels, torch.arange(24)), 0)
    torch.testing.assert_close(step, contrastive_loss(torch.stack(z, 1), 0.5))
    assert z[0].shape == (24, 128)


def test_the_head_is_left_alone_and_the_projection_is_trained() -> None:
    module, start = trained(24), net_of()
    assert all(map(torch.equal, module.net.head.parameters(), start.head.parameters()))
    fresh = SimCLR(net_of(), module.recipe, width=16, temperature=0.5, flip=True, blur=0.5, seed=1)
    assert not torch.equal(module.projection[0].weight, fresh.projection[0].weight)
    assert module.projection[3].bias is not None


def test_training_lowers_the_loss() -> None:
    """Images of four by four random squares: what tells them apart survives the crops and the jitter."""
    squares = torch.randint(0, 256, (64, 1, 4, 4), generator=generator(0, "squares"))
    data = ImageSet(squares.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8), torch.zeros(64).long(), 4)
    recipe = Recipe(epochs=30, batch=32, lr=0.1, weight_decay=1e-4, crop=0, flip=False)
    losses: list[float] = []

    class Kept(SimCLR):
        def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    net = VGG11BN(width=8, hidden=0).build(4, (1, 16, 16), [0.5], [0.25], 0)
    fit(Kept(net, recipe, width=64, temperature=0.5, flip=False, blur=0.0, seed=0), data, recipe, 0)
    assert len(losses) == 60
    assert np.mean(losses[-8:]) < np.mean(losses[:4]) - 0.15
