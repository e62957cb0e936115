"""Two stored stages: a defense run and the canaries it is chosen by."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.base import PoisonedSet, PoisonedTest, Role, poison_test
from benchmark.rules.canary import Canary, Planted, Planting, plant
from benchmark.rules.metrics import Scorer, score, val_accuracy
from benchmark.rules.selection import Selection, choose, paired_loss
from benchmark.rules.tracks import view_for
from benchmark.run.keys import canary_key, cell_key
from benchmark.run.outcome import gpu_mib, measured_from, nan_of, none_of, numbers, peak_mib, reset_peak, score_of
from benchmark.run.victim import Victim, read_extractor, read_victim, surrogate_of
from benchmark.run.world import World, defender_seed, fresh, lesser, world
from benchmark.settings.cells import Cell, Scenario
from benchmark.storage.store import Store
from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Withheld
from defenses.controls import NoDefense
from models.backbone import Network
from models.cost import Cost, metered
from models.extractors import Extractor
from models.spec import derive_seed, generator
from models.training import Diverged, Fitted, predict
from models.units import Scope, unit_layers

__all__ = ["clean_seeds", "defend", "read_canary", "run_cell"]

SEEDS_PER_CLASS = 10
"""How many training samples of every class are known to be clean where a track says so (ASD's protocol: Gao et al., CVPR 2023)."""


def run_cell(cell: Cell, store: Store, cache: Path) -> None:
    """Runs a defense on its view, scores every candidate it yields, and stores the scores; no-op when they stand."""
    w = world(cell.scenario, cache)
    key = cell_key(cell, w.data.fingerprint)
    store.once("defended", key, lambda: _make_cell(cell, w, key, store, cache))


def _make_cell(cell: Cell, w: World, key: str, store: Store, cache: Path) -> None:
    scenario = cell.scenario
    victim = read_victim(scenario, store, cache)
    reset_peak()
    if victim.outcome["status"] == "ok":

        def fetch(extractor: Extractor) -> Fitted:
            return read_extractor(extractor, scenario, store, cache, victim.poisoned.visible)

        try:
            smaller = lesser(w, cell)
            met = victim if cell.budget is None else _validated_on(smaller, victim)
            outcome = defend(
                cell, smaller, met, fetch=fetch, recraft=_recrafter(scenario, w, store, cache),
                planted=functools.partial(read_canary, cell, smaller, victim.net, store),
            )  # fmt: skip
        except Inapplicable as error:
            outcome = _stopped("refused", f"does not apply: {error}")
    else:
        outcome = _stopped("failed", f"no victim: {victim.outcome['reason']}")
    outcome |= {"peak_mib": peak_mib(), "gpu_mib": gpu_mib(), "victim_seconds": victim.outcome["seconds"]}
    store.write("defended", key, cell.spec(), outcome)


def _validated_on(w: World, victim: Victim) -> Victim:
    """The victim, validated on ``w``'s images instead of those it was stored with."""
    scorer = Scorer(victim.net, w.data.test, victim.triggered, w.validation)
    outcome = {**victim.outcome, "val_acc": none_of(val_accuracy(victim.net, w.validation))}
    return dataclasses.replace(victim, scorer=scorer, outcome=outcome)


def _recrafter(scenario: Scenario, w: World, store: Store, cache: Path) -> Callable[[Network], PoisonedTest] | None:
    """For attacks whose trigger needs the attacked model: the triggered test set against any network."""
    attack = scenario.attack
    if attack is None or not attack.needs_model_at_test:
        return None
    seed = derive_seed(scenario.seed, "attack")
    crafted = attack.craft(w.train, scenario.plan, seed, surrogate_of(scenario, store, cache))

    def against(net: Network) -> PoisonedTest:
        return poison_test(w.data.test, attack.recraft(net, crafted, w.train, scenario.plan, seed), scenario.plan)

    return against


def _stopped(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "candidates": [], "units": 0, "seconds": 0.0}


def defend(
    cell: Cell,
    w: World,
    victim: Victim,
    keep: list[Network] | None = None,
    fetch: Callable[[Extractor], Fitted] | None = None,
    recraft: Callable[[Network], PoisonedTest] | None = None,
    planted: Callable[[Canary], Planted] | None = None,
) -> dict[str, Any]:
    """Builds the view, lets the defense yield, scores what it yields.

    The defense is tried at every setting of its knob, the published one first, as long as the cell's budget of candidates lasts
    (the published setting's dial is always whole). To a defense that edits the model the benchmark adds the untouched model.

    Args:
        keep: receives every candidate's network, if given.
        fetch: where extractors come from; whoever uses one is charged its cost, in samples and seconds, with the first candidate.
        recraft: crafts the triggered test set anew against a network; candidates that a selection chooses are scored on it too.
        planted: where the copies with canaries come from; without it the cell's canaries are left out.
    """
    defense = cell.defense
    missing = defense.needs & ~cell.grants
    if missing:
        return _stopped("refused", f"needs {defense.needs.words}; the track {cell.track.name!r} withholds {missing.words}")
    taken: list[Fitted] = []

    def network_of(extractor: Extractor) -> Network:
        assert fetch is not None
        taken.append(fetch(extractor))
        return taken[-1].net

    try:
        if fetch is not None:  # before any meter runs: a missing one is trained and stored here
            for wanted in cell.extractors:
                fetch(wanted)
    except Diverged as error:
        return _stopped("failed", f"no extractor: {error}")
    copies: list[Planted] = []
    canary: dict[str, Any] = {}
    if planted is not None and cell.canaried:  # as early, for the same reason
        try:
            copies = [planted(one) for one in cell.canaries]
        except Diverged as error:
            canary = {"canary_reason": f"a canary could not be planted: {error}"}

    used = Knowledge.NONE
    trained = False

    def tried(variant: Defense, net: Network) -> Iterator[tuple[Candidate, Cost, float]]:
        nonlocal used, trained
        view = _view(cell, variant, w, victim, net, network_of if fetch is not None else None)
        yield from _metered_candidates(variant.candidates(view))
        used, trained = used | view.used, trained or view.trained

    measured: list[dict[str, Any]] = []
    nets: list[Network] = []
    seconds = 0.0
    counts: dict[Any, int] = {}
    validated = Knowledge.CLEAN in cell.grants
    right = victim.scorer.val_right(victim.net) if validated else None
    own = {name: value.clone() for name, value in victim.net.state_dict().items()}
    untouched = {name: victim.outcome.get(name) for name in ("acc", "asr", "ra")}
    try:
        for number, variant in enumerate(defense.knobs):
            left = cell.candidates - len(measured)
            if number and left <= 0:
                break
            begun = len(measured)
            for candidate, cost, took in itertools.islice(tried(variant, victim.net), left if number else None):
                seconds += took
                nets.append(candidate.model)
                changed = not _alike(candidate.model, own)
                measured.append(
                    {
                        "knob": variant.knob,
                        "dial": candidate.dial,
                        "is_default": candidate.is_default and not number,
                        "starts": candidate.is_default,
                        "changed": changed,
                        "kept": False,
                        "strength": float(candidate.strength),
                        "pruned": candidate.pruned,
                        "units": _units(candidate.model, cell.scope, counts),
                        "note": candidate.note,
                        **(numbers(victim.scorer(candidate.model)) if changed or None in untouched.values() else untouched),
                        **_validated(victim, candidate.model, right),
                        "forward": cost.forward,
                        "backward": cost.backward,
                        **_singled_out(candidate.isolated, victim.poisoned.role),
                    }
                )
            if sum(entry["starts"] for entry in measured[begun:]) != 1 and (not number or left > len(measured) - begun):
                words = f"must mark exactly one default among its {len(measured) - begun} candidates"
                return _stopped("failed", f"{defense.name} {words}")
    except Withheld as error:
        return _stopped("refused", str(error))
    except Inapplicable as error:
        return _stopped("refused", f"does not apply: {error}")
    except Diverged as error:
        return _stopped("failed", str(error))
    if Knowledge.MODEL in defense.needs and not isinstance(defense, NoDefense):
        nets.append(victim.net)
        measured.append(
            {
                "knob": None, "dial": None, "is_default": False, "starts": False, "changed": False, "kept": True, "strength": 0.0,
                "pruned": 0, "units": _units(victim.net, cell.scope, counts), "note": "", **numbers(victim.scorer(victim.net)),
                **_validated(victim, victim.net, right), "forward": 0, "backward": 0,
            }
        )  # fmt: skip
    if keep is not None:
        keep += nets
    if copies:
        canary = _canary_scores(cell, w, victim, measured, copies)
    if recraft is not None:
        offered = [measured_from(entry) for entry in measured]
        for position in {choose(how, offered, score_of(victim.outcome), cell.tau) for how in Selection} - {None}:
            assert position is not None
            again = score(nets[position], w.data.test, recraft(nets[position]))
            measured[position] |= {"asr_recraft": none_of(again.asr), "ra_recraft": none_of(again.ra)}
    lent = Cost(sum(fitted.samples_forward for fitted in taken), sum(fitted.samples_backward for fitted in taken))
    measured[0]["forward"] += lent.forward
    measured[0]["backward"] += lent.backward
    seconds += sum(fitted.seconds for fitted in taken)
    return {
        "status": "ok",
        "reason": "",
        "candidates": measured,
        "units": max(counts.values()),
        "used": used.words,
        "trained": trained,
        "extractor_forward": lent.forward,
        "extractor_backward": lent.backward,
        "clean_images": len(w.clean) + len(w.validation),
        "seconds": seconds,
        **canary,
    }


def _view(
    cell: Cell, defense: Defense, w: World, victim: Victim, net: Network, built: Callable[[Extractor], Network] | None
) -> DefenderView:
    """What the cell's track grants to ``defense``, with ``net`` as the model."""
    scenario = cell.scenario
    kept = victim.poisoned.role == Role.CLEAN
    return view_for(
        cell.grants,
        defense,
        cell.scope,
        {
            Knowledge.MODEL: lambda: net,
            Knowledge.CLEAN: lambda: (w.clean, w.validation),
            Knowledge.TRAIN: lambda: victim.poisoned.visible,
            Knowledge.EXTRACTOR: lambda: built(cell.extractor) if built and cell.extractor else None,
            Knowledge.SEEDS: lambda: clean_seeds(victim.poisoned, derive_seed(scenario.seed, "clean-seeds")),
            Knowledge.ROLES: lambda: victim.poisoned.visible.subset(kept),
        },
        fresh=functools.partial(fresh, scenario, w),
        num_classes=w.train.num_classes,
        seed=defender_seed(scenario),
        recipe=scenario.recipe,
        built=built,
    )


def _alike(net: Network, own: Mapping[str, Tensor]) -> bool:
    """Whether every weight and running statistic of ``net`` is the attacked model's."""
    state = net.state_dict()
    return state.keys() == own.keys() and all(torch.equal(value.cpu(), own[name]) for name, value in state.items())


def _units(net: Network, scope: Scope, counts: dict[Any, int]) -> int:
    """Prunable units of a network; counted once per architecture, since every count traces the network."""
    shape = tuple((name, tuple(value.shape)) for name, value in net.state_dict().items())
    if shape not in counts:
        counts[shape] = sum(layer.size for layer in unit_layers(net, scope))
    return counts[shape]


def _validated(victim: Victim, net: Network, right: Tensor | None) -> dict[str, Any]:
    """Accuracy on the validation images and the paired loss; nothing measured without images. ``right``: of the attacked model."""
    if right is None:
        return {"val_acc": None, "val_loss": None, "val_loss_se": None}
    now = victim.scorer.val_right(net)
    loss, error = paired_loss(right, now)
    accuracy = float(now.double().mean()) if len(now) else None
    return {"val_acc": accuracy, "val_loss": none_of(loss), "val_loss_se": none_of(error)}


def read_canary(cell: Cell, w: World, model: Network, store: Store, canary: Canary) -> Planted:
    """A stored copy with a canary; planted first when it is absent or damaged.

    Raises:
        Diverged: planting did.
    """
    key = canary_key(cell, canary, w.data.fingerprint)
    seed = derive_seed(defender_seed(cell.scenario), "canary", canary.name)

    def compute() -> None:
        try:
            net = plant(canary, model, w.clean, w.validation, cell.scenario.recipe, seed)
        except Diverged as error:
            store.write("canary", key, canary.spec(), {"status": "failed", "reason": str(error)})
            return
        outcome = {"status": "ok", "target": net.target, "forward": net.forward, "backward": net.backward}
        tensors = {f"net.{name}": value for name, value in net.net.state_dict().items()}
        store.write("canary", key, canary.spec(), outcome, {**tensors, "probes": net.probes})

    entry = store.read("canary", key)
    if entry is None:
        store.once("canary", key, compute)
        entry = store.read("canary", key)
    assert entry is not None
    if entry.outcome["status"] != "ok":
        raise Diverged(entry.outcome["reason"])
    net = copy.deepcopy(model)
    net.load_state_dict({name.removeprefix("net."): value for name, value in entry.tensors.items() if name.startswith("net.")})
    told = entry.outcome
    return Planted(net.eval(), told["target"], entry.tensors["probes"], told["forward"], told["backward"])


def _canary_scores(
    cell: Cell, w: World, victim: Victim, measured: list[dict[str, Any]], copies: Sequence[Planted]
) -> dict[str, Any]:
    """Runs the defense on every copy and writes the canaries' ASR and losses beside the candidates of the same setting.

    The copies are validated on the same images as the model; of the scenario, only what the cell's track grants is read.

    Returns:
        What it cost, and why there is nothing to choose by, if so.
    """
    found: list[list[tuple[float, float]]] = []
    spent = Cost()
    for canary, one in zip(cell.canaries, copies, strict=True):
        reached = one.asr(one.net)
        if not reached > Planting().reached:
            return {"canary_reason": f"the canary {canary.name!r} did not take (ASR {100 * reached:.1f} %)"}
        try:
            found.append(_on_copy(cell, w, victim, one, measured, spent))
        except (Diverged, Inapplicable) as error:
            return {"canary_reason": f"the defense failed on the copy with the canary {canary.name!r}: {error}"}
    for position, entry in enumerate(measured):
        entry["canary_asr"] = [scores[position][0] for scores in found]
        entry["canary_loss"] = [scores[position][1] for scores in found]
    return {"canary_forward": spent.forward, "canary_backward": spent.backward}


def _on_copy(
    cell: Cell, w: World, victim: Victim, one: Planted, measured: list[dict[str, Any]], spent: Cost
) -> list[tuple[float, float]]:
    """(ASR of the canary, loss of validation accuracy) after each candidate's setting.

    A setting is a knob and a dial, or the default of a knob, whose dial may be read off the model; the untouched model is the copy
    before the defense.
    """

    def right(net: Network) -> Tensor:
        return predict(net, w.validation.images) == w.validation.labels

    before = right(one.net)
    settings: list[tuple[float | None, float | None, bool]] = []
    scores: list[tuple[float, float]] = []
    wanted = {entry["knob"] for entry in measured if not entry["kept"]}
    for variant in cell.defense.knobs:
        if variant.knob not in wanted:
            break
        view = _view(cell, variant, w, victim, one.net, None)
        for candidate, cost, _ in _metered_candidates(variant.candidates(view)):
            spent.forward, spent.backward = spent.forward + cost.forward, spent.backward + cost.backward
            settings.append((variant.knob, candidate.dial, candidate.is_default))
            scores.append((one.asr(candidate.model), paired_loss(before, right(candidate.model))[0]))
    spent.forward, spent.backward = spent.forward + one.forward, spent.backward + one.backward
    kept = one.asr(one.net), 0.0

    def of(entry: dict[str, Any]) -> tuple[float, float]:
        if entry["kept"]:
            return kept
        same = [i for i, (knob, _, _) in enumerate(settings) if knob == entry["knob"]]
        if entry["starts"]:
            return scores[next(i for i in same if settings[i][2])]
        return scores[min(same, key=lambda i: (abs(nan_of(settings[i][1]) - nan_of(entry["dial"])), settings[i][2]))]

    return [of(entry) for entry in measured]


def clean_seeds(poisoned: PoisonedSet, seed: int) -> Tensor:
    """Ten samples of every class, or all it has, drawn from those that nobody touched: bool (N,)."""
    order = torch.randperm(len(poisoned.role), generator=generator(seed))
    mask = torch.zeros(len(order), dtype=torch.bool)
    for label in range(poisoned.visible.num_classes):
        own = (poisoned.true_labels[order] == label) & (poisoned.role[order] == Role.CLEAN)
        mask[order[own][:SEEDS_PER_CLASS]] = True
    return mask


def _singled_out(isolated: Tensor | None, role: Tensor) -> dict[str, Any]:
    """Samples taken for poisoned, and how they meet the roles: precision (none where nothing is isolated), recall."""
    if isolated is None:
        return {}
    poisoned = role == Role.POISON
    hits, taken, there = int((isolated & poisoned).sum()), int(isolated.sum()), int(poisoned.sum())
    return {"isolated": taken, "precision": hits / taken if taken else None, "recall": hits / there if there else None}


def _metered_candidates(candidates: Iterator[Candidate]) -> Iterator[tuple[Candidate, Cost, float]]:
    """Each candidate with the samples and seconds spent since the one before it; the benchmark's own scoring is not charged."""
    while True:
        start = time.perf_counter()
        with metered() as cost:
            candidate = next(candidates, None)
        if candidate is None:
            return
        yield candidate, cost, time.perf_counter() - start
