"""Semi-supervised training: its formulas against loops and reference values, its batches, one step written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.backbone import Network
from models.images import ImageSet, to_float
from models.mixmatch import MixMatch, interleave, mixmatch_loss, ramped, sharpened
from models.recipe import Recipe
from models.spec import generator
from models.training import fit, logits
from models.vgg import VGG11BN

RECIPE = Recipe(epochs=2, batch=6, lr=0.01, optimizer="adam", weight_decay=0, schedule="constant", crop=1, flip=True)


def sines(count: int, step: float, *shape: int) -> Tensor:
    return torch.from_numpy(np.sin(step * np.arange(1, count + 1))).float().view(shape)


def test_losses_at_the_reference_values() -> None:
    """Closed-form inputs; the two numbers come from DBD's authors' functions."""
    given = torch.eye(10)[torch.tensor([1, 2, 3, 4])]
    lx, lu = mixmatch_loss(2 * sines(40, 0.3, 4, 10), given, 2 * sines(80, 0.9, 8, 10), sines(80, 0.4, 8, 10).softmax(1))
    assert lx.item() == pytest.approx(2.60990357, rel=1e-6)
    assert lu.item() == pytest.approx(0.01453918, rel=1e-5)


def test_losses_of_soft_targets_by_loops() -> None:
    x, xt = sines(12, 0.7, 3, 4), sines(12, 0.2, 3, 4).softmax(1)
    u, ut = sines(20, 0.5, 5, 4), sines(20, 0.9, 5, 4).softmax(1)
    found = [loss.item() for loss in mixmatch_loss(x, xt, u, ut)]
    a, at, b, bt = (tensor.double().numpy() for tensor in (x, xt, u, ut))
    lx = -sum(at[i, c] * np.log(np.exp(a[i, c]) / np.exp(a[i]).sum()) for i in range(3) for c in range(4)) / 3
    lu = sum((np.exp(b[i, c]) / np.exp(b[i]).sum() - bt[i, c]) ** 2 for i in range(5) for c in range(4)) / 20
    assert found == pytest.approx([lx, lu], rel=1e-5)


def test_sharpening_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    assert sharpened(p, 0.5)[0].tolist() == pytest.approx([v**2 / (0.25 + 0.09 + 0.04) for v in (0.5, 0.3, 0.2)])
    torch.testing.assert_close(sharpened(p, 1.0), p)


def test_the_ramp_at_the_reference_value_and_its_ends() -> None:
    assert ramped(15, 10 + 256 / 1024, 190) == pytest.approx(0.80921053)
    assert [ramped(15, position, 4) for position in (0, 1, 4, 9)] == [0, 3.75, 15, 15]


def test_interleaving_at_the_reference_values() -> None:
    parts = [torch.arange(start, start + 6) for start in (0, 10, 20)]
    mixed = interleave(parts)
    assert [part.tolist() for part in mixed] == [[0, 1, 12, 13, 24, 25], [10, 11, 2, 3, 14, 15], [20, 21, 22, 23, 4, 5]]
    assert all(map(torch.equal, interleave(mixed), parts))


def test_interleaving_64_samples_cuts_at_21_and_42() -> None:
    first = interleave([torch.full((64,), part) for part in range(3)])[0].tolist()
    assert first == [0] * 21 + [1] * 21 + [2] * 22


def data_of(size: int = 40) -> ImageSet:
    """Every image is of one brightness, five times its number."""
    images = (5 * torch.arange(size)).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return ImageSet(images, torch.arange(size) % 4, 4)


def net_of() -> Network:
    return VGG11BN(width=2, hidden=5).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0)


def module_of(split, recipe: Recipe = RECIPE, **changes) -> MixMatch:
    settings = {"iterations": 9, "sharpen": 0.5, "mixup": 0.75, "weight": 3.0, "ramp": 2.0, **changes}
    return MixMatch(net_of(), recipe, split, **settings)


def even(net: Network, data: ImageSet) -> Tensor:
    return torch.arange(len(data)) % 2 == 0


def test_batches_come_from_the_two_sides_and_views_show_the_same_images() -> None:
    data = data_of()
    module = module_of(even)
    seen: tuple[list[int], list[int]] = ([], [])
    batches = list(module.loader(data, 1))
    assert len(batches) == 9
    for images, labels, views in batches:
        assert images.shape == (6, 3, 8, 8)
        assert views.shape == (12, 3, 8, 8)
        known = (images.amax((1, 2, 3)) * 51).round().long()
        assert torch.equal(labels, data.labels[known])
        first, second = views.chunk(2)
        assert torch.equal(first.amax((1, 2, 3)), second.amax((1, 2, 3)))
        seen[0].extend(known.tolist())
        seen[1].extend((first.amax((1, 2, 3)) * 51).round().long().tolist())
    assert {number % 2 for number in seen[0]} == {0}
    assert {number % 2 for number in seen[1]} == {1}
    for numbers in seen:  # three batches of six to a round of twenty; the next round is shuffled anew
        assert len(set(numbers[:18])) == 18
        assert numbers[:18] != numbers[18:36]
    views = torch.cat([views.view(2, 6, 3, 8, 8) for _, _, views in batches], 1)
    assert not torch.equal(views[0], views[1])  # their crops differ
    twice = list(module.loader(data, 1))
    assert all(torch.equal(a, b) for one, two in zip(batches, twice, strict=True) for a, b in zip(one, two, strict=True))


def test_a_small_side_sets_the_batch_and_an_empty_one_is_refused() -> None:
    images, labels, views = next(iter(module_of(lambda net, data: torch.arange(40) < 3).loader(data_of(), 0)))
    assert (len(images), len(labels), len(views)) == (3, 3, 6)
    with pytest.raises(ValueError, match="39 of 40 samples are labelled"):
        next(iter(module_of(lambda net, data: torch.arange(40) < 39).loader(data_of(), 0)))


def test_the_set_is_split_anew_before_every_epoch_by_the_network_as_it_stands() -> None:
    seen: list[tuple[int, bool, Tensor]] = []
    module = module_of(even)

    def split(net: Network, data: ImageSet) -> Tensor:
        found = logits(net, data.images)
        seen.append((int(module.global_step), net.training, found))
        return even(net, data) if len(seen) == 1 else ~even(net, data)

    module.split = split
    fit(module, data_of(), RECIPE, 0)
    assert [(step, training) for step, training, _ in seen] == [(0, True), (9, True)]
    assert not torch.equal(seen[0][2], seen[1][2])
    assert torch.equal(module.labelled, torch.arange(40) % 2 == 1)


def test_one_step_against_plain_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess, sharpen, mix with one share, both losses at the ramp's place: written out on the network's own probabilities."""
    module = module_of(even, iterations=4, head_start=0.25).eval()
    monkeypatch.setattr(MixMatch, "global_step", 1)
    order = torch.randperm(18, generator=generator(0, "order"))
    monkeypatch.setattr(torch, "randperm", lambda count: order)
    share = torch.tensor(0.3)
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: share)
    images, views = to_float(data_of().images[:6]), to_float(data_of().images[6:18])
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    loss = module.training_step((images, labels, views), 0).item()

    def probabilities(x: Tensor) -> np.ndarray:
        with torch.no_grad():
            return module.net(x).double().softmax(1).numpy()

    guess = ((probabilities(views[:6]) + probabilities(views[6:])) / 2) ** 2
    guess /= guess.sum(1, keepdims=True)
    targets = np.concatenate([np.eye(4)[labels], guess, guess])
    inputs = torch.cat([images, views])
    p = probabilities(0.7 * inputs + 0.3 * inputs[order])
    mixed = 0.7 * targets + 0.3 * targets[order.numpy()]
    lx = -(mixed[:6] * np.log(p[:6])).sum(1).mean()
    lu = np.square(p[6:] - mixed[6:]).mean()
    assert loss == pytest.approx(lx + 3.0 * (0.25 + 1 / 4) / 2 * lu, rel=1e-4)


def test_guesses_carry_no_gradient_and_training_mode_sees_five_passes() -> None:
    module = module_of(even).train()
    calls: list[bool] = []
    module.net.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    batch = next(iter(module.loader(data_of(), 0)))
    module.training_step(batch, 0).backward()
    assert calls == [False, False, True, True, True]


def test_the_same_seed_gives_the_same_weights_and_the_cost_is_counted() -> None:
    nets = []
    for seed in (0, 0, 1):
        module = module_of(even)
        done = fit(module, data_of(), RECIPE, seed)
        nets.append(torch.cat([value.flatten() for value in done.net.state_dict().values()]))
        assert (done.samples_forward, done.samples_backward) == (2 * 9 * 5 * 6, 2 * 9 * 3 * 6)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])
