from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses import asd
from defenses.asd import ASD, class_aware
from defenses.base import DefenderView, Inapplicable, Knowledge, Scope, lowest_loss
from defenses.dbd import symmetric_cross_entropy
from models.cost import metered
from models.images import Batches, to_float
from models.mixmatch import MixMatch
from models.recipe import Recipe
from models.resnet import ResNet18
from models.spec import BadInput, derive_seed, generator
from models.training import fit

TINY = ASD(
    aware_epochs=2, agnostic_epochs=1, meta_epochs=1, grow=2, grow_epochs=1, iterations=2, batch=8, meta_batch=16
)  # fmt: skip
SEEDS = torch.arange(32) < 8


def view_with(method: ASD, data, net_of, seeds=SEEDS) -> DefenderView:
    sources = {Knowledge.TRAIN: lambda: data, Knowledge.SEEDS: lambda: seeds}
    return DefenderView(
        granted=Knowledge.TRAIN | Knowledge.SEEDS, declared=method.needs, sources=sources, fresh=net_of, num_classes=4, seed=3,
        scope=Scope.WHOLE, recipe=Recipe(epochs=1, batch=8, crop=1),
    )  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def chosen(mask: torch.Tensor) -> set[int]:
    return set(torch.nonzero(mask).flatten().tolist())


LOSS = torch.from_numpy(np.sin(np.arange(1, 21)) + 1)
META = torch.from_numpy(0.5 * np.sin(2 * np.arange(1, 21)) + 0.5)


