"""The whole pipeline: scenario -> poisoned set -> victim -> view -> candidates -> scores -> rows.

Two stages are stored: a *victim* (an attacked or benign network with its poisoned data) and a *defense run* (what every candidate
of a cell scored). Rows are computed from stored outcomes alone, so they are the same whoever computed the stages, and when.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.base import PoisonedSet, PoisonedTest, Power, Role, poison, poison_test
from benchmark.datasets import Dataset, DatasetSpec, load, mean_std, split_budget, split_validation
from benchmark.matrix import Cell, Scenario
from benchmark.metrics import Score, Scorer, der, gate, score, val_accuracy
from benchmark.rows import Curve, Key, Row, Timing
from benchmark.selection import NOTHING_TO_VALIDATE_ON, Measured, Selection, choose
from benchmark.store import Entry, Store
from benchmark.tracks import view_for
from defenses.base import Candidate, Inapplicable, Knowledge, Withheld
from models.backbone import Network
from models.classifier import Classifier
from models.cost import Cost, metered
from models.images import ImageSet
from models.spec import BadInput, derive_seed, digest
from models.training import Diverged, fit
from models.units import unit_layers

__all__ = [
    "CellResult", "Victim", "World", "cell_key", "cell_rows", "defend", "measured_from", "read_victim", "run_cell", "run_victim",
    "victim_key", "world",
]  # fmt: skip

REVISION = 1
"""Raised when this file changes what the same settings give."""


# -- the attacked world --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The data of a scenario before any attack: the attacker's training set, the clean budget in two parts, the test set."""

    data: Dataset
    train: ImageSet
    clean: ImageSet
    validation: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]


@functools.lru_cache(maxsize=2)
def _dataset(spec: DatasetSpec, cache: Path) -> Dataset:
    return load(spec, cache)


@functools.lru_cache(maxsize=2)
def _world(spec: DatasetSpec, fraction: float, seed: int, cache: Path) -> World:
    data = _dataset(spec, cache)
    attacker, budget = split_budget(data.train, fraction, seed)
    train, held_out = data.train.subset(attacker), data.train.subset(budget)
    fitting, validating = split_validation(held_out, seed)
    mean, std = mean_std(train)
    return World(data, train, held_out.subset(fitting), held_out.subset(validating), mean, std)


def world(scenario: Scenario, cache: Path) -> World:
    """The scenario's data; the budget is drawn from (data, fraction, seed) alone, so every attack and defense shares it."""
    return _world(scenario.dataset, scenario.clean_fraction, scenario.seed, cache)


def victim_key(scenario: Scenario, fingerprint: str) -> str:
    """Key of a scenario's victim; ``fingerprint`` of the data set it stands on."""
    return digest("victim", REVISION, scenario.spec(), fingerprint)


def cell_key(cell: Cell, fingerprint: str) -> str:
    """Key of a cell's defense run."""
    return digest("defended", REVISION, cell.spec(), victim_key(cell.scenario, fingerprint))


@dataclass(frozen=True)
class Victim:
    """A stored victim, put together again."""

    net: Network
    poisoned: PoisonedSet
    triggered: PoisonedTest | None
    scorer: Scorer
    outcome: dict[str, Any]


def _fresh(scenario: Scenario, w: World, seed: int) -> Network:
    return scenario.backbone.build(w.data.train.num_classes, w.data.train.shape, w.mean, w.std, seed)


def run_victim(scenario: Scenario, store: Store, cache: Path) -> None:
    """Trains the scenario's victim and stores it with its poisoned samples and triggered test set; no-op when it stands."""
    w = world(scenario, cache)
    key = victim_key(scenario, w.data.fingerprint)
    if store.read("victim", key, tensors=False):
        return
    start = time.perf_counter()
    # The initial weights depend on the backbone and the seed alone: benign twin and victim start from the same network.
    net = _fresh(scenario, w, derive_seed(scenario.backbone.spec(), scenario.seed, "init"))
    seed = derive_seed(scenario.seed, "train")
    outcome: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    triggered: PoisonedTest | None = None
    try:
        with metered() as cost:
            if scenario.attack is None:
                fitted = fit(Classifier(net, scenario.recipe), w.train, scenario.recipe, seed)
            else:
                fitted, poisoned, triggered = _attack(scenario, w, net, seed, store, cache, outcome)
                touched = torch.nonzero(poisoned.role != Role.CLEAN).flatten()
                tensors |= {
                    "role": poisoned.role,
                    "touched": touched,
                    "touched_images": poisoned.visible.images[touched],
                    "labels": poisoned.visible.labels,
                    "test_images": triggered.images,
                    "test_source": triggered.source,
                    "test_target": triggered.target_labels,
                }
        measured = score(fitted.net, w.data.test, triggered)
        outcome |= {
            "status": "ok",
            **_numbers(measured),
            "val_acc": _none(val_accuracy(fitted.net, w.validation)),
            "samples_forward": cost.forward,
            "samples_backward": cost.backward,
            "train_size": len(w.train),
        }
        tensors |= {f"net.{name}": value for name, value in fitted.net.state_dict().items()}
    except Diverged as error:
        outcome, tensors = {"status": "failed", "reason": str(error), "train_size": len(w.train)}, {}
    outcome["seconds"] = time.perf_counter() - start
    store.write("victim", key, scenario.spec(), outcome, tensors)


