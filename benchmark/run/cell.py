"""The whole pipeline: scenario -> poisoned set -> victim -> view -> candidates -> scores -> rows.

Four stages are stored: a *victim* (an attacked or benign network with its poisoned data, compared with its benign twin), an
*extractor* (features learned on the clean or the poisoned images, shared by all who ask for the same ones), a *canary* (a copy of a
victim with a backdoor of the benchmark's own, shared by all defenses) and a *defense run* (what every candidate of a cell scored).
Rows are computed from stored outcomes alone, so they are the same whoever computed the stages, and when.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.base import PoisonedSet, PoisonedTest, Power, Role, poison, poison_test
from benchmark.rules.canary import Canary, Planted, Planting, plant
from benchmark.data.datasets import Dataset, DatasetSpec, load, mean_std
from benchmark.data.splits import split_budget, split_validation
from benchmark.run.literature import compared, reference
from benchmark.settings.cells import Cell, Scenario
from benchmark.rules.metrics import Score, Scorer, der, gate, score, val_accuracy
from benchmark.storage.rows import Curve, Key, Row, Timing
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON, Measured, Selection, choose, paired_loss
from benchmark.storage.store import Entry, Store
from benchmark.rules.tracks import view_for
from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Withheld
from defenses.controls import NoDefense
from models.backbone import Network
from models.classifier import Classifier
from models.cost import Cost, metered
from models.extractors import Extractor, embeddings, fit_head, mlp
from models.images import ImageSet
from models.room import copied, taken
from models.spec import BadInput, derive_seed, digest, generator
from models.training import Diverged, Fitted, fit, predict
from models.units import Scope, unit_layers

__all__ = [
    "CellResult", "Victim", "World", "canary_key", "cell_key", "cell_rows", "clean_seeds", "defend", "extractor_key",
    "measured_from", "read_canary", "read_extractor", "read_victim", "run_cell", "run_extractor", "run_victim", "victim_key",
    "world",
]  # fmt: skip

REVISION = 2
"""Raised when this file changes what the same settings give. 2: victims are compared with their twins; losses are paired."""


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


def _lesser(w: World, cell: Cell) -> World:
    """The world with the budget that the cell allows: a smaller one is a part of a larger one, so of the pool that is held out.

    Raises:
        Inapplicable: fewer than two images, which cannot be split into a part to work with and a part to validate on.
    """
    if cell.budget is None:
        return w
    seed, whole = cell.scenario.seed, w.data.train
    size = round(cell.budget * len(whole))
    if size < 2:
        raise Inapplicable(f"a clean budget of {100 * cell.budget:g} % of {len(whole)} images is {size}: at least 2 are needed")
    held_out = whole.subset(split_budget(whole, cell.budget, seed)[1])
    fitting, validating = split_validation(held_out, seed)
    return dataclasses.replace(w, clean=held_out.subset(fitting), validation=held_out.subset(validating))


def victim_key(scenario: Scenario, fingerprint: str) -> str:
    """Key of a scenario's victim; ``fingerprint`` of the data set it stands on."""
    return digest("victim", REVISION, scenario.spec(), fingerprint)


def extractor_key(extractor: Extractor, scenario: Scenario, fingerprint: str) -> str:
    """Key of an extractor for a scenario: scenarios whose images and architecture agree share it."""
    told: dict[str, Any] = {
        "extractor": extractor.spec(),
        "dataset": scenario.dataset.spec(),
        "clean_fraction": scenario.clean_fraction,
        "backbone": scenario.backbone.spec(),
        "recipe": extractor.follows(scenario.recipe),
        "seed": scenario.seed,
    }
    if extractor.reads == "poisoned" and scenario.attack is not None:
        told |= {"attack": scenario.attack.spec(), "plan": scenario.plan.spec()}
        if scenario.attack.power is Power.TRAINING:  # the poisoned set is what this victim's training left
            told["victim"] = victim_key(scenario, fingerprint)
        elif lent := scenario.surrogate():
            told["surrogate"] = victim_key(lent, fingerprint)
    return digest("extractor", REVISION, told, fingerprint)


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


