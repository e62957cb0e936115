"""The three selection rules, case by case."""

from __future__ import annotations

import math

from benchmark.metrics import Score
from benchmark.selection import Measured, Selection, choose

BEFORE = Score(0.90, 0.99, 0.01)


def candidate(acc: float, asr: float, val: float, strength: float, default: bool = False) -> Measured:
    return Measured(strength, default, strength, int(strength), "", Score(acc, asr, 0.0), val, 0, 0)


DIAL = [
    candidate(0.90, 0.99, 0.92, 0),
    candidate(0.89, 0.60, 0.90, 5, default=True),
    candidate(0.86, 0.30, 0.885, 9),
    candidate(0.82, 0.05, 0.80, 20),
    candidate(0.50, 0.00, 0.50, 40),
]


def test_default_is_the_marked_one() -> None:
    assert choose(Selection.DEFAULT, DIAL, BEFORE, 0.92) == 1


def test_validation_takes_the_strongest_within_tau_and_never_looks_at_test() -> None:
    assert choose(Selection.VALIDATION, DIAL, BEFORE, 0.92) == 2
    assert choose(Selection.VALIDATION, DIAL, BEFORE, 0.92, tau=0.01) == 0
    blind = [Measured(m.dial, m.is_default, m.strength, m.pruned, "", Score(math.nan), m.val_acc, 0, 0) for m in DIAL]
    assert choose(Selection.VALIDATION, blind, Score(math.nan), 0.92) == 2


def test_a_drop_of_exactly_tau_is_tolerated() -> None:
    assert choose(Selection.VALIDATION, [candidate(0.9, 0.9, 0.5, 0, True), candidate(0.9, 0.1, 0.46, 1)], BEFORE, 0.5) == 1


def test_validation_falls_back_to_the_most_accurate() -> None:
    assert choose(Selection.VALIDATION, [candidate(0.5, 0.1, 0.3, 1, True), candidate(0.5, 0.2, 0.4, 2)], BEFORE, 0.92) == 1


def test_validation_is_impossible_without_clean_images_unless_there_is_no_choice() -> None:
    assert choose(Selection.VALIDATION, DIAL, BEFORE, math.nan) is None
    assert choose(Selection.VALIDATION, [DIAL[1]], BEFORE, math.nan) == 0


def test_oracle_takes_the_lowest_test_asr_within_ten_percent_relative_acc() -> None:
    assert choose(Selection.ORACLE, DIAL, BEFORE, 0.92) == 3  # 0.82 >= 0.81, 0.50 is not
    assert choose(Selection.ORACLE, [candidate(0.1, 0.0, 0.1, 1, True), candidate(0.2, 0.5, 0.1, 2)], BEFORE, 0.9) == 1


def test_oracle_without_an_attack_is_the_most_accurate() -> None:
    plain = [candidate(0.8, math.nan, 0.8, 0, True), candidate(0.85, math.nan, 0.8, 1)]
    assert choose(Selection.ORACLE, plain, Score(0.9), 0.9) == 1
