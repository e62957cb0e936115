"""Nemenyi's critical difference, and pairs with any control over scenarios, against plain loops and printed tables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from benchmark.analysis import rank_tests
from benchmark.storage.rows import Row, frame


def row(attack: str, seed: int, defense: str, ra: float, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "digits", "backbone": "net", "attack": attack, "rate": 0.1, "seed": seed, "track": "model+clean",
        "scope": "whole", "defense": defense, "cell": f"{attack}{seed}{defense}", "target": 0, "label_mode": "all-to-one",
        "realised_rate": 0.1, "control": defense == "none", "selection": "validation", "status": "ok", "acc": 0.9,
        "asr": 0.95 - ra, "ra": ra, "acc_undefended": 0.95, "asr_undefended": 1.0, "ra_undefended": 0.0, "acc_benign": 0.96,
        "asr_benign": 0.02, "implanted": True,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(("entries", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (7, 2.949), (10, 3.164)])
def test_the_critical_difference_is_that_of_demsars_table(entries: int, q: float) -> None:
    """Demsar 2006, Table 5(a): q at 5 %."""
    assert rank_tests.critical_difference(entries, 14) == pytest.approx(q * math.sqrt(entries * (entries + 1) / (6 * 14)), abs=2e-3)


def test_the_critical_difference_by_integrating_the_range_of_normal_values() -> None:
    k, blocks = 4, 12
    q = rank_tests.critical_difference(k, blocks) * math.sqrt(2) / math.sqrt(k * (k + 1) / (6 * blocks))
    z = np.linspace(-8, 8, 4001)
    below = k * scipy.stats.norm.pdf(z) * (scipy.stats.norm.cdf(z) - scipy.stats.norm.cdf(z - q)) ** (k - 1)
    assert float(np.trapezoid(below, z)) == pytest.approx(0.95, abs=1e-6)


def test_groups_hold_entries_that_are_no_further_apart_than_the_critical_difference() -> None:
    rows = [row(f"a{n}", 0, name, 0.1 * place + 0.03 * ((7 * n + 5 * place) % 11))
            for n in range(12) for place, name in enumerate("wxyz")]  # fmt: skip
    found = rank_tests.significance(frame(rows), "model+clean", "validation")
    assert found is not None
    assert found.friedman < rank_tests.LEVEL
    near = {frozenset((a, b)) for a, b in itertools.combinations(found.ranks, 2)
            if abs(found.ranks[a] - found.ranks[b]) <= found.critical}  # fmt: skip
    assert 0 < len(near) < 6
    assert {frozenset(pair) for group in found.groups for pair in itertools.combinations(group, 2)} == near
    assert all(list(group) == sorted(group, key=found.ranks.__getitem__) for group in found.groups)


RA = {"badnets": {"base": (0.4, 0.5, 0.6), "new": (0.5, 0.7, 0.9)}, "wanet": {"base": (0.3,), "new": (0.2,)},
      "sig": {"base": (0.1, 0.2), "new": (0.4, 0.3)}}  # fmt: skip


def mixed_seeds() -> list[Row]:
    """Three scenarios with three, one and two seeds; the base competes in one track, another entry in a second one."""
    rows = []
    for attack, by in RA.items():
        for name, values in by.items():
            rows += [row(attack, seed, name, ra) for seed, ra in enumerate(values)]
        rows += [row(attack, seed, "other", ra + 0.05, track="model", selection="default") for seed, ra in enumerate(by["base"])]
        rows += [row(attack, seed, "none", 0.0, track="control", selection=how) for seed in range(len(by["base"]))
                 for how in ("default", "validation")]  # fmt: skip
    return rows


def test_pairs_over_scenarios_by_hand() -> None:
    found = rank_tests.paired(frame(mixed_seeds()), "model+clean", "base", metrics=("ra", "asr"), scenarios=True)
    assert list(found["defense"]) == ["new", "new"]  # the base is not compared with itself
    ra, asr = (line for _, line in found.iterrows())
    means = [np.mean(np.subtract(by["new"], by["base"])) for by in RA.values()]
    assert ra["difference"] == pytest.approx(np.mean(means))
    assert asr["difference"] == pytest.approx(-np.mean(means))
    assert (ra["pairs"], ra["worlds"], ra["blocks"]) == (6, 6, 3)
    exact = sorted(np.mean(draw) for draw in itertools.product(means, repeat=3))
    low, high = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
    assert (ra["difference_low"], ra["difference_high"]) == pytest.approx((low, high), abs=0.02)
    signs = list(itertools.product((-1, 1), repeat=3))  # ranks 1 (wanet, negative), 2, 3: the sum of positive ones is 5
    sums = [sum(rank for rank, sign in zip((1, 2, 3), pattern, strict=True) if sign > 0) for pattern in signs]
    assert sorted(np.abs(means)) == pytest.approx([abs(means[1]), *sorted((means[0], means[2]))])
    assert ra["p_blocks"] == pytest.approx(2 * sum(total >= 5 for total in sums) / len(sums))


def test_a_control_may_compete_in_another_track_or_be_the_untouched_model() -> None:
    rows = frame(mixed_seeds())
    across = rank_tests.paired(rows, "model", "base", metrics=("ra",), scenarios=True)
    assert list(across["defense"]) == ["other"]
    assert across["difference"].iloc[0] == pytest.approx(0.05)
    assert (across["pairs"].iloc[0], across["control"].iloc[0]) == (6, "base")
    untouched = rank_tests.paired(rows, "model+clean", "none", metrics=("ra",), scenarios=True)
    assert list(untouched["defense"]) == ["base", "new"]
    assert untouched["difference"].iloc[0] == pytest.approx(np.mean([np.mean(by["base"]) for by in RA.values()]))
    assert rank_tests.paired(rows, "model+clean", "nobody").empty
    head = rows.assign(scope=rows["scope"].where(rows["defense"] != "base", "head"))
    assert rank_tests.paired(head, "model+clean", "base").empty  # a control on the head alone is no control
