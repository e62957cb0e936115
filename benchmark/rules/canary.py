"""Canaries: backdoors planted in copies of a model, to choose a defense's setting without access to the attack.

A defender who has a model and clean images cannot measure ASR, because the trigger is unknown. But the defender can plant another
backdoor in a copy of the model and measure which setting of a defense removes that one. A canary's pattern is drawn from the seed,
and its family is one that no attack of the matrix uses. It is trained on the clean budget alone: a few stamped images towards a
drawn class, while the logits on clean images are held at those of the model (plain fine-tuning would change the whole network and
remove the attacker's backdoor). The rule compares ranks of settings, not ASR (:func:`benchmark.rules.selection.choose`).

Nothing here gets the scenario: planting takes the model, the clean budget, a recipe and a seed.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from models.backbone import Network
from models.classifier import Classifier
from models.cost import metered
from models.images import ImageSet, quantise, to_float
from models.recipe import Recipe
from models.spec import Spec, check, derive_seed, generator
from models.training import fit, predict

__all__ = ["CANARIES", "Blend", "Canary", "Frame", "Patch", "Planted", "Planting", "Ripple", "canaries_for", "plant"]

Stamp = Callable[[Tensor], Tensor]
"""Images float (N, C, H, W) in [0, 1] -> stamped images, same shape and range."""


@dataclass(frozen=True)
class Canary(Spec, ABC):
    """A family of patterns.

    Attributes:
        like: names of the attacks whose triggers are of the same family.
        local: whether it changes a few pixels; otherwise it changes all of them.
    """

    like: ClassVar[frozenset[str]]
    local: ClassVar[bool]

    @abstractmethod
    def stamp(self, shape: tuple[int, int, int], seed: int) -> Stamp:
        """A pattern for images of ``shape`` (C, H, W), drawn from ``seed``."""


def _pasted(pattern: Tensor, mask: Tensor) -> Stamp:
    return lambda images: torch.where(mask.to(images.device), pattern.to(images.device), images)


@dataclass(frozen=True)
class Patch(Canary):
    """A square of random black and white pixels at a random place. side: as a share of the image's."""

    name: ClassVar[str] = "patch"
    like: ClassVar[frozenset[str]] = frozenset({"badnets", "lc", "trojannn", "adap-patch", "input-aware", "imc", "natural"})
    local: ClassVar[bool] = True

    side: float = 0.2

    def __post_init__(self) -> None:
        check(self, "side", 0 < self.side < 1, "a share in (0, 1)")

    def stamp(self, shape: tuple[int, int, int], seed: int) -> Stamp:
        channels, height, width = shape
        draw, size = generator(seed, "patch"), max(2, round(self.side * min(height, width)))
        top, left = (int(torch.randint(1, max(2, side - size), (1,), generator=draw)) for side in (height, width))
        pattern, mask = torch.zeros(channels, height, width), torch.zeros(1, height, width, dtype=torch.bool)
        place = (slice(None), slice(top, top + size), slice(left, left + size))
        pattern[place] = torch.randint(0, 2, (1, size, size), generator=draw).float()
        mask[place] = True
        return _pasted(pattern, mask)


@dataclass(frozen=True)
class Frame(Canary):
    """The outermost ring of pixels, randomly black and white."""

    name: ClassVar[str] = "frame"
    like: ClassVar[frozenset[str]] = frozenset()
    local: ClassVar[bool] = True

    def stamp(self, shape: tuple[int, int, int], seed: int) -> Stamp:
        _, height, width = shape
        pattern = torch.randint(0, 2, (1, height, width), generator=generator(seed, "frame")).float()
        mask = torch.ones(1, height, width, dtype=torch.bool)
        mask[:, 1:-1, 1:-1] = False
        return _pasted(pattern.expand(shape).clone(), mask)


