"""Two stored stages: victims and extractors.

A victim is an attacked or benign network with its poisoned data, compared with its benign twin. An extractor holds features learned
on the clean or the poisoned images; all defenses that use the same one share it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.base import Crafted, PoisonedSet, PoisonedTest, Power, Role, poison, poison_test, roles
from benchmark.rules.metrics import Scorer, null_of, score, val_accuracy
from benchmark.rules.selection import paired_loss
from benchmark.run.keys import extractor_key, victim_key
from benchmark.run.outcome import gpu_mib, peak_mib, reset_peak
from benchmark.run.world import World, defender_seed, fresh, rebuilt, restored, world
from benchmark.settings.cells import Scenario
from benchmark.storage import zoo
from benchmark.storage.store import Store
from models.backbone import Network
from models.classifier import Classifier
from models.cost import metered
from models.extractors import Extractor, embeddings, fit_head, mlp
from models.images import ImageSet
from models.room import copied, taken
from models.spec import BadInput, derive_seed
from models.training import Diverged, Fitted, fit
from models.weights import round_to_half

__all__ = ["Victim", "read_extractor", "read_victim", "run_extractor", "run_victim", "surrogate_of"]


@dataclass(frozen=True)
class Victim:
    """A victim as loaded from the store.

    Attributes:
        net: the network.
        poisoned: its training set and every sample's role.
        triggered: the triggered test set; None without an attack.
        scorer: scores networks on the test sets of this victim.
        outcome: its record in the store.
    """

    net: Network
    poisoned: PoisonedSet
    triggered: PoisonedTest | None
    scorer: Scorer
    outcome: dict[str, Any]


def run_extractor(extractor: Extractor, scenario: Scenario, store: Store, cache: Path, poisoned: ImageSet | None = None) -> None:
    """Trains an extractor for the scenario and stores it, unless it is cached or needs no training images.

    Args:
        extractor: the extractor.
        scenario: the scenario.
        store: the store.
        cache: folder of decoded images.
        poisoned: the scenario's poisoned training set; None = it is read from the victim.
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
    seed = derive_seed(defender_seed(scenario), "extractor")
    return extractor.build(functools.partial(fresh, scenario, w), data, scenario.recipe, seed)


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
    net = fresh(scenario, w, 0)
    net.load_state_dict({name.removeprefix("net."): value for name, value in entry.tensors.items()})
    net.eval()
    return Fitted(net, entry.outcome["seconds"], entry.outcome["forward"], entry.outcome["backward"])


def read_extractor(extractor: Extractor, scenario: Scenario, store: Store, cache: Path, poisoned: ImageSet | None = None) -> Fitted:
    """A stored extractor with its cost; trained first where it is missing or damaged.

    Raises:
        Diverged: its training diverged.
    """
    fitted = _read_extractor(extractor, scenario, store, cache)
    if fitted is None:
        _read_extractor.cache_clear()
        run_extractor(extractor, scenario, store, cache, poisoned)
        fitted = _read_extractor(extractor, scenario, store, cache)
    assert fitted is not None
    return fitted


def _on_features(given: Network, scenario: Scenario, w: World, seed: int) -> Network:
    """The features of ``given`` with a new head of the scenario's backbone."""
    first = given.head[0]
    assert isinstance(first, torch.nn.Linear)
    hidden = (scenario.backbone.hidden,) if scenario.backbone.hidden else ()
    return Network(given.normalise, given.features, mlp(first.in_features, hidden, w.train.num_classes, seed)).eval()


def _fit_on_features(scenario: Scenario, w: World, data: ImageSet, seed: int, store: Store, cache: Path) -> Network:
    """A victim on given features; only its head is trained on ``data``."""
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
    """Trains the scenario's victim and stores it with its poisoned samples and triggered test set, unless it is cached.

    A victim that the zoo has is read from there instead.

    Raises:
        BadInput: its file in the zoo is damaged.
    """
    w = world(scenario, cache)
    key = victim_key(scenario, w.data.fingerprint)

    def compute() -> None:
        card = zoo.by_key(key, store.report)
        if card is None:
            _make_victim(scenario, w, key, store, cache)
        else:
            _from_zoo(card, scenario, w, key, store, cache)

    store.once("victim", key, compute)


