"""Which of a defense's candidates counts: three rules, each printed beside the figures it chose.

* DEFAULT: what the method's published default gives.
* VALIDATION: the strongest intervention whose accuracy on the validation part of the clean budget is at most ``tau`` below the
  undefended model's. This is the honest rule, and the one rankings use.
* ORACLE: the lowest *test* ASR among candidates whose test ACC is at least 90 % of the undefended model's: how the leading public
  benchmark chooses ANP's and RNP's threshold. For comparison only, never ranked; its distance to the honest rules is the
  selection gap.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.metrics import Score

__all__ = ["NOTHING_TO_VALIDATE_ON", "ORACLE_TOLERANCE", "TAU", "Measured", "Selection", "choose"]

TAU = 0.04
"""Tolerated loss of validation accuracy, in [0, 1] (ours; the same for every defense)."""
ORACLE_TOLERANCE = 0.1
"""Tolerated relative loss of test ACC for the oracle (BackdoorBench, evaluate_by_threshold)."""


NOTHING_TO_VALIDATE_ON = "the track grants no clean images to validate on"
"""Reason of a validation row that cannot be: it is the track's doing, not the defense's."""


class Selection(enum.Enum):
    DEFAULT = "default"
    VALIDATION = "validation"
    ORACLE = "oracle"


@dataclass(frozen=True)
class Measured:
    """A candidate after the benchmark has scored it. ``forward``/``backward``: samples spent since the candidate before it."""

    dial: float | None
    is_default: bool
    strength: float
    pruned: int
    note: str
    score: Score
    val_acc: float
    forward: int
    backward: int
    isolated: int = 0
    precision: float = math.nan
    recall: float = math.nan
    asr_recraft: float = math.nan
    ra_recraft: float = math.nan


def choose(how: Selection, measured: Sequence[Measured], before: Score, before_val: float, tau: float = TAU) -> int | None:
    """Position of the chosen candidate; None for VALIDATION where the track grants no clean images and there is a choice to make.

    Ties go to the higher accuracy, then to the earlier candidate. Where no candidate is within the tolerance, the most accurate one
    is taken.
    """
    everything = range(len(measured))
    if how is Selection.DEFAULT or len(measured) == 1:
        return next(i for i in everything if measured[i].is_default)
    if how is Selection.VALIDATION:
        if math.isnan(before_val):
            return None
        within = [i for i in everything if measured[i].val_acc >= before_val - tau - 1e-9]
        if not within:
            return max(everything, key=lambda i: (measured[i].val_acc, -i))
        return max(within, key=lambda i: (measured[i].strength, measured[i].val_acc, -i))
    within = [i for i in everything if measured[i].score.acc >= (1 - ORACLE_TOLERANCE) * before.acc - 1e-9]
    if not within or math.isnan(measured[0].score.asr):
        return max(everything, key=lambda i: (measured[i].score.acc, -i))
    return min(within, key=lambda i: (measured[i].score.asr, -measured[i].score.acc, i))
