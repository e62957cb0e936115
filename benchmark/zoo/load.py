"""A victim of the zoo, ready for a defense."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.base import Crafted, PoisonedTest, poison_test
from benchmark.data.datasets import load_original
from benchmark.run.keys import REVISION, victim_key
from benchmark.run.world import World, divided, rebuilt, world
from benchmark.settings.cells import Scenario
from benchmark.settings.described import scenario_of
from benchmark.storage.zoo import Card, by_key, home, read_card
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput
from models.training import arithmetic

__all__ = ["ZooWorld", "load_victim", "made_again", "opened"]


@dataclass(frozen=True)
class ZooWorld:
    """What belongs to a victim of the zoo.

    Attributes:
        clean: the clean budget that a defense works with, outside of the attacker's training set.
        validation: the part of the clean budget on which candidates are compared.
        test: the clean test set; ACC is the share of it that is classified as labelled.
        triggered: the triggered test set (ASR: share classified as ``target_labels``; RA: as ``true_labels``); None for a benign
            twin.
        target: the class that triggered images are sent to; None for a benign twin.
        card: the fields of the card, which README.md of the zoo explains.
    """

    clean: ImageSet
    validation: ImageSet
    test: ImageSet
    triggered: PoisonedTest | None
    target: int | None
    card: Mapping[str, Any]


def load_victim(name: str, cache: str | Path | None = None, folder: str | Path | None = None) -> tuple[Network, ZooWorld]:
    """A victim of the zoo in evaluation mode (images float (N, C, H, W) in [0, 1] -> logits), and its data.

    The images are found as a run finds them: in ``$LEVELFIELD_DATA``, in the cache, or downloaded. Where a re-encoded copy is asked
    for and only the original release is there, the same images of the release are used, with a warning.

    Args:
        name: of the victim: its file without the suffix.
        cache: folder of decoded images; None = ``$LEVELFIELD_CACHE``, or ``.cache``.
        folder: of the zoo; None = ``$LEVELFIELD_ZOO``, or ``results/zoo`` of this project.

    Raises:
        BadInput: no such victim (with the nearest name); its file is damaged; its card was made with another version; its data
            cannot be had.
    """
    shelf = home() if folder is None else Path(folder)
    card, scenario = opened(shelf, name)
    w = _world(card, scenario, Path(cache or os.environ.get("LEVELFIELD_CACHE") or ".cache"))
    net, crafted = made_again(card, scenario, w)
    with arithmetic(scenario.recipe.precision):
        triggered = None if crafted is None else poison_test(w.data.test, crafted, scenario.plan)
    target = None if triggered is None else scenario.plan.target
    return net, ZooWorld(w.clean, w.validation, w.data.test, triggered, target, card.content)


def opened(folder: Path, name: str) -> tuple[Card, Scenario]:
    """A card and the scenario that it describes.

    Raises:
        BadInput: no such victim; the card is damaged, or was made with another version.
    """
    card = read_card(folder, name)
    content = card.content
    if content["revision"] != REVISION:
        raise BadInput(
            f"{card.path}: made under revision {content['revision']} of the victims' keys, and this version has revision "
            f"{REVISION}: use the version that made it, or export the victim again"
        )
    try:
        scenario = scenario_of(content["scenario"], content["backbone_label"], content["attack_label"])
    except BadInput as error:
        raise BadInput(f"{card.path}: {error}") from error
    if victim_key(scenario, str(content["dataset"].get("fingerprint"))) != content["key"]:
        raise BadInput(f"{card.path}: its key does not follow from its settings and its data: the card was changed")
    return card, scenario


def made_again(card: Card, scenario: Scenario, w: World) -> tuple[Network, Crafted | None]:
    """The network and its triggers; a surrogate that a trigger needs is another victim of the same zoo.

    Raises:
        BadInput: the file is damaged or does not fit its card, or the zoo lacks the surrogate.
    """

    def surrogate() -> Network | None:
        lent = scenario.surrogate()
        assert lent is not None
        found = by_key(victim_key(lent, card.content["dataset"]["fingerprint"]), folder=card.path.parent)
        if found is None:
            raise BadInput(f"{card.path.parent}: lacks the network on which {card.name} is crafted, {lent.backbone_label}")
        return rebuilt(found, lent, w, lambda: None)[0]

    with arithmetic(scenario.recipe.precision):
        net, crafted, _ = rebuilt(card, scenario, w, surrogate)
    return net, crafted


def _world(card: Card, scenario: Scenario, cache: Path) -> World:
    """The data of the card, or the release that they are a copy of."""
    name = card.content["dataset"].get("name")
    try:
        w = world(scenario, cache)
    except BadInput as missing:
        try:
            data = load_original(scenario.dataset, cache)
        except BadInput as error:
            raise BadInput(f"{missing}; nor can the original be had: {error}") from error
        if data is None:
            raise
        warnings.warn(
            f"{card.name}: {name} is not here: the same images of {data.name} are used, whose pixels are not re-encoded; figures "
            "differ slightly from the card's",
            stacklevel=3,
        )
        return divided(data, scenario.clean_fraction, scenario.seed)
    if w.data.fingerprint != card.content["dataset"]["fingerprint"]:
        warnings.warn(
            f"{card.name}: the pixels of {name} are not those of the card (another decoder?): figures differ slightly", stacklevel=3
        )
    return w