def _make_victim(scenario: Scenario, w: World, key: str, store: Store, cache: Path) -> None:
    start = time.perf_counter()
    reset_peak()
    # The initial weights depend on the backbone and the seed alone: benign twin and victim start from the same network.
    weights = scenario.seed if scenario.weights_seed is None else scenario.weights_seed
    net = fresh(scenario, w, derive_seed(scenario.backbone.spec(), weights, "init"))
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
                _finish(trained, scenario)
            else:
                trained, poisoned, crafted = _attack(scenario, w, net, seed, store, cache, outcome)
                triggered = poison_test(w.data.test, crafted, scenario.plan)
                tensors |= {f"trigger.{name}": value for name, value in scenario.attack.keep(crafted).items()}
                tensors |= {
                    "role": poisoned.role,
                    **_touched(poisoned),
                    "test_images": triggered.images,
                    "test_source": triggered.source,
                    "test_target": triggered.target_labels,
                }
        scorer = Scorer(trained, w.data.test, triggered, w.validation)
        outcome |= {
            "status": "ok",
            **scorer(trained).stored(),
            **_single_keys(scenario, w, trained),
            **_against_twin(twin, trained, scorer),
            "val_acc": null_of(scorer.val_acc(trained)),
            "samples_forward": cost.forward,
            "samples_backward": cost.backward,
            "train_size": len(w.train),
        }
        # Given features are stored as the extractor.
        own = trained.state_dict().items()
        tensors |= {f"net.{name}": value for name, value in own if not scenario.frozen or name.startswith("head.")}
    except Diverged as error:
        outcome, tensors = {"status": "failed", "reason": str(error), "train_size": len(w.train)}, {}
    outcome |= {"seconds": time.perf_counter() - start, "peak_mib": peak_mib(), "gpu_mib": gpu_mib()}
    store.write("victim", key, scenario.spec(), outcome, tensors)


def _finish(net: Network, scenario: Scenario) -> None:
    """Rounds the weights of a finished victim where its recipe says so, before anything is measured on it.

    Raises:
        Diverged: a weight is beyond the range of the rounded ones.
    """
    if scenario.recipe.weights == "half":
        try:
            round_to_half(net)
        except OverflowError as error:
            raise Diverged(f"the weights cannot be rounded to float16: {error}") from error


def _against_twin(twin: Victim | None, net: Network, scorer: Scorer) -> dict[str, Any]:
    """ASR and RA of the benign twin, and the paired loss of ACC against it; empty for a twin, or where its training failed."""
    if twin is None or scorer.triggered is None or twin.outcome["status"] != "ok":
        return {}
    benign = scorer(twin.net)
    loss, error = paired_loss(scorer.right(twin.net), scorer.right(net))
    found = {"asr_benign": benign.asr, "ra_benign": benign.ra, "acc_loss": loss, "acc_loss_se": error}
    return {name: null_of(value) for name, value in found.items()}


def _single_keys(scenario: Scenario, w: World, net: Network) -> dict[str, Any]:
    """ASR and RA of every key of a combined trigger; empty for other triggers."""
    if scenario.attack is None:
        return {}
    keys = scenario.attack.single_keys(net, w.train, scenario.plan, derive_seed(scenario.seed, "attack"))
    nothing = w.data.test.subset(torch.zeros(0, dtype=torch.int64))  # ACC is known
    alone = {name: score(net, nothing, poison_test(w.data.test, key, scenario.plan)) for name, key in keys.items()}
    return {"single_keys": {name: {"asr": null_of(one.asr), "ra": null_of(one.ra)} for name, one in alone.items()}} if alone else {}


