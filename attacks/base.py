"""How a training set is poisoned, and the base class of every attack.

An attack crafts triggers; :func:`poison` chooses the samples that receive them. Poisoned samples *replace* clean ones, so |D'| =
|D|, and every triggered image is quantised to uint8 once: victim, defender and test get what an image file can hold.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from models.backbone import Backbone, Network
from models.classifier import Classifier
from models.images import ImageSet, quantise, to_float
from models.recipe import Recipe
from models.room import copied, room, taken
from models.spec import BadInput, Ge, Share, Spec, generator, uniforms
from models.training import default_device

__all__ = [
    "Attack", "Crafted", "Plan", "PoisonedSet", "PoisonedTest", "Power", "Role", "Trigger", "apply", "poison", "poison_test",
    "roles", "uniforms",
]  # fmt: skip

Trigger = Callable[[Tensor, Tensor], Tensor]
"""(images float (N, C, H, W) in [0, 1], index int64 (N,) of each image in its set) -> triggered images, same shape and range.

Pure, batched, deterministic: per-sample randomness is looked up by ``index`` (:func:`uniforms`), never drawn. Works on any device,
for images of the shape it was crafted for.
"""


class Power(enum.Enum):
    """What the attacker controls: the DATA alone, or the TRAINING of the victim too."""

    DATA = "data"
    TRAINING = "training"


class Role(enum.IntEnum):
    """What happened to a training sample. COVER = triggered, true label kept (WaNet's noise mode, adaptive blend)."""

    CLEAN = 0
    POISON = 1
    COVER = 2


@dataclass(frozen=True)
class Plan(Spec):
    """How much is poisoned, and towards what.

    Attributes:
        rate: poisoned share of the whole training set, in [0, 1] (clean-label attacks too; they stop at the target class's size).
        cover_rate: share of cover samples; None = the attack's own default. Without effect on attacks that make no covers.
        target: class every triggered image is sent to (all-to-one).
        label_mode: ``all-to-one``, or ``all-to-all``: y -> (y + 1) mod K.
    """

    name: ClassVar[str] = "plan"

    rate: Share = 0.1
    cover_rate: Share | None = None
    target: Annotated[int, Ge(0)] = 0
    label_mode: Literal["all-to-one", "all-to-all"] = "all-to-one"

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """The attacker's labels for images of classes ``labels`` (N,).

        Raises:
            BadInput: the target is not one of the ``num_classes`` classes.
        """
        if self.target >= num_classes:
            raise BadInput(f"plan: target = {self.target} does not exist; the data has classes 0 to {num_classes - 1}")
        if self.label_mode == "all-to-all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target)


@dataclass(frozen=True)
class Crafted:
    """The triggers of one attack.

    Attributes:
        train: for poisoned training samples.
        test: for test images.
        cover: for cover samples; None = the attack makes none.
    """

    train: Trigger
    test: Trigger
    cover: Trigger | None = None


@dataclass(frozen=True)
class PoisonedSet:
    """A poisoned training set. Only ``visible`` may ever reach a defender.

    Attributes:
        visible: the images and labels as published.
        role: int8 (N,), values of :class:`Role`.
        true_labels: int64 (N,).
    """

    visible: ImageSet
    role: Tensor
    true_labels: Tensor

    def realised(self, role: Role) -> float:
        """Share of the set in that role, in [0, 1]."""
        return float((self.role == role).double().mean())


@dataclass(frozen=True)
class PoisonedTest:
    """Triggered test images: ASR is read against ``target_labels``, RA against ``true_labels``, on the very same images.

    All-to-one: images of the target class are left out, since they would count as successes of any classifier.

    Attributes:
        images: uint8 (M, C, H, W).
        true_labels: int64 (M,).
        target_labels: int64 (M,).
        source: int64 (M,), the test image each one comes from.
    """

    images: Tensor
    true_labels: Tensor
    target_labels: Tensor
    source: Tensor


class Attack(Spec, ABC):
    """A backdoor attack: a frozen dataclass of its settings, one file, one paper."""

    injects: ClassVar[bool] = True
    """Whether anything is poisoned; otherwise the trigger is one that the clean network answers to."""
    clean_label: ClassVar[bool] = False
    """Whether only images of the target class are poisoned, so that no label is ever wrong."""
    needs_surrogate: ClassVar[bool] = False
    """Whether :meth:`craft` needs a cleanly trained network."""
    cover_share: ClassVar[float] = 0.0
    """Cover samples per poisoned sample when the plan names no cover rate."""
    needs_model_at_test: ClassVar[bool] = False
    """Whether the test trigger is computed on the attacked model (:meth:`recraft`), so that two protocols exist: *frozen*, crafted
    once on the undefended model, and *recraft*, crafted again on each defended one."""
    keeps: ClassVar[bool] = False
    """Whether the triggers hold tensors (:meth:`keep`) that cannot be computed again, or not at little cost."""

    def own_surrogate(self, backbone: Backbone) -> Backbone | None:
        """The architecture of a surrogate that the attacker trains apart, for a victim of architecture ``backbone``.

        Such a surrogate sees the same images as the victim and its benign twin, with other initial weights and batches. None: the
        twin itself is the surrogate.
        """
        return None

    @property
    def power(self) -> Power:
        """What this attack, with these settings, needs control of."""
        return Power.DATA

    @property
    def poisons_batches(self) -> bool:
        """Whether its victim is given the clean set and poisons its own batches; otherwise it is given the poisoned set."""
        return self.power is Power.TRAINING

    def cover_rate(self, plan: Plan) -> float:
        """Cover samples as a share of the training set: the plan's, or this attack's own share of the poison; in [0, 1]."""
        return min(1.0, plan.rate * self.cover_share) if plan.cover_rate is None else plan.cover_rate

    @abstractmethod
    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """Builds the triggers.

        Args:
            train: the clean training set the attacker holds.
            plan: how much is poisoned, and towards which class.
            seed: of every draw.
            surrogate: a cleanly trained network, where ``needs_surrogate``.

        Raises:
            BadInput: the settings do not suit images of this shape.
        """

    def victim(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> Classifier:
        """The module that trains the victim: plain unless the attacker controls training (``power`` TRAINING)."""
        return Classifier(net, recipe)

    def finished(self, victim: Classifier, crafted: Crafted) -> Crafted:
        """The triggers after training, for attacks that learn them jointly with the victim, or that edit the finished weights."""
        return crafted

    def recraft(self, net: Network, crafted: Crafted, train: ImageSet, plan: Plan, seed: int) -> Crafted:
        """The triggers for ``net``, an attacked or defended model, where ``needs_model_at_test``; otherwise as they are.

        Args:
            net: in evaluation mode; it is not changed.
            crafted: what :meth:`craft` returned.
            train: the clean training set the attacker holds.
            plan: as in :meth:`craft`.
            seed: as in :meth:`craft`.
        """
        return crafted

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        """What a file must hold of the triggers, so that :meth:`restore` gives the same ones: tensors by name, on any device.

        Nothing where :meth:`craft` gives the same triggers again at little cost (``keeps`` is false).

        Args:
            crafted: the triggers of a finished victim, after :meth:`finished` and :meth:`recraft`.
        """
        return {}

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        """The triggers of a finished victim again, bit for bit on one machine type; those that are kept, on every one.

        Args:
            kept: what :meth:`keep` gave.
            train: as in :meth:`craft`.
            plan: as in :meth:`craft`.
            seed: as in :meth:`craft`.
            surrogate: gives the network of :meth:`craft`; called only where it is needed.

        Raises:
            KeyError: ``kept`` lacks a tensor. RuntimeError: one has another shape than these settings give.
        """
        return self.craft(train, plan, seed, surrogate() if self.needs_surrogate else None)

    def single_keys(self, net: Network, train: ImageSet, plan: Plan, seed: int) -> dict[str, Crafted]:
        """Of a trigger that takes several keys together: each by itself, by name; none of them should open the backdoor.

        Arguments as in :meth:`recraft`.
        """
        return {}


MOST_PIXELS = 2**24
"""Pixels (times channels) triggered at once: 64 MiB as floats, and as much again for what the trigger makes of them."""


def apply(trigger: Trigger, images: Tensor, index: Tensor, batch: int = 1000) -> Tensor:
    """Triggers uint8 images (N, C, H, W) in batches (of fewer than ``batch`` where images are large) and quantises the result to
    uint8.

    Computed on the default device, where some triggers are networks; the result is where ``images`` are.
    """
    device = default_device()
    batch = max(1, min(batch, MOST_PIXELS // math.prod(images.shape[1:])))
    out = torch.empty_like(images) if images.device.type != "cpu" else room(images.shape)
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        out[part] = quantise(trigger(to_float(images[part].to(device)), index[part].to(device))).to(images.device)
    return out


def poison(train: ImageSet, attack: Attack, crafted: Crafted, plan: Plan, seed: int) -> PoisonedSet:
    """The static poisoned set; for training-control attacks, the set they would export.

    ``round(rate * N)`` samples are drawn uniformly from all classes (clean label: from the target class, never more than it
    holds), cover samples from the rest. The same (data, plan, seed) draw the same samples for every attack and backbone, and a
    higher rate keeps the samples of a lower one.

    Raises:
        BadInput: the target does not exist, or a clean-label attack is asked for all-to-all.
    """
    role = roles(train, attack, plan, seed, covers=crafted.cover is not None)
    images, labels = copied(train.images), train.labels.clone()
    poisoned, covers = (torch.nonzero(role == kind).flatten() for kind in (Role.POISON, Role.COVER))
    images[poisoned] = apply(crafted.train, taken(train.images, poisoned), poisoned)
    labels[poisoned] = plan.relabel(train.labels, train.num_classes)[poisoned]
    if crafted.cover is not None:
        images[covers] = apply(crafted.cover, taken(train.images, covers), covers)
    return PoisonedSet(ImageSet(images, labels, train.num_classes), role, train.labels.clone())


def roles(train: ImageSet, attack: Attack, plan: Plan, seed: int, *, covers: bool) -> Tensor:
    """Roles int8 (N,) of the static poisoned set, see :func:`poison`; ``covers``: whether the attack makes any.

    Raises:
        BadInput: as :func:`poison`.
    """
    if attack.clean_label and plan.label_mode == "all-to-all":
        raise BadInput(f"{attack.name}: label_mode = 'all-to-all' would need wrong labels; clean-label attacks are 'all-to-one'")
    plan.relabel(train.labels, train.num_classes)  # the target exists
    size = len(train)
    order = torch.randperm(size, generator=generator(seed, "poison-indices"))
    eligible = order[train.labels[order] == plan.target] if attack.clean_label else order
    role = torch.zeros(size, dtype=torch.int8)
    role[eligible[: round(plan.rate * size)]] = Role.POISON
    if covers:
        rest = order[role[order] == Role.CLEAN]
        role[rest[: round(attack.cover_rate(plan) * size)]] = Role.COVER
    return role


def poison_test(test: ImageSet, crafted: Crafted, plan: Plan) -> PoisonedTest:
    """The triggered test set: every image whose true class the trigger would change (all-to-all: all of them)."""
    target_labels = plan.relabel(test.labels, test.num_classes)
    source = torch.nonzero(target_labels != test.labels).flatten()
    images = apply(crafted.test, taken(test.images, source), source)
    return PoisonedTest(images, test.labels[source], target_labels[source], source)
