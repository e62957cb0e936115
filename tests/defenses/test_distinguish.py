"""The detector of D-BR and D-ST against loops and the reference values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import rotate

from defenses import distinguish
from defenses.base import Inapplicable, Knowledge
from defenses.d_br import DBR
from defenses.d_st import DST
from defenses.distinguish import SampleDistinguishment, consistency, intra_class_loss, sides
from models.augmentations import rotated_and_moved
from models.images import Batches, ImageSet, to_float
from models.spec import BadInput, derive_seed, generator, uniforms


@dataclass(frozen=True)
class Alone(SampleDistinguishment):
    name: ClassVar[str] = "alone"

    needs: ClassVar[Knowledge] = Knowledge.TRAIN


def sines(count: int, step: float, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.sin(step * np.arange(1, count + 1))).float().view(shape)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_intra_class_loss_at_the_reference_value():
    """Closed-form input; the number comes from the authors' function."""
    found = intra_class_loss(sines(30, 0.53, 6, 5), torch.tensor([0, 0, 1, 1, 0, 1]))
    assert found.item() == pytest.approx(-0.44731447, abs=1e-5)


def test_the_intra_class_loss_by_loops_over_the_classes_that_are_present():
    draw = generator(0, "features")
    features, labels = torch.randn(11, 4, generator=draw), [5, 2, 2, 9, 5, 9, 9, 2, 5, 0, 0]
    centres = []
    for label in sorted(set(labels)):
        centre = np.mean([features[i].numpy() for i in range(11) if labels[i] == label], axis=0)
        centres.append(centre / np.linalg.norm(centre))
    expected = sum(a @ b for i, a in enumerate(centres) for j, b in enumerate(centres) if i != j) / len(centres) ** 2
    assert intra_class_loss(features, torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-4)
    alone = features.clone().requires_grad_()
    found = intra_class_loss(alone, torch.zeros(11, dtype=torch.int64))
    found.backward()
    assert found.item() == 0
    assert not alone.grad.any()


def test_consistency_at_the_reference_values():
    features = sines(30, 0.53, 6, 5)
    expected = [0.00593304, 0.00554709, 0.00467355, 0.00409096, 0.00431855, 0.00515349]
    assert consistency(features, 0.9 * features).tolist() == pytest.approx(expected, abs=1e-5)


def test_sides_on_a_fixed_table():
    """Of 20 distinct values: the 5 lowest (up to position 4), the one above position 19; ties join their side."""
    values = sines(20, 1.0, 20)
    order = sorted(range(20), key=lambda i: values[i].item())
    clean, poisoned = sides(values, 0.2, 0.1)
    assert torch.nonzero(clean).flatten().tolist() == sorted(order[:5])
    assert torch.nonzero(poisoned).flatten().tolist() == sorted(order[-2:])
    tied = torch.tensor([1.0, 1, 1, 2, 3, 3, 3, 3, 4, 4])
    clean, poisoned = sides(tied, 0.1, 0.2)
    assert torch.nonzero(clean).flatten().tolist() == [0, 1, 2]
    assert torch.nonzero(poisoned).flatten().tolist() == [8, 9]
    for clean_share, poisoned_share in ((0.04, 0.2), (0.2, 0.05)):
        with pytest.raises(Inapplicable, match="each side needs at least 2"):
            sides(values, clean_share, poisoned_share)


def test_a_turn_is_that_of_a_loop_and_of_torchvision():
    draw = generator(0, "turns")
    images = torch.randint(0, 256, (8, 2, 9, 7), generator=draw).float() / 255
    draws = torch.rand((8, 3), generator=draw)
    draws[:, 1:] = 0.5  # moved nowhere
    found = rotated_and_moved(images, draws)
    for n in range(8):
        angle = math.pi * (2 * draws[n, 0].item() - 1)
        expected = torch.zeros(2, 9, 7)
        for i in range(9):
            for j in range(7):
                y, x = i - 4, j - 3
                row = round(4 + math.sin(angle) * x + math.cos(angle) * y)
                column = round(3 + math.cos(angle) * x - math.sin(angle) * y)
                if 0 <= row < 9 and 0 <= column < 7:
                    expected[:, i, j] = images[n, :, row, column]
        assert torch.equal(found[n], expected)
        assert (rotate(images[n], math.degrees(-angle)) != found[n]).double().mean() < 0.1 or (
            rotate(images[n], math.degrees(angle)) != found[n]
        ).double().mean() < 0.1


