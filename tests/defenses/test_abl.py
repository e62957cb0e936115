from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from defenses import abl
from defenses.abl import ABL, local_ascent
from defenses.base import Inapplicable, Knowledge, lowest_loss
from models.augmentations import cutout
from models.classifier import Classifier
from models.images import ImageSet, quantise, to_float
from models.resnet import ResNet8
from models.spec import BadInput, derive_seed, generator
from models.training import fit, logits

TINY = ABL(rate=0.25, isolation_epochs=1, epochs=3, batch=8, hole=1, unlearning_epochs=2, unlearning_lr=0.01, points=(0, 1, 3))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("loss", "slope"), [(0.2, -1.0), (0.5, 0.0), (0.9, 1.0)])
def test_local_ascent_has_the_slope_of_flooding(loss, slope):
    for form in (lambda x: local_ascent(x, 0.5), lambda x: (x - 0.5).abs() + 0.5):
        x = torch.tensor(loss, requires_grad=True)
        (found,) = torch.autograd.grad(form(x), x)
        assert found.item() == slope


def test_the_sign_is_that_of_the_batch_mean_not_of_each_sample():
    x = torch.tensor([0.1, 2.0], requires_grad=True)
    (found,) = torch.autograd.grad(local_ascent(x.mean(), 0.5), x)
    assert found.tolist() == [0.5, 0.5]


def test_the_lowest_losses_are_those_of_a_loop():
    losses = torch.randint(0, 6, (41,), generator=generator(0, "losses")).float()
    order = sorted(range(41), key=lambda i: (losses[i].item(), i))
    for share in (0.01, 0.1, 0.5):
        assert set(torch.nonzero(lowest_loss(losses, share)).flatten().tolist()) == set(order[: int(41 * share)])


def test_rates_of_all_stages(view_of, data_of, monkeypatch):
    """Constant while isolating; two thirds of the epochs at the full rate, the rest at a tenth; constant while unlearning."""
    seen: list[tuple[str, int, float, int, bool]] = []

    def watched(module, data, recipe, seed):
        seen.append((type(module).__name__, recipe.epochs, recipe.lr, recipe.crop, recipe.flip))
        assert (recipe.momentum, recipe.nesterov, recipe.weight_decay, recipe.schedule) == (0.9, True, 1e-4, "constant")
        return fit(module, data, recipe, seed)

    monkeypatch.setattr(abl, "fit", watched)
    list(TINY.candidates(view_of(TINY)))
    assert seen == [
        ("_Isolating", 1, 0.1, 0, False), ("CutOut", 2, 0.1, 1, True), ("CutOut", 1, 0.1 / 10, 1, True),
        ("_Unlearning", 3, 0.01, 0, False),
    ]  # fmt: skip
    method = ABL()
    assert (round(method.epochs * 2 / 3), method.unlearning_lr, method.gamma) == (40, 5e-4, 0.5)


def test_its_stages_written_out(view_of, data_of, net_of):
    """Isolation above the floor, ranking by loss, training on the rest, ascent on the few: one plain loop each."""
    method = replace(TINY, hole=0, points=())
    view, data = view_of(method), data_of(3, 32)
    net = net_of(derive_seed(view.seed, "abl", "weights"))
    recipe = method.recipe(1, 0.1)

    class Floor(Classifier):
        def loss(self, logits, labels, index):
            loss = cross_entropy(logits, labels)
            return loss if loss > 0.5 else -loss

    class Up(Classifier):
        def loss(self, logits, labels, index):
            return -cross_entropy(logits, labels)

    fit(Floor(net, recipe), data, recipe, derive_seed(view.seed, "abl", "isolation"))
    with torch.no_grad():
        losses = cross_entropy(net(to_float(data.images)), data.labels, reduction="none")
    few = np.argsort(losses.numpy(), kind="stable")[:8]
    rest = np.setdiff1d(np.arange(32), few)
    for part, (epochs, lr) in enumerate(((2, 0.1), (1, 0.01))):
        recipe = replace(method.recipe(epochs, lr), crop=1, flip=True)
        seed = derive_seed(derive_seed(view.seed, "abl", "training"), part)
        fit(Classifier(net, recipe), data.subset(torch.from_numpy(rest)), recipe, seed)
    recipe = method.recipe(2, 0.01)
    fit(Up(net, recipe), data.subset(torch.from_numpy(np.sort(few))), recipe, derive_seed(view.seed, "abl", "unlearning"))
    (candidate,) = method.candidates(view)
    assert same(candidate.model, net)
    assert torch.nonzero(candidate.isolated).flatten().tolist() == sorted(few.tolist())


def test_a_point_of_the_dial_is_the_training_that_ends_there(view_of):
    offered = list(TINY.candidates(view_of(TINY)))
    assert [(c.dial, c.is_default, c.strength) for c in offered] == [(0, False, 0), (1, False, 1), (2, True, 2), (3, False, 3)]
    for candidate in offered[1:]:
        alone = replace(TINY, unlearning_epochs=int(candidate.dial), points=())
        (model,) = (c.model for c in alone.candidates(view_of(alone)))
        assert same(candidate.model, model)
    assert not same(offered[0].model, offered[1].model)