def surrogate_of(scenario: Scenario, store: Store, cache: Path) -> Network | None:
    """The network on which the scenario's attack crafts, trained first where it is missing; None for an attack without one.

    Raises:
        Diverged: its training diverged.
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
) -> tuple[Network, PoisonedSet, Crafted]:
    """The attacked network, its poisoned set and the triggers."""
    attack, plan, recipe = scenario.attack, scenario.plan, scenario.recipe
    assert attack is not None
    if plan.target >= w.train.num_classes:
        raise BadInput(f"attack {attack.name}: target = {plan.target}: {w.data.name} has classes 0 to {w.train.num_classes - 1}")
    surrogate = surrogate_of(scenario, store, cache)
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
    _finish(trained, scenario)
    shares = getattr(module, "realised", {"poison": poisoned.realised(Role.POISON), "cover": poisoned.realised(Role.COVER)})
    outcome |= {
        "realised_rate": shares["poison"],
        "realised_cover": shares["cover"],
        "exported": attack.power is Power.TRAINING,
    }
    return trained, poisoned, attack.recraft(trained, crafted, w.train, plan, attack_seed)


# -- victims from files --------------------------------------------------------------------------------------------------------


def _from_zoo(card: zoo.Card, scenario: Scenario, w: World, key: str, store: Store, cache: Path) -> None:
    """Stores a victim of the zoo: its figures are measured here; the cost of its training and its twin's figures are the card's.

    The images of the poisoned set are not computed before a defense asks for them (:class:`_Later`).
    """
    net, crafted, kept = rebuilt(card, scenario, w, lambda: surrogate_of(scenario, store, cache))
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    tensors |= {f"trigger.{name}": value for name, value in kept.items()}
    triggered = None
    if crafted is not None:
        assert scenario.attack is not None
        triggered = poison_test(w.data.test, crafted, scenario.plan)
        seed, covers = derive_seed(scenario.seed, "attack"), crafted.cover is not None
        tensors |= {
            "role": roles(w.train, scenario.attack, scenario.plan, seed, covers=covers),
            "test_images": triggered.images,
            "test_source": triggered.source,
            "test_target": triggered.target_labels,
        }
    measured = {**score(net, w.data.test, triggered).stored(), "val_acc": null_of(val_accuracy(net, w.validation))}
    outcome = {**card.content["measured"], **card.content["training"], **measured, "status": "ok", "zoo": card.name}
    store.write("victim", key, scenario.spec(), outcome, tensors)
    label = f"{scenario.backbone_label} / {scenario.attack_label} / seed {scenario.seed}"
    store.report(f"{label}: not trained, but read from {card.weights}")


class _Later(PoisonedSet):
    """A poisoned set whose images are computed when they are first read: a defense after training needs none of them."""

    def __init__(self, role: Tensor, true_labels: Tensor, make: Callable[[], ImageSet]) -> None:
        for name, value in (("role", role), ("true_labels", true_labels), ("make", make)):
            object.__setattr__(self, name, value)

    @functools.cached_property
    def visible(self) -> ImageSet:
        made: ImageSet = self.make()  # type: ignore[attr-defined]
        return made


def _poisoned_again(scenario: Scenario, w: World, t: Mapping[str, Tensor], net: Network, store: Store, cache: Path) -> ImageSet:
    """The poisoned images of a victim of the zoo; a stored stage of their own."""
    attack, key = scenario.attack, victim_key(scenario, w.data.fingerprint)
    assert attack is not None

    def compute() -> None:
        crafted = restored(scenario, w, zoo.part("trigger", t), net, lambda: surrogate_of(scenario, store, cache))
        poisoned = poison(w.train, attack, crafted, scenario.plan, derive_seed(scenario.seed, "attack"))
        store.write("poisoned", key, scenario.spec(), {}, _touched(poisoned))

    store.once("poisoned", key, compute)
    entry = store.read("poisoned", key)
    assert entry is not None
    return _visible(w, entry.tensors)


def _touched(poisoned: PoisonedSet) -> dict[str, Tensor]:
    """The labels of a poisoned set, and those of its images that are not the clean ones."""
    touched = torch.nonzero(poisoned.role != Role.CLEAN).flatten()
    images = taken(poisoned.visible.images, touched)
    return {"touched": touched, "touched_images": images, "labels": poisoned.visible.labels}


def _visible(w: World, t: Mapping[str, Tensor]) -> ImageSet:
    """The inverse of :func:`_touched`."""
    images = copied(w.train.images)
    images[t["touched"]] = t["touched_images"]
    return ImageSet(images, t["labels"], w.train.num_classes)


# -- reading -------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _read_victim(scenario: Scenario, store: Store, cache: Path) -> Victim | None:
    w = world(scenario, cache)
    entry = store.read("victim", victim_key(scenario, w.data.fingerprint))
    if entry is None:
        return None
    weights = {name.removeprefix("net."): value for name, value in entry.tensors.items() if name.startswith("net.")}
    t = entry.tensors
    touched = _visible(w, t) if "touched" in t else None
    net = fresh(scenario, w, 0)
    if weights and scenario.frozen:
        given = read_extractor(scenario.frozen.extractor, scenario, store, cache, touched if touched is not None else w.train).net
        net = _on_features(given, scenario, w, 0)
        net.head.load_state_dict({name.removeprefix("head."): value for name, value in weights.items()})
    elif weights:
        net.load_state_dict(weights)
    net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if "role" not in t:
        nothing = torch.zeros(len(w.train), dtype=torch.int8)
        scorer = Scorer(net, w.data.test, None, w.validation)
        return Victim(net, PoisonedSet(w.train, nothing, w.train.labels), None, scorer, entry.outcome)
    if touched is None:
        poisoned: PoisonedSet = _Later(
            t["role"], w.train.labels, functools.partial(_poisoned_again, scenario, w, t, net, store, cache)
        )
    else:
        poisoned = PoisonedSet(touched, t["role"], w.train.labels)
    source = t["test_source"]
    triggered = PoisonedTest(t["test_images"], w.data.test.labels[source], t["test_target"], source)
    return Victim(net, poisoned, triggered, Scorer(net, w.data.test, triggered, w.validation), entry.outcome)


def read_victim(scenario: Scenario, store: Store, cache: Path) -> Victim:
    """A stored victim; trained first where it is missing or damaged."""
    victim = _read_victim(scenario, store, cache)
    if victim is None:
        _read_victim.cache_clear()
        run_victim(scenario, store, cache)
        victim = _read_victim(scenario, store, cache)
    assert victim is not None
    return victim