def _attack(
    scenario: Scenario, w: World, net: Network, seed: int, store: Store, cache: Path, outcome: dict[str, Any]
) -> tuple[Any, PoisonedSet, PoisonedTest]:
    attack, plan, recipe = scenario.attack, scenario.plan, scenario.recipe
    assert attack is not None
    if plan.target >= w.train.num_classes:
        raise BadInput(f"attack {attack.name}: target = {plan.target}: {w.data.name} has classes 0 to {w.train.num_classes - 1}")
    surrogate = None
    if attack.needs_surrogate:
        run_victim(scenario.twin(), store, cache)
        surrogate = read_victim(scenario.twin(), store, cache).net
    # Which samples are poisoned depends on the seed alone, so it is the same for every attack, backbone and defense.
    attack_seed = derive_seed(scenario.seed, "attack")
    crafted = attack.craft(w.train, plan, attack_seed, surrogate)
    module = attack.victim(net, recipe, crafted, plan, attack_seed)
    if attack.power is Power.TRAINING:
        fitted = fit(module, w.train, recipe, seed)
        crafted = attack.finished(module, crafted)
        poisoned = poison(w.train, attack, crafted, plan, attack_seed)
        shares = getattr(module, "realised", {"poison": poisoned.realised(Role.POISON), "cover": poisoned.realised(Role.COVER)})
        outcome |= {"realised_rate": shares["poison"], "realised_cover": shares["cover"], "exported": True}
    else:
        poisoned = poison(w.train, attack, crafted, plan, attack_seed)
        fitted = fit(module, poisoned.visible, recipe, seed)
        outcome |= {
            "realised_rate": poisoned.realised(Role.POISON),
            "realised_cover": poisoned.realised(Role.COVER),
            "exported": False,
        }
    return fitted, poisoned, poison_test(w.data.test, crafted, plan)


@functools.lru_cache(maxsize=2)
def _read_victim(scenario: Scenario, root: Path, cache: Path) -> Victim | None:
    store = Store(root)
    w = world(scenario, cache)
    entry = store.read("victim", victim_key(scenario, w.data.fingerprint))
    if entry is None:
        return None
    net = _fresh(scenario, w, 0)
    weights = {name.removeprefix("net."): value for name, value in entry.tensors.items() if name.startswith("net.")}
    if weights:
        net.load_state_dict(weights)
    net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if "role" not in entry.tensors:
        nothing = torch.zeros(len(w.train), dtype=torch.int8)
        scorer = Scorer(net, w.data.test, None, w.validation)
        return Victim(net, PoisonedSet(w.train, nothing, w.train.labels), None, scorer, entry.outcome)
    t = entry.tensors
    images = w.train.images.clone()
    images[t["touched"]] = t["touched_images"]
    poisoned = PoisonedSet(ImageSet(images, t["labels"], w.train.num_classes), t["role"], w.train.labels)
    source = t["test_source"]
    triggered = PoisonedTest(t["test_images"], w.data.test.labels[source], t["test_target"], source)
    return Victim(net, poisoned, triggered, Scorer(net, w.data.test, triggered, w.validation), entry.outcome)


def read_victim(scenario: Scenario, store: Store, cache: Path) -> Victim:
    """A stored victim; trained first when it is absent or damaged."""
    victim = _read_victim(scenario, store.root, cache)
    if victim is None:
        _read_victim.cache_clear()
        run_victim(scenario, store, cache)
        victim = _read_victim(scenario, store.root, cache)
    assert victim is not None
    return victim


