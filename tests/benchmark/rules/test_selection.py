"""The six selection rules, case by case, and against slow twins."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmark.rules.metrics import Score
from benchmark.rules.selection import HINDSIGHT, CandidateScore, Selection, choose, paired_loss

BEFORE = Score(0.90, 0.99, 0.01)


def candidate(acc: float, asr: float, ra: float, loss: float, strength: float, **more: object) -> CandidateScore:
    one = CandidateScore(
        acc, asr, ra, dial=strength, is_default=False, strength=strength, pruned=int(strength), note="", val_acc=0.92 - loss,
        forward=0, backward=0, val_loss=loss, val_loss_se=0.01,
    )  # fmt: skip
    return replace(one, **more)  # type: ignore[arg-type]


KEPT = candidate(0.90, 0.99, 0.01, 0.0, 0, dial=math.nan, kept=True, changed=False)
DIAL = [
    candidate(0.90, 0.99, 0.01, 0.0, 0, changed=False),
    candidate(0.89, 0.60, 0.30, 0.02, 5),
    candidate(0.86, 0.30, 0.55, 0.035, 9, is_default=True, starts=True),
    candidate(0.82, 0.05, 0.70, 0.12, 20),
    candidate(0.50, 0.00, 0.20, 0.42, 40),
    KEPT,
]


def test_default_is_the_marked_one() -> None:
    assert choose(Selection.DEFAULT, DIAL, BEFORE) == 2


def test_validation_takes_the_default_while_it_is_within_tau() -> None:
    assert choose(Selection.VALIDATION, DIAL, BEFORE) == 2


def test_validation_steps_back_from_the_default_and_never_beyond_it() -> None:
    assert choose(Selection.VALIDATION, DIAL, BEFORE, tau=0.03) == 1
    assert choose(Selection.VALIDATION, DIAL, BEFORE, tau=0.2) == 2  # the stronger ones are not the default's business
    assert choose(Selection.STRONGEST, DIAL, BEFORE, tau=0.2) == 3


def test_a_loss_of_exactly_tau_is_tolerated() -> None:
    assert choose(Selection.VALIDATION, DIAL, BEFORE, tau=0.035) == 2


def test_a_dial_whose_every_step_wrecks_the_model_keeps_it_untouched() -> None:
    wrecks = [
        candidate(0.2, 0.1, 0.1, 0.7, 5),
        candidate(0.1, 0.0, 0.1, 0.8, 9, is_default=True, starts=True),
        KEPT,
    ]
    for how in (Selection.VALIDATION, Selection.STRONGEST, Selection.LEAKY):
        chosen = choose(how, wrecks, BEFORE)
        assert chosen is not None
        assert wrecks[chosen].kept
    assert choose(Selection.DEFAULT, wrecks, BEFORE) == 1


def test_the_hardest_setting_of_the_knob_that_leaves_an_edited_model_within_tau() -> None:
    hard = [candidate(0.1, 0.0, 0.1, 0.8, 9, knob=0.4, is_default=True, starts=True),
            candidate(0.90, 0.99, 0.01, 0.0, 0, knob=0.4, changed=False)]  # fmt: skip
    softer = [candidate(0.3, 0.0, 0.1, 0.6, 9, knob=0.2, starts=True), candidate(0.88, 0.2, 0.6, 0.03, 4, knob=0.2)]
    softest = [candidate(0.89, 0.5, 0.4, 0.01, 3, knob=0.1, starts=True)]
    assert choose(Selection.VALIDATION, [*hard, *softer, *softest, KEPT], BEFORE) == 3
    assert choose(Selection.VALIDATION, [*hard, *softest, KEPT], BEFORE) == 2
    assert choose(Selection.VALIDATION, [*hard, KEPT], BEFORE) == 2  # unedited is no better than kept


def test_without_clean_images_only_the_default_and_hindsight_are_left() -> None:
    blind = [replace(one, val_loss=math.nan, val_acc=math.nan) for one in DIAL]
    for how in (Selection.VALIDATION, Selection.STRONGEST, Selection.CANARY):
        assert choose(how, blind, BEFORE) is None
    assert choose(Selection.DEFAULT, blind, BEFORE) == 2
    assert {choose(how, [DIAL[2]], BEFORE) for how in Selection} == {0}  # nothing to choose from


def test_rules_without_hindsight_never_look_at_the_test_set() -> None:
    hidden = [replace(one, acc=math.nan, asr=math.nan, ra=math.nan) for one in DIAL]
    for how in set(Selection) - set(HINDSIGHT) - {Selection.CANARY}:
        assert choose(how, hidden, Score(math.nan)) == choose(how, DIAL, BEFORE)


def test_a_defense_that_trains_anew_has_no_untouched_model_and_takes_the_most_accurate() -> None:
    anew = [candidate(0.5, 0.1, 0.4, 0.4, 1, is_default=True, starts=True), candidate(0.6, 0.2, 0.4, 0.3, 2)]
    assert choose(Selection.VALIDATION, anew, BEFORE) == 1
    assert choose(Selection.STRONGEST, anew, BEFORE) == 1


def test_leaky_takes_the_lowest_test_asr_within_ten_percent_relative_acc() -> None:
    assert choose(Selection.LEAKY, DIAL, BEFORE) == 3  # 0.82 >= 0.81, 0.50 is not
    broken = [candidate(0.1, 0.0, 0.0, 0.8, 1, is_default=True), candidate(0.2, 0.5, 0.1, 0.7, 2)]
    assert choose(Selection.LEAKY, broken, BEFORE) == 1


def test_hindsight_without_an_attack_is_the_most_accurate() -> None:
    plain = [candidate(0.8, math.nan, math.nan, 0.1, 0, is_default=True), candidate(0.85, math.nan, math.nan, 0.1, 1)]
    for how in HINDSIGHT:
        assert choose(how, plain, Score(0.9)) == 1


def test_canaries_choose_by_rank_within_tau_on_the_model_and_on_every_copy() -> None:
    def with_canary(one: CandidateScore, asr: tuple[float, ...], loss: tuple[float, ...]) -> CandidateScore:
        return replace(one, canary_asr=asr, canary_loss=loss)

    offered = [
        with_canary(DIAL[1], (0.9, 0.7), (0.0, 0.0)),
        with_canary(DIAL[2], (0.8, 0.6), (0.01, 0.03)),
        with_canary(replace(DIAL[1], strength=7), (0.1, 0.1), (0.0, 0.2)),  # wrecks a copy
        with_canary(DIAL[3], (0.0, 0.0), (0.0, 0.0)),  # wrecks the model
        with_canary(KEPT, (0.95, 0.97), (0.0, 0.0)),
    ]
    assert choose(Selection.CANARY, offered, BEFORE) == 1
    # Ranks, not levels: the first canary falls by more, the second orders the two the other way, by as many ranks; ties go to the
    # gentler setting.
    torn = [with_canary(DIAL[1], (0.1, 0.7), (0.0, 0.0)), with_canary(DIAL[2], (0.8, 0.6), (0.0, 0.0))]
    assert choose(Selection.CANARY, torn, BEFORE) == 0
    useless = [with_canary(DIAL[2], (0.95, 0.97), (0.0, 0.0)), with_canary(KEPT, (0.95, 0.97), (0.0, 0.0))]
    assert choose(Selection.CANARY, useless, BEFORE) == 1
    assert choose(Selection.CANARY, DIAL, BEFORE) is None  # none was planted


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, shares, shares, shares, st.integers(0, 9)), min_size=1, max_size=8), st.integers(0, 7))
def test_no_rule_has_a_higher_ra_than_the_oracle(rows: list[tuple[float, float, float, float, int]], default: int) -> None:
    offered = [candidate(acc, asr, ra, loss, strength, canary_asr=(asr,), canary_loss=(loss,))
               for acc, asr, ra, loss, strength in rows]  # fmt: skip
    place = default % len(offered)
    offered[place] = replace(offered[place], is_default=True, starts=True)
    offered.append(replace(KEPT, canary_asr=(1.0,), canary_loss=(0.0,)))
    best = choose(Selection.ORACLE, offered, BEFORE)
    assert best is not None
    for how in Selection:
        chosen = choose(how, offered, BEFORE)
        assert chosen is not None
        assert offered[best].ra >= offered[chosen].ra


@pytest.mark.parametrize("seed", range(3))
def test_paired_loss_is_the_mean_and_the_standard_error_of_the_differences(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    before, after = (torch.rand(40, generator=draw) < 0.7 for _ in range(2))
    differences = [float(b) - float(a) for b, a in zip(before, after, strict=True)]
    loss, error = paired_loss(before, after)
    assert loss == pytest.approx(statistics.fmean(differences), abs=1e-12)
    assert error == pytest.approx(statistics.pstdev(differences) / math.sqrt(40), abs=1e-12)


def test_paired_loss_of_the_same_answers_is_zero_and_of_none_unknown() -> None:
    right = torch.tensor([True, False, True])
    assert paired_loss(right, right) == (0.0, 0.0)
    assert all(math.isnan(value) for value in paired_loss(right[:0], right[:0]))


def test_a_score_reads_what_it_stores() -> None:
    plain = candidate(0.9, math.nan, math.nan, 0.1, 2)
    measured = replace(plain, isolated=0, precision=math.nan, recall=0.0, canary_asr=(0.5, 0.25), canary_loss=(0.0, 0.125))
    stored = measured.stored()
    assert stored["asr"] is stored["precision"] is stored["knob"] is None  # no value
    assert stored["canary_asr"] == [0.5, 0.25]
    assert "asr_recraft" not in stored  # not measured
    assert not {"isolated", "precision", "recall", "canary_asr", "canary_loss"} & set(plain.stored())
    for one in (plain, measured):
        again = CandidateScore.read(one.stored() | {"unknown": 1})
        assert repr(again) == repr(one)  # NaN differs from itself
