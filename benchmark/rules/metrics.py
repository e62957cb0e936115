"""ACC, ASR, RA, DER and the attack-validity gate: defined once, with the sets they are measured on.

All are shares in [0, 1].

* ACC: clean test images classified correctly, all of them.
* ASR: triggered test images *whose true class is not the target* classified as the target.
* RA (robust accuracy): the same triggered images classified as their true class; hence ASR + RA <= 1.
* DER (defense effectiveness rating; Zhu et al., ICCV 2023, arXiv 2304.11823, eq. 7):
  ``(max(0, ASR_before - ASR_after) - max(0, ACC_before - ACC_after) + 1) / 2``. Printed, never ranked on: it rewards broken models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from attacks.base import PoisonedTest
from models.backbone import Network
from models.images import ImageSet
from models.training import predict
from models.variants import Variants

__all__ = [
    "ADVERSARIAL_ASR", "COSTS_POINTS", "COSTS_SHARE", "IMPLANTED_ASR", "IMPLANTED_EFFECT", "Gate", "Score", "Scorer", "der", "gate",
    "nan_of", "null_of", "score", "val_accuracy",
]  # fmt: skip

IMPLANTED_ASR = 0.5
"""An attack counts as implanted from this ASR on ..."""
IMPLANTED_EFFECT = 0.5
"""... if the ASR of the benign twin, trained without poison, is lower by at least this much."""
ADVERSARIAL_ASR = 0.2
"""Above this ASR of the twin the trigger is an adversarial perturbation and no backdoor."""
COSTS_POINTS, COSTS_SHARE = 0.02, 0.05
"""An attack costs accuracy when the lower bound of its loss is above 2 points and 5 % of the twin's ACC; it is only marked."""
_EXACT = 1e-9
"""Tolerance of comparisons: far below one image, so that 50.0 does not count as 49.9999999."""


def null_of(value: Any) -> Any:
    """A value as JSON: null for NaN, a list for a tuple."""
    if isinstance(value, tuple):
        return [*value]
    return None if isinstance(value, float) and math.isnan(value) else value


def nan_of(value: float | None) -> float:
    """A number from JSON: NaN for null."""
    return math.nan if value is None else value


@dataclass(frozen=True)
class Score:
    """Scores of one network on the test sets, in [0, 1]; ASR and RA are NaN where there is no attack."""

    acc: float
    asr: float = math.nan
    ra: float = math.nan

    def stored(self) -> dict[str, Any]:
        """The fields as JSON, by name: null for NaN. Fields that are None were not measured and are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: null_of(value) for name, value in values.items() if value is not None}

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`stored`; other keys of ``entry`` are ignored."""
        known: dict[str, Any] = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        known |= {name: tuple(value) if isinstance(value, list) else nan_of(value) for name, value in known.items()}
        return cls(**known)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else math.nan


def score(net: Network, test: ImageSet, triggered: PoisonedTest | None) -> Score:
    """ACC on ``test``; ASR and RA on ``triggered``, in one pass over each set."""
    acc = _share(predict(net, test.images) == test.labels)
    if triggered is None or not len(triggered.images):
        return Score(acc)
    predicted = predict(net, triggered.images)
    return Score(acc, _share(predicted == triggered.target_labels), _share(predicted == triggered.true_labels))


class Scorer:
    """Scores the candidates of a defense of one victim, on the same sets each time, and computes nothing twice
    (:mod:`models.variants`)."""

    def __init__(self, victim: Network, test: ImageSet, triggered: PoisonedTest | None, validation: ImageSet) -> None:
        self.test, self.triggered, self.validation = test, triggered, validation
        images = {"test": test.images, "validation": validation.images}
        self._variants = Variants(victim, images if triggered is None else images | {"triggered": triggered.images})

    def __call__(self, net: Network) -> Score:
        """ACC, ASR and RA of ``net``."""
        acc = _share(self.right(net))
        if self.triggered is None or not len(self.triggered.images):
            return Score(acc)
        predicted = self._variants.predict(net, "triggered")
        return Score(acc, _share(predicted == self.triggered.target_labels), _share(predicted == self.triggered.true_labels))

    def on_part(self, victim: Network, count: int) -> Scorer:
        """The same on ``count`` of the test images and of the triggered ones, evenly spaced; all where there are no more.

        Both sets are class-balanced or in random order, so that every part is close to the whole.
        """

        def spaced(size: int) -> Tensor:
            return torch.arange(min(count, size)) * size // min(count, size) if size else torch.arange(0)

        few = self.triggered
        if few is not None:
            at = spaced(len(few.images))
            few = PoisonedTest(few.images[at], few.true_labels[at], few.target_labels[at], few.source[at])
        return Scorer(victim, self.test.subset(spaced(len(self.test))), few, self.validation)

    def right(self, net: Network) -> Tensor:
        """Which test images ``net`` classifies correctly, bool (N,)."""
        return self._variants.predict(net, "test") == self.test.labels

    def val_right(self, net: Network) -> Tensor:
        """Which images of the validation part of the clean budget ``net`` classifies correctly, bool (N,)."""
        return self._variants.predict(net, "validation") == self.validation.labels

    def val_acc(self, net: Network) -> float:
        """Accuracy on the validation part of the clean budget."""
        return _share(self.val_right(net))


def der(before: Score, after: Score) -> float:
    """Defense effectiveness rating in [0, 1]; 0.5 = nothing changed. NaN without an attack."""
    if math.isnan(after.asr):
        return math.nan
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2


@dataclass(frozen=True)
class Gate:
    """Whether an attack worked, so that a defense can be credited for removing it.

    Attributes:
        implanted: the ASR is high because of the poison.
        adversarial: the benign twin's ASR is high too, so that the trigger is an adversarial perturbation and no backdoor.
        words: the verdict as text.
    """

    implanted: bool
    adversarial: bool
    words: str


def gate(asr: float, asr_benign: float) -> Gate:
    """``implanted`` = ASR >= 50 % and effect = ASR - ASR of the benign twin on the same images >= 50 points, and not adversarial.

    Args:
        asr, asr_benign: of one attacked model and its twin, or their means over the seeds of a scenario, in [0, 1]. Where the twin
            was not measured (NaN; rows of an earlier version) the ASR alone decides.
    """
    effect = asr - asr_benign
    if asr_benign > ADVERSARIAL_ASR + _EXACT:
        figures = f"its ASR {100 * asr_benign:.1f}, the victim's {100 * asr:.1f}"
        return Gate(False, True, f"adversarial: the benign twin answers the trigger, too ({figures})")
    if not asr >= IMPLANTED_ASR - _EXACT:
        return Gate(False, False, f"not implanted: ASR {100 * asr:.1f} < {100 * IMPLANTED_ASR:.0f}")
    if effect < IMPLANTED_EFFECT - _EXACT:
        words = f"not implanted: the poison explains {100 * effect:.1f} < {100 * IMPLANTED_EFFECT:.0f} points of the ASR"
        return Gate(False, False, words)
    explained = "effect not measured" if math.isnan(effect) else f"of which the poison explains {100 * effect:.1f} points"
    return Gate(True, False, f"implanted: ASR {100 * asr:.1f}, {explained}")


def val_accuracy(net: Network, validation: ImageSet | None) -> float:
    """Accuracy on the validation part of the clean budget; NaN where the track grants none."""
    if validation is None:
        return math.nan
    return _share(torch.eq(predict(net, validation.images), validation.labels))