def _defender_seed(scenario: Scenario) -> int:
    return derive_seed(scenario.seed, "defense")


# -- extractors ----------------------------------------------------------------------------------------------------------------


def run_extractor(extractor: Extractor, scenario: Scenario, store: Store, cache: Path, poisoned: ImageSet | None = None) -> None:
    """Trains an extractor for the scenario and stores it; no-op when it stands, or reads none of our images.

    ``poisoned``: the scenario's poisoned training set, where the caller has it; otherwise it is read off the victim.
    """
    if extractor.reads == "nothing":
        return
    w = world(scenario, cache)
    key = extractor_key(extractor, scenario, w.data.fingerprint)
    store.once("extractor", key, lambda: _make_extractor(extractor, scenario, w, key, store, cache, poisoned))


def _make_extractor(
    extractor: Extractor, scenario: Scenario, w: World, key: str, store: Store, cache: Path, poisoned: ImageSet | None
) -> None:
    if extractor.reads == "clean":
        data = w.train
    elif poisoned is not None:
        data = poisoned
    else:
        data = read_victim(scenario, store, cache).poisoned.visible
    outcome: dict[str, Any]
    tensors: dict[str, Tensor] = {}
    try:
        fitted = _extractor(extractor, scenario, w, data)
        outcome = {
            "status": "ok",
            "forward": fitted.samples_forward,
            "backward": fitted.samples_backward,
            "seconds": fitted.seconds,
        }
        tensors = {f"net.{name}": value for name, value in fitted.net.state_dict().items()}
    except Diverged as error:
        outcome = {"status": "failed", "reason": f"{extractor.name}: {error}"}
    store.write("extractor", key, {"extractor": extractor.spec(), "scenario": scenario.spec()}, outcome, tensors)


def _extractor(extractor: Extractor, scenario: Scenario, w: World, data: ImageSet) -> Fitted:
    seed = derive_seed(_defender_seed(scenario), "extractor")
    return extractor.build(functools.partial(_fresh, scenario, w), data, scenario.recipe, seed)


@functools.lru_cache(maxsize=2)
def _read_extractor(extractor: Extractor, scenario: Scenario, store: Store, cache: Path) -> Fitted | None:
    w = world(scenario, cache)
    if extractor.reads == "nothing":
        return _extractor(extractor, scenario, w, w.train)
    entry = store.read("extractor", extractor_key(extractor, scenario, w.data.fingerprint))
    if entry is None:
        return None
    if entry.outcome["status"] != "ok":
        raise Diverged(entry.outcome["reason"])
    net = _fresh(scenario, w, 0)
    net.load_state_dict({name.removeprefix("net."): value for name, value in entry.tensors.items()})
    net.eval()
    return Fitted(net, entry.outcome["seconds"], entry.outcome["forward"], entry.outcome["backward"])


def read_extractor(extractor: Extractor, scenario: Scenario, store: Store, cache: Path, poisoned: ImageSet | None = None) -> Fitted:
    """A stored extractor with its cost; trained first when it is absent or damaged.

    Raises:
        Diverged: its training did.
    """
    fitted = _read_extractor(extractor, scenario, store, cache)
    if fitted is None:
        _read_extractor.cache_clear()
        run_extractor(extractor, scenario, store, cache, poisoned)
        fitted = _read_extractor(extractor, scenario, store, cache)
    assert fitted is not None
    return fitted


# -- victims -------------------------------------------------------------------------------------------------------------------


def _on_features(given: Network, scenario: Scenario, w: World, seed: int) -> Network:
    """``given``'s features under a fresh head of the scenario's backbone."""
    first = given.head[0]
    assert isinstance(first, torch.nn.Linear)
    hidden = (scenario.backbone.hidden,) if scenario.backbone.hidden else ()
    return Network(given.normalise, given.features, mlp(first.in_features, hidden, w.train.num_classes, seed)).eval()


