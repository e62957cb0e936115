"""Stored victims of a matrix -> files and cards of the zoo."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from attacks.base import poison_test
from benchmark.report.text import slug
from benchmark.rules.metrics import gate, nan_of, score
from benchmark.run.keys import REVISION, victim_key
from benchmark.run.local import single_thread
from benchmark.run.session import chosen_cells
from benchmark.run.victim import surrogate_of
from benchmark.run.world import World, world
from benchmark.settings.cells import Matrix, Scenario
from benchmark.storage import zoo
from benchmark.storage.machine import arithmetic, versions
from benchmark.storage.store import Entry, Store
from benchmark.zoo.load import made_again, opened
from models.spec import BadInput, canonical, derive_seed
from models.training import arithmetic as at_precision

__all__ = ["export", "names_of", "victims_of"]

LICENCE = "Apache-2.0 for the weights and the trigger; the images are not included and have their own licence"
MEASURED = ("acc", "asr", "ra", "asr_benign", "ra_benign", "acc_loss", "acc_loss_se", "val_acc", "single_keys")
TRAINING = (
    "seconds", "samples_forward", "samples_backward", "train_size", "realised_rate", "realised_cover", "exported", "peak_mib",
    "gpu_mib",
)  # fmt: skip


def names_of(scenarios: Sequence[Scenario]) -> dict[Scenario, str]:
    """A file name for each victim: its attack (``benign`` for none) and, but for the first backbone that has it, its backbone.

    Two of one name are numbered, in their order.
    """
    found: dict[Scenario, str] = {}
    for scenario in scenarios:
        first = next(one.backbone_label for one in scenarios if one.attack_label == scenario.attack_label)
        attack = "benign" if scenario.attack is None else scenario.attack_label
        name, number = slug(attack if scenario.backbone_label == first else f"{attack} {scenario.backbone_label}"), 1
        while (name if number == 1 else f"{name}-{number}") in found.values():
            number += 1
        found[scenario] = name if number == 1 else f"{name}-{number}"
    return found


def export(matrix: Matrix, *, only: str | None, cache: Path, folder: Path, console: Console) -> list[str]:
    """Writes the victims of the matrix's first seed that are in the store, and their benign twins, to ``folder``.

    Every file is read back and compared with the stored victim before anything is written.

    Args:
        matrix: the loaded matrix.
        only: see :func:`benchmark.run.session.parse_only`; the twins of what it names are exported, too.
        cache: folder of the store and of decoded images.
        folder: of the zoo.
        console: where it is printed what is written, and what is not in the store.

    Returns:
        The names of what was written.

    Raises:
        BadInput: a victim's weights are not rounded to half precision, or its file does not give the stored victim again; nothing
            is in the store; or the files would exceed the size that a repository can hold.
    """
    single_thread()
    say: Callable[[str], None] = functools.partial(console.print, highlight=False, markup=False)
    store = Store(cache / "store", say)
    made: dict[str, tuple[dict[str, Any], bytes]] = {}
    for name, scenario in _wanted(matrix, only).items():
        entry = store.read("victim", victim_key(scenario, world(scenario, cache).data.fingerprint))
        if entry is None or entry.outcome["status"] != "ok":
            say(f"{name}: left out: {'not in the store' if entry is None else entry.outcome['reason']}")
            continue
        made[name] = _exported(name, scenario, entry, store, cache, made)
        say(f"{name}: {len(made[name][1]) / 1e6:.2f} MB{_shares(made[name][0]['measured'])}")
    if not made:
        raise BadInput(f"{matrix.path}: none of its victims is in the store {store.root}: run the matrix first")
    total = zoo.size_of(folder, {name: len(content) for name, (_, content) in made.items()})
    say(f"{len(made)} victims; all files in {folder}: {total / 1e6:.2f} MB of {zoo.LIMIT / 1e6:g} MB")
    if total > zoo.LIMIT:
        limit = f"more than {zoo.LIMIT / 1e6:g} MB: export fewer victims with --only, or remove some"
        raise BadInput(f"{folder}: would hold {total / 1e6:.2f} MB, {limit}; nothing was written")
    for name, (card, content) in made.items():
        zoo.write(folder, name, card, content)
    return list(made)


def _wanted(matrix: Matrix, only: str | None) -> dict[str, Scenario]:
    """The victims that ``only`` names, and their twins, by name.

    Raises:
        BadInput: a file would not hold one of them whole.
    """
    every = names_of(victims_of(matrix, matrix.scenarios))
    chosen = {canonical(one.spec()) for one in victims_of(matrix, [cell.scenario for cell in chosen_cells(matrix, only)])}
    wanted = {name: scenario for scenario, name in every.items() if canonical(scenario.spec()) in chosen}
    for name, scenario in wanted.items():
        if scenario.recipe.weights != "half" or scenario.frozen is not None:
            problem = "weights are not rounded" if scenario.frozen is None else "features belong to an extractor"
            raise BadInput(
                f"{matrix.path}: {name}: its {problem}, so a file of float16 would hold another network: the zoo takes victims "
                'that are trained end to end with weights = "half" in their recipe'
            )
    return wanted


def victims_of(matrix: Matrix, scenarios: Iterable[Scenario]) -> list[Scenario]:
    """The victims of the matrix's first seed, benign twins first."""
    first = [scenario for scenario in scenarios if scenario.seed == matrix.scenarios[0].seed]
    if not first:
        raise BadInput(f"{matrix.path}: the zoo takes victims of its first seed alone, which is {matrix.scenarios[0].seed}")
    different: dict[str, Scenario] = {}
    for scenario in [*(scenario.twin() for scenario in first), *first]:
        different.setdefault(canonical(scenario.spec()), scenario)
    return list(different.values())


