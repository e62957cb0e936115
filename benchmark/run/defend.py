"""Two stored stages: defense runs, with the scores of all candidates of a cell, and canaries, copies of a victim with a backdoor
planted by the benchmark that all defenses share."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.base import PoisonedTest, Role, poison_test
from benchmark.rules.canary import Canary, Planted, Planting, plant
from benchmark.rules.metrics import Score, Scorer, nan_of, null_of, score, val_accuracy
from benchmark.rules.selection import CandidateScore, Selection, choose, paired_loss
from benchmark.rules.tracks import view_for
from benchmark.run.keys import canary_key, cell_key, scratch_key
from benchmark.run.outcome import gpu_mib, isolation, peak_mib, reset_peak
from benchmark.run.victim import Victim, read_extractor, read_victim, surrogate_of
from benchmark.run.world import World, clean_seeds, defender_seed, fresh, lesser, world
from benchmark.settings.cells import Cell, Scenario
from benchmark.storage.networks import stored_network
from benchmark.storage.store import Store
from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Withheld
from defenses.controls import NoDefense, TrainingFromScratch
from models.backbone import Network
from models.cost import Cost, metered
from models.extractors import Extractor
from models.spec import derive_seed
from models.training import Diverged, Fitted
from models.units import Scope, unit_layers
from models.variants import Variants

__all__ = ["defend", "read_canary", "run_cell", "run_metered"]

Runner = Callable[[Defense, DefenderView], Iterator[tuple[Candidate, Cost, float]]]


def run_cell(cell: Cell, store: Store, cache: Path) -> None:
    """Runs the defense of a cell and stores the scores of its candidates, unless they are cached."""
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
            given = victim if cell.budget is None else _validated_on(smaller, victim)
            outcome = defend(
                cell, smaller, given, fetch=fetch, recraft=_recrafter(scenario, w, store, cache),
                planted=functools.partial(read_canary, cell, smaller, victim.net, store), run=_shared(cell, smaller, store),
            )  # fmt: skip
        except Inapplicable as error:
            outcome = _stopped_by(error)
    else:
        outcome = _stopped("failed", f"no victim: {victim.outcome['reason']}")
    outcome |= {"peak_mib": peak_mib(), "gpu_mib": gpu_mib(), "victim_seconds": victim.outcome["seconds"]}
    store.write("defended", key, cell.spec(), outcome)


def _validated_on(w: World, victim: Victim) -> Victim:
    """The victim, validated on the images of ``w``."""
    scorer = Scorer(victim.net, w.data.test, victim.triggered, w.validation)
    outcome = {**victim.outcome, "val_acc": null_of(val_accuracy(victim.net, w.validation))}
    return dataclasses.replace(victim, scorer=scorer, outcome=outcome)


def _recrafter(scenario: Scenario, w: World, store: Store, cache: Path) -> Callable[[Network], PoisonedTest] | None:
    """For attacks whose trigger needs the attacked model: gives the triggered test set against a network."""
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


def _stopped_by(error: Withheld | Inapplicable | Diverged) -> dict[str, Any]:
    if isinstance(error, Diverged):
        return _stopped("failed", str(error))
    return _stopped("refused", str(error) if isinstance(error, Withheld) else f"does not apply: {error}")


def defend(
    cell: Cell,
    w: World,
    victim: Victim,
    keep: list[Network] | None = None,
    fetch: Callable[[Extractor], Fitted] | None = None,
    recraft: Callable[[Network], PoisonedTest] | None = None,
    planted: Callable[[Canary], Planted] | None = None,
    run: Runner | None = None,
) -> dict[str, Any]:
    """Runs a defense on the view that the cell's track grants and scores every candidate.

    The defense runs at every setting of its knob, the published one first, within the cell's budget of candidates (the published
    setting's dial is always complete). For a defense that edits the model, the untouched model is added as a candidate.

    Args:
        cell: the cell.
        w: its data.
        victim: its attacked model.
        keep: receives every candidate's network, if given.
        fetch: gives an extractor; its cost in samples and seconds is added to the first candidate.
        recraft: crafts the triggered test set again for a network; the candidates that a selection chooses are scored on it too.
        planted: gives the copy with a canary; without it the cell's canaries are left out.
        run: gives the defense's candidates, each with its cost and seconds; None = :func:`run_metered`.

    Returns:
        The outcome as it is stored.
    """
    missing = cell.defense.needs & ~cell.grants
    if missing:
        return _stopped("refused", f"needs {cell.defense.needs.words}; the track {cell.track.name!r} withholds {missing.words}")
    # Before any meter runs, because missing extractors and copies are trained here.
    try:
        if fetch is not None:
            for extractor in cell.extractors:
                fetch(extractor)
    except Diverged as error:
        return _stopped("failed", f"no extractor: {error}")
    copies, canary = _copies(cell, planted)
    trial = _Trial(cell, w, victim, fetch, run or run_metered)
    try:
        if fault := trial.run():
            return _stopped("failed", f"{cell.defense.name} {fault}")
    except (Withheld, Inapplicable, Diverged) as error:
        return _stopped_by(error)
    if keep is not None:
        keep += trial.nets
    if copies:
        canary = _canary_scores(cell, w, victim, trial.scored, copies)
    trial.score_chosen()
    if recraft is not None:
        trial.score_again(recraft)
    return trial.outcome() | canary


def _copies(cell: Cell, planted: Callable[[Canary], Planted] | None) -> tuple[list[Planted], dict[str, str]]:
    """The copies with the cell's canaries; if planting diverged, none and the reason."""
    if planted is None or not cell.canaried:
        return [], {}
    try:
        return [planted(one) for one in cell.canaries], {}
    except Diverged as error:
        return [], {"canary_reason": f"a canary could not be planted: {error}"}