@dataclass(frozen=True)
class Blend(Canary):
    """A smooth random field, blended in. alpha: blend ratio. waves: number of cosines, of up to two cycles, that are summed."""

    name: ClassVar[str] = "blend"
    like: ClassVar[frozenset[str]] = frozenset({"blended", "adap-blend", "lf", "dfst", "ssba", "narcissus", "advtrojan"})
    local: ClassVar[bool] = False

    alpha: float = 0.3
    waves: int = 6

    def __post_init__(self) -> None:
        check(self, "alpha", 0 < self.alpha <= 1, "a blend ratio in (0, 1]")
        check(self, "waves", 1 <= self.waves <= 1000, "between 1 and 1000")

    def stamp(self, shape: tuple[int, int, int], seed: int) -> Stamp:
        channels, height, width = shape
        draws = torch.rand(self.waves, channels, 3, generator=generator(seed, "blend"))
        down, across = (torch.arange(side) / side for side in (height, width))
        field = torch.zeros(shape)
        for wave in draws:
            for channel, (fy, fx, phase) in enumerate(wave.tolist()):
                field[channel] += torch.cos(2 * math.pi * (2 * fy * down[:, None] + 2 * fx * across + phase))
        low, high = field.min(), field.max()
        picture = (field - low) / (high - low).clamp_min(1e-6)
        return lambda images: torch.lerp(images, picture.to(images.device), self.alpha)


@dataclass(frozen=True)
class Ripple(Canary):
    """Faint slanted stripes, added. amplitude: in (0, 1]. Three to six cycles across and down, drawn at random."""

    name: ClassVar[str] = "ripple"
    like: ClassVar[frozenset[str]] = frozenset({"sig"})
    local: ClassVar[bool] = False

    amplitude: float = 0.25

    def __post_init__(self) -> None:
        check(self, "amplitude", 0 < self.amplitude <= 1, "an amplitude in (0, 1]")

    def stamp(self, shape: tuple[int, int, int], seed: int) -> Stamp:
        _, height, width = shape
        fy, fx, phase = torch.rand(3, generator=generator(seed, "ripple")).tolist()
        down, across = torch.arange(height) / height, torch.arange(width) / width
        stripes = self.amplitude * torch.sin(2 * math.pi * ((3 + 3 * fy) * down[:, None] + (3 + 3 * fx) * across + phase))
        return lambda images: (images + stripes.to(images.device)).clamp(0.0, 1.0)


CANARIES: tuple[Canary, ...] = (Patch(), Frame(), Blend(), Ripple())
"""Every family, local ones first, in the order in which they are used."""


def canaries_for(attacks: Iterable[str]) -> tuple[Canary, ...]:
    """One local and one global canary whose families none of the named attacks uses; fewer where all are in use."""
    used = frozenset(attacks)
    free = [canary for canary in CANARIES if not canary.like & used]
    return tuple(one for local in (True, False) for one in [c for c in free if c.local is local][:1])


@dataclass(frozen=True)
class Planting(Spec):
    """How a canary is planted; all numbers ours.

    Attributes:
        rate: share of the training images that are stamped. hold: weight of the distance to the model's own logits.
        lr, batch: of Adam at a constant rate, batch norm in evaluation mode (its statistics are part of what is held).
        epochs: at most; planting ends once the canary's ASR on images that were not stamped exceeds ``reached``, and at most a
            share ``moved`` of the clean training images has changed its predicted class.
    """

    name: ClassVar[str] = "planting"

    rate: float = 0.25
    hold: float = 10.0
    lr: float = 1e-3
    batch: int = 32
    epochs: int = 100
    reached: float = 0.9
    moved: float = 0.02

    def __post_init__(self) -> None:
        check(self, "rate", 0 < self.rate <= 1, "a share in (0, 1]")
        check(self, "hold", 0 <= self.hold <= 1000, "between 0 and 1000")
        check(self, "reached", 0 <= self.reached < 1, "a share in [0, 1)")
        check(self, "moved", 0 <= self.moved <= 1, "a share in [0, 1]")


