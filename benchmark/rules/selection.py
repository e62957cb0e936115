"""Six rules that select one of a defense's candidates; tables show each rule's figures under its name.

Without hindsight:

* DEFAULT: the candidate of the method's published default.
* VALIDATION (the rule of the rankings): start at the published default. While the loss on the validation part of the clean budget
  exceeds ``tau``, step back along the dial, then go on at the next setting of the knob; at worst the untouched model is kept.
* STRONGEST: the strongest intervention within ``tau`` on the validation part; at worst the untouched model is kept.
* CANARY: the setting that best removes backdoors planted in copies of the model with the defender's data alone, within ``tau``
  (:mod:`benchmark.rules.canary`).

With hindsight, for comparison only and never ranked:

* ORACLE: the candidate of highest test RA, the metric of the rankings. No other rule can beat it.
* LEAKY: the lowest *test* ASR among candidates whose test ACC is at least 90 % of the undefended model's: how the leading public
  benchmark chooses ANP's and RNP's threshold.

Losses are paired: the same validation images, before and after (:func:`paired_loss`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from benchmark.rules.metrics import Score

__all__ = ["HINDSIGHT", "LEAKY_TOLERANCE", "NOTHING_TO_VALIDATE_ON", "TAU", "CandidateScore", "Selection", "choose", "paired_loss"]

TAU = 0.04
"""Tolerated loss of validation accuracy, in [0, 1] (ours; the same for every defense)."""
LEAKY_TOLERANCE = 0.1
"""Tolerated relative loss of test ACC for the leaky rule (BackdoorBench, evaluate_by_threshold)."""
_EXACT = 1e-9
"""Tolerance of comparisons, so that a loss of exactly ``tau`` is within it whatever its last bit."""

NOTHING_TO_VALIDATE_ON = "the track grants no clean images to validate on"
"""Reason of a row without figures under VALIDATION, STRONGEST or CANARY: it is due to the track, not to the defense."""


class Selection(enum.Enum):
    DEFAULT = "default"
    VALIDATION = "validation"
    STRONGEST = "strongest"
    CANARY = "canary"
    ORACLE = "oracle"
    LEAKY = "leaky"


HINDSIGHT = (Selection.ORACLE, Selection.LEAKY)


@dataclass(frozen=True, kw_only=True)
class CandidateScore(Score):
    """A candidate as the benchmark scored it.

    A field is stored under its name and fills the column of that name in :mod:`benchmark.storage.rows`, where there is one.

    To add a metric, add a field with the default None (not measured), set it in :mod:`benchmark.run.defend` and add its column.

    Attributes:
        knob: setting of the defense's second knob; candidates of one setting form one dial. NaN = no knob.
        dial: setting of the defense's first parameter. NaN = none.
        is_default: whether the candidate is the method's published default.
        starts: whether it is the default of its own dial.
        changed: whether any weight differs from the attacked model's.
        kept: whether it is the untouched model.
        strength: how hard the defense intervened; larger = harder.
        pruned: number of pruned units.
        units: number of prunable units within the scope.
        note: remark of the defense.
        val_acc: accuracy on the validation images, in [0, 1]; NaN where the track grants no clean images.
        val_loss: paired loss of validation accuracy against the attacked model, in [-1, 1]; NaN as above.
        val_loss_se: its standard error.
        forward: samples in forward passes since the candidate before it.
        backward: samples in backward passes since the candidate before it.
        isolated: number of training samples that the defense isolated; None for a method that isolates none.
        precision: share of the isolated samples that are poisoned; NaN for an empty set.
        recall: share of the poisoned samples that are isolated; NaN without poison.
        auroc: area under the ROC curve of the method's order of the training samples, in [0, 1], else of the isolated set itself;
            NaN without poison.
        asr_recraft: ASR with the trigger crafted again on this model; None where this was not measured.
        ra_recraft: RA with that trigger.
        canary_asr: ASR of every canary after the same setting was applied to its copy; None where no canary was planted.
        canary_loss: paired loss of validation accuracy of every such copy.
        on_part: whether ACC, ASR and RA were measured on a part of the test images, because no rule selects it; None = no.
    """

    knob: float = math.nan
    dial: float
    is_default: bool
    starts: bool = False
    changed: bool = True
    kept: bool = False
    strength: float
    pruned: int
    units: int = 0
    note: str
    val_acc: float
    val_loss: float = math.nan
    val_loss_se: float = math.nan
    forward: int
    backward: int
    isolated: int | None = None
    precision: float | None = None
    recall: float | None = None
    auroc: float | None = None
    asr_recraft: float | None = None
    ra_recraft: float | None = None
    canary_asr: tuple[float, ...] | None = None
    canary_loss: tuple[float, ...] | None = None
    on_part: bool | None = None


def paired_loss(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Accuracy lost on the same images, and its standard error; (NaN, NaN) for no images.

    Args:
        before, after: bool (N,), which images are classified correctly before and after.
    """
    if not len(before):
        return math.nan, math.nan
    lost = before.double() - after.double()
    # In one pass over integers, so that the same counts give the same bits: E[d^2] - E[d]^2 with d in {-1, 0, 1}.
    mean, square = float(lost.sum()) / len(lost), float(torch.count_nonzero(lost)) / len(lost)
    return mean, math.sqrt(max(0.0, square - mean * mean) / len(lost))