class _Trial:
    """A defense on an attacked model, setting by setting of its knob. Every candidate is scored at once, where the cell says so on
    a part of the test images.

    Attributes:
        scored: the candidates.
        nets: their networks.
    """

    def __init__(self, cell: Cell, w: World, victim: Victim, fetch: Callable[[Extractor], Fitted] | None, run: Runner) -> None:
        self.cell, self.w, self.victim, self.fetch, self.candidates = cell, w, victim, fetch, run
        self.scored: list[CandidateScore] = []
        self.nets: list[Network] = []
        self.borrowed: list[Fitted] = []
        self.used, self.trained, self.seconds = Knowledge.NONE, False, 0.0
        self.counts: dict[Any, int] = {}
        self.right = victim.scorer.val_right(victim.net) if Knowledge.CLEAN in cell.grants else None
        self.weights = {name: value.clone() for name, value in victim.net.state_dict().items()}
        known = {name: victim.outcome.get(name) for name in ("acc", "asr", "ra")}
        self.on_part = victim.scorer.on_part(victim.net, cell.curve_images) if cell.on_part and cell.curve_images else None
        self.untouched = None if None in known.values() else Score.read(known)

    def run(self) -> str:
        """Collects and scores all candidates. Returns what is wrong with their defaults; empty if nothing."""
        for number, variant in enumerate(self.cell.defense.knobs):
            left = self.cell.candidates - len(self.scored) if number else None
            if left is not None and left <= 0:
                break
            begun = len(self.scored)
            self._collect(variant, left)
            new = self.scored[begun:]
            if sum(one.starts for one in new) != 1 and (left is None or left > len(new)):
                return f"must mark exactly one default among its {len(new)} candidates"
        if Knowledge.MODEL in self.cell.defense.needs and not isinstance(self.cell.defense, NoDefense):
            known = self.untouched or self.victim.scorer(self.victim.net)
            self._add(Candidate(self.victim.net, is_default=False), known, kept=True)
        return ""

    def _collect(self, variant: Defense, left: int | None) -> None:
        """Scores the candidates of one setting of the knob, at most ``left``; None = the published setting, all of them."""
        view = _view(self.cell, variant, self.w, self.victim, self.victim.net, None if self.fetch is None else self._network_of)
        for candidate, cost, seconds in itertools.islice(self.candidates(variant, view), left):
            self.seconds += seconds
            changed = not _alike(candidate.model, self.weights)
            default = candidate.is_default and left is None
            known = None if changed else self.untouched
            part = None if default or known else self.on_part  # the default is read in every row
            score = known or (part or self.victim.scorer)(candidate.model)
            self._add(
                candidate, score, knob=nan_of(variant.knob), is_default=default, starts=candidate.is_default, changed=changed,
                forward=cost.forward, backward=cost.backward, on_part=None if part is None else True,
                **isolation(candidate.isolated, candidate.suspicion, self.victim.poisoned.role),
            )  # fmt: skip
        self.used, self.trained = self.used | view.used, self.trained or view.trained

    def _network_of(self, extractor: Extractor) -> Network:
        assert self.fetch is not None
        self.borrowed.append(self.fetch(extractor))
        return self.borrowed[-1].net

    def _add(self, candidate: Candidate, score: Score, **about: Any) -> None:
        untouched = {"knob": math.nan, "is_default": False, "starts": False, "changed": False, "forward": 0, "backward": 0}
        self.nets.append(candidate.model)
        self.scored.append(
            CandidateScore(
                **dataclasses.asdict(score),
                **_validated(self.victim, candidate.model, self.right),
                dial=nan_of(candidate.dial),
                strength=float(candidate.strength),
                pruned=candidate.pruned,
                units=_units(candidate.model, self.cell.scope, self.counts),
                note=candidate.note,
                **untouched | about,
            )
        )

    def score_chosen(self) -> None:
        """Scores on all test images what a rule selects. The rules of hindsight first select by the part; of what was scored on all
        images they then take the best, so that no other rule can beat the oracle."""
        if self.on_part is None:
            return
        before = self.untouched or self.victim.scorer(self.victim.net)
        first = [dataclasses.replace(one, on_part=None) for one in self.scored]
        for chosen in {choose(how, first, before, self.cell.tau) for how in Selection} - {None}:
            assert chosen is not None
            if self.scored[chosen].on_part:
                whole = dataclasses.asdict(self.victim.scorer(self.nets[chosen]))
                self.scored[chosen] = dataclasses.replace(self.scored[chosen], on_part=None, **whole)

    def score_again(self, recraft: Callable[[Network], PoisonedTest]) -> None:
        """Scores the candidates that a selection chooses with the trigger crafted again on each."""
        before = Score.read(self.victim.outcome)
        for chosen in {choose(how, self.scored, before, self.cell.tau) for how in Selection} - {None}:
            assert chosen is not None
            nothing = self.w.data.test.subset(torch.zeros(0, dtype=torch.int64))  # its ACC is known
            again = score(self.nets[chosen], nothing, recraft(self.nets[chosen]))
            self.scored[chosen] = dataclasses.replace(self.scored[chosen], asr_recraft=again.asr, ra_recraft=again.ra)

    def outcome(self) -> dict[str, Any]:
        """The outcome of a finished run as it is stored."""
        lent = Cost(sum(one.samples_forward for one in self.borrowed), sum(one.samples_backward for one in self.borrowed))
        first = self.scored[0]
        first = dataclasses.replace(first, forward=first.forward + lent.forward, backward=first.backward + lent.backward)
        return {
            "status": "ok",
            "reason": "",
            "candidates": [one.stored() for one in (first, *self.scored[1:])],
            "units": max(self.counts.values()),
            "used": self.used.words,
            "trained": self.trained,
            "extractor_forward": lent.forward,
            "extractor_backward": lent.backward,
            "clean_images": len(self.w.clean) + len(self.w.validation),
            "seconds": self.seconds + sum(one.seconds for one in self.borrowed),
        }