def _fit_on_features(scenario: Scenario, w: World, data: ImageSet, seed: int, store: Store, cache: Path) -> Network:
    """A victim on given features: its head, trained on ``data``."""
    frozen = scenario.frozen
    assert frozen is not None
    given = read_extractor(frozen.extractor, scenario, store, cache, data).net
    net = _on_features(given, scenario, w, derive_seed(scenario.backbone.spec(), scenario.seed, "init"))
    z = embeddings(net, data)
    fit_head(net.head, z, data.labels, epochs=frozen.epochs, lr=frozen.lr, batch=frozen.batch, seed=seed)
    if not all(bool(torch.isfinite(value).all()) for value in net.head.state_dict().values()):
        raise Diverged(f"training diverged: the head's weights are not finite after {frozen.epochs} epochs at lr {frozen.lr}")
    return net


def run_victim(scenario: Scenario, store: Store, cache: Path) -> None:
    """Trains the scenario's victim and stores it with its poisoned samples and triggered test set; no-op when it stands."""
    w = world(scenario, cache)
    key = victim_key(scenario, w.data.fingerprint)
    store.once("victim", key, lambda: _make_victim(scenario, w, key, store, cache))


def _make_victim(scenario: Scenario, w: World, key: str, store: Store, cache: Path) -> None:
    start = time.perf_counter()
    reset_peak()
    # The initial weights depend on the backbone and the seed alone: benign twin and victim start from the same network.
    weights = scenario.seed if scenario.weights_seed is None else scenario.weights_seed
    net = _fresh(scenario, w, derive_seed(scenario.backbone.spec(), weights, "init"))
    seed = derive_seed(weights, "train")
    outcome: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    triggered: PoisonedTest | None = None
    twin = None if scenario.attack is None else read_victim(scenario.twin(), store, cache)
    try:
        with metered() as cost:
            if scenario.attack is None:
                if scenario.frozen:
                    trained = _fit_on_features(scenario, w, w.train, seed, store, cache)
                else:
                    trained = fit(Classifier(net, scenario.recipe), w.train, scenario.recipe, seed).net
            else:
                trained, poisoned, triggered = _attack(scenario, w, net, seed, store, cache, outcome)
                touched = torch.nonzero(poisoned.role != Role.CLEAN).flatten()
                tensors |= {
                    "role": poisoned.role,
                    "touched": touched,
                    "touched_images": taken(poisoned.visible.images, touched),
                    "labels": poisoned.visible.labels,
                    "test_images": triggered.images,
                    "test_source": triggered.source,
                    "test_target": triggered.target_labels,
                }
        measured = score(trained, w.data.test, triggered)
        outcome |= {
            "status": "ok",
            **_numbers(measured),
            **_single_keys(scenario, w, trained),
            **_against_twin(w, twin, trained, triggered),
            "val_acc": _none(val_accuracy(trained, w.validation)),
            "samples_forward": cost.forward,
            "samples_backward": cost.backward,
            "train_size": len(w.train),
        }
        # Given features are stored once, as the extractor.
        own = trained.state_dict().items()
        tensors |= {f"net.{name}": value for name, value in own if not scenario.frozen or name.startswith("head.")}
    except Diverged as error:
        outcome, tensors = {"status": "failed", "reason": str(error), "train_size": len(w.train)}, {}
    outcome |= {"seconds": time.perf_counter() - start, "peak_mib": peak_mib(), "gpu_mib": gpu_mib()}
    store.write("victim", key, scenario.spec(), outcome, tensors)


