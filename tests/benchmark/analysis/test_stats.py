"""Every aggregate against a by-hand twin on frames small enough to read."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from benchmark.analysis import intervals, rank_tests, stats
from benchmark.run import outcome
from benchmark.storage.rows import Row, Timing, frame

RA = {  # (attack, seed) -> defense -> RA; acc is 0.9 and asr is 0.95 - ra throughout
    ("badnets", 0): {"good": 0.8, "weak": 0.3, "twin": 0.8},
    ("badnets", 1): {"good": 0.6, "weak": 0.5, "twin": 0.6},
    ("wanet", 0): {"good": 0.2, "weak": 0.4, "twin": 0.2},
    ("wanet", 1): {"good": 0.4, "weak": 0.4, "twin": 0.4},
    ("sig", 0): {"good": 0.9, "weak": 0.9, "twin": 0.9},
    ("sig", 1): {"good": 0.9, "weak": 0.9, "twin": 0.9},
}


def row(attack: str, seed: int, defense: str, ra: float = 0.0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "digits", "backbone": "net", "attack": attack, "rate": 0.1, "seed": seed, "track": "t",
        "scope": "whole", "defense": defense, "cell": f"{attack}{seed}{defense}", "target": 0,
        "label_mode": "all-to-one", "realised_rate": 0.1,
        "control": defense in ("none", "random"), "selection": "validation", "status": "ok", "acc": 0.9, "asr": 0.95 - ra, "ra": ra,
        "der": 0.5, "acc_undefended": 0.95, "asr_undefended": 0.3 if attack == "sig" else 1.0, "ra_undefended": 0.0,
        "acc_benign": 0.96, "asr_benign": 0.02,
        "implanted": attack != "sig", "pruned": 10, "units": 100, "cost_epochs": 1.5,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def table(**more: object) -> pd.DataFrame:
    rows = [row(attack, seed, name, ra, **more) for (attack, seed), by in RA.items() for name, ra in by.items()]
    rows += [row(attack, seed, "none", 0.0, track="control", **more) for attack, seed in RA]
    return frame(rows)


def line(board: pd.DataFrame, defense: str) -> pd.Series:
    return board[board["defense"] == defense].iloc[0]


def test_mean_averages_seeds_first():
    assert intervals.interval([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0]]).mean == pytest.approx(0.375)  # a pooled mean would be 0.5


def test_interval_covers_the_exact_bootstrap_distribution():
    samples = [[0.1, 0.5, 0.6], [0.2, 0.9]]
    exact = sorted(
        (np.mean(first) + np.mean(second)) / 2
        for first in itertools.product(samples[0], repeat=3)
        for second in itertools.product(samples[1], repeat=2)
    )
    low, high = np.quantile(exact, [0.025, 0.975])
    found = intervals.interval(samples)
    assert found.mean == pytest.approx((0.4 + 0.55) / 2)
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    assert found.low < found.mean < found.high
    assert found == intervals.interval(samples)  # fixed seed: the same bits


def test_interval_of_no_spread_one_seed_and_nothing():
    assert intervals.interval([[0.5, 0.5], [0.7, 0.7]]) == pytest.approx((0.6, 0.6, 0.6))
    one = intervals.interval({("a", "b", "c"): [0.5], ("a", "b", "d"): [0.1, 0.3]})
    assert one.mean == pytest.approx(0.35)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert all(math.isnan(part) for part in intervals.interval([]))


def test_a_scenario_is_judged_on_the_mean_over_its_seeds():
    asr = {"badnets": (1.0, 0.9, 0.4), "sig": (0.7, 0.1)}
    rows = frame([row(name, seed, "d", asr_undefended=value, implanted=value >= 0.5) for name, values in asr.items()
                  for seed, value in enumerate(values)])  # fmt: skip
    found = stats.scenarios(rows)
    assert found[["attack", "seeds", "implanted_seeds", "implanted"]].to_numpy().tolist() == [
        ["badnets", 3, 2, True],
        ["sig", 2, 1, False],
    ]
    assert found["asr"].to_list() == pytest.approx([2.3 / 3, 0.4])
    assert found["effect"].to_list() == pytest.approx([2.3 / 3 - 0.02, 0.38])
    # All seeds of an implanted scenario count, the weak one too.
    counted = set(stats.implanted_worlds(rows)[["attack", "seed"]].itertuples(index=False, name=None))
    assert counted == {("badnets", 0), ("badnets", 1), ("badnets", 2)}


def test_a_trigger_that_the_twin_answers_is_adversarial_and_not_ranked():
    rows = pd.concat([table(), frame([row("narcissus", seed, "good", 0.9, asr_benign=0.99) for seed in (0, 1)])])
    line = stats.scenarios(rows).set_index("attack").loc["narcissus"]
    assert bool(line["adversarial"])
    assert not line["implanted"]
    assert "narcissus" not in set(stats.implanted_worlds(rows)["attack"])
    # ASR and effect high on the mean, and the twin still answers a quarter of the images.
    some = frame([row("x", seed, "good", asr_benign=0.25) for seed in (0, 1)])
    assert stats.scenarios(some)[["adversarial", "implanted"]].to_numpy().tolist() == [[True, False]]


def test_an_attack_that_costs_accuracy_stays_ranked_is_marked_and_left_out_of_the_stealthy_board():
    costly = frame([row("dear", seed, name, ra, acc_undefended=0.88, acc_benign=0.96, acc_loss_se=0.004)
                    for seed in (0, 1) for name, ra in (("good", 0.1), ("weak", 0.2), ("twin", 0.1))])  # fmt: skip
    rows = pd.concat([table(acc_loss_se=0.004), costly], ignore_index=True)
    found = stats.scenarios(rows).set_index("attack")
    assert found["costs_acc"].to_dict() == {"badnets": False, "wanet": False, "sig": False, "dear": True}
    assert bool(found.loc["dear", "implanted"])
    assert found.loc["dear", "acc_loss"] == pytest.approx(0.08)
    assert found.loc["dear", "acc_loss_low"] == pytest.approx(0.08 - 1.96 * 0.004)  # no spread over seeds
    assert stats.average_ranks(rows, "t", "validation") != stats.average_ranks(table(), "t", "validation")
    quiet = stats.stealthy(rows)
    assert set(quiet["attack"]) == {"badnets", "wanet", "sig"}
    assert stats.average_ranks(quiet, "t", "validation") == stats.average_ranks(table(), "t", "validation")


def test_the_standard_error_of_the_loss_adds_the_seeds_spread_to_the_images_noise():
    """By hand: the images are the same for every seed, so their noise is not divided by the number of seeds; the spread is."""
    losses, errors = [0.02, 0.06, 0.04], [0.01, 0.02, 0.03]
    rows = frame([row("x", seed, "d", acc_benign=0.96, acc_undefended=0.96 - loss, acc_loss_se=error)
                  for seed, (loss, error) in enumerate(zip(losses, errors, strict=True))])  # fmt: skip
    images = sum(error**2 for error in errors) / 3
    seeds = sum((loss - 0.04) ** 2 for loss in losses) / 2 / 3
    line = stats.scenarios(rows).iloc[0]
    assert line["acc_loss_low"] == pytest.approx(0.04 - 1.96 * math.sqrt(images + seeds))
    assert not line["costs_acc"]  # 4 points on the mean, but not surely above 5 % of 96


def test_rows_in_which_the_twin_was_not_measured_are_judged_by_the_asr_alone():
    found = stats.scenarios(table(asr_benign=math.nan))
    assert found["implanted"].to_list() == [True, True, False]
    assert found["effect"].isna().all()


def test_marks_are_counted_over_finished_cells():
    rows = frame([
        row("badnets", 0, "d", mark="no change", kept=True), row("badnets", 1, "d", mark="no change"),
        row("badnets", 2, "d", mark="mechanism failed"), row("badnets", 3, "d", status="failed", mark="no change"),
    ])  # fmt: skip
    board = stats.leaderboard(rows, "t", "validation").iloc[0]
    assert (board["no_change"], board["kept"], board["mechanism_failed"], board["cells_ok"]) == (2, 1, 1, 3)


def test_whether_the_validation_part_resolves_the_tolerance():
    assert stats.validation_images(table(clean_images=288)) == 58
    enough, error = stats.resolves(58)
    assert not enough
    assert error == pytest.approx(math.sqrt(0.1 / 58))
    assert stats.resolves(250)[0]
    assert not stats.resolves(249)[0]
    assert stats.validation_images(table()) == 0


def test_a_dial_is_drawn_at_the_published_setting_of_the_knob_without_the_untouched_model():
    curves = pd.DataFrame({"cell": list("aaabb"), "knob": [0.4, 0.1, math.nan, math.nan, math.nan],
                           "is_default": [True, False, False, True, False], "kept": [False, False, True, False, True],
                           "dial": [1.0, 2.0, math.nan, 3.0, math.nan]})  # fmt: skip
    assert stats.at_published_knob(curves)["dial"].to_list() == [1.0, 3.0]


def test_no_attack_is_no_scenario():
    rows = pd.concat([table(), frame([row("none", 0, "good", implanted=False)])])
    assert "none" not in set(stats.scenarios(rows)["attack"])


def test_leaderboard_by_hand():
    board = stats.leaderboard(table(), "t", "validation")
    good = line(board, "good")
    assert good["ra"] == pytest.approx(((0.8 + 0.6) / 2 + (0.2 + 0.4) / 2) / 2)
    assert good["asr"] == pytest.approx(0.95 - 0.5)
    assert good["d_acc"] == pytest.approx(-0.05)
    assert good["d_asr"] == pytest.approx(0.45 - 1.0)
    assert good["ra_low"] < good["ra"] < good["ra_high"]
    assert (good["pruned"], good["units"], good["cost_epochs"]) == (10, 100, 1.5)
    assert (good["cells_ok"], good["cells"], good["scenarios_ok"]) == (4, 4, 2)
    assert list(board["role"]) == ["defense"] * 3 + ["reference"]
    assert list(board["place"]) == [1, 1, 1, 0]


def test_ranks_by_hand_with_ties():
    # badnets: good and twin 0.7 share 1.5, weak 0.4 is 3; wanet: weak 0.4 is 1, good and twin share 2.5; sig is not implanted
    ranks = stats.average_ranks(table(), "t", "validation")
    assert ranks == pytest.approx({("good", "whole"): 2.0, ("weak", "whole"): 2.0, ("twin", "whole"): 2.0})


def test_missing_cells_take_the_last_place_and_no_mean():
    rows = table()
    lost = (rows["defense"] == "good") & (rows["attack"] == "badnets")
    rows.loc[lost, ["status", "reason"]] = ["failed", "out of memory"]
    rows.loc[lost, ["acc", "asr", "ra"]] = np.nan
    board = stats.leaderboard(rows, "t", "validation")
    good = line(board, "good")
    assert good["ra"] == pytest.approx(0.3)
    assert good["reasons"] == "failed in 2 of 4: out of memory"
    assert (good["missing"], good["cells_ok"], good["scenarios_ok"]) == ("failed", 2, 1)
    assert good["rank"] == pytest.approx((3 + 2.5) / 2)
    assert line(board, "twin")["rank"] == pytest.approx((1 + 2.5) / 2)


def test_wholly_refused_entry_stays_on_the_board():
    rows = table()
    rows.loc[rows["defense"] == "good", "status"] = "refused"
    good = line(stats.leaderboard(rows, "t", "validation"), "good")
    assert good["cells_ok"] == 0
    assert math.isnan(good["ra"])
    assert good["rank"] == 3.0


def test_an_entry_that_was_run_on_fewer_scenarios_is_shown_but_not_ranked():
    rows = table()
    fewer = rows[~((rows["defense"] == "good") & (rows["attack"] == "badnets"))]
    board = stats.leaderboard(fewer, "t", "validation")
    good = line(board, "good")
    assert (good["place"], good["scenarios_run"], good["scenarios"]) == (0, 1, 2)
    assert math.isnan(good["rank"])
    assert good["ra"] == pytest.approx(0.3)
    assert list(board["defense"])[-2:] == ["good", "none"]
    # weak and twin are ranked among themselves: twin 0.7 and 0.3, weak 0.4 and ahead on wanet.
    assert stats.average_ranks(fewer, "t", "validation") == pytest.approx({("weak", "whole"): 1.5, ("twin", "whole"): 1.5})
    # A failed cell is a row: leaving the matrix's scenario out and failing in it are not the same.
    failed = rows.copy()
    failed.loc[(rows["defense"] == "good") & (rows["attack"] == "badnets"), "status"] = "failed"
    assert line(stats.leaderboard(failed, "t", "validation"), "good")["rank"] == pytest.approx((3 + 2.5) / 2)


def test_oracle_is_never_ranked():
    board = stats.leaderboard(table(selection="oracle"), "t", "oracle")
    assert set(board["place"]) == {0}
    assert board["rank"].isna().all()


def test_controls_are_lent_to_every_track_once_and_never_ranked():
    extra = [row(attack, seed, "random", 0.99, track=track) for track in ("u", "v") for attack, seed in RA]
    rows = pd.concat(
        [table(), frame(extra), frame([row(attack, seed, "other", 0.1, track="u") for attack, seed in RA])], ignore_index=True
    )
    assert stats.tracks(rows) == ["t", "u"]
    assert stats.tracks(rows[rows["defense"] == "none"]) == []
    board = stats.leaderboard(rows, "t", "validation")
    random = board[board["defense"] == "random"]
    assert list(random["source"]) == ["u"]
    assert int(random["place"].iloc[0]) == 0
    assert ("random", "whole") not in stats.average_ranks(rows, "t", "validation")
    assert list(stats.leaderboard(rows, "u", "validation")["defense"]) == ["other", "none", "random"]


def test_nothing_implanted_gives_empty_results():
    rows = table(implanted=False, asr_undefended=0.4)
    assert stats.leaderboard(rows, "t", "validation").empty
    assert stats.average_ranks(rows, "t", "validation") == {}
    assert stats.selection_gaps(rows, "t").empty
    assert rank_tests.significance(rows, "t", "validation") is None


def test_selection_gap_is_paired_and_by_hand():
    ra = {"oracle": (0.9, 0.7), "validation": (0.8, 0.5), "default": (0.4, 0.4), "leaky": (0.6, 0.7)}
    asr = {"oracle": (0.1, 0.2), "validation": (0.1, 0.4), "default": (0.5, 0.5), "leaky": (0.0, 0.2)}
    kept = {("validation", 1)}  # the untouched model has no place on the dial, and its row counts all the same
    rows = [
        row("badnets", seed, "good", ra[name][seed], asr=asr[name][seed], selection=name, cell=f"good{seed}",
            dial=math.nan if (name, seed) in kept else 0.5)
        for name in ra for seed in (0, 1)
    ]  # fmt: skip
    rows += [row("badnets", seed, "plain", selection=name) for name in asr for seed in (0, 1)]  # no dial: no gap
    gaps = stats.selection_gaps(frame(rows), "t")
    assert list(gaps["defense"]) == ["good"]
    gap = gaps.iloc[0]
    assert gap["gap_validation"] == pytest.approx((0.1 + 0.2) / 2)
    assert gap["gap_default"] == pytest.approx((0.5 + 0.3) / 2)
    assert (gap["gap_validation_low"], gap["gap_validation_high"]) == pytest.approx((0.1, 0.2))
    assert gap["leak_validation"] == pytest.approx((0.1 + 0.2) / 2)
    assert gap["ra_oracle"] == pytest.approx(0.8)
    assert gap["cells"] == 2


def test_a_track_without_clean_images_is_judged_by_the_default_even_where_there_was_nothing_to_choose():
    rows = frame([row("badnets", 0, "one", track=track, selection=how) for track in ("train", "model+clean")
                  for how in ("default", "validation", "oracle")])  # fmt: skip
    assert stats.headline(rows, "train") == "default"
    assert stats.selections(rows, "train") == ["default", "oracle"]
    assert stats.headline(rows, "model+clean") == "validation"


def test_problems_join_seeds_and_selections():
    rows = frame(
        [row("badnets", seed, "d", status="failed", reason="why", selection=name) for seed in (1, 0) for name in stats.SELECTIONS]
    )
    found = stats.problems(rows)
    assert found[["defense", "status", "reason", "seeds"]].to_numpy().tolist() == [["d", "failed", "why", "0, 1"]]
    assert stats.problems(table()).empty


def test_timing_summary_takes_ok_cells():
    rows = frame([row("badnets", seed, "d", status="ok" if seed else "failed") for seed in range(4)])
    names = ("matrix", "dataset", "backbone", "attack", "rate", "seed", "track", "scope", "defense", "cell")
    keys = rows[list(names)].to_dict("records")
    timings = frame(
        [Timing(**key, seconds=10.0 * seed, peak_mib=100.0 * seed, victim_seconds=40.0) for seed, key in enumerate(keys)]
    )
    found = stats.timing_summary(rows, timings).iloc[0]
    assert (found["seconds"], found["peak_mib"], found["share"], found["cells"]) == (20.0, 300.0, 0.5, 3)


def test_rank_tests_need_eleven_scenarios_and_match_a_hand_made_holm():
    def many(count: int) -> pd.DataFrame:
        return frame(
            [
                row(f"a{number}", 0, name, base + 0.01 * number * (1 + (name == "y")), implanted=True)
                for number in range(count)
                for name, base in (("x", 0.1), ("y", 0.2), ("z", 0.1 + 0.001 * (-1) ** number))
            ]
        )

    assert rank_tests.significance(many(10), "t", "validation") is None
    found = rank_tests.significance(many(12), "t", "validation")
    assert found is not None
    assert found.blocks == 12
    assert 0 < found.friedman < 0.01
    by_pair = {(a[0], b[0]): p for a, b, p in found.pairs}
    least = 2 / 2**12  # all twelve differences of one sign, exact two-sided signed-rank test
    assert by_pair["x", "y"] == pytest.approx(3 * least)
    assert by_pair["y", "z"] == pytest.approx(3 * least)  # Holm: max(3 p, 2 p)
    assert by_pair["x", "z"] > 0.05


@pytest.mark.parametrize(
    "differences",
    [
        [0.3], [0.1, 0.2, -0.1], [0.1, -0.25, 0.3, 0.2, 0.6, 0.7, 0.9], [0.2] * 5 + [-0.2] * 3, [0.0, 0.4, 0.4, -0.1, 0.0, 0.9],
        [0.1 + 0.2, 0.3, -0.7, 0.5, 0.5, 0.5, 0.2, 0.1, -0.1],
    ],
)  # fmt: skip
def test_signed_rank_test_counts_every_pattern_of_signs(differences: list[float]):
    kept = [round(value, 6) for value in differences if round(value, 6)]
    ranks = [sum(abs(b) < abs(a) for b in kept) + (sum(abs(b) == abs(a) for b in kept) + 1) / 2 for a in kept]
    observed = sum(rank for rank, value in zip(ranks, kept, strict=True) if value > 0)
    sums = [sum(rank for rank, up in zip(ranks, ups, strict=True) if up) for ups in itertools.product((0, 1), repeat=len(kept))]
    low, high = sum(total <= observed for total in sums), sum(total >= observed for total in sums)
    assert rank_tests.signed_rank(np.array(differences)) == pytest.approx(min(1.0, 2 * min(low, high) / len(sums)))


def test_signed_rank_test_agrees_with_scipy_without_ties_and_beyond_its_own_range():
    spread = np.array([(-1) ** (number % 3) * (1 + number) for number in range(60)], dtype=float)
    for count in (12, 30, 50, 60):
        assert rank_tests.signed_rank(spread[:count]) == pytest.approx(float(scipy.stats.wilcoxon(spread[:count]).pvalue))
    assert rank_tests.signed_rank(np.zeros(4)) == 1.0


def test_holm_by_its_definition():
    raw = [0.01, 0.04, math.nan, 0.03, 0.005, 0.9]
    told = sorted(p for p in raw if not math.isnan(p))
    twin = [max(min(1.0, (len(told) - step) * p) for step, p in enumerate(told[: place + 1])) for place in range(len(told))]
    found = rank_tests.holm(raw)
    assert math.isnan(found[2])
    assert [found[raw.index(p)] for p in told] == pytest.approx(twin)
    assert rank_tests.holm([]) == []


def test_the_least_p_is_that_of_differences_of_one_sign():
    for count in range(1, 13):
        assert rank_tests.least_p(count) == pytest.approx(rank_tests.signed_rank(np.arange(1.0, count + 1)))
    assert rank_tests.least_p(0) == 1.0
    assert rank_tests.blocks_needed() == 6  # 2 / 2^6 = 0.031
    assert rank_tests.blocks_needed(26) == 11  # 26 * 2 / 2^11 = 0.025, and 0.051 at 10


def against_scratch() -> list[Row]:
    """Two scenarios, three seeds; the control's ACC is the seed's alone, as its network is."""
    rows = []
    for attack, shift in (("badnets", 0.0), ("wanet", 0.2)):
        for seed in range(3):
            rows.append(row(attack, seed, "training-from-scratch", 0.5 + 0.1 * seed, acc=0.6 + 0.01 * seed, control=True))
            rows.append(row(attack, seed, "good", 0.6 + shift + 0.05 * seed, acc=0.7))
            status = "failed" if (attack, seed) == ("wanet", 1) else "ok"
            rows.append(row(attack, seed, "weak", 0.1 * seed, acc=0.6 + 0.01 * seed, status=status))
    return rows


def test_pairs_with_a_control_by_hand():
    found = rank_tests.paired(frame(against_scratch()), "t")
    assert list(zip(found["defense"], found["metric"], strict=True)) == [
        ("good", "ra"), ("good", "acc"), ("weak", "ra"), ("weak", "acc"),
    ]  # fmt: skip
    good, acc, weak, same = (found.iloc[place] for place in range(4))
    differences = {(s, seed): 0.1 + shift - 0.05 * seed for s, shift in ((0, 0.0), (1, 0.2)) for seed in range(3)}
    assert good["difference"] == pytest.approx(np.mean(list(differences.values())))
    assert (good["pairs"], good["worlds"], good["blocks"]) == (6, 6, 3)
    # Exactly one of the six differences is 0 and left out; the others are positive.
    assert good["p"] == pytest.approx(2 / 2**5)
    assert good["p_least"] == pytest.approx(2 / 2**6)
    assert good["p_blocks"] == good["p_blocks_least"] == pytest.approx(0.25)
    # Whole blocks: a draw of seeds is the same in both scenarios.
    means = [np.mean([differences[0, seed], differences[1, seed]]) for seed in range(3)]
    exact = [np.mean(draw) for draw in itertools.product(means, repeat=3)]
    low, high = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
    assert (good["difference_low"], good["difference_high"]) == pytest.approx((low, high))
    assert acc["difference"] == pytest.approx(0.09)
    assert (weak["pairs"], weak["worlds"]) == (5, 6)
    assert weak["difference"] == pytest.approx(-0.5)
    assert (same["difference"], same["p"], same["p_blocks"]) == (pytest.approx(0.0), 1.0, 1.0)
    assert list(found["p_holm"]) == pytest.approx(rank_tests.holm(list(found["p"])))
    pd.testing.assert_frame_equal(rank_tests.paired(frame(against_scratch()), "t"), found)  # fixed seed: the same bits


def test_pairs_of_one_seed_have_no_interval_and_without_the_control_there_are_none():
    rows = [r for r in against_scratch() if r.seed == 0]
    found = rank_tests.paired(frame(rows), "t")
    assert found["difference_low"].isna().all()
    assert set(found["blocks"]) == {1}
    assert set(found["p_blocks"]) == {1.0}
    assert rank_tests.paired(frame([r for r in rows if not r.control]), "t").empty
    assert rank_tests.paired(table(implanted=False), "t").empty


def test_cliques_are_the_largest_sets_nobody_tells_apart():
    names = [(letter, "whole") for letter in "abcdef"]
    ranks = {name: float(place) for place, name in enumerate(names)}
    joined = [(names[a], names[b]) for a, b in ((0, 1), (1, 2), (0, 2), (2, 3), (3, 4))]
    subsets = [set(part) for size in range(2, 7) for part in itertools.combinations(names, size)
               if all((a, b) in joined for a, b in itertools.combinations(part, 2))]  # fmt: skip
    largest = [part for part in subsets if not any(part < other for other in subsets)]
    found = rank_tests._cliques(ranks, joined)
    assert [set(clique) for clique in found] == sorted(largest, key=lambda part: sorted(part))
    assert all(list(clique) == sorted(clique) for clique in found)


def test_rank_tests_name_the_cliques_and_what_is_incomplete():
    def many(gap: float) -> list[Row]:
        return [row(f"a{n}", 0, name, 0.4 + place * gap + 0.01 * ((7 * n + 3 * place) % 11), implanted=True)
                for n in range(12) for place, name in enumerate("xyz")]  # fmt: skip

    rows = many(0.2)
    found = rank_tests.significance(frame([*rows, row("a0", 0, "half", 0.9)]), "t", "validation")
    assert found is not None
    assert found.ranks == {("z", "whole"): 1.0, ("y", "whole"): 2.0, ("x", "whole"): 3.0}
    assert found.ranks == pytest.approx(stats.average_ranks(frame(rows), "t", "validation"))
    assert found.cliques == []
    assert found.incomplete == [("half", "whole")]
    level = rank_tests.significance(frame(many(0.0)), "t", "validation")
    assert level is not None
    assert level.friedman > rank_tests.LEVEL
    assert [set(clique) for clique in level.cliques] == [{("x", "whole"), ("y", "whole"), ("z", "whole")}]


def detector(attack: str, seed: int, defense: str, precision: float, recall: float, **more: object) -> Row:
    settings: dict[str, object] = {"selection": "default", "isolated": 10 + seed, "train_images": 200, "precision": precision,
                                   "recall": recall, "realised_rate": 0.1 + 0.01 * seed}  # fmt: skip
    return row(attack, seed, defense, 0.5, **{**settings, **more})


def test_detectors_equal_plain_loops_over_the_rows():
    nan = math.nan
    rows = [
        *(detector("badnets", seed, "abl", 0.5 + 0.1 * seed, 0.2 * seed) for seed in range(3)),
        detector("wanet", 0, "abl", 0.25, 0.75, note="training-control attack: met through its exported static set; more"),
        detector("wanet", 1, "abl", nan, 0.0, isolated=0),  # nothing isolated: no precision
        detector("wanet", 2, "abl", nan, nan, status="failed", isolated=0, train_images=0),
        *(detector("sig", seed, "abl", 0.1, 0.3) for seed in range(2)),
        detector("none", 0, "abl", 0.0, nan),  # no attack: nothing to find
        *(detector("badnets", seed, "blind", nan, nan, isolated=0) for seed in range(3)),
        *(detector("badnets", seed, "lent", 0.9, 0.9, control=True, track="control") for seed in range(3)),
        *(detector("badnets", seed, "abl", 0.99, 0.99, selection="oracle") for seed in range(3)),
    ]
    found = stats.detectors(frame(rows), "t")
    assert list(zip(found["defense"], found["attack"], strict=True)) == [
        ("abl", "badnets"), ("abl", "wanet"), ("abl", "sig"), ("lent", "badnets"),
    ]  # fmt: skip
    for _, got in found.iterrows():
        mine = [r for r in rows if (r.defense, r.attack, r.selection) == (got["defense"], got["attack"], "default")]
        good = [r for r in mine if r.status == "ok"]
        assert (got["cells_ok"], got["cells"]) == (len(good), len(mine))
        assert got["isolated"] == pytest.approx(sum(r.isolated for r in good) / len(good))
        assert got["isolated_share"] == pytest.approx(sum(r.isolated / 200 for r in good) / len(good))
        assert got["base_rate"] == pytest.approx(sum(r.realised_rate for r in mine) / len(mine))
        for name in ("precision", "recall"):
            values = [getattr(r, name) for r in good if not math.isnan(getattr(r, name))]
            mean = sum(values) / len(values)
            assert got[name] == pytest.approx(mean)
            assert got[f"{name}_seeds"] == len(values)
            if len(values) > 1:
                assert got[f"{name}_sd"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))
            else:
                assert math.isnan(got[f"{name}_sd"])
    assert list(found["implanted"]) == [True, True, False, True]
    assert list(found["exported"]) == [False, True, False, False]
    assert list(found["missing"]) == ["", "failed", "", ""]
    assert list(found["role"]) == ["defense"] * 3 + ["control"]
    assert stats.detectors(frame([r for r in rows if r.defense == "blind"]), "t").empty


def test_the_note_that_marks_an_exported_attack_is_the_one_that_cells_write():
    assert stats.EXPORTED in inspect.getsource(outcome)


def test_given_by_plain_loops():
    rows = [
        *(row(attack, seed, "mixed", 0.5, used="model + clean", clean_images=100 + 50 * (attack == "wanet"), preset="cpu",
              cost_epochs=1.0 + seed, status="failed" if (attack, seed) == ("sig", 1) else "ok") for attack, seed in RA),
        *(row(attack, seed, "lost", status="refused", cost_epochs=math.nan) for attack, seed in RA),
        *(row(attack, seed, "none", used="model") for attack, seed in RA),
        *(row(attack, seed, "random", control=True, track="control", used="clean + extractor", extractor="there",
              extractor_epochs=0.5) for attack, seed in RA),
    ]  # fmt: skip
    found = stats.given(frame([rows[-1], *rows]).drop_duplicates(), "t", "validation")
    assert list(found["defense"]) == ["mixed", "lost", "none", "random"]
    mixed, lost, _, random = (line for _, line in found.iterrows())
    good = [r for r in rows if r.defense == "mixed" and r.status == "ok"]
    assert (mixed["cells_ok"], mixed["cells"], mixed["missing"]) == (len(good), 6, "failed")
    assert (mixed["clean_images_min"], mixed["clean_images_max"]) == (100, 150)
    assert mixed["cost_epochs"] == pytest.approx(sum(r.cost_epochs for r in good) / len(good))
    assert math.isnan(mixed["extractor_epochs"])
    assert (mixed["used"], mixed["preset"]) == (("model + clean",), ("cpu",))
    assert (lost["cells_ok"], lost["used"], lost["missing"], lost["clean_images_max"]) == (0, (), "refused", 0)
    assert (random["role"], random["source"]) == ("control", "control")
    assert (random["extractor"], random["extractor_epochs"]) == (("there",), 0.5)


def test_spread():
    assert intervals.spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert math.isnan(intervals.spread([1.0]))