def choose(how: Selection, measured: Sequence[CandidateScore], before: Score, tau: float = TAU) -> int | None:
    """Position of the selected candidate; None where there are no validation images, or no canaries, for a rule that needs them.

    A single candidate is always selected. Where no candidate is within the tolerance and none is the untouched model (defenses
    that train anew), the most accurate one is taken. Rules of hindsight read only candidates scored on all test images.

    Args:
        how: the rule.
        measured: the candidates in the order in which the defense offered them, at least one; one is the default.
        before: scores of the undefended model.
        tau: tolerated loss of validation accuracy, in [0, 1].
    """
    everything = range(len(measured))
    if how is Selection.DEFAULT or len(measured) == 1:
        return next(i for i in everything if measured[i].is_default)
    if how in HINDSIGHT:
        return _with_hindsight(how, measured, before)
    if any(math.isnan(one.val_loss) for one in measured):
        return None
    fitting = [i for i in everything if measured[i].val_loss <= tau + _EXACT]
    if how is Selection.CANARY:
        return _by_canary(measured, fitting, tau)
    if not fitting:
        return max(everything, key=lambda i: (measured[i].val_acc, -i))
    if how is Selection.STRONGEST:
        return max(fitting, key=lambda i: (not measured[i].kept, measured[i].strength, measured[i].val_acc, -i))
    return _stepping_back(measured, set(fitting))


def _with_hindsight(how: Selection, measured: Sequence[CandidateScore], before: Score) -> int:
    whole = [i for i, one in enumerate(measured) if not one.on_part]
    most_accurate = max(whole, key=lambda i: (measured[i].acc, -i))
    if how is Selection.ORACLE:
        if all(math.isnan(measured[i].ra) for i in whole):
            return most_accurate
        return max(whole, key=lambda i: (measured[i].ra, measured[i].acc, -i))
    within = [i for i in whole if measured[i].acc >= (1 - LEAKY_TOLERANCE) * before.acc - _EXACT]
    if not within or math.isnan(measured[whole[0]].asr):
        return most_accurate
    return min(within, key=lambda i: (measured[i].asr, -measured[i].acc, i))


def _stepping_back(measured: Sequence[CandidateScore], fitting: set[int]) -> int:
    """From the published default back along its dial, then from the default of the next setting of the knob; the first within the
    tolerance that changes the model. The published default itself counts although it may change nothing."""
    own = [i for i, one in enumerate(measured) if not one.kept]
    starts = [i for i in own if measured[i].starts or measured[i].is_default]
    for start in starts:
        knob = measured[start].knob
        dial = [i for i in own if measured[i].knob == knob or (math.isnan(knob) and math.isnan(measured[i].knob))]
        back = [i for i in dial if i != start and measured[i].strength <= measured[start].strength]
        back.sort(key=lambda i: (-measured[i].strength, i))
        for i in (start, *back):
            if i in fitting and (measured[i].changed or measured[i].is_default):
                return i
    kept = [i for i, one in enumerate(measured) if one.kept]
    return kept[0] if kept else max(fitting, key=lambda i: (measured[i].val_acc, -i))


def _by_canary(measured: Sequence[CandidateScore], fitting: Sequence[int], tau: float) -> int | None:
    """Of the settings within the tolerance on the model and on every canary's copy: the lowest mean rank of the canaries' ASR.

    Ranks are compared and not ASR, because a canary may be easier to remove than a backdoor from training. Ties go to the weaker
    intervention. None where no canary was planted.
    """
    if not any(one.canary_asr for one in measured):
        return None
    safe = [i for i in fitting if all(loss <= tau + _EXACT for loss in measured[i].canary_loss or ())]
    if not safe:
        return next((i for i, one in enumerate(measured) if one.kept), None)
    ranks = rankdata([measured[i].canary_asr for i in safe], method="average", axis=0).mean(axis=1)
    return min(zip(safe, ranks, strict=True), key=lambda pair: (round(float(pair[1]), 9), not measured[pair[0]].kept,
                                                                 measured[pair[0]].strength, pair[0]))[0]  # fmt: skip