def _against_twin(w: World, twin: Victim | None, net: Network, triggered: PoisonedTest | None) -> dict[str, Any]:
    """What the trigger does to the benign twin, and what the attack costs on the clean test images, image by image; nothing for a
    twin itself, or where the twin's training failed."""
    if twin is None or triggered is None or twin.outcome["status"] != "ok":
        return {}
    answered = score(twin.net, w.data.test.subset(torch.zeros(0, dtype=torch.int64)), triggered)
    right = [predict(one, w.data.test.images) == w.data.test.labels for one in (twin.net, net)]
    loss, error = paired_loss(right[0], right[1])
    found = {"asr_benign": answered.asr, "ra_benign": answered.ra, "acc_loss": loss, "acc_loss_se": error}
    return {name: _none(value) for name, value in found.items()}


def _single_keys(scenario: Scenario, w: World, net: Network) -> dict[str, Any]:
    """What each key of a trigger of several scores by itself; nothing for other triggers."""
    if scenario.attack is None:
        return {}
    keys = scenario.attack.single_keys(net, w.train, scenario.plan, derive_seed(scenario.seed, "attack"))
    alone = {name: score(net, w.data.test, poison_test(w.data.test, key, scenario.plan)) for name, key in keys.items()}
    return {"single_keys": {name: {"asr": _none(one.asr), "ra": _none(one.ra)} for name, one in alone.items()}} if alone else {}


def _surrogate(scenario: Scenario, store: Store, cache: Path) -> Network | None:
    """The network that the scenario's attack crafts on, trained first when it is absent; None = it takes none.

    Raises:
        Diverged: its training did.
    """
    lent = scenario.surrogate()
    if lent is None:
        return None
    trained = read_victim(lent, store, cache)
    if trained.outcome["status"] != "ok":
        raise Diverged(f"no surrogate: {trained.outcome['reason']}")
    return trained.net


def _attack(
    scenario: Scenario, w: World, net: Network, seed: int, store: Store, cache: Path, outcome: dict[str, Any]
) -> tuple[Network, PoisonedSet, PoisonedTest]:
    attack, plan, recipe = scenario.attack, scenario.plan, scenario.recipe
    assert attack is not None
    if plan.target >= w.train.num_classes:
        raise BadInput(f"attack {attack.name}: target = {plan.target}: {w.data.name} has classes 0 to {w.train.num_classes - 1}")
    surrogate = _surrogate(scenario, store, cache)
    # Which samples are poisoned depends on the seed alone, so it is the same for every attack, backbone and defense.
    attack_seed = derive_seed(scenario.seed, "attack")
    crafted = attack.craft(w.train, plan, attack_seed, surrogate)
    module = attack.victim(net, recipe, crafted, plan, attack_seed)
    if attack.poisons_batches:
        trained = fit(module, w.train, recipe, seed).net
        crafted = attack.finished(module, crafted)
        poisoned = poison(w.train, attack, crafted, plan, attack_seed)
    else:
        poisoned = poison(w.train, attack, crafted, plan, attack_seed)
        if scenario.frozen:
            trained = _fit_on_features(scenario, w, poisoned.visible, seed, store, cache)
        else:
            trained = fit(module, poisoned.visible, recipe, seed).net
            crafted = attack.finished(module, crafted)
    shares = getattr(module, "realised", {"poison": poisoned.realised(Role.POISON), "cover": poisoned.realised(Role.COVER)})
    outcome |= {
        "realised_rate": shares["poison"],
        "realised_cover": shares["cover"],
        "exported": attack.power is Power.TRAINING,
    }
    return trained, poisoned, poison_test(w.data.test, attack.recraft(trained, crafted, w.train, plan, attack_seed), plan)