@dataclass(frozen=True)
class Planted:
    """A copy of the model with a canary in it.

    Attributes:
        net: the copy, in evaluation mode. target: class of the stamped images.
        probes: stamped images of other classes that planting did not stamp, uint8 (M, C, H, W): ASR is measured on them.
        forward, backward: samples that planting took.
    """

    net: Network
    target: int
    probes: Tensor
    forward: int
    backward: int

    def asr(self, net: Network) -> float:
        """Share of the probes that ``net`` classifies as the target; NaN without probes."""
        return self.share(predict(net, self.probes))

    def share(self, predicted: Tensor) -> float:
        """The same from the classes predicted for the probes, int64 (M,)."""
        return _hits(predicted, self.target)


def _hits(predicted: Tensor, target: int) -> float:
    return float((predicted == target).double().mean()) if len(predicted) else math.nan


class _Planter(Classifier):
    """Stamps chosen samples and trains until the probes go to the target; on clean images the logits are held."""

    def __init__(
        self, net: Network, recipe: Recipe, how: Planting, stamp: Stamp, clean: Tensor, chosen: Tensor, target: int, probes: Tensor
    ) -> None:
        super().__init__(net, recipe)
        self.how, self.stamp, self.chosen, self.target, self.probes = how, stamp, chosen, target, probes
        self.clean, self.classes = clean, predict(net, clean)
        self.model = copy.deepcopy(net).requires_grad_(False)

    def train(self, mode: bool = True) -> _Planter:
        super().train(mode)
        self.net.eval()
        self.model.eval()
        return self

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _, index = batch
        with torch.no_grad():
            wanted = self.model(images).float()
        # Relative to the logits' own size: networks differ by orders of magnitude in it, and the rate is one for all.
        loss: Tensor = self.how.hold * mse_loss(self(images), wanted) / wanted.square().mean().clamp_min(1e-6)
        marked = images[self.chosen.to(index.device)[index]]
        if len(marked):
            logits = self(self.stamp(marked).contiguous(memory_format=torch.channels_last))
            loss = loss + cross_entropy(logits, torch.full((len(marked),), self.target, device=logits.device))
        return loss

    def on_train_epoch_end(self) -> None:
        moved = float((predict(self.net, self.clean) != self.classes).double().mean())
        if moved <= self.how.moved and _hits(predict(self.net, self.probes), self.target) > self.how.reached:
            self.trainer.should_stop = True


def plant(
    canary: Canary, model: Network, clean: ImageSet, validation: ImageSet, recipe: Recipe, seed: int, how: Planting = Planting()
) -> Planted:
    """A copy of ``model`` with a canary planted; ``Planted.asr(Planted.net)`` tells whether it worked.

    Args:
        canary: the family of the pattern.
        model: the attacked model; not changed.
        clean, validation: the two parts of the clean budget; images of the first alone are stamped.
        recipe: the victim's, for crop and flip.
        seed: of the pattern, the target and the stamped images.
        how: settings of planting.

    Raises:
        models.training.Diverged: weights are not finite at the end.
    """
    stamp = canary.stamp(clean.shape, derive_seed(seed, "pattern"))
    target = int(torch.randint(0, clean.num_classes, (1,), generator=generator(seed, "target")))
    others = torch.nonzero(clean.labels != target).flatten()
    others = others[torch.randperm(len(others), generator=generator(seed, "stamped"))]
    count = min(len(others), max(1, round(how.rate * len(clean))))
    chosen = torch.zeros(len(clean), dtype=torch.bool)
    chosen[others[:count]] = True
    rest = torch.cat([clean.images[others[count:]], validation.images[validation.labels != target]])
    probes = quantise(stamp(to_float(rest)))
    plan = Recipe(
        epochs=how.epochs, batch=how.batch, lr=how.lr, optimizer="adam", weight_decay=0.0, schedule="constant", crop=recipe.crop,
        flip=recipe.flip, precision=recipe.precision,
    )  # fmt: skip
    module = _Planter(copy.deepcopy(model), plan, how, stamp, clean.images, chosen, target, probes)
    with metered() as cost:
        net = fit(module, clean, plan, derive_seed(seed, "fit")).net
    return Planted(net.requires_grad_(True).eval(), target, probes, cost.forward, cost.backward)
