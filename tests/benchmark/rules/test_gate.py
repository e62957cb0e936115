"""When an attack counts and what it costs, the second board, gaps of the rules of selection, marks of entries that did nothing."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmark.analysis import stats
from benchmark.report import report
from benchmark.report import words as sentences
from benchmark.report.tables import details
from benchmark.report.tables import write as tables
from benchmark.rules.metrics import gate
from benchmark.storage.rows import Curve, Row, Timing, frame

RULES = ("validation", "default", "strongest", "canary", "oracle", "leaky")


def row(attack: str, seed: int, defense: str, ra: float = 0.0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "digits", "backbone": "net", "attack": attack, "rate": 0.1, "seed": seed, "track": "model+clean",
        "scope": "whole", "defense": defense, "cell": f"{attack}{seed}{defense}", "target": 0, "label_mode": "all-to-one",
        "realised_rate": 0.1, "control": defense in ("none", "random"), "selection": "validation", "status": "ok", "acc": 0.9,
        "asr": 0.95 - ra, "ra": ra, "der": 0.5, "acc_undefended": 0.95, "asr_undefended": 0.99, "ra_undefended": 0.0,
        "acc_benign": 0.95, "asr_benign": 0.01, "acc_loss_se": 0.002, "implanted": True, "gate": "implanted", "cost_epochs": 0.125,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def one(rows: list[Row], attack: str) -> pd.Series:
    found = stats.scenarios(frame(rows))
    return found[found["attack"] == attack].iloc[0]


def written(rows: list[Row], folder: Path) -> dict[str, str]:
    curves, timings = (pd.DataFrame(columns=[*kind.__dataclass_fields__]) for kind in (Curve, Timing))
    return {path.name: path.read_text() for path in tables.write_tables(frame(rows), curves, timings, folder, "tiny")}


# -- scenarios -----------------------------------------------------------------------------------------------------------------


def test_scenarios_equal_plain_loops() -> None:
    draw = random.Random(3)
    rows = [
        row(f"a{n}", seed, "good", asr_undefended=draw.uniform(0.3, 1), asr_benign=draw.uniform(0, 0.4),
            acc_benign=draw.uniform(0.5, 1), acc_undefended=draw.uniform(0.5, 0.95), acc_loss_se=draw.uniform(0, 0.02),
            implanted=draw.random() < 0.5)
        for n in range(40) for seed in range(1 + n % 4)
    ]  # fmt: skip
    found = stats.scenarios(frame([*rows, *(replace(line, defense="other", cell=f"{line.cell} other") for line in rows)]))
    assert found["implanted"].nunique() == found["adversarial"].nunique() == found["costs_acc"].nunique() == 2
    for _, line in found.iterrows():
        mine = [r for r in rows if r.attack == line["attack"]]
        count = len(mine)
        asr, twin = sum(r.asr_undefended for r in mine) / count, sum(r.asr_benign for r in mine) / count
        losses = [r.acc_benign - r.acc_undefended for r in mine]
        mean = sum(losses) / count
        spread = sum((loss - mean) ** 2 for loss in losses) / (count - 1) / count if count > 1 else 0.0
        low = mean - 1.96 * (sum(r.acc_loss_se**2 for r in mine) / count + spread) ** 0.5
        benign = sum(r.acc_benign for r in mine) / count
        assert (line["seeds"], line["implanted_seeds"]) == (count, sum(r.implanted for r in mine))
        assert [line["asr"], line["asr_benign"], line["effect"]] == pytest.approx([asr, twin, asr - twin])
        assert [line["acc_loss"], line["acc_loss_low"]] == pytest.approx([mean, low])
        assert line["adversarial"] == (twin > 0.2)
        assert line["implanted"] == (asr >= 0.5 and asr - twin >= 0.5 and twin <= 0.2)
        assert line["costs_acc"] == (low > 0.02 and low > 0.05 * benign)


def test_one_seed_that_fails_does_not_drop_out_of_an_implanted_scenario() -> None:
    rows = [row("badnets", seed, "good", asr_undefended=asr, implanted=asr > 0.5) for seed, asr in enumerate((0.99, 0.9, 0.3))]
    assert bool(one(rows, "badnets")["implanted"])
    assert set(stats.implanted_worlds(frame(rows))["seed"]) == {0, 1, 2}
    weak = [row("badnets", seed, "good", asr_undefended=asr, implanted=asr > 0.5) for seed, asr in enumerate((0.6, 0.55, 0.1))]
    assert not one(weak, "badnets")["implanted"], "two seeds of three pass, their mean does not"
    assert stats.implanted_worlds(frame(weak)).empty


def test_rows_of_an_earlier_version_are_judged_by_the_asr_alone() -> None:
    old = {"asr_benign": math.nan, "acc_loss_se": math.nan, "effect": math.nan, "acc_loss": math.nan}
    line = one([row("badnets", seed, "good", acc_undefended=0.87, **old) for seed in (0, 1)], "badnets")
    assert bool(line["implanted"])
    assert not line["adversarial"]
    assert math.isnan(line["effect"])
    assert line["acc_loss"] == pytest.approx(0.08), "from the two accuracies"
    assert line["acc_loss_low"] == pytest.approx(0.08), "no error was measured"
    assert bool(line["costs_acc"])
    assert gate(0.99, math.nan).words == "implanted: ASR 99.0, effect not measured"


# -- boards --------------------------------------------------------------------------------------------------------------------


def mixed() -> list[Row]:
    """Two quiet attacks, one that costs 8 points, one that the twin answers too, one that failed; ``bold`` wins at the costly."""
    worlds: dict[str, dict[str, object]] = {
        "quiet": {}, "silent": {}, "costly": {"acc_undefended": 0.87}, "answered": {"asr_benign": 0.98},
        "failed": {"asr_undefended": 0.3},
    }  # fmt: skip
    strength = {"good": 0.6, "bold": 0.5, "none": 0.0}
    return [
        row(attack, seed, name, 0.9 if (name, attack) == ("bold", "costly") else ra, selection=rule, **more)
        for attack, more in worlds.items() for name, ra in strength.items() for seed in (0, 1) for rule in RULES
    ]  # fmt: skip


def test_an_attack_that_the_twin_answers_is_adversarial_and_not_ranked() -> None:
    line = one(mixed(), "answered")
    assert (bool(line["adversarial"]), bool(line["implanted"])) == (True, False)
    assert "answered" not in set(stats.implanted_worlds(frame(mixed()))["attack"])
    flipped = [row(r.attack, r.seed, r.defense, 1 - r.ra, selection=r.selection, asr_benign=0.98) if r.attack == "answered" else r
               for r in mixed()]  # fmt: skip
    assert stats.average_ranks(frame(flipped), "model+clean", "validation") == stats.average_ranks(
        frame(mixed()), "model+clean", "validation"
    )


def test_an_attack_that_costs_8_points_stays_ranked_marked_and_leaves_the_stealthy_board(tmp_path: Path) -> None:
    rows = frame(mixed())
    assert bool(one(mixed(), "costly")["costs_acc"])
    assert "costly" in set(stats.implanted_worlds(rows)["attack"])
    assert stats.average_ranks(rows, "model+clean", "validation") == pytest.approx(
        {("good", "whole"): (1 + 1 + 2) / 3, ("bold", "whole"): (2 + 2 + 1) / 3}
    )
    quiet = stats.stealthy(rows)
    assert set(quiet["attack"]) == {"quiet", "silent", "answered", "failed"}
    assert stats.average_ranks(quiet, "model+clean", "validation") == {("good", "whole"): 1.0, ("bold", "whole"): 2.0}
    files = written(mixed(), tmp_path)
    assert [name for name in files if "stealthy" in name] == [
        "leaderboard-model-clean-validation-stealthy.md", "leaderboard-model-clean-validation-stealthy.csv",
    ]  # fmt: skip
    board, second = (files[f"leaderboard-model-clean-validation{part}.md"] for part in ("", "-stealthy"))
    assert "3 of 5 scenarios implanted (1 of them costs ACC), 1 adversarial, 1 not implanted" in board
    assert "2 of 4 scenarios implanted, 1 adversarial, 1 not implanted" in second
    assert "costly" not in second
    marks = {line.split("|")[3].strip(): line.split("|")[4].strip() for line in files["attack-validity.md"].splitlines()[6:]
             if line.startswith("| digits")}  # fmt: skip
    assert marks == {"quiet": "**implanted**", "silent": "**implanted**", "costly": "**implanted, costs ACC**",
                     "answered": "**adversarial**", "failed": "**not implanted**"}  # fmt: skip
    text = report.write_report(tmp_path, rows, "tiny").read_text()
    assert "**Stealthy attacks only** (2 of 4 scenarios implanted" in text
    assert "tables/leaderboard-model-clean-validation-stealthy.md" in text


@pytest.mark.parametrize("costs", [(0.95, 0.95), (0.8, 0.8)])
def test_there_is_no_second_board_where_no_attack_or_every_attack_costs(costs: tuple[float, float], tmp_path: Path) -> None:
    rows = [row(attack, seed, name, ra, acc_undefended=acc) for attack, acc in zip(("a", "b"), costs, strict=True)
            for name, ra in (("good", 0.5), ("none", 0.0)) for seed in (0, 1)]  # fmt: skip
    assert not any("stealthy" in name for name in written(rows, tmp_path))


# -- rules of selection --------------------------------------------------------------------------------------------------------


def chosen(defense: str, values: dict[str, tuple[float, float]], seeds: int = 2) -> list[Row]:
    """RA and ASR of each rule on one attack, a little better from seed to seed."""
    return [row("badnets", seed, defense, ra + 0.01 * seed, asr=asr, selection=rule, dial=0.5) for rule, (ra, asr) in values.items()
            for seed in range(seeds)]  # fmt: skip


VALUES = {"validation": (0.5, 0.2), "default": (0.4, 0.3), "strongest": (0.55, 0.1), "canary": (0.6, 0.15), "oracle": (0.7, 0.12),
          "leaky": (0.3, 0.05)}  # fmt: skip


def test_gaps_to_the_oracle_and_to_the_leaky_rule_by_hand() -> None:
    (gap,) = (line for _, line in stats.selection_gaps(frame(chosen("good", VALUES)), "model+clean").iterrows())
    for rule in ("validation", "default", "strongest", "canary"):
        assert gap[f"gap_{rule}"] == pytest.approx(0.7 - VALUES[rule][0])
        assert gap[f"leak_{rule}"] == pytest.approx(VALUES[rule][1] - 0.05)
        assert [gap[f"gap_{rule}_low"], gap[f"gap_{rule}_high"]] == pytest.approx([gap[f"gap_{rule}"]] * 2), "paired by seed"
    assert gap["ra_leaky"] == pytest.approx(0.305)


def test_an_entry_without_canaries_or_with_some_keeps_its_other_gaps() -> None:
    without = {rule: value for rule, value in VALUES.items() if rule != "canary"}
    rows = [*chosen("good", VALUES), *chosen("anew", without)]
    rows += [row("badnets", seed, "anew", selection="canary", status="refused", reason="no canary is planted") for seed in (0, 1)]
    rows += [r for r in chosen("some", VALUES) if (r.selection, r.seed) != ("canary", 1)]
    gaps = stats.selection_gaps(frame(rows), "model+clean").set_index("defense")
    assert list(gaps["cells"]) == [2, 2, 2]
    assert list(gaps["gap_validation"]) == pytest.approx([0.2, 0.2, 0.2])
    assert gaps["gap_canary"].isna().to_dict() == {"good": False, "anew": True, "some": False}
    assert gaps.loc["some", "ra_canary"] == pytest.approx(0.6), "seed 0 alone"
    assert "nan" not in details.gaps_markdown(frame(rows))


def test_rules_with_hindsight_are_never_ranked_and_the_others_are() -> None:
    rows = frame([*chosen("good", VALUES), *chosen("weak", dict.fromkeys(VALUES, (0.1, 0.8)))])
    for rule in RULES:
        board = stats.leaderboard(rows, "model+clean", rule)
        assert sorted(board["place"]) == ([0, 0] if rule in ("oracle", "leaky") else [1, 2])
    assert stats.selections(rows, "model+clean") == list(RULES)
    ((_, judged, board),) = stats.judged_boards(rows)
    good = board[board["defense"] == "good"].iloc[0]
    assert judged == "validation"
    assert [good["ra_oracle"], good["asr_oracle"], good["asr_leaky"]] == pytest.approx([0.705, 0.12, 0.05])


# -- entries that did nothing --------------------------------------------------------------------------------------------------


def idle() -> list[Row]:
    """The best-ranked entry changed no model; the second is marked in some cells; a control is matched by the idle one alone."""
    rows = [row("badnets", seed, "lazy", 0.8, mark="no change") for seed in range(3)]
    rows += [row("badnets", seed, "works", 0.5, mark="no change" if seed == 0 else "", kept=seed == 0) for seed in range(3)]
    rows += [row("badnets", seed, "finder", 0.3, mark="mechanism failed" if seed else "") for seed in range(3)]
    return [*rows, *(row("badnets", seed, "random", 0.7) for seed in range(3))]


def test_leaderboards_count_marks_of_finished_cells() -> None:
    rows = [*idle(), row("badnets", 3, "lazy", status="failed", reason="why", mark="")]
    board = stats.leaderboard(frame(rows), "model+clean", "validation").set_index("defense")
    counts = {name: tuple(line) for name, line in board[["no_change", "mechanism_failed", "kept", "cells_ok"]].iterrows()}
    assert counts == {"lazy": (3, 0, 0, 3), "works": (1, 0, 1, 3), "finder": (0, 2, 0, 3), "random": (0, 0, 0, 3)}
    words = {name: sentences.mark_words(line) for name, line in board.iterrows()}
    assert words == {"lazy": "no change in 3 of 3", "works": "kept untouched in 1 of 3", "finder": "mechanism failed in 2 of 3",
                     "random": ""}  # fmt: skip


def test_no_sentence_calls_an_entry_best_that_changed_no_model() -> None:
    text = report.summary(frame(idle()), "model+clean")
    assert text.startswith("Best average rank by RA of those that changed a model: **works (whole)**")
    assert "lazy" not in text
    nobody = report.summary(frame([r for r in idle() if r.defense in ("lazy", "random")]), "model+clean")
    assert nobody == "No entry changed a model, so none is called best."
    words = report.plain_words(frame(idle()))
    assert "No defense matches the *random* control (RA 70.0 %)." in words
    assert "No model was changed in any cell by lazy (whole)." in words
    assert words.count("lazy") == 1


def test_sentences_agree_in_number() -> None:
    def words(**asr: float) -> str:
        return report.plain_words(frame([row("badnets", seed, name, asr=value) for name, value in asr.items() for seed in (0, 1)]))

    assert "No entry takes the mean ASR below 50 %." in words(a=0.9, b=0.8)
    assert "1 of 2 entries takes the mean ASR below 50 %: a (whole) leaves ASR 10.0 %" in words(a=0.1, b=0.8)
    assert "2 of 2 entries take the mean ASR below 50 %" in words(a=0.1, b=0.2)


# -- how far the validation part reaches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "enough"), [(290, False), (1240, False), (1250, True), (5000, True)])
def test_a_validation_part_that_cannot_resolve_the_tolerance_is_named(budget: int, enough: bool, tmp_path: Path) -> None:
    rows = [row("badnets", seed, name, clean_images=budget * (name == "good")) for name in ("good", "none") for seed in (0, 1)]
    images = budget // 5
    assert stats.validation_images(frame(rows)) == images
    # By hand: one pair in ten discordant, each way as likely, so the variance of a difference is 0.1.
    pairs = list(itertools.chain([1, -1], [0] * 18))
    error = math.sqrt(sum(pair**2 for pair in pairs) / len(pairs) / images)
    assert stats.resolves(images) == (enough, pytest.approx(error))
    text = written(rows, tmp_path)["leaderboard-model-clean-validation.md"]
    assert (f"The validation part holds {images} images" in text) is not enough
    assert (f"{100 * error:.1f} points" in text) is not enough


def test_the_nearest_published_figure_has_its_own_column() -> None:
    words = "nearest reference: ACC 92.2, ASR 92.6; differs: another network (139.6 M parameters, ours 20.0 M)"
    text = details.validity_markdown(frame([row("badnets", seed, "none", gate=f"implanted: ASR 99.0; {words}") for seed in (0, 1)]))
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")]
    assert cells[-4:-1] == ["implanted: ASR 99.0", f"not judged; {words.replace(' reference', '')}", "\N{EN DASH}"]