@functools.lru_cache(maxsize=2)
def _read_victim(scenario: Scenario, store: Store, cache: Path) -> Victim | None:
    w = world(scenario, cache)
    entry = store.read("victim", victim_key(scenario, w.data.fingerprint))
    if entry is None:
        return None
    weights = {name.removeprefix("net."): value for name, value in entry.tensors.items() if name.startswith("net.")}
    t = entry.tensors
    touched = None
    if "role" in t:
        images = copied(w.train.images)
        images[t["touched"]] = t["touched_images"]
        touched = ImageSet(images, t["labels"], w.train.num_classes)
    net = _fresh(scenario, w, 0)
    if weights and scenario.frozen:
        given = read_extractor(scenario.frozen.extractor, scenario, store, cache, touched if touched is not None else w.train).net
        net = _on_features(given, scenario, w, 0)
        net.head.load_state_dict({name.removeprefix("head."): value for name, value in weights.items()})
    elif weights:
        net.load_state_dict(weights)
    net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if touched is None:
        nothing = torch.zeros(len(w.train), dtype=torch.int8)
        scorer = Scorer(net, w.data.test, None, w.validation)
        return Victim(net, PoisonedSet(w.train, nothing, w.train.labels), None, scorer, entry.outcome)
    poisoned = PoisonedSet(touched, t["role"], w.train.labels)
    source = t["test_source"]
    triggered = PoisonedTest(t["test_images"], w.data.test.labels[source], t["test_target"], source)
    return Victim(net, poisoned, triggered, Scorer(net, w.data.test, triggered, w.validation), entry.outcome)


def read_victim(scenario: Scenario, store: Store, cache: Path) -> Victim:
    """A stored victim; trained first when it is absent or damaged."""
    victim = _read_victim(scenario, store, cache)
    if victim is None:
        _read_victim.cache_clear()
        run_victim(scenario, store, cache)
        victim = _read_victim(scenario, store, cache)
    assert victim is not None
    return victim


# -- one defense run -----------------------------------------------------------------------------------------------------------


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
            lesser = _lesser(w, cell)
            met = victim if cell.budget is None else _validated_on(lesser, victim)
            outcome = defend(
                cell, lesser, met, fetch=fetch, recraft=_recrafter(scenario, w, store, cache),
                planted=functools.partial(read_canary, cell, lesser, victim.net, store),
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
    outcome = {**victim.outcome, "val_acc": _none(val_accuracy(victim.net, w.validation))}
    return dataclasses.replace(victim, scorer=scorer, outcome=outcome)


def _recrafter(scenario: Scenario, w: World, store: Store, cache: Path) -> Callable[[Network], PoisonedTest] | None:
    """For attacks whose trigger needs the attacked model: the triggered test set against any network."""
    attack = scenario.attack
    if attack is None or not attack.needs_model_at_test:
        return None
    seed = derive_seed(scenario.seed, "attack")
    crafted = attack.craft(w.train, scenario.plan, seed, _surrogate(scenario, store, cache))

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
                        **(_numbers(victim.scorer(candidate.model)) if changed or None in untouched.values() else untouched),
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
                "pruned": 0, "units": _units(victim.net, cell.scope, counts), "note": "", **_numbers(victim.scorer(victim.net)),
                **_validated(victim, victim.net, right), "forward": 0, "backward": 0,
            }
        )  # fmt: skip
    if keep is not None:
        keep += nets
    if copies:
        canary = _canary_scores(cell, w, victim, measured, copies)
    if recraft is not None:
        offered = [measured_from(entry) for entry in measured]
        for position in {choose(how, offered, _score_of(victim.outcome), cell.tau) for how in Selection} - {None}:
            assert position is not None
            again = score(nets[position], w.data.test, recraft(nets[position]))
            measured[position] |= {"asr_recraft": _none(again.asr), "ra_recraft": _none(again.ra)}
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
        fresh=functools.partial(_fresh, scenario, w),
        num_classes=w.train.num_classes,
        seed=_defender_seed(scenario),
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
    return {"val_acc": accuracy, "val_loss": _none(loss), "val_loss_se": _none(error)}


# -- canaries ------------------------------------------------------------------------------------------------------------------


def canary_key(cell: Cell, canary: Canary, fingerprint: str) -> str:
    """Key of a copy of the cell's victim with a canary: cells on one victim and budget share it."""
    budget = {"budget": cell.budget} if cell.budget is not None else {}
    return digest("canary", REVISION, canary.spec(), Planting().spec(), budget, victim_key(cell.scenario, fingerprint))