# -- one defense run -----------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, store: Store, cache: Path) -> None:
    """Runs a defense on its view, scores every candidate it yields, and stores the scores; no-op when they stand."""
    scenario = cell.scenario
    w = world(scenario, cache)
    key = cell_key(cell, w.data.fingerprint)
    if store.read("defended", key, tensors=False):
        return
    victim = read_victim(scenario, store, cache)
    reset_peak()
    if victim.outcome["status"] == "ok":
        outcome = defend(cell, w, victim)
    else:
        outcome = _stopped("failed", f"no victim: {victim.outcome['reason']}")
    outcome |= {"peak_mib": peak_mib(), "victim_seconds": victim.outcome["seconds"]}
    store.write("defended", key, cell.spec(), outcome)


def _stopped(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "candidates": [], "units": 0, "seconds": 0.0}


def defend(cell: Cell, w: World, victim: Victim, keep: list[Network] | None = None) -> dict[str, Any]:
    """Builds the view, lets the defense yield, scores what it yields. ``keep`` receives every candidate's network, if given."""
    defense, scenario = cell.defense, cell.scenario
    missing = defense.needs & ~cell.track.grants
    if missing:
        return _stopped("refused", f"needs {defense.needs.words}; the track {cell.track.name!r} withholds {missing.words}")
    kept = victim.poisoned.role == Role.CLEAN
    view = view_for(
        cell.track,
        defense,
        cell.scope,
        {
            Knowledge.MODEL: lambda: victim.net,
            Knowledge.CLEAN: lambda: (w.clean, w.validation),
            Knowledge.TRAIN: lambda: victim.poisoned.visible,
            Knowledge.ROLES: lambda: victim.poisoned.visible.subset(kept),
        },
        fresh=functools.partial(_fresh, scenario, w),
        num_classes=w.train.num_classes,
        seed=derive_seed(scenario.seed, "defense"),
        recipe=scenario.recipe,
    )
    measured: list[dict[str, Any]] = []
    seconds = 0.0
    try:
        for candidate, cost, took in _metered_candidates(defense.candidates(view)):
            seconds += took
            if keep is not None:
                keep.append(candidate.model)
            measured.append(
                {
                    "dial": candidate.dial,
                    "is_default": candidate.is_default,
                    "strength": float(candidate.strength),
                    "pruned": candidate.pruned,
                    "note": candidate.note,
                    **_numbers(victim.scorer(candidate.model)),
                    "val_acc": _none(victim.scorer.val_acc(candidate.model)) if Knowledge.CLEAN in cell.track.grants else None,
                    "forward": cost.forward,
                    "backward": cost.backward,
                }
            )
    except Withheld as error:
        return _stopped("refused", str(error))
    except Inapplicable as error:
        return _stopped("refused", f"does not apply: {error}")
    except Diverged as error:
        return _stopped("failed", str(error))
    if sum(entry["is_default"] for entry in measured) != 1:
        return _stopped("failed", f"{defense.name} must mark exactly one default among its {len(measured)} candidates")
    units = sum(layer.size for layer in unit_layers(victim.net, cell.scope))
    return {
        "status": "ok",
        "reason": "",
        "candidates": measured,
        "units": units,
        "used": view.used.words,
        "seconds": seconds,
    }


def _metered_candidates(candidates: Iterator[Candidate]) -> Iterator[tuple[Candidate, Cost, float]]:
    """Each candidate with the samples and seconds spent since the one before it; the benchmark's own scoring is not charged."""
    while True:
        start = time.perf_counter()
        with metered() as cost:
            candidate = next(candidates, None)
        if candidate is None:
            return
        yield candidate, cost, time.perf_counter() - start


def _none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(measured: Score) -> dict[str, float | None]:
    return {"acc": _none(measured.acc), "asr": _none(measured.asr), "ra": _none(measured.ra)}


def _score_of(stored: dict[str, Any]) -> Score:
    return Score(_nan(stored["acc"]), _nan(stored["asr"]), _nan(stored["ra"]))


def measured_from(c: dict[str, Any]) -> Measured:
    """A candidate's stored scores, as the selection rules read them."""
    return Measured(
        dial=c["dial"],
        is_default=c["is_default"],
        strength=c["strength"],
        pruned=c["pruned"],
        note=c["note"],
        score=_score_of(c),
        val_acc=_nan(c["val_acc"]),
        forward=c["forward"],
        backward=c["backward"],
    )


