"""What every attack of the catalogue keeps to, with its default settings."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load, save

from attacks import ATTACKS
from attacks.base import Attack, Crafted, Plan, PoisonedSet, Power, Role, Trigger, apply, poison, poison_test
from attacks.natural import unchanged
from models.backbone import Network
from models.images import ImageSet, quantise, to_float
from models.recipe import Recipe
from models.resnet import ResNet8
from models.spec import BadInput, lookup
from models.training import fit

QUICK: Mapping[str, Mapping[str, object]] = {
    "lc": {"steps": 2},
    "trojannn": {"steps": 2},
    "narcissus": {"rounds": 10, "lr": 0.1},
    "ssba": {"bits": 8, "epochs": 1, "batch": 16, "width": 2, "min_bit_accuracy": 0.01, "min_psnr": 0.01},
    "input-aware": {"width": 2, "mask_epochs": 1, "batch": 16},
    "advtrojan": {"steps": 2},
    "feature-shift": {"steps": 2, "batch": 4},
    "natural": {"steps": 10, "refit": 2, "batch": 4},
}
"""Settings that make a slow attack tiny, and nothing else."""
INJECTS_NOTHING = {"natural"}
"""Attacks that refuse a plan with poison: their training set is the clean one."""

SHAPES = [(3, 32, 32), (1, 16, 16), (3, 64, 64), (3, 24, 40), (1, 40, 24)]
PLAN = Plan(rate=0.1, target=1)


def pictures(shape: tuple[int, int, int], count: int = 60, classes: int = 5) -> ImageSet:
    draw = torch.Generator().manual_seed(8)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.arange(count) % classes, classes)


def triggers(crafted: Crafted) -> list[Trigger]:
    return [trigger for trigger in (crafted.train, crafted.test, crafted.cover) if trigger not in (None, unchanged)]


def made(kind: type[Attack]) -> Attack:
    return kind(**QUICK.get(kind.name, {}))


def allowed(attack: Attack, plan: Plan = PLAN) -> Plan:
    """The plan, without poison where the attack takes none."""
    return dataclasses.replace(plan, rate=0.0) if attack.name in INJECTS_NOTHING else plan


@functools.lru_cache(maxsize=8)
def trained(shape: tuple[int, int, int], classes: int) -> Network:
    """Stands in for a cleanly trained network."""
    return ResNet8(width=2, hidden=4).build(classes, shape, [0.5] * shape[0], [0.25] * shape[0], 0).eval()


def crafted_by(attack: Attack, data: ImageSet, plan: Plan = PLAN, seed: int = 0) -> Crafted:
    """What it crafts; a trigger that needs a model at test time is the one for the surrogate."""
    shape = (int(data.images.shape[1]), int(data.images.shape[2]), int(data.images.shape[3]))
    net, plan = trained(shape, data.num_classes), allowed(attack, plan)
    crafted = attack.craft(data, plan, seed, net if attack.needs_surrogate else None)
    return attack.recraft(net, crafted, data, plan, seed)


def poisoned(attack: Attack, data: ImageSet, plan: Plan = PLAN, seed: int = 0) -> PoisonedSet:
    return poison(data, attack, crafted_by(attack, data, plan, seed), allowed(attack, plan), seed)


@pytest.fixture(params=ATTACKS, ids=lambda kind: kind.name)
def attack(request) -> Attack:
    return made(request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triggers_keep_shape_range_and_dtype_and_change_something(attack, shape) -> None:
    data = pictures(shape, count=4)
    images = to_float(data.images)
    for trigger in triggers(crafted_by(attack, data)):
        kept = images.clone()
        result = trigger(images, torch.arange(4))
        assert torch.equal(images, kept), "a trigger must not write into its input"
        assert result.shape == images.shape
        assert result.dtype == torch.float32
        assert float(result.min()) >= 0
        assert float(result.max()) <= 1
        stored = quantise(result)
        assert all(not torch.equal(one, other) for one, other in zip(stored, data.images, strict=True))
        assert torch.equal(quantise(to_float(stored)), stored)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_batch_equals_its_images_one_by_one(attack, shape) -> None:
    data = pictures(shape, count=6)
    images, index = to_float(data.images), torch.tensor([3, 0, 50, 7, 1, 20])
    for trigger in triggers(crafted_by(attack, data)):
        together = trigger(images, index)
        alone = torch.cat([trigger(images[i : i + 1], index[i : i + 1]) for i in range(6)])
        assert torch.equal(together, alone)
        assert torch.equal(apply(trigger, data.images, index, batch=4), apply(trigger, data.images, index))


def test_crafting_twice_gives_the_same_triggers(attack) -> None:
    data = pictures((3, 16, 16))
    index = torch.arange(60)
    one, other = (triggers(crafted_by(attack, data, seed=3)) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        assert torch.equal(apply(first, data.images, index), apply(second, data.images, index))


def through_a_file(attack: Attack, crafted: Crafted, data: ImageSet, asked: list[bool]) -> Crafted:
    """The triggers as a file gives them back; ``asked`` grows whenever the surrogate is asked for."""
    kept = load(save({name: value.contiguous() for name, value in attack.keep(crafted).items()}))
    assert bool(kept) == attack.keeps or attack.name == "dfst", "DFST's filter comes with the training"

    def surrogate() -> Network:
        asked.append(True)
        return trained(data.shape, data.num_classes)

    return attack.restore(kept, data, allowed(attack), 0, surrogate)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_triggers_come_back_from_a_file_bit_for_bit(attack, shape) -> None:
    data, index, asked = pictures(shape, count=20), torch.arange(20), []
    crafted = crafted_by(attack, data)
    before = torch.random.get_rng_state()
    again = through_a_file(attack, crafted, data, asked)
    assert torch.equal(torch.random.get_rng_state(), before)
    if attack.needs_model_at_test:  # not kept: computed on the model again
        again = attack.recraft(trained(shape, data.num_classes), again, data, allowed(attack), 0)
    assert torch.equal(apply(again.test, data.images, index), apply(crafted.test, data.images, index))
    assert asked == ([True] if attack.name == "advtrojan" else []), "a surrogate is trained only where a test trigger needs it"
    for one, other in zip(triggers(crafted), triggers(again), strict=True):
        assert torch.equal(apply(one, data.images, index), apply(other, data.images, index))


@pytest.mark.parametrize("name", ["input-aware", "imc", "dfst"])
def test_triggers_learned_with_the_victim_come_back_from_a_file(name: str) -> None:
    attack, data, index = made(lookup("attack", ATTACKS, name)), pictures((3, 16, 16), count=40), torch.arange(40)
    recipe = Recipe(epochs=2, batch=16, lr=0.05, crop=0, flip=False)
    crafted = attack.craft(data, PLAN, 0)
    module = attack.victim(copy.deepcopy(trained((3, 16, 16), 5)), recipe, crafted, PLAN, 0)
    fit(module, data, recipe, 0)
    learned = attack.finished(module, crafted)
    assert attack.keep(learned)
    again = through_a_file(attack, learned, data, [])
    for one, other in zip(triggers(learned), triggers(again), strict=True):
        assert torch.equal(apply(one, data.images, index), apply(other, data.images, index))
    changed = [not torch.equal(apply(one, data.images, index), apply(other, data.images, index))
               for one, other in zip(triggers(crafted), triggers(learned), strict=False)]  # fmt: skip
    assert any(changed) or name == "dfst", "of a trigger that learns nothing the test would say nothing"


def test_what_a_kept_trigger_lacks_is_an_error(attack) -> None:
    if not attack.keeps or attack.name == "dfst" or getattr(attack, "strength", 0):
        return  # their remainder is complete without it
    with pytest.raises((KeyError, RuntimeError)):
        attack.restore({}, pictures((3, 16, 16)), allowed(attack), 0, lambda: None)


def test_drawing_leaves_the_global_generator_alone(attack) -> None:
    data = pictures((3, 16, 16))
    before = torch.random.get_rng_state()
    poisoned(attack, data)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_poisoning_replaces_samples_and_keeps_roles_apart(attack) -> None:
    data = pictures((3, 16, 16))
    result = poisoned(attack, data)
    visible, role = result.visible, result.role
    assert len(visible) == len(data)
    assert visible.num_classes == data.num_classes
    assert set(role.unique().tolist()) <= {int(one) for one in Role}
    ceiling = int((data.labels == PLAN.target).sum()) if attack.clean_label else len(data)
    assert int((role == Role.POISON).sum()) == min(round(allowed(attack).rate * len(data)), ceiling)
    assert int((role == Role.COVER).sum()) == round(PLAN.rate * attack.cover_share * len(data))
    assert torch.equal(result.true_labels, data.labels)
    clean = role == Role.CLEAN
    assert torch.equal(visible.images[clean], data.images[clean])
    changed = (visible.images != data.images).flatten(1).any(1)
    assert torch.equal(changed, ~clean)
    assert torch.equal(visible.labels[role != Role.POISON], data.labels[role != Role.POISON])
    assert (visible.labels[role == Role.POISON] == PLAN.target).all()


def test_clean_label_attacks_touch_only_the_target_class(attack) -> None:
    data = pictures((3, 16, 16))
    result = poisoned(attack, data, Plan(rate=1.0, target=1))
    if attack.clean_label:
        assert torch.equal(result.role == Role.POISON, data.labels == 1)
        assert torch.equal(result.visible.labels, data.labels)
    elif attack.name in INJECTS_NOTHING:
        assert (result.role == Role.CLEAN).all()
    else:
        assert (result.role == Role.POISON).all()
        assert (result.visible.labels == 1).all()


def test_attacks_of_one_label_kind_poison_the_same_samples(attack) -> None:
    """Compared with BadNets or SIG, which cost nothing to craft: all with all would grow with the square of the catalogue."""
    data = pictures((3, 16, 16))
    reference = next(one for one in map(made, ATTACKS) if one.clean_label == attack.clean_label)
    plan = allowed(attack)
    expected = poison(data, reference, crafted_by(reference, data), plan, 0).role == Role.POISON
    assert torch.equal(poisoned(attack, data).role == Role.POISON, expected)


def test_the_test_set_leaves_the_target_class_out(attack) -> None:
    data = pictures((3, 16, 16))
    result = poison_test(data, crafted_by(attack, data), PLAN)
    assert sorted(set(result.true_labels.tolist())) == [0, 2, 3, 4]
    assert (result.target_labels == PLAN.target).all()
    if not attack.clean_label:
        plan = Plan(label_mode="all-to-all")
        if attack.name == "feature-shift":  # one perturbation leads to one class
            with pytest.raises(BadInput, match="all-to-one"):
                crafted_by(attack, data, plan)
            return
        every = poison_test(data, crafted_by(attack, data, plan), plan)
        assert len(every.images) == len(data)
        assert set(every.target_labels.tolist()) == set(range(5))
        relabelled = poisoned(attack, data, plan)
        moved = relabelled.role == Role.POISON
        assert torch.equal(relabelled.visible.labels[moved], (data.labels[moved] + 1) % 5)


def changes(attack: Attack) -> list[Attack]:
    """The attack with each numeric setting nudged in turn, skipping nudges its range refuses."""
    found = []
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        if isinstance(value, (bool, int, float)):
            nudged = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 0.9 or 0.5
            found.append(dataclasses.replace(attack, **{field.name: nudged}))
    return found


def test_the_spec_is_json_and_changes_with_every_setting(attack) -> None:
    spec = attack.spec()
    assert json.loads(json.dumps(spec)) == spec
    assert spec["name"] == attack.name
    variants = changes(attack)
    assert variants
    assert len({json.dumps(one.spec(), sort_keys=True) for one in [attack, *variants]}) == len(variants) + 1


def test_settings_are_frozen_and_power_is_readable(attack) -> None:
    assert attack.power in Power
    assert attack == made(type(attack))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(attack, dataclasses.fields(attack)[0].name, 1)


def test_every_attack_is_found_by_its_name() -> None:
    names = [kind.name for kind in ATTACKS]
    assert len(set(names)) == len(names)
    assert [lookup("attack", ATTACKS, name) for name in names] == list(ATTACKS)