def read_canary(cell: Cell, w: World, model: Network, store: Store, canary: Canary) -> Planted:
    """A stored copy with a canary; planted first when it is absent or damaged.

    Raises:
        Diverged: planting did.
    """
    key = canary_key(cell, canary, w.data.fingerprint)
    seed = derive_seed(_defender_seed(cell.scenario), "canary", canary.name)

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
        return scores[min(same, key=lambda i: (abs(_nan(settings[i][1]) - _nan(entry["dial"])), settings[i][2]))]

    return [of(entry) for entry in measured]


SEEDS_PER_CLASS = 10
"""How many training samples of every class are known to be clean where a track says so (ASD's protocol: Gao et al., CVPR 2023)."""


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
        isolated=c.get("isolated", 0),
        precision=_nan(c.get("precision")),
        recall=_nan(c.get("recall")),
        asr_recraft=_nan(c.get("asr_recraft")),
        ra_recraft=_nan(c.get("ra_recraft")),
        val_loss=_nan(c.get("val_loss")),
        val_loss_se=_nan(c.get("val_loss_se")),
        knob=_nan(c.get("knob")),
        starts=c.get("starts", c["is_default"]),
        kept=c.get("kept", False),
        changed=c.get("changed", True),
        units=c.get("units", 0),
        canary_asr=tuple(c.get("canary_asr", ())),
        canary_loss=tuple(c.get("canary_loss", ())),
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
    benign, answered = _nan(twin.outcome.get("acc")), _nan(vic.get("asr_benign"))
    verdict, published = gate(before.asr, answered), reference(scenario)
    literature, said = compared(scenario, before)
    base_rate = _nan(vic.get("realised_rate"))
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
        "asr_benign": answered,
        "effect": before.asr - answered,
        "acc_loss": _nan(vic.get("acc_loss")),
        "acc_loss_se": _nan(vic.get("acc_loss_se")),
        "implanted": verdict.implanted,
        "gate": f"{verdict.words}; {said}",
        "literature": literature,
        "acc_literature": published.acc / 100 if published else math.nan,
        "asr_literature": published.asr / 100 if published else math.nan,
        "preset": cell.preset,
        "features": scenario.frozen.extractor.origin if scenario.frozen else "",
        **_given(cell, out, vic),
    }
    notes = []
    if isinstance(cell.defense, NoDefense):
        notes += [
            f"the {name} alone: ASR {100 * _nan(alone['asr']):.1f} %, RA {100 * _nan(alone['ra']):.1f} %"
            for name, alone in vic.get("single_keys", {}).items()
        ]
    if vic.get("exported") and cell.defense.needs & (Knowledge.TRAIN | Knowledge.ROLES):
        notes.append("training-control attack: met through its exported static set")
    rows = []
    for how in Selection:
        if how is Selection.CANARY and not cell.canaries:
            continue
        row: dict[str, Any] = {**axes, **common, "selection": how.value, "status": out["status"], "reason": out["reason"]}
        chosen = choose(how, measured, before, cell.tau) if out["status"] == "ok" else None
        if out["status"] == "ok" and chosen is None:
            row |= {"status": "refused", "reason": _nothing_to_choose_by(cell, out)}
        if chosen is not None:
            m = measured[chosen]
            forward, backward = _cost(how, measured, chosen, out)
            spent = Cost(forward, backward)
            row |= {
                "acc": m.score.acc,
                "asr": m.score.asr,
                "ra": m.score.ra,
                "der": der(before, m.score),
                "asr_recraft": m.asr_recraft,
                "ra_recraft": m.ra_recraft,
                "knob": m.knob,
                "dial": _nan(m.dial),
                "kept": m.kept,
                "mark": _mark(m, cell, base_rate),
                "pruned": m.pruned,
                "units": m.units,
                "val_acc": m.val_acc,
                "val_loss": m.val_loss,
                "val_loss_se": m.val_loss_se,
                "note": "; ".join([*notes, *([m.note] if m.note else [])]),
                "samples_forward": forward,
                "samples_backward": backward,
                "cost_epochs": spent.epochs(vic["train_size"]),
                "isolated": m.isolated,
                "precision": m.precision,
                "recall": m.recall,
            }
        rows.append(Row(**row))
    curves = [
        Curve(
            **axes,
            dial_name=cell.defense.dial_name,
            knob=m.knob,
            dial=_nan(m.dial),
            is_default=m.is_default,
            kept=m.kept,
            strength=m.strength,
            pruned=m.pruned,
            acc=m.score.acc,
            asr=m.score.asr,
            ra=m.score.ra,
            val_acc=m.val_acc,
            val_loss=m.val_loss,
            val_loss_se=m.val_loss_se,
            canary_asr=sum(m.canary_asr) / len(m.canary_asr) if m.canary_asr else math.nan,
            canary_loss=max(m.canary_loss, default=math.nan),
        )
        for m in measured
    ]
    costs: dict[str, Any] = {name: _nan(out.get(name)) for name in ("seconds", "peak_mib", "gpu_mib", "victim_seconds")}
    before_it: dict[str, Any] = {f"victim_{name}": _nan(vic.get(name)) for name in ("peak_mib", "gpu_mib")}
    timing = Timing(**axes, **costs, **before_it)
    return CellResult(key, rows, curves, timing)