def _view(
    cell: Cell, defense: Defense, w: World, victim: Victim, net: Network, built: Callable[[Extractor], Network] | None
) -> DefenderView:
    """The view that the cell's track grants to ``defense``, with ``net`` as the model."""
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
    """Whether all weights and running statistics of ``net`` are those of the attacked model."""
    state = net.state_dict()
    return state.keys() == own.keys() and all(torch.equal(value.cpu(), own[name]) for name, value in state.items())


def _units(net: Network, scope: Scope, counts: dict[Any, int]) -> int:
    """Prunable units of a network; counted once per architecture, since counting traces the network."""
    shape = tuple((name, tuple(value.shape)) for name, value in net.state_dict().items())
    if shape not in counts:
        counts[shape] = sum(layer.size for layer in unit_layers(net, scope))
    return counts[shape]


def _validated(victim: Victim, net: Network, right: Tensor | None) -> dict[str, Any]:
    """Accuracy on the validation images and the paired loss; NaN without images. ``right``: of the attacked model, bool (N,)."""
    if right is None:
        return {"val_acc": math.nan, "val_loss": math.nan, "val_loss_se": math.nan}
    now = victim.scorer.val_right(net)
    loss, error = paired_loss(right, now)
    return {"val_acc": float(now.double().mean()), "val_loss": loss, "val_loss_se": error}


def read_canary(cell: Cell, w: World, model: Network, store: Store, canary: Canary) -> Planted:
    """A stored copy with a canary; planted first where it is missing or damaged.

    Raises:
        Diverged: planting diverged.
    """
    seed = derive_seed(defender_seed(cell.scenario), "canary", canary.name)

    def train() -> tuple[Network, dict[str, Any], dict[str, Tensor]]:
        made = plant(canary, model, w.clean, w.validation, cell.scenario.recipe, seed)
        return made.net, {"target": made.target, "forward": made.forward, "backward": made.backward}, {"probes": made.probes}

    key = canary_key(cell, canary, w.data.fingerprint)
    net, entry = stored_network(store, "canary", key, canary.spec(), lambda: copy.deepcopy(model), train)
    stored = entry.outcome
    return Planted(net, stored["target"], entry.tensors["probes"], stored["forward"], stored["backward"])


