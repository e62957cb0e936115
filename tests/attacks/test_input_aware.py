from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.base import Plan, Power, Role, Trigger, apply, poison, uniforms
from attacks.dynamic import DynamicVictim, batch_roles
from attacks.generated import in_fixed_batches
from attacks.input_aware import (
    CrossTrigger,
    Generator,
    InputAware,
    InputAwareVictim,
    MaskTraining,
    OwnTrigger,
    diversity,
    hardened,
    mixed,
    statistics,
)
from models.backbone import Network, Normalise
from models.images import ImageSet, quantise, to_float
from models.recipe import Recipe
from models.spec import BadInput, derive_seed
from models.training import fit, seeded

TINY = InputAware(width=2, mask_epochs=2, batch=16)
RECIPE = Recipe(epochs=2, batch=16, lr=0.05, crop=1, flip=True)


def pictures(count: int, shape: tuple[int, int, int], classes: int = 4) -> ImageSet:
    """Smooth, so that a distance between images says something."""
    draw = torch.Generator().manual_seed(4)
    coarse = torch.rand(count, shape[0], 3, 3, generator=draw)
    images = quantise(torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=True))
    return ImageSet(images, torch.randint(0, classes, (count,), generator=draw), classes)


# -- the generator, layer by layer in loops ------------------------------------------------------------------------------------


def conv_by_hand(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """(C, H, W) -> (O, H, W): 3x3, zeros outside."""
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), height, width))
    for o, i, j in np.ndindex(*out.shape):
        out[o, i, j] = bias[o] + (weight[o] * padded[:, i : i + 3, j : j + 3]).sum()
    return out


def block_by_hand(x: np.ndarray, block: nn.Sequential, relu: bool) -> np.ndarray:
    conv, norm = block[0], block[1]
    out = conv_by_hand(x, conv)
    for c in range(len(out)):
        scale = float(norm.weight[c]) / math.sqrt(float(norm.running_var[c]) + norm.eps)
        out[c] = (out[c] - float(norm.running_mean[c])) * scale + float(norm.bias[c])
    return np.maximum(out, 0) if relu else out