def _given(cell: Cell, out: dict[str, Any], vic: dict[str, Any]) -> dict[str, Any]:
    """What the defender was given and took, for its rows; nothing for a cell that did not finish."""
    if out["status"] != "ok":
        return {}
    used = out["used"].split(" + ")
    extractor = cell.extractor or cell.defense.extractor
    lent = Cost(out["extractor_forward"], out["extractor_backward"])
    return {
        "used": out["used"],
        "clean_images": out["clean_images"] if "clean" in used else 0,
        "train_images": vic["train_size"] if {"train", "roles"} & set(used) else 0,
        "trained_anew": out["trained"],
        "extractor": extractor.origin if extractor else "",
        "extractor_epochs": lent.epochs(vic["train_size"]) if extractor else math.nan,
    }


def _cost(how: Selection, measured: list[Measured], chosen: int, out: dict[str, Any]) -> tuple[int, int]:
    """Samples it took to get the chosen candidate: a fixed default needs the first yield (which carries the scoring) and its own; a
    choice needs every candidate; a choice by canaries, the copies too."""
    paid = {0, chosen} if how is Selection.DEFAULT else set(range(len(measured)))
    extra = [out.get(f"canary_{name}", 0) if how is Selection.CANARY else 0 for name in ("forward", "backward")]
    return sum(measured[i].forward for i in paid) + extra[0], sum(measured[i].backward for i in paid) + extra[1]


def _nothing_to_choose_by(cell: Cell, out: dict[str, Any]) -> str:
    if Knowledge.CLEAN not in cell.grants:
        return NOTHING_TO_VALIDATE_ON
    other = "no canary is planted for a defense that does more than edit the model with the clean budget"
    return str(out.get("canary_reason", other))


def _mark(m: Measured, cell: Cell, base_rate: float) -> str:
    """What a reader must know of a chosen model: that nothing was edited, or that its detector found no more poison than chance."""
    if not m.changed and not isinstance(cell.defense, NoDefense):
        return "no change"
    detects = base_rate > 0 and not math.isnan(m.recall)
    return "mechanism failed" if detects and not m.precision > base_rate else ""


# -- memory --------------------------------------------------------------------------------------------------------------------


def reset_peak() -> None:
    """Starts a new high-water mark of this process's memory, where the system can (Linux), and of its GPU memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        try:
            marker.write_text("5")
        except OSError:
            return


def gpu_mib() -> float | None:
    """The high-water mark of GPU memory allocated since :func:`reset_peak`, in MiB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def peak_mib() -> float:
    """The high-water mark of resident memory in MiB, since :func:`reset_peak` where the system can tell."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
