"""The defender's view of a model and its data, and the base class of every defense.

The view holds no trigger, target, role, true label of the poisoned set, or test set, and the import contracts keep a defense from
fetching them. What the track does not grant raises :class:`Withheld`.
"""

from __future__ import annotations

import copy
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from models.backbone import Network
from models.extractors import Extractor
from models.images import ImageSet
from models.recipe import Recipe
from models.spec import Spec, derive_seed
from models.units import Masks, Pairing, Scope, UnitLayer, Writer, prune, unit_layers

__all__ = [
    "Candidate",
    "DefenderView",
    "Defense",
    "Inapplicable",
    "Knowledge",
    "Scope",
    "Withheld",
    "lowest_loss",
    "prunable",
    "pruned_candidate",
]


class Knowledge(enum.Flag):
    """What a defender may hold. SEEDS: a few training samples known to be clean. ROLES (which samples are poisoned) is granted to
    the perfect-filter control alone."""

    NONE = 0
    MODEL = enum.auto()
    CLEAN = enum.auto()
    TRAIN = enum.auto()
    EXTRACTOR = enum.auto()
    ROLES = enum.auto()
    SEEDS = enum.auto()

    @property
    def words(self) -> str:
        """As text: "model + clean", "nothing"."""
        return " + ".join((flag.name or "").lower() for flag in self) or "nothing"


class Withheld(PermissionError):
    """A defense asked for something that its track does not grant, or that is not in its ``needs``."""


class Inapplicable(ValueError):
    """A defense cannot run on this network or view, e.g. because there are no hidden units."""


class DefenderView:
    """Everything a defender gets. Each access is recorded in ``used`` and checked against ``granted`` and ``declared``; ``trained``
    records whether the defense trained a new network.

    Args:
        granted: what the track gives.
        declared: the defense's ``needs``.
        sources: functions that fetch each kind of knowledge, called at most once each. MODEL -> Network, CLEAN -> (fit part,
            validation part) of the clean budget, TRAIN -> ImageSet, EXTRACTOR -> Network, ROLES -> ImageSet without the poison,
            SEEDS -> bool (N,) over the training set.
        fresh: builds an untrained network of the victim's architecture from a seed (the architecture is public).
        num_classes: number of classes.
        seed: the defender's.
        scope: which weights may be edited.
        recipe: the one the victim was trained with (public).
        built: fetches a cached extractor that was trained on the poisoned training set; without it, :meth:`extract` trains one.
    """

    def __init__(
        self,
        *,
        granted: Knowledge,
        declared: Knowledge,
        sources: Mapping[Knowledge, Callable[[], object]],
        fresh: Callable[[int], Network],
        num_classes: int,
        seed: int,
        scope: Scope,
        recipe: Recipe,
        built: Callable[[Extractor], Network] | None = None,
    ) -> None:
        self.__built = built
        self.granted, self.declared, self.used = granted, declared, Knowledge.NONE
        self.num_classes, self.seed, self.scope, self.recipe = num_classes, seed, scope, recipe
        self.trained = False
        self.__fresh = fresh
        self.__sources = dict(sources)
        self.__fetched: dict[Knowledge, object] = {}

    def fresh(self, seed: int) -> Network:
        """An untrained network of the victim's architecture."""
        self.trained = True
        return self.__fresh(seed)

    def _fetch(self, what: Knowledge) -> object:
        if what not in self.granted:
            raise Withheld(f"the track withholds {what.words!r}; it grants {self.granted.words}")
        if what not in self.declared:
            raise Withheld(f"the defense asked for {what.words!r} but declares only {self.declared.words}")
        self.used |= what
        if what not in self.__fetched:
            self.__fetched[what] = self.__sources[what]()
        return self.__fetched[what]

    @property
    def model(self) -> Network:
        """A fresh copy of the victim, in evaluation mode, every parameter trainable; it may be changed in place."""
        net = copy.deepcopy(self._fetch(Knowledge.MODEL))
        assert isinstance(net, Network)
        return net.requires_grad_(True).eval()

    @property
    def clean(self) -> ImageSet:
        """The part of the clean budget to fit on (four fifths), class-balanced, never in the attacker's set."""
        return self._budget()[0]

    @property
    def validation(self) -> ImageSet:
        """The part of the clean budget to validate on (one fifth)."""
        return self._budget()[1]

    def _budget(self) -> tuple[ImageSet, ImageSet]:
        parts = self._fetch(Knowledge.CLEAN)
        assert isinstance(parts, tuple)
        return parts

    @property
    def train(self) -> ImageSet:
        """The training set as published: poisoned, no roles, no true labels."""
        data = self._fetch(Knowledge.TRAIN)
        assert isinstance(data, ImageSet)
        return data

    @property
    def seeds(self) -> Tensor:
        """Training samples known to be clean, the same number of every class: bool (N,), a copy."""
        mask = self._fetch(Knowledge.SEEDS)
        assert isinstance(mask, Tensor)
        return mask.clone()

    @property
    def extractor(self) -> Network:
        """A copy of the trusted feature extractor."""
        net = copy.deepcopy(self._fetch(Knowledge.EXTRACTOR))
        assert isinstance(net, Network)
        return net

    def extract(self, extractor: Extractor) -> Network:
        """An extractor trained by the defender on the poisoned training set; in evaluation mode.

        Defenses that use the same extractor get the same weights, so it is trained once; each is charged its full cost.

        Raises:
            ValueError: ``extractor`` reads anything but the poisoned images.
        """
        if extractor.reads != "poisoned":
            raise ValueError(f"{extractor.name} reads {extractor.reads!r}: a defender holds the poisoned images only")
        data = self.train
        self.trained = True
        if self.__built is not None:
            net = copy.deepcopy(self.__built(extractor))
        else:
            net = extractor.build(self.fresh, data, self.recipe, derive_seed(self.seed, "extractor")).net
        return net.requires_grad_(True).eval()

    @property
    def filtered(self) -> ImageSet:
        """The training set without its poisoned and cover samples; for the perfect-filter control only."""
        data = self._fetch(Knowledge.ROLES)
        assert isinstance(data, ImageSet)
        return data


