"""Attackers who know the defense: another attack plus one change aimed at pruning by sensitivity.

Pruning defenses of the CLP and Hölder kind look for units that answer a small change of the input with a large change of their
output. An attacker who knows this can keep the backdoor and remove the signature. Each such attack wraps a base attack and has a
strength; at strength 0 it *is* the base attack, bit for bit, so that whatever it gains is the adaptation's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from attacks.base import Attack, Crafted, Plan, Power
from models.backbone import Backbone, Network
from models.classifier import Classifier
from models.images import ImageSet
from models.recipe import Recipe
from models.spec import BadInput, Ge, Le, check, lookup, nearest

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive(Attack):
    """A base attack and what it shares with every adaptation: who is poisoned, with what, under which label.

    Attributes:
        base: name of the base attack.
        base_settings: its settings, as (field, value) pairs.
        strength: of the adaptation; 0 = the base attack.
    """

    base: str = "badnets"
    base_settings: tuple[tuple[str, object], ...] = ()
    strength: Annotated[float, Ge(0), Le(1000)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wrapped()

    def wrapped(self) -> Attack:
        """The base attack.

        Raises:
            BadInput: no such attack, it is adaptive itself, or it has no such setting.
        """
        from attacks import ATTACKS  # the catalogue lists the adaptive attacks too, so it can only be read once it is complete

        kind = lookup("attack", ATTACKS, self.base)
        check(self, "base", not issubclass(kind, Adaptive) and not kind.needs_model_at_test, "an attack with a trigger of its own")
        known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for field, _ in self.base_settings:
            if field not in known:
                raise BadInput(f"{self.name}: base_settings: {self.base} has no setting {field!r}{nearest(field, known)}")
        return kind(**dict(self.base_settings))

    def spec(self) -> dict[str, Any]:
        """With the base's revision, once it has been raised."""
        revision = self.wrapped().revision
        return {**super().spec(), **({"base_revision": revision} if revision > 1 else {})}

    # What `Attack` declares per class depends on the base here.

    @property
    def clean_label(self) -> bool:  # type: ignore[override]
        return self.wrapped().clean_label

    @property
    def needs_surrogate(self) -> bool:  # type: ignore[override]
        return self.wrapped().needs_surrogate

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        return self.wrapped().keeps

    @property
    def cover_share(self) -> float:  # type: ignore[override]
        return self.wrapped().cover_share

    @property
    def power(self) -> Power:
        """The training: each of these changes it, or the weights it leaves."""
        return Power.TRAINING

    @property
    def poisons_batches(self) -> bool:
        return self.wrapped().poisons_batches

    def own_surrogate(self, backbone: Backbone) -> Backbone | None:
        return self.wrapped().own_surrogate(backbone)

    def cover_rate(self, plan: Plan) -> float:
        return self.wrapped().cover_rate(plan)

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        return self.wrapped().craft(train, plan, seed, surrogate)

    def victim(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> Classifier:
        return self.wrapped().victim(net, recipe, crafted, plan, seed)

    def finished(self, victim: Classifier, crafted: Crafted) -> Crafted:
        return self.wrapped().finished(victim, crafted)

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        return self.wrapped().keep(crafted)

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        return self.wrapped().restore(kept, train, plan, seed, surrogate)