def test_unlearning_raises_the_loss_of_the_isolated(view_of, data_of):
    data = data_of(3, 32)
    losses = []
    for candidate in TINY.candidates(view_of(TINY)):
        few = data.subset(candidate.isolated)
        losses.append(cross_entropy(logits(candidate.model, few.images), few.labels).item())
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.01


def test_cutout_hides_a_hole_in_every_image_and_another_one_each_epoch(net_of, data_of):
    recipe = TINY.recipe(2, 0.1)
    seen: dict[tuple[int, int], Tensor] = {}

    class Watched(abl.CutOut):
        def on_batch(self, images, labels, index):
            out, labels = super().on_batch(images + 0.1, labels, index)
            seen.update({(int(self.current_epoch), int(i)): row[0] == 0 for i, row in zip(index, out, strict=True)})
            return out, labels

    fit(Watched(net_of(), recipe, 3, 5), data_of(0, 24), recipe, 0)
    assert len(seen) == 48
    assert all(2 * 2 <= int(hole.sum()) <= 9 for hole in seen.values())
    assert sum(torch.equal(seen[0, i], seen[1, i]) for i in range(24)) < 6


def test_it_needs_the_poisoned_set_alone_and_enough_of_it(view_of, data_of):
    view = view_of(TINY)
    list(TINY.candidates(view))
    assert view.used == TINY.needs == Knowledge.TRAIN
    few = replace(TINY, rate=0.05)
    with pytest.raises(Inapplicable, match=r"rate = 0\.05 isolates 1 of 32 samples"):
        list(few.candidates(view_of(few)))


def poisoned_digits() -> tuple[ImageSet, Tensor]:
    """Digits at 16x16, a tenth of them with a white 3x3 corner and label 0."""
    digits = load_digits()
    images = interpolate(torch.from_numpy(digits.images)[:, None].float() / 16, (16, 16), mode="bilinear")
    poison = torch.zeros(len(images), dtype=torch.bool)
    poison[torch.randperm(len(images), generator=generator(0, "poison"))[: len(images) // 10]] = True
    images[poison, :, -3:, -3:] = 1.0
    labels = torch.from_numpy(digits.target).long().masked_fill(poison, 0)
    return ImageSet(quantise(images), labels, 10), poison


def test_what_it_isolates_of_badnets_digits_is_poisoned():
    data, poison = poisoned_digits()
    net = ResNet8(width=8, hidden=0).build(10, (1, 16, 16), [0.3], [0.35], 0)
    found, note = ABL(isolation_epochs=10, isolation_lr=0.03, batch=64).isolate(net, data, 1)
    assert int(found.sum()) == 17  # 1 % of 1797
    below = re.fullmatch(r"(\d+) of 290 batches below gamma", note)  # 29 batches an epoch
    assert below
    assert 0 < int(below[1]) < 290
    assert poison[found].double().mean() >= 0.9


def test_losses_are_averaged_over_the_last_epochs(net_of, data_of):
    """``average`` = 1 is the last epoch alone; more take the mean of what trainings that end sooner would isolate by."""
    data, method = data_of(3, 32), ABL(isolation_epochs=4, batch=8, rate=0.25)

    def losses(epochs: int) -> Tensor:
        net = net_of()
        replace(method, isolation_epochs=epochs).isolate(net, data, 1)
        return cross_entropy(logits(net, data.images), data.labels, reduction="none")

    def lowest_of(values: Tensor) -> list[int]:
        return sorted(values.argsort(stable=True)[:8].tolist())

    for average, ends in ((1, (4,)), (3, (2, 3, 4)), (9, (1, 2, 3, 4))):
        found, _ = replace(method, average=average).isolate(net_of(), data, 1)
        assert torch.nonzero(found).flatten().tolist() == lowest_of(torch.stack([losses(end) for end in ends]).mean(0))


def test_the_default_hole_is_the_official_cutouts():
    """The authors' Cutout(1, 3) clears rows y - 3 // 2 to y + 3 // 2, the far end left out: two pixels a side."""
    images = torch.ones(1, 1, 9, 9)
    cleared = cutout(images, torch.full((1, 2), 0.5), ABL().hole)[0, 0] == 0
    official = torch.zeros(9, 9, dtype=torch.bool)
    official[4 - 3 // 2 : 4 + 3 // 2, 4 - 3 // 2 : 4 + 3 // 2] = True
    assert torch.equal(cleared, official)


@pytest.mark.parametrize(
    "wrong",
    [{"rate": 0.0}, {"average": 0}, {"gamma": -1.0}, {"isolation_epochs": -1}, {"epochs": -1}, {"isolation_lr": 11.0},
     {"lr": 11.0}, {"batch": 1},
     {"weight_decay": 2.0}, {"hole": -1}, {"unlearning_epochs": -1}, {"unlearning_lr": -1.0}, {"points": (-1,)}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"abl: {next(iter(wrong))} = "):
        ABL(**wrong)