def test_the_three_splits_at_the_reference_values():
    """Closed-form losses; the sets come from the authors' functions."""
    assert chosen(lowest_loss(LOSS, 0.5)) == {2, 3, 4, 5, 9, 10, 11, 15, 16, 17}
    assert chosen(lowest_loss(LOSS - META, 0.5)) == {3, 4, 5, 9, 10, 11, 15, 16, 17, 18}
    seeds = torch.zeros(20, dtype=torch.bool)
    seeds[[0, 10]] = True
    assert chosen(class_aware(LOSS, torch.arange(20) // 10, seeds, 2)) == {0, 3, 4, 10, 16, 17}


def test_the_class_aware_split_by_a_loop():
    draw = generator(0, "losses")
    losses, labels = torch.randint(0, 6, (60,), generator=draw).float(), torch.randint(0, 4, (60,), generator=draw) * 3
    seeds = torch.rand(60, generator=draw) < 0.2
    for count in (0, 3, 100):
        expected = chosen(seeds)
        for label in set(labels.tolist()):
            own = sorted((i for i in range(60) if labels[i] == label and not seeds[i]), key=lambda i: (losses[i].item(), i))
            expected |= set(own[:count])
        assert chosen(class_aware(losses, labels, seeds, count)) == expected


def test_the_pool_grows_as_published():
    assert [ASD().added(epoch) for epoch in range(60)] == [10 * step for step in range(12) for _ in range(5)]


def test_every_phase_has_its_split(net_of, data_of):
    """Against the losses of plain forward passes; the copy's are taken after an epoch of its own."""
    method, net, data = replace(TINY, aware_epochs=4, agnostic_epochs=2), net_of(), data_of(3, 32)
    recipe = Recipe(epochs=1, batch=8, crop=1)

    def losses(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return symmetric_cross_entropy(model.eval()(to_float(data.images)), data.labels)

    before = losses(net)
    expected = [class_aware(before, data.labels, SEEDS, 2 * epoch) for epoch in range(4)]
    expected += [lowest_loss(before, 0.25)] * 2
    expected += [lowest_loss(before - losses(method.virtual(net, data, recipe, 5)), 0.25)]
    found = [method.pool(net, data, SEEDS, epoch, 0.25, (recipe, 5)) for epoch in range(7)]
    found, orders = zip(*found, strict=True)
    assert all(map(torch.equal, found, expected))
    fell = before - losses(method.virtual(net, data, recipe, 5))
    torch.testing.assert_close(torch.stack(orders), torch.stack([*[before] * 6, fell]))
    assert chosen(found[0]) == chosen(SEEDS)
    assert len({tuple(mask.tolist()) for mask in found}) > 4


def test_the_copy_written_out(net_of, data_of):
    """Adam on the second conv, its norm and the head; every running statistic moves, and the network itself does not."""
    net, data, recipe = net_of(), data_of(3, 32), Recipe(epochs=1, batch=8, crop=1)
    before, found = copy.deepcopy(net), TINY.virtual(net, data, recipe, 5)
    assert same(net, before)
    assert not net.training
    assert {parameter.requires_grad for parameter in net.parameters()} == {True}
    twin = net_of().train()
    own = [*twin.features[3:].parameters(), *twin.head.parameters()]
    optimizer = torch.optim.Adam(own, lr=0.015)
    for images, labels, _ in Batches(data, 16, 5, crop=1, flip=True):
        optimizer.zero_grad()
        cross_entropy(twin(images), labels).backward()
        optimizer.step()
    for a, b in zip(found.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.features[0].weight, net.features[0].weight)
    assert not torch.equal(found.features[1].running_mean, net.features[1].running_mean)


def test_the_last_half_of_resnet18_are_its_two_last_stages(data_of):
    net = ResNet18(width=2, hidden=0).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0)
    found = TINY.virtual(net, data_of(3, 16), Recipe(epochs=1, batch=8, crop=1), 5)
    last = ("features.layer3", "features.layer4", "head")
    trained = {name for name, parameter in found.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in net.named_parameters() if name.startswith(last)}
    assert all(name in trained or torch.equal(value, found.get_parameter(name)) for name, value in net.named_parameters())


def test_its_training_written_out(net_of, data_of):
    view, data = view_with(TINY, data_of(3, 32), net_of), data_of(3, 32)
    net = net_of(derive_seed(view.seed, "asd", "weights"))
    recipe = Recipe(
        epochs=4, batch=8, lr=0.002, optimizer="adam", weight_decay=0, schedule="constant", crop=1, flip=True
    )  # fmt: skip
    pools = []

    def split(model, images):
        epoch = len(pools)
        with torch.no_grad():
            losses = symmetric_cross_entropy(model.eval()(to_float(data.images)), data.labels)
            model.train()
        if epoch < 2:
            pools.append(class_aware(losses, data.labels, SEEDS, 2 * epoch))
        elif epoch == 2:
            pools.append(lowest_loss(losses, 0.5))
        else:
            twin = TINY.virtual(model, data, recipe, derive_seed(view.seed, "asd", "virtual", 3)).eval()
            with torch.no_grad():
                after = symmetric_cross_entropy(twin(to_float(data.images)), data.labels)
            pools.append(lowest_loss(losses - after, 0.5))
        return pools[-1]

    module = MixMatch(net, recipe, split, iterations=2, sharpen=0.5, mixup=0.75, weight=15.0, ramp=4)
    fit(module, data, recipe, derive_seed(view.seed, "asd", "semi"))
    (candidate,) = TINY.candidates(view)
    assert same(candidate.model, net)
    assert torch.equal(candidate.isolated, ~pools[-1])
    assert torch.equal(candidate.isolated, ~lowest_loss(candidate.suspicion, 0.5))
    assert (candidate.dial, candidate.is_default, candidate.strength) == (0.5, True, 0.5)
    assert len(pools) == 4


def test_a_point_of_the_dial_is_the_training_with_that_share(net_of, data_of):
    method, data = replace(TINY, shares=(0.25,)), data_of(3, 32)
    offered = list(method.candidates(view_with(method, data, net_of)))
    assert [(c.dial, c.is_default, c.strength) for c in offered] == [(0.25, False, 0.75), (0.5, True, 0.5)]
    alone = replace(TINY, clean_share=0.25)
    assert same(next(alone.candidates(view_with(alone, data, net_of))).model, offered[0].model)
    assert int(offered[0].isolated.sum()) == 24


def test_passes_are_counted(net_of, data_of):
    """MixMatch: two views to guess from, three batches to train on; losses before every epoch; one epoch of the copy."""
    with metered() as cost:
        list(TINY.candidates(view_with(TINY, data_of(3, 32), net_of)))
    trained, guessed = 4 * 2 * 3 * 8, 4 * 2 * 2 * 8
    assert (cost.forward, cost.backward) == (trained + guessed + 5 * 32 + 32, trained + 32)


def test_it_needs_the_poisoned_set_and_seeds_that_leave_two_samples_a_side(net_of, data_of):
    view = view_with(TINY, data_of(3, 32), net_of)
    list(TINY.candidates(view))
    assert view.used == TINY.needs == Knowledge.TRAIN | Knowledge.SEEDS
    for method, seeds, sizes in (
        (TINY, torch.arange(32) < 1, "1, 9, 16"), (replace(TINY, grow=10), SEEDS, "8, 32, 16"),
        (replace(TINY, clean_share=0.05), SEEDS, "8, 16, 1"),
    ):  # fmt: skip
        with pytest.raises(Inapplicable, match=rf"clean pools of \[{sizes}\] of 32 samples"):
            list(method.candidates(view_with(method, data_of(3, 32), net_of, seeds)))


def test_the_published_settings():
    method = ASD()
    assert (method.aware_epochs, method.agnostic_epochs, method.meta_epochs, method.epochs) == (60, 30, 30, 120)
    assert (method.iterations, method.batch, method.lr, method.meta_lr, method.clean_share) == (1024, 64, 0.002, 0.015, 0.5)
    assert asd.fit is fit


@pytest.mark.parametrize(
    "wrong",
    [{"aware_epochs": 0}, {"agnostic_epochs": -1}, {"meta_epochs": -1}, {"grow": -1}, {"grow_epochs": 0}, {"clean_share": 1.0},
     {"iterations": 0}, {"batch": 1}, {"lr": 11.0}, {"meta_lr": 11.0}, {"meta_batch": 1}, {"sharpen": 0.0}, {"mixup": 0.0},
     {"unlabelled_weight": -1.0}, {"shares": (0.0,)}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"asd: {next(iter(wrong))} = "):
        ASD(**wrong)