def pooled_by_hand(x: np.ndarray) -> np.ndarray:
    channels, height, width = x.shape
    out = np.zeros((channels, height // 2, width // 2))
    for c, i, j in np.ndindex(*out.shape):
        out[c, i, j] = x[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max()
    return out


def enlarged_by_hand(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixel centres at halves, edges repeated."""
    _, h, w = x.shape
    out = np.zeros((len(x), height, width))
    for i, j in np.ndindex(height, width):
        y, z = max(0.0, (i + 0.5) * h / height - 0.5), max(0.0, (j + 0.5) * w / width - 0.5)
        a, b = int(y), int(z)
        for di, dj in np.ndindex(2, 2):
            weight = abs(1 - di - (y - a)) * abs(1 - dj - (z - b))
            out[:, i, j] += weight * x[:, min(a + di, h - 1), min(b + dj, w - 1)]
    return out


def generated_by_hand(image: np.ndarray, net: Generator) -> np.ndarray:
    x = (image - net.normalise.mean[0].double().numpy()) / net.normalise.std[0].double().numpy()
    sizes = []
    for stage in net.down:
        sizes.append(x.shape[1:])
        x = pooled_by_hand(block_by_hand(block_by_hand(x, stage[0], True), stage[1], True))
    x = block_by_hand(x, net.middle, True)
    for number, stage in enumerate(net.up):
        x = enlarged_by_hand(x, *sizes[2 - number])
        x = block_by_hand(block_by_hand(x, stage[0], True), stage[1], number < 2)
    return np.tanh(x) / 2 + 0.5


def unsettled(net: Generator) -> Generator:
    """With statistics and scales of batch norm that are not 0 and 1, in evaluation mode."""
    draw = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.running_mean, -0.3), (module.running_var, 0.5), (module.weight, 0.7), (module.bias, -0.2)):
                value.data.copy_(torch.rand(value.shape, generator=draw) * 0.6 + low)
    return net.eval().requires_grad_(False)


def made(outputs: int, channels: int, seed: int = 0) -> Generator:
    with seeded(seed):
        return Generator(outputs, 2, [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels])


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 8, 8), (1, 11, 14), (2, 16, 9)])
def test_the_generator_equals_its_layers_in_loops(channels, height, width) -> None:
    net = unsettled(made(channels, channels))
    image = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(2))
    expected = generated_by_hand(image[0].double().numpy(), net)
    assert np.allclose(net(image)[0], expected, atol=1e-5)
    assert 0 < expected.min() < expected.max() < 1


def test_the_generator_has_the_published_widths() -> None:
    convs = [module for module in Generator(3, 32, [0.5] * 3, [0.2] * 3).modules() if isinstance(module, nn.Conv2d)]
    found = [(conv.in_channels, conv.out_channels) for conv in convs]
    encoder = [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 128)]
    assert found == [*encoder, (128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 3)]


def test_statistics_are_the_channels_mean_and_deviation() -> None:
    data = pictures(9, (3, 8, 10))
    mean, std = statistics(data)
    pixels = data.images.double().numpy() / 255
    assert np.allclose(mean, pixels.mean((0, 2, 3)))
    assert np.allclose(std, pixels.std((0, 2, 3)))
    assert statistics(ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2))[1] == [0.001]


# -- losses --------------------------------------------------------------------------------------------------------------------


def diversity_by_hand(one: np.ndarray, other: np.ndarray, made_one: np.ndarray, made_other: np.ndarray) -> float:
    total = 0.0
    for a, b, p, q in zip(one, other, made_one, made_other, strict=True):
        total += math.sqrt(((a - b) ** 2).mean()) / (math.sqrt(((p - q) ** 2).mean()) + 1e-7)
    return total / len(one)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_diversity_equals_the_formula_and_its_gradient_the_difference_quotient() -> None:
    parts = [numbers(3, 2, 3, 4, seed=i) for i in range(2)] + [numbers(3, 1, 3, 4, seed=i) for i in (2, 3)]
    assert float(diversity(*parts)) == pytest.approx(diversity_by_hand(*(part.numpy() for part in parts)))
    moved = [part.requires_grad_(True) for part in parts]
    assert torch.autograd.gradcheck(diversity, moved)


def test_equal_images_and_no_pairs_give_finite_gradients() -> None:
    x = numbers(2, 1, 3, 3).requires_grad_(True)
    diversity(x, x, x, x).backward()
    assert torch.isfinite(x.grad).all()
    none = x[:0].detach()
    assert float(diversity(none, none, none, none)) == 0.0


def test_the_mask_loss_equals_the_formula_and_its_gradient_the_difference_quotient() -> None:
    attack = InputAware(width=2, density=0.4, norm_weight=7.0, diversity_weight=3.0)
    training = MaskTraining(made(1, 3), RECIPE, attack).double()
    images, raw = numbers(4, 3, 5, 5), numbers(4, 1, 5, 5, seed=1)
    normal = (images.numpy() - training.mask.normalise.mean.numpy()) / training.mask.normalise.std.numpy()
    masks = np.tanh(20 * raw.numpy() - 10) / 2 + 0.5
    expected = 7 * np.maximum(masks - 0.4, 0).mean()
    expected += 3 * diversity_by_hand(normal, normal[[1, 2, 3, 0]], masks, masks[[1, 2, 3, 0]])
    assert float(training.mask_loss(images, hardened(raw))) == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda value: training.mask_loss(images, hardened(value)), [raw.requires_grad_(True)])


def test_mask_training_makes_masks_smaller_and_leaves_no_trace_elsewhere() -> None:
    data = pictures(64, (1, 8, 8))
    areas = []
    for epochs in (0, 15):
        trigger = InputAware(width=4, mask_epochs=epochs, batch=16).craft(data, Plan(), 0).train
        assert isinstance(trigger, OwnTrigger)
        areas.append(float(hardened(trigger.mask(to_float(data.images))).mean()))
    assert areas[1] < 0.5 * areas[0]


# -- triggers ------------------------------------------------------------------------------------------------------------------


def test_triggers_equal_the_formula() -> None:
    data, index = pictures(5, (3, 10, 9)), torch.tensor([4, 0, 2])
    pattern, mask = unsettled(made(3, 3)), unsettled(made(1, 3, seed=1))
    pixels = data.images.double().numpy() / 255

    def expected(of: int, donor: int) -> np.ndarray:
        m = np.tanh(20 * generated_by_hand(pixels[donor], mask) - 10) / 2 + 0.5
        return pixels[of] * (1 - m) + generated_by_hand(pixels[donor], pattern) * m

    images = to_float(data.images[index])
    own = OwnTrigger(pattern, mask)(images, index)
    assert np.allclose(own, np.stack([expected(i, i) for i in index.tolist()]), atol=1e-5)
    crossed = CrossTrigger(pattern, mask, data, key=9)(images, index)
    draws = uniforms(9, index, 1)[:, 0].tolist()
    donors = [(i + 1 + int(draw * 4)) % 5 for i, draw in zip(index.tolist(), draws, strict=True)]
    pairs = list(zip(index.tolist(), donors, strict=True))
    assert all(i != donor for i, donor in pairs)
    assert np.allclose(crossed, np.stack([expected(i, donor) for i, donor in pairs]), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 70])
def test_fixed_batches_give_every_image_the_same_bits_whatever_comes_with_it(count) -> None:
    net = unsettled(made(3, 3))
    images = torch.rand(70, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    whole = in_fixed_batches(net, images)
    turned = torch.randperm(70, generator=torch.Generator().manual_seed(3))[:count]
    some = in_fixed_batches(net, images[turned].contiguous(memory_format=torch.channels_last))
    assert torch.equal(some, whole[turned])
    assert torch.allclose(whole, net(images), atol=1e-6)


def test_sides_below_eight_pixels_are_refused() -> None:
    with pytest.raises(BadInput, match="at least 8 pixels, not 7 x 40"):
        TINY.craft(pictures(4, (1, 7, 40)), Plan(), 0)


# -- the joint training --------------------------------------------------------------------------------------------------------


def victim_of(attack: InputAware, data: ImageSet, plan: Plan, seed: int = 0) -> InputAwareVictim:
    with seeded(0):
        pixels = math.prod(data.shape)
        net = Network(Normalise([0.5], [0.5]), nn.Flatten(), nn.Sequential(nn.Linear(pixels, 4)))
    victim = attack.victim(net, RECIPE, attack.craft(data, plan, seed), plan, seed)
    assert isinstance(victim, InputAwareVictim)
    return victim


def test_a_batch_is_poisoned_as_its_roles_say() -> None:
    data, plan = pictures(20, (1, 8, 8)), Plan(rate=0.3, target=1)
    victim = victim_of(TINY, data, plan).train()
    assert not victim.mask.training
    assert victim.pattern.training
    images, role = to_float(data.images), torch.zeros(20, dtype=torch.int8)
    role[[3, 7, 12]], role[[0, 9]] = Role.POISON, Role.COVER
    out, labels, apart = victim.triggered(images, data.labels, role)
    sources = images[[3, 7, 12, 19, 8]]
    victim.pattern.load_state_dict(victim_of(TINY, data, plan).pattern.state_dict())
    patterns, masks = victim.pattern(sources), hardened(victim.mask(sources))
    assert torch.allclose(out[[3, 7, 12, 0, 9]], mixed(images[[3, 7, 12, 0, 9]], patterns, masks), atol=1e-6)
    assert labels[[3, 7, 12]].tolist() == [1, 1, 1]
    assert torch.equal(labels[role != Role.POISON], data.labels[role != Role.POISON])
    assert torch.equal(out[role == Role.CLEAN], images[role == Role.CLEAN])
    normal = victim.pattern.normalise
    pairs = [part.detach().numpy() for part in (normal(sources), normal(patterns))]
    expected = diversity_by_hand(pairs[0][:2], pairs[0][3:], pairs[1][:2], pairs[1][3:])
    assert float(apart.detach()) == pytest.approx(expected, rel=1e-4)
    same, kept, nothing = victim.triggered(images, data.labels, torch.zeros(20, dtype=torch.int8))
    assert torch.equal(same, images)
    assert torch.equal(kept, data.labels)
    assert float(nothing) == 0


def test_a_single_trigger_of_a_small_image_can_be_trained() -> None:
    data = pictures(20, (1, 8, 8))
    victim = victim_of(TINY, data, Plan(target=1)).train()
    role = torch.zeros(20, dtype=torch.int8)
    role[4] = Role.POISON
    out, _, apart = victim.triggered(to_float(data.images), data.labels, role)
    assert bool(torch.isfinite(out).all())
    assert float(apart.detach()) == 0


def test_gradients_of_the_pattern_generator_add_up_only_where_asked() -> None:
    data, plan = pictures(48, (1, 8, 8)), Plan(rate=0.25, target=1)
    ends = []
    for accumulate in (False, True):
        victim = victim_of(InputAware(width=2, mask_epochs=1, batch=16, accumulate_g=accumulate), data, plan)
        fit(victim, data, RECIPE, seed=7)
        kept = [weight.grad for weight in victim.pattern.parameters()]
        assert all((grad is not None) == accumulate for grad in kept)
        ends.append(torch.cat([weight.detach().flatten() for weight in victim.pattern.parameters()]).cpu())
    assert not torch.equal(*ends)


def test_training_is_reproducible_moves_the_pattern_and_not_the_mask_and_is_exported() -> None:
    data, plan = pictures(48, (1, 8, 8)), Plan(rate=0.25, target=1)
    attack = InputAware(width=2, mask_epochs=1, batch=16, rounding="floor")
    index, stored = torch.arange(48), []
    for _ in range(2):
        victim = victim_of(attack, data, plan)
        crafted = attack.craft(data, plan, 0)
        assert isinstance(crafted.train, OwnTrigger)
        before = apply(crafted.test, data.images, index)
        fit(victim, data, RECIPE, seed=7)
        after = attack.finished(victim, crafted)
        assert isinstance(after.train, OwnTrigger)
        masks = [list(trigger.mask.state_dict().values()) for trigger in (crafted.train, after.train)]
        assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))
        assert torch.equal(apply(crafted.test, data.images, index), before), "crafted triggers are left as they were"
        stored.append(apply(after.test, data.images, index))
        assert not torch.equal(stored[-1], before)
        assert victim.realised == {"poison": 4 / 16, "cover": 4 / 16}
        exported = poison(data, attack, after, plan, 0)
        assert [exported.realised(role) for role in Role] == [0.5, 0.25, 0.25]
        chosen = exported.role == Role.POISON
        assert torch.equal(exported.visible.images[chosen], stored[-1][chosen])
    assert torch.equal(*stored)


def test_other_samples_are_poisoned_in_every_epoch() -> None:
    victim = victim_of(TINY, pictures(40, (1, 8, 8)), Plan(rate=0.25))
    assert isinstance(victim, DynamicVictim)
    assert victim.before_augment is None, "augmentation comes before the trigger"
    draws = victim.draws(torch.arange(40))
    assert torch.equal(draws, uniforms(derive_seed(0, "dynamic-roles"), torch.arange(40) + (1 << 32), 2))
    assert int((batch_roles(draws, 0.25, 0.25, "floor") == Role.POISON).sum()) == 10


def test_it_needs_the_training_and_its_triggers_are_functions_of_images() -> None:
    assert InputAware().power is Power.TRAINING
    crafted = TINY.craft(pictures(20, (1, 8, 8)), Plan(), 0)
    cover: Trigger | None = crafted.cover
    assert isinstance(cover, CrossTrigger)


@pytest.mark.parametrize(
    "settings",
    [{"width": 0}, {"density": 2}, {"norm_weight": -1}, {"mask_epochs": -1}, {"batch": 1}, {"generator_lr": 0}, {"rounding": "up"}],
)
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"input-aware: {next(iter(settings))} = "):
        InputAware(**settings)