@dataclass(frozen=True)
class Candidate:
    """One model a defense offers.

    Attributes:
        model: the defended network.
        dial: its value on the defense's dial; None for a defense without one.
        is_default: whether the method's published default gives it. Exactly one candidate of a run is the default.
        strength: how much the defense changed, larger = more; orders the candidates for the validation rule.
        masks: pruned units by layer (bool, True = pruned), for pruning defenses.
        isolated: for methods that isolate suspicious training samples: bool (N,), True = taken for poisoned. The benchmark compares
            it with the roles; the defense never gets the result.
        suspicion: what such a method orders the training samples by, float (N,), larger = sooner taken for poisoned; None where it
            gives no order.
        note: a remark for the row.
    """

    model: Network
    dial: float | None = None
    is_default: bool = True
    strength: float = 0.0
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    isolated: Tensor | None = None
    suspicion: Tensor | None = None
    note: str = ""

    @property
    def pruned(self) -> int:
        """Number of pruned units."""
        return int(sum(int(mask.sum()) for mask in self.masks.values()))


class Defense(Spec, ABC):
    """A defense: a frozen dataclass of its settings, one file, one paper."""

    control: ClassVar[bool] = False
    """Controls are listed in every table and are never ranked."""
    family: ClassVar[str] = ""
    """Kind of method in a word or two, e.g. "pruning", for the table of defenses."""
    cost: ClassVar[str] = ""
    """Passes that a run takes, in words, for the same table; ``{epochs}`` stands for the value of the setting ``epochs``."""
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.WHOLE,)
    dial_name: ClassVar[str] = ""
    """Axis label of the dial, e.g. "share of units pruned"."""
    knob_name: ClassVar[str] = ""
    """Axis label of the knob, a second setting beside the dial, e.g. "perturbation radius"; empty where there is none."""
    writer: ClassVar[Writer | None] = None
    """What a pruning method writes into pruned units, copied by random pruning; None for methods that do not only prune."""

    @property
    @abstractmethod
    def needs(self) -> Knowledge:
        """What this defense, with these settings, must be granted."""

    @property
    def extractor(self) -> Extractor | None:
        """The extractor that it gets from :meth:`DefenderView.extract`, so that it can be trained beforehand; None = none."""
        return None

    @property
    def z_threshold(self) -> float | None:
        """The published threshold in standard deviations above the mean of a layer's scores; None for a method of another rule."""
        return None

    @property
    def knob(self) -> float | None:
        """This instance's value of the knob; None for a method without one."""
        return None

    @property
    def knobs(self) -> tuple[Defense, ...]:
        """The method at every setting of its knob that the benchmark tries: itself first (the published setting), then from the
        hardest intervention to the gentlest. The same rule chooses among all of them, within the matrix's budget of candidates."""
        return (self,)

    @abstractmethod
    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        """Yields models along the dial (any order), exactly one of them marked as the default.

        Raises:
            Withheld: it asked for something the track does not grant.
            Inapplicable: it cannot run on this network.
        """


def prunable(net: Network, scope: Scope, pairing: Pairing = "dataflow") -> tuple[UnitLayer, ...]:
    """The layers a pruning defense may touch under ``scope``, in forward order.

    Raises:
        Inapplicable: there is no unit to prune, with the reason.
    """
    layers = unit_layers(net, scope, pairing)
    if not layers:
        reason = "the head is a single linear layer and has no hidden units" if scope is Scope.HEAD else "no prunable layer"
        raise Inapplicable(f"nothing to prune at scope {scope.value!r}: {reason}")
    return layers


def lowest_loss(losses: Tensor, share: float) -> Tensor:
    """The ``floor(share * N)`` samples of lowest loss, bool (N,); ties go to the lower index."""
    mask = torch.zeros(len(losses), dtype=torch.bool)
    mask[torch.argsort(losses, stable=True)[: int(share * len(losses))]] = True
    return mask


def pruned_candidate(model: Network, masks: Masks, writer: Writer, dial: float, is_default: bool) -> Candidate:
    """``model`` with the masks written into a copy; its strength is the number of pruned units."""
    strength = float(sum(int(mask.sum()) for mask in masks.values()))
    return Candidate(prune(model, masks, writer), dial, is_default, strength, masks)
