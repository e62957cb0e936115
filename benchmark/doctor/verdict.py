"""From signs to a probability: a model's signs beside those of benign networks of the same kind.

A sign by itself says little: benign networks show it too, more or less by architecture, data and training. So the model takes its
place among benign twins. Every network is compared with all the others: each of its signs in standard deviations from their mean,
and the largest of these is its strength. Were the model benign and trained as the twins were, every place in the order of
strengths would be as likely, so ``p = (1 + twins of at least its strength) / (twins + 1)`` would be exact for any number of twins.
A model that was trained otherwise may stand out without a backdoor; the page says so.

A small p is no probability of a backdoor. If one model in two were backdoored, that probability would be at most
``1 / (1 - e p log p)`` for p below 1/e (Sellke, Bayarri and Berger, "Calibration of p values for testing precise null hypotheses",
The American Statistician 55, 2001), which is what is reported; for larger p, one half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["FEWEST", "Verdict", "judged", "most_probable"]

FEWEST = 4
"""Twins from which on a verdict is calibrated: with fewer, the smallest p is above 0.2."""


class Verdict(NamedTuple):
    """How a model compares with benign networks.

    Attributes:
        twins: how many there are. stronger: how many of them show at least as strong signs.
        p: see above; NaN with fewer than four twins: not calibrated.
        probability: of a backdoor, at most, if one model in two had one; NaN likewise.
        deviations: of every sign, in standard deviations from the twins' mean; empty likewise.
    """

    twins: int
    stronger: int
    p: float
    probability: float
    deviations: dict[str, float]


def most_probable(p: float) -> float:
    """The largest probability of a backdoor that a p-value supports, if one model in two had one, in [0.5, 1).

    >>> round(most_probable(1 / 20), 2), most_probable(0.5)
    (0.71, 0.5)
    """
    return 1 / (1 - math.e * p * math.log(p)) if 0 < p < 1 / math.e else 0.5


def _deviations(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of every sign (S,) from those of other networks (N, S); a sign that is the same in all of them deviates by 0 or infinity."""
    distance, spread = values - others.mean(0), others.std(0, ddof=1)
    return np.where(spread > 0, distance / np.where(spread > 0, spread, 1), np.where(distance > 0, np.inf, 0.0))


def judged(model: Mapping[str, float], twins: Sequence[Mapping[str, float]]) -> Verdict:
    """The verdict on a model.

    Args:
        model: its signs by name. twins: those of benign networks.
    """
    if len(twins) < FEWEST:
        return Verdict(len(twins), 0, math.nan, math.nan, {})
    names = list(model)
    every = np.array([[one[name] for name in names] for one in (model, *twins)], dtype=np.float64)
    strengths = [float(_deviations(every[at], np.delete(every, at, 0)).max()) for at in range(len(every))]
    stronger = sum(other >= strengths[0] for other in strengths[1:])
    p = (1 + stronger) / len(every)
    own = _deviations(every[0], every[1:])
    return Verdict(len(twins), stronger, p, most_probable(p), dict(zip(names, map(float, own), strict=True)))