def test_a_move_is_by_whole_pixels_up_to_a_fifth_of_each_side():
    images = torch.rand((40, 3, 10, 20), generator=generator(0, "images"))
    draws = torch.rand((40, 3), generator=generator(1, "draws"))
    draws[:, 0] = 0.5  # not turned
    found, seen = rotated_and_moved(images, draws), set()
    for n in range(40):
        across, down = round((2 * draws[n, 1].item() - 1) * 4), round((2 * draws[n, 2].item() - 1) * 2)
        expected = torch.zeros(3, 10, 20)
        for i in range(10):
            for j in range(20):
                if 0 <= i - down < 10 and 0 <= j - across < 20:
                    expected[:, i, j] = images[n, :, i - down, j - across]
        assert torch.equal(found[n], expected)
        seen.add((across, down))
    assert {a for a, _ in seen} == set(range(-4, 5))
    assert {d for _, d in seen} == set(range(-2, 3))


def test_the_probe_written_out(view_of, data_of, net_of):
    """SGD on cross-entropy, then on the cosines of the class centres, without augmentation; momentum and cosine run on."""
    method = Alone(probe_epochs=2, intra_epochs=2, probe_batch=16)
    view, data = view_of(method), data_of(3, 32)
    net = net_of(derive_seed(view.seed, "distinguish", "weights")).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    batches = Batches(data, 16, derive_seed(view.seed, "distinguish", "probe"))
    for epoch in range(4):
        for images, labels, _ in batches:
            loss = cross_entropy(net(images), labels) if epoch < 2 else intra_class_loss(net.embed(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    for a, b in zip(method.probe(view).state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_changes_by_a_loop_do_not_depend_on_the_chunk(net_of, data_of, monkeypatch):
    method, net, data = Alone(), net_of(), data_of(3, 30)
    found = method.changes(net, data, 5)
    with torch.no_grad():
        for i in range(30):
            x = to_float(data.images[i : i + 1])
            moved = rotated_and_moved(x, uniforms(5, torch.tensor([i]), 3))
            expected = ((net.embed(x) - net.embed(moved))[0].numpy() ** 2).sum() / 6
            assert found[i].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    monkeypatch.setattr(distinguish, "CHUNK", 7)
    torch.testing.assert_close(method.changes(net, data, 5), found)


def test_both_methods_find_the_same_sides(view_of):
    settings = {"probe_epochs": 1, "intra_epochs": 1, "probe_batch": 16, "poisoned_share": 0.2}
    a, b = (method.distinguish(view_of(method)) for method in (DBR(**settings), DST(**settings)))
    assert all(map(torch.equal, a, b))
    clean, poisoned, changes = a
    assert changes[poisoned].min() >= changes[~poisoned].max()
    assert (int(clean.sum()), int(poisoned.sum())) == (7, 6)
    assert not (clean & poisoned).any()


def test_it_finds_images_whose_features_hang_on_a_corner(net_of):
    """A network that reads one corner: images with a bright one change most when they are turned."""
    draw = generator(0, "corners")
    images = torch.randint(60, 80, (40, 3, 8, 8), generator=draw).to(torch.uint8)
    images[::5, :, 0, 0] = 255

    class Corner(nn.Module):
        def forward(self, x):
            return x[:, :, 0, 0]

    net = net_of(hidden=0)
    net.features, net.head = Corner(), nn.Sequential(nn.Linear(3, 4))
    changes = Alone().changes(net, ImageSet(images, torch.zeros(40, dtype=torch.int64), 4), 3)
    marked = torch.arange(40) % 5 == 0
    _, poisoned = sides(changes, 0.2, 0.1)
    assert marked[poisoned].all()


@pytest.mark.parametrize(
    "wrong",
    [{"probe_epochs": -1}, {"intra_epochs": -1}, {"probe_lr": 11.0}, {"probe_batch": 1}, {"clean_share": 0.0},
     {"poisoned_share": 1.0}, {"weight_decay": 2.0}, {"poisoned_share": 0.9}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"alone: {next(iter(wrong))} = "):
        Alone(**wrong)
