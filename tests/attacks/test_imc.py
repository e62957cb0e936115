from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.base import Plan, Power, Role, apply, poison, uniforms
from attacks.dynamic import batch_roles
from attacks.imc import IMC, IMCVictim, Mark, marked
from models.backbone import Network, Normalise
from models.images import ImageSet, quantise, to_float
from models.recipe import Recipe
from models.spec import BadInput, derive_seed, generator
from models.training import fit, seeded

CLASSES = 4
SHAPE = (1, 8, 10)
RECIPE = Recipe(epochs=3, batch=32, lr=0.05, crop=1, flip=True)


def network(shape: tuple[int, int, int] = SHAPE) -> Network:
    channels = shape[0]
    with seeded(5):
        conv = nn.Conv2d(channels, 6, 3, padding=1)
        features = nn.Sequential(conv, nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        return Network(Normalise([0.5] * channels, [0.25] * channels), features, nn.Sequential(nn.Linear(96, CLASSES)))


def pictures(shape: tuple[int, int, int] = SHAPE, count: int = 96) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.arange(count) % CLASSES, CLASSES)


def victim_of(attack: IMC, data: ImageSet, plan: Plan, recipe: Recipe = RECIPE, seed: int = 0) -> IMCVictim:
    victim = attack.victim(network(data.shape), recipe, attack.craft(data, plan, seed), plan, seed)
    assert isinstance(victim, IMCVictim)
    return victim


def mark_of(victim: IMCVictim) -> Mark:
    mark = victim.crafted.train
    assert isinstance(mark, Mark)
    return mark


# -- the mark ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "settings", "rows", "columns"),
    [
        ((1, 8, 10), {}, (4, 7), (6, 9)),
        ((3, 32, 32), {"size": 5}, (26, 31), (26, 31)),
        ((3, 64, 80), {}, (56, 62), (72, 78)),
        ((1, 12, 9), {"size": 2, "margin": 0}, (10, 12), (7, 9)),
    ],
)
def test_the_mark_stands_where_it_should_and_is_the_formula_pixel_by_pixel(shape, settings, rows, columns) -> None:
    data = pictures(shape, 4)
    mark = IMC(**settings).craft(data, Plan(), seed=3).test
    assert isinstance(mark, Mark)
    z = torch.randn(shape, generator=generator(3, "imc-mark")).double().numpy()
    expected = data.images.double().numpy() / 255
    for n, c in np.ndindex(4, shape[0]):
        for i in range(*rows):
            for j in range(*columns):
                expected[n, c, i, j] = (np.tanh(z[c, i, j]) + 1) / 2
    assert np.allclose(mark(to_float(data.images), torch.arange(4)), expected, atol=1e-6)


def test_the_loss_and_its_gradient_are_right() -> None:
    data, plan = pictures(count=5), Plan(target=1)
    victim = victim_of(IMC(size=2), data, plan)
    victim.net.double().eval()
    images, targets = to_float(data.images).double(), torch.tensor([1, 2, 1, 0, 3])
    mask, z = mark_of(victim).mask, mark_of(victim).z.double().requires_grad_()
    loss = victim.mark_loss(images, targets, mask, z)
    logits = victim.net(marked(images, mask, z)).detach().numpy()
    by_hand = np.mean([np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, targets.tolist(), strict=True)])
    assert float(loss.detach()) == pytest.approx(by_hand)
    (gradient,) = torch.autograd.grad(loss, [z])
    assert torch.equal(gradient != 0, mask.expand(1, 8, 10)), "only what is shown can be moved"
    for i, j in np.argwhere(mask.numpy()):
        values = []
        for sign in (1, -1):
            moved = z.detach().clone()
            moved[0, i, j] += sign * 1e-5
            values.append(float(victim.mark_loss(images, targets, mask, moved).detach()))
        assert float(gradient[0, i, j]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-10)


def fitted_by_hand(victim: IMCVictim, data: ImageSet, epoch: int, share: float, lr: float) -> Tensor:
    """Adam written out (Kingma and Ba, ICLR 2015), on finite differences of the loss."""
    mask, z = mark_of(victim).mask, mark_of(victim).z.double().clone()
    places = np.argwhere(mask.numpy())
    order = torch.randperm(len(data), generator=generator(0, "imc-images", epoch))[: round(share * len(data))]
    first, second = np.zeros(len(places)), np.zeros(len(places))
    for step, start in enumerate(range(0, len(order), 32), start=1):
        part = order[start : start + 32]
        images, targets = data.images[part].double() / 255, torch.full((len(part),), 1)
        slopes = np.zeros(len(places))
        for k, (i, j) in enumerate(places):
            values = []
            for sign in (1, -1):
                moved = z.clone()
                moved[0, i, j] += sign * 1e-5
                values.append(float(victim.mark_loss(images, targets, mask, moved).detach()))
            slopes[k] = (values[0] - values[1]) / 2e-5
        first, second = 0.9 * first + 0.1 * slopes, 0.999 * second + 0.001 * slopes**2
        change = lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        for k, (i, j) in enumerate(places):
            z[0, i, j] -= change[k]
    return z


@pytest.mark.parametrize(("share", "epoch"), [(1.0, 0), (0.5, 2)])
def test_a_fitting_is_one_pass_of_adam(share, epoch) -> None:
    data, plan = pictures(), Plan(target=1)
    victim = victim_of(IMC(size=2, share=share), data, plan)
    victim.loader(data, 0)
    found = victim.fitted_mark(epoch)
    assert torch.equal(found.mask, mark_of(victim).mask)
    victim.net.double().eval()
    assert torch.allclose(found.z.double(), fitted_by_hand(victim, data, epoch, share, 0.1), atol=1e-4)


