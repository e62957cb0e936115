"""Every aggregate against a by-hand twin on frames small enough to read."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pandas as pd
import pytest

from benchmark import cell, stats
from benchmark.rows import Row, Timing, frame

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
        "der": 0.5, "acc_undefended": 0.95, "asr_undefended": 1.0, "ra_undefended": 0.0, "acc_benign": 0.96,
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
    assert stats.interval([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0]]).mean == pytest.approx(0.375)  # a pooled mean would be 0.5


def test_interval_covers_the_exact_bootstrap_distribution():
    samples = [[0.1, 0.5, 0.6], [0.2, 0.9]]
    exact = sorted(
        (np.mean(first) + np.mean(second)) / 2
        for first in itertools.product(samples[0], repeat=3)
        for second in itertools.product(samples[1], repeat=2)
    )
    low, high = np.quantile(exact, [0.025, 0.975])
    found = stats.interval(samples)
    assert found.mean == pytest.approx((0.4 + 0.55) / 2)
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    assert found.low < found.mean < found.high
    assert found == stats.interval(samples)  # fixed seed: the same bits


def test_interval_of_no_spread_one_seed_and_nothing():
    assert stats.interval([[0.5, 0.5], [0.7, 0.7]]) == pytest.approx((0.6, 0.6, 0.6))
    one = stats.interval({("a", "b", "c"): [0.5], ("a", "b", "d"): [0.1, 0.3]})
    assert one.mean == pytest.approx(0.35)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert all(math.isnan(part) for part in stats.interval([]))


def test_gate_counts_scenarios_by_majority_and_worlds_one_by_one():
    rows = frame(
        [row("badnets", seed, "d", 0.5, implanted=seed != 2) for seed in range(3)]
        + [row("sig", seed, "d", implanted=seed == 0) for seed in (0, 1)]
    )
    found = stats.scenarios(rows)
    assert found[["attack", "seeds", "implanted_seeds", "implanted"]].to_numpy().tolist() == [
        ["badnets", 3, 2, True],
        ["sig", 2, 1, False],
    ]
    assert set(stats.implanted_worlds(rows)[["attack", "seed"]].itertuples(index=False, name=None)) == {
        ("badnets", 0),
        ("badnets", 1),
    }


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
    board = stats.leaderboard(rows, "t", "validation")
    random = board[board["defense"] == "random"]
    assert list(random["source"]) == ["u"]
    assert int(random["place"].iloc[0]) == 0
    assert ("random", "whole") not in stats.average_ranks(rows, "t", "validation")
    assert list(stats.leaderboard(rows, "u", "validation")["defense"]) == ["other", "none", "random"]


def test_nothing_implanted_gives_empty_results():
    rows = table(implanted=False)
    assert stats.leaderboard(rows, "t", "validation").empty
    assert stats.average_ranks(rows, "t", "validation") == {}
    assert stats.selection_gaps(rows, "t").empty
    assert stats.significance(rows, "t", "validation") is None


def test_selection_gap_is_paired_and_by_hand():
    asr = {"oracle": (0.0, 0.2), "validation": (0.1, 0.4), "default": (0.5, 0.5)}
    rows = [
        row("badnets", seed, "good", asr=values[seed], selection=name, dial=0.5) for name, values in asr.items() for seed in (0, 1)
    ]
    rows += [row("badnets", seed, "plain", selection=name) for name in asr for seed in (0, 1)]  # no dial: no gap
    gaps = stats.selection_gaps(frame(rows), "t")
    assert list(gaps["defense"]) == ["good"]
    gap = gaps.iloc[0]
    assert gap["gap_validation"] == pytest.approx((0.1 + 0.2) / 2)
    assert gap["gap_default"] == pytest.approx((0.5 + 0.3) / 2)
    assert (gap["gap_validation_low"], gap["gap_validation_high"]) == pytest.approx((0.1, 0.2))
    assert gap["asr_oracle"] == pytest.approx(0.1)
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

    assert stats.significance(many(10), "t", "validation") is None
    found = stats.significance(many(12), "t", "validation")
    assert found is not None
    assert found.blocks == 12
    assert 0 < found.friedman < 0.01
    by_pair = {(a[0], b[0]): p for a, b, p in found.pairs}
    least = 2 / 2**12  # all twelve differences of one sign, exact two-sided signed-rank test
    assert by_pair["x", "y"] == pytest.approx(3 * least)
    assert by_pair["y", "z"] == pytest.approx(3 * least)  # Holm: max(3 p, 2 p)
    assert by_pair["x", "z"] > 0.05


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
    assert stats.EXPORTED in inspect.getsource(cell.cell_rows)


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
    assert stats.spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert math.isnan(stats.spread([1.0]))
