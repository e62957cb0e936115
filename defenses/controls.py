"""Controls, which every defense is compared with. They are listed in every table and are never ranked.

None leaves the victim as it is. Random pruning removes as many units as another method, chosen at random: the effect of a pruning
method beyond that is due to its score. Training from scratch spends the clean budget without the victim. The perfect filter trains
on the poisoned set without its poison: the best that detection could reach.

Needs: nothing but the model (none); what the imitated method needs (random pruning); the clean budget (training from scratch); the
roles of the training samples, which no defender has (perfect filter). Edits: everything, or the imitated method's units.
Dial: random pruning has the imitated method's; the others have none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope, pruned_candidate
from defenses.filtering import trained
from models.spec import BadInput, EpochCount, check, generator, lookup, nearest

__all__ = ["NoDefense", "PerfectFilter", "RandomPruning", "TrainingFromScratch"]


@dataclass(frozen=True)
class NoDefense(Defense):
    """The victim as it is.

    >>> NoDefense().needs.words
    'model'
    """

    name: ClassVar[str] = "none"
    family: ClassVar[str] = "control"
    cost: ClassVar[str] = "none"
    control: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        yield Candidate(view.model)


@dataclass(frozen=True)
class RandomPruning(Defense):
    """Prunes as many units of each layer as another method, but random ones; written the same way.

    One permutation per layer is used for the whole dial, so that nested masks stay nested.

    Attributes:
        like: name of the pruning method it imitates.
        like_settings: that method's settings, as (field, value) pairs.

    >>> RandomPruning(like="clp", like_settings=(("u", 2.0),)).imitated().u
    2.0
    """

    name: ClassVar[str] = "random-pruning"
    family: ClassVar[str] = "control"
    cost: ClassVar[str] = "that of the imitated method"
    control: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "dial of the imitated method"

    like: str = "clp"
    like_settings: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.imitated()

    def imitated(self) -> Defense:
        """The method whose numbers are copied.

        Raises:
            BadInput: no such method, it does not prune (or not only), or it has no such setting.
        """
        from defenses import DEFENSES  # the catalogue lists this class, so it can only be read once it is complete

        kind = lookup("defense", DEFENSES, self.like)
        pruners = [entry.name for entry in DEFENSES if entry.writer is not None]
        check(self, "like", kind.writer is not None, "a method that prunes and does nothing else: " + ", ".join(pruners))
        known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        settings = dict(self.like_settings)
        for field in settings:
            if field not in known:
                raise BadInput(f"{self.name}: {self.like} has no setting {field!r}{nearest(field, known)}")
        return kind(**settings)

    def spec(self) -> dict[str, Any]:
        """With the imitated method's own settings and revision: where that one changes, so does this."""
        return {**super().spec(), "imitated": self.imitated().spec()}

    @property
    def needs(self) -> Knowledge:
        return self.imitated().needs

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        imitated = self.imitated()
        if view.scope not in imitated.scopes:
            raise Inapplicable(f"{self.like} cannot run at scope {view.scope.value!r}")
        assert imitated.writer is not None
        for candidate in imitated.candidates(view):
            masks = {
                name: mask[torch.randperm(len(mask), generator=generator(view.seed, "random-pruning", name))]
                for name, mask in candidate.masks.items()
            }
            assert candidate.dial is not None
            yield pruned_candidate(view.model, masks, imitated.writer, candidate.dial, candidate.is_default)


@dataclass(frozen=True)
class TrainingFromScratch(Defense):
    """A fresh network of the victim's architecture, trained with the victim's recipe on the clean budget alone.

    Attributes:
        epochs: passes over the clean samples (ours: 100, as fine-tuning).

    >>> TrainingFromScratch(epochs=10).needs.words
    'clean'
    """

    name: ClassVar[str] = "training-from-scratch"
    family: ClassVar[str] = "control"
    cost: ClassVar[str] = "{epochs} epochs on the clean budget"
    control: ClassVar[bool] = True

    epochs: EpochCount = 100

    @property
    def needs(self) -> Knowledge:
        return Knowledge.CLEAN

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        recipe = dataclasses.replace(view.recipe, epochs=self.epochs)
        yield Candidate(trained(view, view.clean, recipe, "training-from-scratch"))


@dataclass(frozen=True)
class PerfectFilter(Defense):
    """A fresh network trained with the victim's recipe on the training set without its poisoned and cover samples.

    >>> PerfectFilter().needs.words
    'roles'
    """

    name: ClassVar[str] = "perfect-filter"
    family: ClassVar[str] = "control"
    cost: ClassVar[str] = "one training, as the victim's"
    control: ClassVar[bool] = True

    @property
    def needs(self) -> Knowledge:
        return Knowledge.ROLES

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        yield Candidate(trained(view, view.filtered, view.recipe, "perfect-filter"))
