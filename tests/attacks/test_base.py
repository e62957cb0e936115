from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.badnets import BadNets
from attacks.base import Plan, Role, apply, poison, poison_test, uniforms
from attacks.sig import SIG
from models.images import ImageSet
from models.spec import BadInput

MASK = 2**64 - 1


def splitmix(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def small(size: int = 40, classes: int = 4) -> ImageSet:
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (size, 1, 8, 8), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.randint(0, classes, (size,), generator=draw), classes)


def test_uniforms_equal_splitmix_in_python_integers() -> None:
    key, index = 2**63 - 5, torch.tensor([0, 1, 7, 3 << 32])
    found = uniforms(key, index, 6)
    for row, sample in enumerate(index.tolist()):
        for position in range(6):
            state = (splitmix((sample + key) & MASK) + position * 0x9E3779B97F4A7C15) & MASK
            assert found[row, position].item() == (splitmix(state) >> 40) / 2**24


def test_uniforms_are_uniform_and_unrelated() -> None:
    table = uniforms(123, torch.arange(1000), 64).double()
    counts = np.histogram(table.numpy(), bins=16, range=(0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 37.7  # chi-square, 15 degrees of freedom, one in a thousand
    centred = table - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), uniforms(124, torch.arange(1000), 64).double() - 0.5):
        assert abs(float((centred * other).mean() * 12)) < 4 / 64_000**0.5


def test_uniforms_do_not_depend_on_the_batch() -> None:
    index = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(uniforms(9, index, 5), uniforms(9, torch.arange(50), 5)[index])


def test_all_to_all_moves_every_label_one_on() -> None:
    plan = Plan(label_mode="all-to-all")
    assert plan.relabel(torch.tensor([0, 1, 2, 3]), 4).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.333, 1.0])
def test_poison_replaces_exactly_round_of_rate_times_n(rate) -> None:
    data, plan = small(), Plan(rate=rate, target=1)
    attack = BadNets()
    crafted = attack.craft(data, plan, seed=0)
    result = poison(data, attack, crafted, plan, seed=0)
    touched = result.role == Role.POISON
    assert int(touched.sum()) == round(rate * 40)
    assert torch.equal(result.visible.images[touched], apply(crafted.train, data.images[touched], torch.nonzero(touched).flatten()))
    assert torch.equal(result.visible.images[~touched], data.images[~touched])
    assert (result.visible.labels[touched] == 1).all()
    assert torch.equal(result.visible.labels[~touched], data.labels[~touched])
    assert result.realised(Role.POISON) == pytest.approx(round(rate * 40) / 40)


def test_a_higher_rate_keeps_the_samples_of_a_lower_one_and_another_seed_draws_others() -> None:
    data, attack = small(200), BadNets()

    def chosen(rate: float, seed: int) -> set[int]:
        plan = Plan(rate=rate)
        role = poison(data, attack, attack.craft(data, plan, seed), plan, seed).role
        return set(torch.nonzero(role == Role.POISON).flatten().tolist())

    assert chosen(0.05, 0) < chosen(0.2, 0)
    assert chosen(0.05, 0) != chosen(0.05, 1)


def test_the_triggered_test_set_follows_the_metric() -> None:
    data = small()
    crafted = BadNets().craft(data, Plan(), seed=0)
    one = poison_test(data, crafted, Plan(target=2))
    assert (one.true_labels != 2).all()
    assert (one.target_labels == 2).all()
    assert len(one.images) == int((data.labels != 2).sum())
    assert torch.equal(one.images, apply(crafted.test, data.images[one.source], one.source))
    every = poison_test(data, crafted, Plan(label_mode="all-to-all"))
    assert every.source.tolist() == list(range(40))
    assert torch.equal(every.target_labels, (data.labels + 1) % 4)


def test_nothing_to_trigger_gives_an_empty_set_of_the_right_kind() -> None:
    data = ImageSet(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), 2)
    empty = poison_test(data, BadNets().craft(data, Plan(), seed=0), Plan(target=0))
    assert empty.images.shape == (0, 1, 8, 8)
    assert empty.images.dtype == torch.uint8


def test_impossible_plans_are_refused_by_name() -> None:
    data = small()
    with pytest.raises(BadInput, match="target = 4 does not exist; the data has classes 0 to 3"):
        poison(data, BadNets(), BadNets().craft(data, Plan(), 0), Plan(target=4), 0)
    with pytest.raises(BadInput, match="target = 9"):
        poison_test(data, BadNets().craft(data, Plan(), 0), Plan(target=9))
    all_to_all = Plan(label_mode="all-to-all")
    with pytest.raises(BadInput, match="sig: label_mode = 'all-to-all'"):
        poison(data, SIG(), SIG().craft(data, all_to_all, 0), all_to_all, 0)


@pytest.mark.parametrize("settings", [{"rate": 1.5}, {"cover_rate": -0.1}, {"target": -1}, {"label_mode": "all2all"}])
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"plan: {next(iter(settings))} = "):
        Plan(**settings)
