"""How fresh rows compare with committed ones, against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmark.proof.compare import compare_rows, points_apart
from benchmark.storage.rows import Row, frame

WHERE = Path("results/m")


def row(defense: str, seed: int, ra: float, selection: str = "default", attack: str = "badnets") -> Row:
    return Row(
        matrix="m", dataset="digits", backbone="b", attack=attack, rate=0.1, seed=seed, track="model", scope="whole",
        defense=defense, cell=f"{defense}-{attack}-{seed}", target=0, label_mode="all-to-one", realised_rate=0.1, control=False,
        selection=selection, status="ok", acc=0.9, asr=0.1, ra=ra, asr_undefended=1.0, asr_benign=0.1, effect=0.9, implanted=True,
    )  # fmt: skip


@pytest.fixture
def committed() -> pd.DataFrame:
    """One scenario, three seeds: the mean RA of ``a`` is 0.50 and any interval of it lies between 0.4 and 0.6."""
    rows = [row("a", seed, ra) for seed, ra in enumerate((0.4, 0.5, 0.6))]
    return frame([*rows, *(row("b", seed, ra) for seed, ra in enumerate((0.7, 0.8, 0.9)))])


def test_the_same_rows_are_identical(committed: pd.DataFrame) -> None:
    same = compare_rows(committed, committed.sample(frac=1, random_state=0))
    assert (same.rows, same.identical, same.unknown) == (6, 6, 0)
    assert (same.entries, same.inside) == (2, 2)
    assert all(math.isnan(half) for half, _ in same.apart.values())
    assert same.lines(WHERE) == [
        "compared with results/m: 6 of 6 rows are identical",
        "2 of 2 leaderboard entries: mean RA inside the committed 95 % interval",
    ]


def test_what_differs_is_measured_on_the_rows_that_differ(committed: pd.DataFrame) -> None:
    fresh = committed.copy()
    fresh.loc[0:2, "ra"] += [0.3, 0.31, 0.35]  # the mean of a leaves its interval, which ends at 0.6
    fresh.loc[3, "acc"] = math.nan  # a value that only one of them has: different, but no distance
    found = compare_rows(fresh, committed)
    assert (found.rows, found.identical) == (6, 2)
    assert found.apart["ra"] == pytest.approx((np.median([30, 31, 35, 0]), 35))
    assert found.apart["acc"] == (0, 0)
    assert (found.entries, found.inside) == (2, 1)
    assert found.lines(WHERE)[1] == (
        "the other 4 differ by (median / at most, in points): ACC 0.0 / 0.0, ASR 0.0 / 0.0, RA 30.5 / 35.0"
    )


def test_of_a_part_of_the_matrix_the_entries_that_are_whole_are_compared(committed: pd.DataFrame) -> None:
    part = compare_rows(committed[committed["defense"] == "b"], committed)
    assert (part.rows, part.identical, part.entries, part.inside) == (3, 3, 1, 1)
    two_seeds = compare_rows(committed[committed["seed"] < 2], committed)
    assert (two_seeds.rows, two_seeds.entries) == (4, 0), "no entry is whole"
    one_seed = committed[committed["seed"] == 0]
    assert compare_rows(one_seed, one_seed).entries == 0, "one seed has no interval"


def test_rows_of_other_settings_are_counted_and_not_compared(committed: pd.DataFrame) -> None:
    fresh = pd.concat([committed, frame([row("c", 0, 0.1)])], ignore_index=True)
    assert compare_rows(fresh, committed).lines(WHERE)[-1] == "1 rows have other settings or images than those in results/m"
    nothing = compare_rows(fresh.tail(1), committed)
    assert (nothing.rows, nothing.entries) == (0, 0)
    assert nothing.lines(WHERE) == ["not compared: all 1 rows have other settings or images than those in results/m"]


def test_points_apart_leaves_out_what_is_missing() -> None:
    assert points_apart([0.5, math.nan, 0.1], [0.25, 0.3, math.nan]).tolist() == [25.0]
