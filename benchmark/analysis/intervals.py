"""Means over scenarios and seeds with 95 % bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats

__all__ = ["RESAMPLES", "Interval", "interval", "intervals", "spread"]

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with its 95 % interval; bounds are NaN when a scenario has a single seed (no spread can be seen)."""

    mean: float
    low: float
    high: float


def interval(samples: Mapping[tuple[str, ...], Sequence[float]] | Sequence[Sequence[float]]) -> Interval:
    """Mean over scenarios of the means over seeds, with a 95 % percentile interval.

    Seeds are resampled within each scenario, independently (stratified bootstrap, ``scipy.stats.bootstrap``, 2,000 resamples,
    fixed seed: the same samples give the same bits). It covers the variation over seeds alone: the attacks are not a sample.

    Args:
        samples: one sequence of finite values per scenario, one value per seed; empty scenarios are left out.
    """
    groups = samples.values() if isinstance(samples, Mapping) else samples
    data = [np.asarray(group, dtype=np.float64)[None, :] for group in groups if len(group)]
    return Interval(*(float(part[0]) for part in intervals(data))) if data else Interval(math.nan, math.nan, math.nan)


def intervals(data: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As :func:`interval`, for several metrics at once: one (metrics, seeds) array per scenario; the metrics share the draws."""

    def statistic(*groups: np.ndarray, axis: int = -1) -> np.ndarray:
        means: np.ndarray = np.stack([group.mean(axis=axis) for group in groups])
        return np.asarray(means.mean(axis=0))

    mean = statistic(*data)
    if min(group.shape[-1] for group in data) < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    result = scipy_stats.bootstrap(
        data, statistic, n_resamples=RESAMPLES, vectorized=True, axis=-1, method="percentile", rng=0
    )  # fmt: skip
    return mean, result.confidence_interval.low, result.confidence_interval.high


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation over seeds; NaN for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