def test_fitting_lowers_the_loss_and_leaves_the_network_alone() -> None:
    data, plan = pictures(), Plan(target=1)
    victim = victim_of(IMC(), data, plan)
    victim.loader(data, 0)
    victim.net.train()
    before = {name: value.clone() for name, value in victim.net.state_dict().items()}
    found = victim.fitted_mark(0)
    assert victim.net.training
    assert all(torch.equal(value, before[name]) for name, value in victim.net.state_dict().items()), "batch norm included"
    assert all(value.requires_grad and value.grad is None for value in victim.net.parameters())
    victim.net.eval()
    images, targets = to_float(data.images), torch.ones(96, dtype=torch.int64)
    losses = [float(victim.mark_loss(images, targets, mark.mask, mark.z).detach()) for mark in (mark_of(victim), found)]
    assert losses[1] < losses[0]


def test_a_share_of_0_leaves_the_mark_as_it_was_drawn() -> None:
    data, plan = pictures(), Plan(rate=0.1, target=1)
    victim = victim_of(IMC(share=0.0), data, plan)
    start = mark_of(victim).z
    fit(victim, data, RECIPE, seed=7)
    assert torch.equal(mark_of(victim).z, start)


# -- the training --------------------------------------------------------------------------------------------------------------


class Watched(IMCVictim):
    """Notes the mark that every batch is poisoned with."""

    def poison_batch(self, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        self.seen = [*getattr(self, "seen", []), (epoch, mark_of(self).z.clone())]
        return super().poison_batch(images, labels, index, epoch)


def test_every_batch_of_an_epoch_is_poisoned_with_the_mark_fitted_before_it() -> None:
    data, plan, attack = pictures(), Plan(rate=0.1, target=1), IMC()
    crafted = attack.craft(data, plan, 0)
    victim = Watched(attack, network(), RECIPE, crafted, plan, 0)
    fit(victim, data, RECIPE, seed=7)
    assert [epoch for epoch, _ in victim.seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    marks = [victim.seen[first][1] for first in (0, 3, 6)]
    assert all(torch.equal(z, marks[epoch]) for epoch, z in victim.seen)
    assert isinstance(crafted.train, Mark)
    for one, other in [(crafted.train.z, marks[0]), (marks[0], marks[1]), (marks[1], marks[2])]:
        assert not torch.equal(one, other)
    finished = attack.finished(victim, crafted).test
    assert isinstance(finished, Mark)
    assert torch.equal(finished.z, marks[2])


def test_a_batch_is_poisoned_as_its_roles_say() -> None:
    data, plan = pictures(), Plan(rate=0.25, cover_rate=0.5, target=1)
    victim = victim_of(IMC(rounding="floor"), data, plan)
    assert victim.before_augment is not None
    index = torch.arange(96)
    images, labels = victim.before_augment(to_float(data.images), data.labels, index, 2)
    role = batch_roles(uniforms(derive_seed(0, "dynamic-roles"), index + (3 << 32), 2), 0.25, 0.0, "floor")
    poisoned = role == Role.POISON
    assert int(poisoned.sum()) == 24
    assert torch.equal(quantise(images[poisoned]), apply(victim.crafted.train, data.images[poisoned], index[poisoned]))
    assert torch.equal(images[~poisoned], to_float(data.images[~poisoned])), "there are no covers"
    assert (labels[poisoned] == 1).all()
    assert torch.equal(labels[~poisoned], data.labels[~poisoned])


def test_training_is_reproducible_and_reports_what_it_realised() -> None:
    data, plan = pictures(), Plan(rate=0.1, target=1)
    victims = [victim_of(IMC(rounding="floor"), data, plan) for _ in range(2)]
    nets = [fit(victim, data, RECIPE, seed=7).net for victim in victims]
    weights = [torch.cat([value.flatten() for value in net.state_dict().values()]) for net in nets]
    assert torch.equal(*weights)
    assert torch.equal(mark_of(victims[0]).z, mark_of(victims[1]).z)
    assert victims[0].realised == {"poison": 3 / 32, "cover": 0.0}


def test_the_exported_set_carries_the_final_mark() -> None:
    data, plan, attack = pictures(), Plan(rate=0.25, target=1), IMC()
    start = attack.craft(data, plan, 0)
    victim = attack.victim(network(), RECIPE, start, plan, 0)
    fit(victim, data, RECIPE, seed=7)
    finished = attack.finished(victim, start)
    exported = poison(data, attack, finished, plan, 0)
    assert [exported.realised(role) for role in Role] == pytest.approx([0.75, 0.25, 0.0])
    poisoned = torch.nonzero(exported.role == Role.POISON).flatten()
    assert torch.equal(exported.visible.images[poisoned], apply(finished.test, data.images[poisoned], poisoned))
    assert attack.power is Power.TRAINING
    assert finished.cover is None


def test_all_to_all_fits_the_mark_to_the_next_class() -> None:
    data = pictures()
    found = []
    for plan in (Plan(target=1), Plan(label_mode="all-to-all")):
        victim = victim_of(IMC(), data, plan)
        victim.loader(data, 0)
        found.append(victim.fitted_mark(0).z)
    assert not torch.equal(*found)


def test_a_mark_larger_than_the_image_is_refused() -> None:
    with pytest.raises(BadInput, match=r"imc: size .* 9 pixels do not fit images of 8 x 10"):
        IMC(size=8).craft(pictures(), Plan(), 0)


@pytest.mark.parametrize("settings", [{"size": 0}, {"margin": -1}, {"lr": 0.0}, {"share": 1.5}, {"rounding": "up"}])
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"imc: {next(iter(settings))} = "):
        IMC(**settings)