# -- rows ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellResult:
    """What a cell contributes to the three files, and its key."""

    key: str
    rows: list[Row]
    curves: list[Curve]
    timing: Timing


def cell_rows(matrix: str, dataset: str, cell: Cell, fingerprint: str, outcome: Entry, victim: Entry, twin: Entry) -> CellResult:
    """Rows of a cell from stored outcomes alone: its own, its victim's and its benign twin's. ``dataset``: its name in rows."""
    scenario, out, vic = cell.scenario, outcome.outcome, victim.outcome
    key = cell_key(cell, fingerprint)
    axes: dict[str, Any] = {
        "matrix": matrix,
        "dataset": dataset,
        "backbone": scenario.backbone_label,
        "attack": scenario.attack_label,
        "rate": scenario.plan.rate,
        "seed": scenario.seed,
        "track": cell.track.name,
        "scope": cell.scope.value,
        "defense": cell.defense_label,
        "cell": key[:12],
    }
    assert set(axes) == set(Key.__dataclass_fields__)
    before = _score_of(vic) if vic["status"] == "ok" else Score(math.nan)
    benign = _nan(twin.outcome.get("acc"))
    verdict = gate(before, benign)
    before_val = _nan(vic.get("val_acc")) if Knowledge.CLEAN in cell.track.grants else math.nan
    measured = [measured_from(candidate) for candidate in out["candidates"]]
    common = {
        "target": scenario.plan.target,
        "label_mode": scenario.plan.label_mode,
        "realised_rate": vic.get("realised_rate", math.nan),
        "control": cell.defense.control,
        "acc_undefended": before.acc,
        "asr_undefended": before.asr,
        "ra_undefended": before.ra,
        "acc_benign": benign,
        "implanted": verdict.implanted,
        "gate": verdict.words,
        "units": out["units"],
        "preset": cell.preset,
    }
    notes = []
    if vic.get("exported") and cell.defense.needs & (Knowledge.TRAIN | Knowledge.ROLES):
        notes.append("training-control attack: met through its exported static set")
    rows = []
    for how in Selection:
        row: dict[str, Any] = {**axes, **common, "selection": how.value, "status": out["status"], "reason": out["reason"]}
        chosen = choose(how, measured, before, before_val, cell.tau) if out["status"] == "ok" else None
        if out["status"] == "ok" and chosen is None:
            row |= {"status": "refused", "reason": NOTHING_TO_VALIDATE_ON}
        if chosen is not None:
            m = measured[chosen]
            forward, backward = _cost(how, measured, chosen)
            spent = Cost(forward, backward)
            row |= {
                "acc": m.score.acc,
                "asr": m.score.asr,
                "ra": m.score.ra,
                "der": der(before, m.score),
                "dial": _nan(m.dial),
                "pruned": m.pruned,
                "val_acc": m.val_acc,
                "note": "; ".join([*notes, *([m.note] if m.note else [])]),
                "samples_forward": forward,
                "samples_backward": backward,
                "cost_epochs": spent.epochs(vic["train_size"]),
            }
        rows.append(Row(**row))
    curves = [
        Curve(
            **axes,
            dial_name=cell.defense.dial_name,
            dial=_nan(m.dial),
            is_default=m.is_default,
            strength=m.strength,
            pruned=m.pruned,
            acc=m.score.acc,
            asr=m.score.asr,
            ra=m.score.ra,
            val_acc=m.val_acc,
        )
        for m in measured
    ]
    timing = Timing(**axes, seconds=out["seconds"], peak_mib=out["peak_mib"], victim_seconds=out["victim_seconds"])
    return CellResult(key, rows, curves, timing)


def _cost(how: Selection, measured: list[Measured], chosen: int) -> tuple[int, int]:
    """What it took to get the chosen candidate: a fixed default needs the first yield (which carries the scoring) and its own; a
    choice needs every candidate."""
    paid = {0, chosen} if how is Selection.DEFAULT else set(range(len(measured)))
    return sum(measured[i].forward for i in paid), sum(measured[i].backward for i in paid)


# -- memory --------------------------------------------------------------------------------------------------------------------


def reset_peak() -> None:
    """Starts a new high-water mark of this process's memory, where the system can (Linux)."""
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        try:
            marker.write_text("5")
        except OSError:
            return


def peak_mib() -> float:
    """The high-water mark of resident memory in MiB, since :func:`reset_peak` where the system can tell."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
