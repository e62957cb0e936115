"""The report: sentences that follow from rows, links that exist, a second run that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmark.report import report, words
from benchmark.report.tables import write as tables
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON
from benchmark.storage.rows import Curve, Row, Timing, frame


def row(attack: str, seed: int, defense: str, ra: float = 0.0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "digits", "backbone": "net", "attack": attack, "rate": 0.1, "seed": seed, "track": "model+clean",
        "scope": "whole", "defense": defense, "cell": f"{attack}{seed}{defense}", "target": 0, "label_mode": "all-to-one",
        "realised_rate": 0.1, "control": defense in ("none", "random"), "selection": "validation", "status": "ok", "acc": 0.9,
        "asr": 0.95 - ra, "ra": ra, "der": 0.5, "acc_undefended": 0.95, "asr_undefended": 1.0, "ra_undefended": 0.0,
        "acc_benign": 0.96, "asr_benign": 0.02, "implanted": True, "gate": "implanted", "pruned": 10, "units": 100, "cost_epochs":
        0.125,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def rows_with(**ra: float) -> list[Row]:
    return [row("badnets", seed, name, value + 0.02 * seed) for name, value in ra.items() for seed in (0, 1, 2)]


def test_summary_names_the_best_and_places_controls_by_interval():
    text = report.summary(frame(rows_with(good=0.7, weak=0.2, random=0.1)), "model+clean")
    assert text.startswith(
        "Best average rank by RA: **good (whole)**, with RA 72.0 % [70.0, 74.0] over 1 of 1 implanted scenarios."
    )
    assert "Its interval lies above that of random (whole) 12.0 % [10.0, 14.0]." in text
    text = report.summary(frame(rows_with(good=0.7, random=0.71)), "model+clean")
    assert "Its interval overlaps that of random (whole)" in text
    text = report.summary(frame(rows_with(good=0.2, random=0.7)), "model+clean")
    assert "Its interval lies below that of random (whole)" in text


def test_summary_with_one_seed_separates_nothing():
    rows = [row("badnets", 0, name, ra) for name, ra in (("good", 0.7), ("random", 0.1))]
    text = report.summary(frame(rows), "model+clean")
    assert "no interval separates them" in text
    assert "lies above" not in text


def test_summary_names_ties_and_incomplete_entries():
    rows = [
        *rows_with(good=0.5, same=0.5),
        row("badnets", 0, "half", 0.4),
        row("badnets", 1, "half", status="failed", reason="why"),
    ]
    text = report.summary(frame(rows), "model+clean")
    assert "tied with same (whole)" in text
    assert "Incomplete (a missing scenario counts as last place): half (whole)." in text


def test_summary_when_nothing_is_implanted_or_finished():
    assert report.summary(frame([row("badnets", 0, "good", asr_undefended=0.3)]), "model+clean") == words.NOTHING
    refused = frame([row("badnets", 0, "good", status="refused", reason="why")])
    assert report.summary(refused, "model+clean") == "No competing defense finished a cell on an implanted scenario."


def test_report_links_what_exists_and_nothing_else(tmp_path: Path):
    for name in ("tables/leaderboard-model-clean-validation.md", "tables/missing.md", "plots/attacks.png", "plots/attacks.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    table = frame([*rows_with(good=0.7, random=0.1), row("badnets", 3, "good", status="failed", reason="out of <memory>")])
    path = report.write_report(tmp_path, table, "A *title*", description="One sentence.")
    text = path.read_text()
    assert path == tmp_path / "README.md"
    assert text.startswith("# A \\*title\\*\n\nOne sentence.\n")
    assert "![The undefended models: did the attacks work?](plots/attacks.png)" in text
    assert "(tables/leaderboard-model-clean-validation.md)" in text
    assert "(tables/missing.md)" in text
    assert ".csv](tables" not in text
    assert "scatter" not in text
    assert "| failed | out of &lt;memory&gt; |" in text
    assert "seeds | 0, 1, 2, 3" in text.replace("| seed |", "| seeds |")
    stamp = path.stat().st_mtime_ns
    report.write_report(tmp_path, table, "A *title*", description="One sentence.")
    assert path.stat().st_mtime_ns == stamp


def test_report_shows_what_each_was_given_and_links_the_isolated_samples_below_their_picture(tmp_path: Path):
    files = [tmp_path / name for name in ("tables/given-train.md", "tables/detectors-train.md", "tables/detectors-train.csv",
                                          "plots/detectors-train.png")]  # fmt: skip
    rows = [row("badnets", 0, "abl", 0.5, track="train", used="train", train_images=99, trained_anew=True)]
    text = report.write_report(tmp_path, frame(rows), "t", files=files).read_text()
    given = text.index("**What the defender was given**")
    assert text.index("| 1 | abl |") < given < text.index("| abl | whole | replaced | none | 99 as published |")
    assert "- what the defender was given: [md](tables/given-train.md)\n" in text
    picture = text.index("](plots/detectors-train.png)")
    assert picture < text.index("[md](tables/detectors-train.md), [csv](tables/detectors-train.csv)")
    assert words.GIVEN_NOTES in text
    assert "detectors" not in report.write_report(tmp_path, frame(rows), "t", files=[]).read_text()


def test_report_says_why_a_track_is_judged_by_default(tmp_path: Path):
    blind = {"status": "refused", "reason": NOTHING_TO_VALIDATE_ON, "track": "train"}
    rows = [row("badnets", 0, name, 0.5, track="train", selection="default") for name in ("dial", "single")]
    rows += [row("badnets", 0, "single", 0.5, track="train"), row("badnets", 0, "dial", **blind)]
    text = report.write_report(tmp_path, frame(rows), "t", files=[]).read_text()
    assert f"Selection: default ({NOTHING_TO_VALIDATE_ON});" in text
    assert "Selection: validation" not in text
    text = report.write_report(tmp_path, frame(rows[:2]), "t", files=[]).read_text()  # a table without validation rows at all
    assert "Selection: default; " in text


def test_report_takes_the_files_it_is_given(tmp_path: Path):
    text = report.write_report(
        tmp_path, frame(rows_with(good=0.7)), "t", files=[tmp_path / "plots" / "scatter-model-clean.png"]
    ).read_text()
    assert "](plots/scatter-model-clean.png)" in text
    assert ".svg" not in text


def test_report_when_nothing_is_implanted(tmp_path: Path):
    text = report.write_report(tmp_path, frame([row("badnets", 0, "good", asr_undefended=0.3)]), "t").read_text()
    assert words.NOTHING in text
    assert "No cell was refused and none failed." in text


BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"


def test_the_front_page_gets_the_finding_between_its_markers_and_only_there(tmp_path: Path):
    rows = frame(rows_with(best=0.8, other=0.2, none=0.0))
    page = tmp_path / "README.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert report.write_front(page, rows, "results/m", "headline") is True
    text = page.read_text()
    assert text.startswith(f"above\n{BEGIN}\n- 1 of 2 entries (a defense and its scope) takes the mean attack success rate")
    assert "\n\nMatrix [m](results/m/README.md): digits, 1 attack, 1 backbone; seeds 0, 1, 2; 1 of 1 scenarios implanted.\n" in text
    assert text.endswith(f"{END}\nbelow\n")
    assert "old" not in text
    assert report.write_front(page, rows, "results/m", "headline") is False
    picture = tmp_path / "results" / "m" / "plots" / "leaderboard.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    (tmp_path / "results" / "m" / "manifest.json").write_text('{"versions": {"torch": "2.9", "scipy": "1"}}')
    assert report.write_front(page, rows, "results/m", "headline") is True
    assert "](results/m/plots/leaderboard.png)](results/m/README.md)\n\n- 1 of 2" in page.read_text()
    assert "; torch 2.9.\n" in page.read_text()
    drawn = tmp_path / "results" / "exhibits" / "reproduction.png"
    assert report.write_front(page, rows, "results/m", "headline", "reproduction") is False, "the exhibit was not drawn"
    drawn.parent.mkdir()
    drawn.touch()
    assert report.write_front(page, rows, "results/m", "headline", "reproduction") is True
    beside = "[![Reproduction: m](results/exhibits/reproduction.png)](results/EXHIBITS.md#reproduction)"
    assert f"](results/m/README.md) {beside}\n\n- 1 of 2" in page.read_text()
    page.write_text("no markers")
    assert report.write_front(page, rows, "results/m", "headline") is False
    assert report.write_front(tmp_path / "none.md", rows, "results/m", "headline") is False


def test_the_finding_is_three_sentences_by_hand():
    rows = rows_with(strong=0.8, weak=0.2, random=0.1, none=0.0)
    rows += [row("badnets", seed, "training-from-scratch", 0.5, control=True) for seed in (0, 1, 2)]
    rows += [row("badnets", seed, name, 0.9, selection="oracle") for seed in (0, 1, 2) for name in ("strong", "weak")]
    # ASR is 0.95 - RA; RA 0.82 and 0.22 on average, 0.9 under the oracle.
    assert report.finding(frame(rows)) == [
        "1 of 2 entries (a defense and its scope) takes the mean attack success rate (ASR) below 50 %: strong (ACC 90.0 %, "
        "ASR 13.0 %, RA 82.0 %), in the track model+clean.",
        "strong (whole) matches the *training-from-scratch* control (RA 50.0 %).",
        "Choosing every setting on the test set would raise the mean robust accuracy (RA) of these entries from 52.0 % to 90.0 %; "
        "no defender can choose so.",
    ]
    nobody = report.finding(frame(rows_with(weak=0.1, none=0.0)))
    assert nobody == ["None of 1 entries (a defense and its scope) takes the mean attack success rate (ASR) below 50 %."]
    assert report.finding(frame([row("badnets", 0, "good", asr_undefended=0.3)])) == [words.NOTHING]


def test_means_over_fewer_scenarios_are_named_and_not_compared():
    everywhere = [row(attack, seed, name, ra) for name, ra in (("good", 0.5), ("weak", 0.2)) for attack in ("badnets", "wanet")
                  for seed in (0, 1)]  # fmt: skip
    rows = frame([*everywhere, *(row("badnets", seed, "once", 0.9) for seed in (0, 1))])
    apart = "Not compared here, since run on fewer scenarios: on 1 of 2 scenarios once (whole)."
    first, *_, last = report.finding(rows)
    assert first.startswith("1 of 2 entries")
    assert "once" not in first
    assert last == apart
    assert apart in report.plain_words(rows)
    assert apart in report.summary(rows, "model+clean")
    assert "Best average rank by RA: **good (whole)**" in report.summary(rows, "model+clean")
    alone = frame([*(one for one in everywhere if one.defense == "weak"), *(row("badnets", 0, "once", 0.9, track="train"),)])
    assert f"- **train**: {apart}" in report.plain_words(alone)


def test_plain_words_count_by_hand():
    rows = rows_with(strong=0.8, weak=0.2, random=0.1, none=0.0)
    rows += [row("badnets", seed, "training-from-scratch", 0.5, control=True) for seed in (0, 1, 2)]
    text = report.plain_words(frame(rows))
    # ASR is 0.95 - RA: strong 0.13 on average, weak 0.73; RA 0.82 and 0.22 against controls of 0.5 and 0.12.
    assert text == (
        "- **model+clean**: 1 of 2 entries takes the mean ASR below 50 %: strong (whole) leaves ASR 13.0 % at ACC 90.0 %. strong "
        "(whole) matches the *training-from-scratch* control (RA 50.0 %).\n"
    )
    nobody = report.plain_words(frame(rows_with(weak=0.1, none=0.0)))
    assert nobody == "- **model+clean**: No entry takes the mean ASR below 50 %.\n"
    assert report.plain_words(frame([row("badnets", 0, "good", asr_undefended=0.3)])).endswith(f"{words.NOTHING}\n")
    behind = report.plain_words(frame([*rows_with(weak=0.1), *(row("badnets", seed, "random", 0.5) for seed in (0, 1, 2))]))
    assert "No defense matches the *random* control (RA 50.0 %)." in behind


def test_who_changed_nothing_is_never_called_best():
    rows = [*rows_with(weak=0.2), *(row("badnets", seed, "idle", 0.8, mark="no change") for seed in (0, 1, 2))]
    assert report.summary(frame(rows), "model+clean").startswith(
        "Best average rank by RA of those that changed a model: **weak (whole)**"
    )
    text = report.plain_words(frame(rows))
    assert "No entry takes the mean ASR below 50 %." in text
    assert "No model was changed in any cell by idle (whole)." in text
    alone = frame([row("badnets", 0, "idle", 0.8, mark="no change")])
    assert report.summary(alone, "model+clean") == "No entry changed a model, so none is called best."
    once = [*rows_with(weak=0.2), *(row("badnets", s, "some", 0.8, mark="no change" if s else "", kept=s == 2) for s in (0, 1, 2))]
    assert "Marks: no change in 1 of 3, kept untouched in 1 of 3." in report.summary(frame(once), "model+clean")


def test_plain_words_say_what_was_singled_out():
    rows = [
        row("badnets", seed, "finder", 0.7, selection=how, isolated=10, precision=0.4 + 0.1 * seed, recall=0.2, train_images=100)
        for seed in (0, 1, 2)
        for how in ("default", "validation")
    ]
    text = report.plain_words(frame(rows))
    assert "Isolated set of finder (whole): precision 50 % (base rate 10 %), recall 20 %." in text
    failed = frame([row("badnets", 0, "finder", 0.7, isolated=10, precision=0.1, recall=0.2, train_images=100, selection=how,
                        mark="mechanism failed") for how in ("default", "validation")])  # fmt: skip
    assert "recall 20 %; mechanism failed in 1 of 1 cells." in report.plain_words(failed)


def test_a_matrix_has_markers_of_its_own(tmp_path: Path):
    rows, page = frame(rows_with(best=0.8, none=0.0)), tmp_path / "README.md"
    page.write_text("<!-- words:m:begin -->\nold\n<!-- words:m:end -->\n<!-- words:n:begin -->\nkept\n<!-- words:n:end -->\n")
    assert report.write_front(page, rows, "results/m", "words:m") is True
    text = page.read_text()
    assert "old" not in text
    assert "kept" in text
    assert "1 of 1 scenarios" in text
    assert report.write_front(page, rows, "results/m", "words:m") is False
    assert report.write_front(page, rows, "results/unnamed", "words:unnamed") is False


def test_a_matrix_of_attacks_alone_shows_the_attacked_models_and_no_board(tmp_path: Path):
    table = frame([row("badnets", seed, "none", selection=name, gate="implanted; no literature reference: another network")
                   for seed in (0, 1) for name in ("default", "validation", "oracle")])  # fmt: skip
    curves, timings = (pd.DataFrame(columns=[*kind.__dataclass_fields__]) for kind in (Curve, Timing))
    written = {path.name for path in tables.write_tables(table, curves, timings, tmp_path, "tiny")}
    assert not any(name.startswith(("leaderboard", "given", "attacks-")) for name in written)
    text = report.write_report(tmp_path, table, "tiny").read_text()
    assert "| track | none |" in text
    assert "## In plain words" not in text
    assert "## Track" not in text
    shown = text.split("## The attacked models")[1]
    assert "| badnets | **implanted** |" in shown
    assert "no reference: another network" in shown