def _shares(measured: Mapping[str, Any]) -> str:
    return "".join(f", {name.upper()} {100 * measured[name]:.1f}" for name in ("acc", "asr", "ra") if measured[name] is not None)


def _exported(
    name: str, scenario: Scenario, entry: Entry, store: Store, cache: Path, before: Mapping[str, tuple[dict[str, Any], bytes]]
) -> tuple[dict[str, Any], bytes]:
    """The card and the file of a stored victim.

    Args:
        before: card and file of the victims so far, among them a surrogate that the trigger may need.

    Raises:
        BadInput: the file does not give the stored victim again.
    """
    w = world(scenario, cache)
    tensors = {key: _half(key, value, name) if key.startswith("net.") else value for key, value in entry.tensors.items()
               if key.startswith(("net.", "trigger."))}  # fmt: skip
    if scenario.attack is not None and scenario.attack.keeps and not zoo.part("trigger", tensors):
        tensors |= {f"trigger.{key}": value for key, value in _crafted_again(name, scenario, w, store, cache).items()}
    weights = zoo.packed(tensors)
    card = _card(name, scenario, entry, w, weights, store)
    with tempfile.TemporaryDirectory(prefix="levelfield-zoo-") as temporary:
        for other, (content, packed) in before.items():
            zoo.write(Path(temporary), other, content, packed)
        zoo.write(Path(temporary), name, card, weights)
        card["measured"] |= _measured_again(Path(temporary), name, w, entry)
    return card, weights


def _half(key: str, value: Tensor, name: str) -> Tensor:
    """A weight as float16; counters stay integers.

    Raises:
        BadInput: it is no number of float16.
    """
    if not value.is_floating_point():
        return value
    half = value.half()
    if not torch.equal(half.to(value.dtype), value):
        raise BadInput(f"{name}: {key} holds numbers that float16 does not have: the stored victim was not rounded")
    return half


def _crafted_again(name: str, scenario: Scenario, w: World, store: Store, cache: Path) -> dict[str, Tensor]:
    """The trigger's tensors of a victim that was stored by a version that did not keep them.

    Raises:
        BadInput: they were learned with the victim, so only another training gives them.
    """
    attack = scenario.attack
    assert attack is not None
    if attack.poisons_batches:
        place = store.folder("victim", victim_key(scenario, w.data.fingerprint))
        raise BadInput(
            f"{name}: its trigger is learned with the victim, and an earlier version stored the victim without it: remove {place} "
            "and run the matrix again (the same settings train the same victim)"
        )
    with at_precision(scenario.recipe.precision):
        crafted = attack.craft(w.train, scenario.plan, derive_seed(scenario.seed, "attack"), surrogate_of(scenario, store, cache))
    return attack.keep(crafted)


def _card(name: str, scenario: Scenario, entry: Entry, w: World, weights: bytes, store: Store) -> dict[str, Any]:
    key = victim_key(scenario, w.data.fingerprint)
    twin = store.read("victim", victim_key(scenario.twin(), w.data.fingerprint), tensors=False)
    measured = {field: entry.outcome[field] for field in MEASURED if field in entry.outcome}
    measured["acc_benign"] = None if twin is None else twin.outcome.get("acc")
    if scenario.attack is not None:
        verdict = gate(nan_of(measured["asr"]), nan_of(measured.get("asr_benign")))
        measured |= {"implanted": verdict.implanted, "gate": verdict.words}
    return {
        "name": name,
        "key": key,
        "revision": REVISION,
        "scenario": scenario.spec(),
        "backbone_label": scenario.backbone_label,
        "attack_label": scenario.attack_label,
        "dataset": {"name": w.data.name, "fingerprint": w.data.fingerprint},
        "measured": measured,
        "training": {field: entry.outcome[field] for field in TRAINING if field in entry.outcome},
        "trigger": _trigger_words(scenario),
        "licence": LICENCE,
        "manifest": {"arithmetic": arithmetic(), "versions": versions()},
    }


def _trigger_words(scenario: Scenario) -> str:
    """What the trigger does, from the attack's own documentation."""
    if scenario.attack is None:
        return "none: the benign twin"
    first = (inspect.getdoc(type(scenario.attack)) or "").partition("\n\n")[0]
    whence = "in the file" if scenario.attack.keeps else "computed from the settings"
    return f"{scenario.attack.name}: {' '.join(first.split())} ({whence})"


def _measured_again(folder: Path, name: str, w: World, entry: Entry) -> dict[str, Any]:
    """ACC, ASR and RA of a file, on this machine.

    Raises:
        BadInput: its triggered test set is not the stored one, bit for bit.
    """
    card, scenario = opened(folder, name)
    net, crafted = made_again(card, scenario, w)
    with at_precision(scenario.recipe.precision):
        triggered = None if crafted is None else poison_test(w.data.test, crafted, scenario.plan)
        if triggered is not None and not torch.equal(triggered.images, entry.tensors["test_images"]):
            apart = (triggered.images != entry.tensors["test_images"]).flatten(1).any(1)
            raise BadInput(
                f"{name}: {int(apart.sum())} of {len(apart)} triggered test images are not the stored ones when they are made from "
                "the file; the victim was trained on another machine type, or its trigger is not kept"
            )
        return score(net, w.data.test, triggered).stored()