def _shared(cell: Cell, w: World, store: Store) -> Runner:
    """Runs a defense; a training from scratch, which no attack changes, is stored and read by the cells of all attacks."""
    if not isinstance(cell.defense, TrainingFromScratch):
        return run_metered

    def run(defense: Defense, view: DefenderView) -> Iterator[tuple[Candidate, Cost, float]]:
        def train() -> tuple[Network, dict[str, Any], dict[str, Tensor]]:
            ((candidate, cost, seconds),) = run_metered(defense, view)
            return candidate.model, {"forward": cost.forward, "backward": cost.backward, "seconds": seconds}, {}

        len(view.clean)  # used, also where the network is read
        key = scratch_key(cell, w.data.fingerprint)
        net, entry = stored_network(store, "scratch", key, defense.spec(), lambda: view.fresh(0), train)
        yield Candidate(net), Cost(entry.outcome["forward"], entry.outcome["backward"]), entry.outcome["seconds"]

    return run


def _canary_scores(cell: Cell, w: World, victim: Victim, scored: list[CandidateScore], copies: Sequence[Planted]) -> dict[str, Any]:
    """Runs the defense on every copy and adds the canaries' ASR and losses to the candidates of the same setting.

    The copies are validated on the same images as the model. Of the scenario only the data that the cell's track grants are read.

    Returns:
        The cost in samples; or the reason why the canary rule has nothing to choose by.
    """
    found: list[list[tuple[float, float]]] = []
    spent = Cost()
    for canary, one in zip(cell.canaries, copies, strict=True):
        reached = one.asr(one.net)
        if not reached > Planting().reached:
            return {"canary_reason": f"the canary {canary.name!r} did not take (ASR {100 * reached:.1f} %)"}
        try:
            found.append(_on_copy(cell, w, victim, one, scored, spent))
        except (Diverged, Inapplicable) as error:
            return {"canary_reason": f"the defense failed on the copy with the canary {canary.name!r}: {error}"}
    for position, pairs in enumerate(zip(*found, strict=True)):
        asr, loss = zip(*pairs, strict=True)
        scored[position] = dataclasses.replace(scored[position], canary_asr=asr, canary_loss=loss)
    return {"canary_forward": spent.forward, "canary_backward": spent.backward}


def _on_copy(
    cell: Cell, w: World, victim: Victim, one: Planted, scored: Sequence[CandidateScore], spent: Cost
) -> list[tuple[float, float]]:
    """(ASR of the canary, loss of validation accuracy) after each candidate's setting.

    A setting is a knob and a dial, or the default of a knob, whose dial may depend on the model. For the untouched model it is the
    copy before the defense.
    """

    variants = Variants(one.net, {"probes": one.probes, "validation": w.validation.images})

    def right(net: Network) -> Tensor:
        return variants.predict(net, "validation") == w.validation.labels

    before = right(one.net)
    settings: list[tuple[float | None, float, bool]] = []
    found: list[tuple[float, float]] = []
    wanted = {null_of(entry.knob) for entry in scored if not entry.kept}
    for variant in cell.defense.knobs:
        if variant.knob not in wanted:
            break
        view = _view(cell, variant, w, victim, one.net, None)
        for candidate, cost, _ in run_metered(variant, view):
            spent.forward, spent.backward = spent.forward + cost.forward, spent.backward + cost.backward
            settings.append((variant.knob, nan_of(candidate.dial), candidate.is_default))
            predicted = variants.predict(candidate.model, "probes")
            found.append((one.share(predicted), paired_loss(before, right(candidate.model))[0]))
    spent.forward, spent.backward = spent.forward + one.forward, spent.backward + one.backward
    kept = one.asr(one.net), 0.0

    def of(entry: CandidateScore) -> tuple[float, float]:
        if entry.kept:
            return kept
        same = [i for i, (knob, _, _) in enumerate(settings) if knob == null_of(entry.knob)]
        if entry.starts:
            return found[next(i for i in same if settings[i][2])]
        return found[min(same, key=lambda i: (abs(settings[i][1] - entry.dial), settings[i][2]))]

    return [of(entry) for entry in scored]


def run_metered(defense: Defense, view: DefenderView) -> Iterator[tuple[Candidate, Cost, float]]:
    """Every candidate with the cost and seconds since the one before it; scoring by the benchmark is not included."""
    candidates = defense.candidates(view)
    while True:
        start = time.perf_counter()
        with metered() as cost:
            candidate = next(candidates, None)
        if candidate is None:
            return
        yield candidate, cost, time.perf_counter() - start
