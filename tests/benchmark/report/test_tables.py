"""Tables: figures by hand, hostile names, missing data, a second run."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from benchmark.analysis import stats
from benchmark.report import text as texts
from benchmark.report import words
from benchmark.report.tables import boards
from benchmark.report.tables import write as tables
from benchmark.storage.rows import Curve, Row, Timing, frame, read, write

HOSTILE = "=x|y<b>$z_1%&#{}\\ [a](b) `c` *d* \x1b[31m\nnew\u202e"


def row(attack: str, seed: int, defense: str, ra: float = 0.0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "digits", "backbone": "net", "attack": attack, "rate": 0.1, "seed": seed, "track": "model+clean",
        "scope": "whole", "defense": defense, "cell": f"{attack}{seed}{defense}", "target": 0, "label_mode": "all-to-one",
        "realised_rate": 0.1, "control": defense in ("none", "random"), "selection": "validation", "status": "ok", "acc": 0.9,
        "asr": 0.95 - ra, "ra": ra, "der": 0.5, "acc_undefended": 0.95, "asr_undefended": 1.0, "ra_undefended": 0.0,
        "acc_benign": 0.96, "asr_benign": 0.02, "acc_loss_se": 0.005, "implanted": True, "gate": "implanted", "pruned": 10,
        "units": 100, "cost_epochs": 0.125,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def field(seeds: int = 2, **more: object) -> list[Row]:
    return [
        row(attack, seed, name, ra + 0.02 * seed, selection=selection, **more)
        for selection in ("default", "validation", "oracle", "leaky")
        for name, ra in (("good", 0.7), ("weak", 0.2), ("none", 0.0), ("random", 0.1))
        for attack in ("badnets", "wanet")
        for seed in range(seeds)
    ]


def run(rows: list[Row], folder: Path, title: str = "tiny") -> dict[str, str]:
    none = pd.DataFrame(columns=[*Curve.__dataclass_fields__])
    times = frame(
        [
            Timing(
                **{
                    name: getattr(r, name)
                    for name in ("matrix", "dataset", "backbone", "attack", "rate", "seed", "track", "scope", "defense", "cell")
                },
                seconds=2.0,
                peak_mib=512.0,
                victim_seconds=8.0,
            )
            for r in rows
            if r.selection == "validation"
        ]
    )
    written = tables.write_tables(frame(rows), none, times, folder, title)
    assert all(path.is_file() for path in written)
    return {path.name: path.read_text() for path in written}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_leaderboard_line_by_hand(tmp_path):
    text = run(field(), tmp_path)["leaderboard-model-clean-validation.md"]
    good = next(cells(line) for line in text.splitlines() if "| good |" in line)
    assert good[:3] == ["1", "good", "whole"]
    assert good[3] == "90.0 [90.0, 90.0]"
    assert good[5].startswith("71.0 [70.")  # (0.70 + 0.72) / 2
    assert good[7] == "-5.0 [-5.0, -5.0]"
    assert good[9:] == ["10 / 100", "0.125", "", "1.00", "4 / 4"]
    assert "2 of 2 scenarios implanted." in text
    assert "badnets (10 %)" in text
    assert "none (undefended)" in text
    assert text.index("| weak |") < text.index("Reference and controls, not ranked") < text.index("| random |")


def test_oracle_has_no_places(tmp_path):
    text = run(field(), tmp_path)["leaderboard-model-clean-oracle.md"]
    good = next(cells(line) for line in text.splitlines() if "| good |" in line)
    assert (good[0], good[12]) == ("", "\N{EN DASH}")
    assert "never ranked" in text


def test_second_run_changes_no_byte(tmp_path):
    first = run(field(), tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert run(field(), tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == stamps


def test_tables_of_a_read_file_equal_those_of_the_frame(tmp_path):
    rows = field()
    write(tmp_path, rows, [], [])
    assert boards.leaderboard_markdown(
        stats.leaderboard(read(tmp_path / "rows.csv", Row), "model+clean", "validation"), ""
    ) == (boards.leaderboard_markdown(stats.leaderboard(frame(rows), "model+clean", "validation"), ""))


def test_seconds_stand_in_the_cost_table_alone(tmp_path):
    written = run(field(), tmp_path)
    assert [name for name, text in written.items() if "Seconds, median" in text] == ["cost.md"]
    good = next(cells(line) for line in written["cost.md"].splitlines() if "| good |" in line)
    assert good[3:] == ["2", "25.0 %", "0.125", "512", "4"]


def test_single_seed_prints_no_bracket(tmp_path):
    written = run(field(seeds=1), tmp_path)
    good = next(line for line in written["leaderboard-model-clean-validation.md"].splitlines() if "| good |" in line)
    assert "[" not in good
    assert "nan" not in "".join(written.values()).lower().replace("dominan", "")
    assert "±" not in next(line for line in written["attacks-model-clean-validation.md"].splitlines() if "| good |" in line)


def test_nothing_implanted_is_a_sentence(tmp_path):
    written = run(field(asr_undefended=0.3, implanted=False), tmp_path)
    assert words.NOTHING in written["leaderboard-model-clean-validation.md"]
    assert written["leaderboard-model-clean-validation.tex"] == f"% {words.NOTHING}\n"
    assert "badnets<br>not implanted" in written["attacks-model-clean-validation.md"]
    assert "**not implanted**" in written["attack-validity.md"]
    twins = run(field(asr_benign=0.9), tmp_path / "twins")
    assert words.NOTHING in twins["leaderboard-model-clean-validation.md"]
    assert "badnets<br>adversarial" in twins["attacks-model-clean-validation.md"]
    assert "0 of 2 scenarios implanted, 2 adversarial." in twins["attack-validity.md"]


def test_marks_and_the_board_of_stealthy_attacks(tmp_path):
    idle = {"mark": "no change"}
    rows = [row(r.attack, r.seed, r.defense, r.ra, selection=r.selection,
                **{**(idle if r.defense == "weak" else {}), **({"acc_undefended": 0.8} if r.attack == "wanet" else {})})
            for r in field()]  # fmt: skip
    written = run(rows, tmp_path)
    board = written["leaderboard-model-clean-validation.md"]
    assert next(cells(line) for line in board.splitlines() if "| weak |" in line)[11] == "no change in 4 of 4"
    assert "2 of 2 scenarios implanted (1 of them costs ACC)." in board
    quiet = written["leaderboard-model-clean-validation-stealthy.md"]
    assert next(cells(line) for line in quiet.splitlines() if "| weak |" in line)[11] == "no change in 2 of 2"
    assert "1 of 1 scenarios implanted." in quiet
    assert "wanet<br>implanted, costs ACC" in written["attacks-model-clean-validation.md"]
    assert not any("stealthy" in name for name in run(field(), tmp_path / "other"))


def test_a_validation_part_that_cannot_tell_the_tolerance_says_so(tmp_path):
    text = run(field(clean_images=288), tmp_path)["leaderboard-model-clean-validation.md"]
    assert "The validation part holds 58 images, too few to detect a loss of 4 points" in text
    assert "the standard error of the loss is 4.2 points" in text
    assert "The validation part" not in run(field(clean_images=2500), tmp_path / "o")["leaderboard-model-clean-validation.md"]


def test_missing_cells_print_their_reason(tmp_path):
    nan = float("nan")
    rows = [r for r in field() if r.defense != "weak"]
    rows += [
        row(
            attack,
            seed,
            "weak",
            nan,
            selection=name,
            acc=nan,
            asr=nan,
            status="refused" if attack == "wanet" else "ok" if seed else "failed",
            reason="" if attack == "badnets" and seed else f"why | {attack}",
        )
        for name in stats.SELECTIONS
        for attack in ("badnets", "wanet")
        for seed in (0, 1)
    ]
    rows = [
        row(r.attack, r.seed, "weak", 0.4, selection=r.selection) if r.defense == "weak" and r.status == "ok" else r for r in rows
    ]
    written = run(rows, tmp_path)
    detail = next(cells(line) for line in written["attacks-model-clean-validation.md"].splitlines() if "| weak |" in line)
    assert detail[2] == "90.0 / 55.0 / 40.0 (1 of 2 seeds)"
    assert detail[3] == r"refused: why \| wanet"
    board = written["leaderboard-model-clean-validation.md"]
    assert r"- weak (whole): failed in 1 of 4: why \| badnets; refused in 2 of 4: why \| wanet" in board
    assert len([line for line in written["missing.md"].splitlines() if "| weak |" in line]) == 2


def test_wholly_refused_line_says_so(tmp_path):
    rows = [
        row(r.attack, r.seed, "weak", selection=r.selection, status="refused", reason="no data") if r.defense == "weak" else r
        for r in field()
    ]
    text = run(rows, tmp_path)["leaderboard-model-clean-validation.md"]
    weak = next(cells(line) for line in text.splitlines() if "| weak |" in line)
    assert weak[3] == "refused"
    assert weak[-1] == "0 / 4"


def test_detail_is_mean_and_sample_deviation(tmp_path):
    text = run(field(), tmp_path)["attacks-model-clean-validation.md"]
    good = next(cells(line) for line in text.splitlines() if "| good |" in line)
    assert good[2] == "90.0±0.0 / 24.0±1.4 / 71.0±1.4"  # sqrt(2) * 0.01 = 1.41 points


def test_validity_lists_every_seed(tmp_path):
    rows = [
        row(
            "badnets",
            seed,
            "good",
            acc_benign=0.9 + 0.01 * seed,
            asr_undefended=0.3 + 0.4 * seed,
            implanted=seed == 1,
            gate=f"gate of {seed}",
            realised_rate=0.0994,
        )
        for seed in (0, 1)
    ]
    line = next(cells(line) for line in run(rows, tmp_path)["attack-validity.md"].splitlines() if "| badnets |" in line)
    assert line[3:7] == ["**not implanted**", "50.0", "2.0", "48.0"]
    assert line[7] == "-4.5"  # a gain: 95.0 where the twins have 90.0 and 91.0
    assert line[9:14] == ["10 %", "9.94 %", "all-to-one, target 0", "0, 1", "90.0, 91.0"]
    assert line[15] == "30.0, 70.0"
    assert line[17:] == ["seed 0: gate of 0; seed 1: gate of 1", "\N{EN DASH}", "\N{EN DASH}"]


def test_validity_tells_the_literature_from_the_gate_and_shows_the_notes_of_the_undefended(tmp_path):
    failed = "not implanted: ASR 1.0 < 50"
    gates = ["implanted; literature: PASS (published ACC 93.0, ASR 95.0)", f"{failed}; no literature reference: another network"]
    rows = [row("badnets", 0, name, gate=gates[0], note=f"of {name}") for name in ("good", "none")]
    rows += [row("wanet", seed, "none", gate=gates[1], note=f"seed {seed}" * seed) for seed in (0, 1)]
    text = run(rows, tmp_path)["attack-validity.md"]
    badnets, wanet = (next(cells(line) for line in text.splitlines() if f"| {name} |" in line) for name in ("badnets", "wanet"))
    assert badnets[17:] == ["implanted", "PASS (published ACC 93.0, ASR 95.0)", "of none"]
    assert wanet[17] == failed.replace("<", "&lt;")
    assert wanet[18:] == ["no reference: another network", "seed 0: ; seed 1: seed 1"]


def test_frozen_and_recraft_stand_side_by_side_where_a_trigger_needs_the_model(tmp_path):
    rows = [row("natural", seed, "good", 0.4 + 0.2 * seed, asr=0.2, asr_recraft=0.6 + 0.2 * seed, ra_recraft=0.1, asr_benign=1.0)
            for seed in (0, 1)]  # fmt: skip
    rows += [row("badnets", 0, "good"), row("natural", 0, "weak", status="failed", reason="why")]
    lines = run(rows, tmp_path)["protocols-model-clean-validation.md"].splitlines()
    assert [cells(line)[5:] for line in lines if "| natural |" in line] == [
        ["**no**", "90.0±0.0", "20.0±0.0", "50.0±14.1", "70.0±14.1", "10.0±0.0"]
    ]
    assert not any("badnets" in line or "weak" in line for line in lines)
    assert "protocols-model-clean-validation.md" not in run([row("badnets", 0, "good")], tmp_path / "other")


def test_selection_gap_table(tmp_path):
    ra = {"oracle": 0.8, "validation": 0.7, "default": 0.5, "leaky": 0.6}
    asr = {"oracle": 0.1, "validation": 0.2, "default": 0.4, "leaky": 0.05}
    rows = [row("badnets", seed, "good", ra[name], selection=name, asr=asr[name], dial=1.0, cell=f"good{seed}")
            for name in ra for seed in (0, 1)]  # fmt: skip
    rows += [row("badnets", seed, "plain", selection=name) for name in asr for seed in (0, 1)]
    text = run(rows, tmp_path)["selection-gap.md"]
    good = next(cells(line) for line in text.splitlines() if "| good |" in line)
    assert good[-4:] == ["+10.0 [+10.0, +10.0]", "+30.0 [+30.0, +30.0]", "+15.0 [+15.0, +15.0]", "+35.0 [+35.0, +35.0]"]
    assert "no dial, no finished cell, or nothing to validate on): plain (whole)." in text


def test_hostile_names_break_nothing(tmp_path):
    rows = [
        row(r.attack + HOSTILE, r.seed, HOSTILE if r.defense == "good" else r.defense, r.ra, selection=r.selection, track=HOSTILE,
            used="train", extractor=HOSTILE, preset=HOSTILE, isolated=1, precision=0.5, recall=0.5)
        for r in field()
    ]  # fmt: skip
    written = run(rows, tmp_path, title=HOSTILE)
    assert {"given", "detectors"} <= {name.split("-")[0] for name in written}
    for name, text in written.items():
        assert "\x1b" not in text
        assert "\u202e" not in text
        if name.endswith(".md"):
            assert "<b>" not in text
            for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
                assert len({len(cells(line)) for line in block.splitlines()}) == 1, (name, block)
    board = next(text for name, text in written.items() if name.startswith("leaderboard") and name.endswith("validation.csv"))
    parsed = list(csv.reader(io.StringIO(board)))
    assert len({len(line) for line in parsed}) == 1
    assert all(line[0].startswith("'=") for line in parsed[1:])
    for start, columns in (("leaderboard", 14), ("given", 10)):
        tex = next(text for name, text in written.items() if name.startswith(start) and name.endswith(".tex"))
        body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")]
        for line in body.splitlines()[1:]:
            if line != r"\midrule":
                assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
                assert not re.search(r"(?<!\\)[#%_]", line.removesuffix(r" \\"))
    for start in ("given", "detectors"):
        table = next(text for name, text in written.items() if name.startswith(start) and name.endswith(".csv"))
        parsed = list(csv.reader(io.StringIO(table)))
        assert len({len(line) for line in parsed}) == 1
        assert all(line[0].startswith("'=") for line in parsed[1:])


# -- what the defender was given -----------------------------------------------------------------------------------------------

POISONED = "self-supervised on the poisoned images"
KINDS: dict[str, dict[str, object]] = {
    "edits": {"used": "model + clean", "clean_images": 120, "preset": "cpu"},
    "bare": {"used": "model"},
    "anew": {"used": "train", "train_images": 480, "trained_anew": True, "preset": "smoke; a_b=1"},
    "features": {"used": "train", "train_images": 480, "trained_anew": True, "extractor": POISONED, "extractor_epochs": 4.0},
    "vouched": {"used": "train + seeds", "train_images": 480, "trained_anew": True},
    "lost": {"status": "refused", "reason": "why", "cost_epochs": float("nan")},
    "none": {"used": "model", "control": True},
    "scratch": {"used": "clean", "clean_images": 120, "trained_anew": True, "control": True},
    "filter": {"used": "roles", "train_images": 480, "trained_anew": True, "control": True, "track": "control"},
    "means": {"used": "clean + extractor", "clean_images": 120, "extractor": "given", "extractor_epochs": 0.0, "control": True},
    "probe": {"used": "train + extractor", "train_images": 480, "extractor": "given", "extractor_epochs": 4.0, "control": True},
}
DASH = "\N{EN DASH}"
WORDS = {  # model, clean labelled images, training images, extractor, controls training, preset, cost, of which extractor
    "edits": ["edited", "120", "none", "none", "no", "cpu", "0.125", DASH],
    "bare": ["edited", "none", "none", "none", "no", DASH, "0.125", DASH],
    "anew": ["replaced", "none", "480 as published", "none", "yes", "smoke; a_b=1", "0.125", DASH],
    "features": ["replaced", "none", "480 as published", POISONED, "yes", DASH, "0.125", "4"],
    "vouched": ["replaced", "none", "480 as published, some known clean", "none", "yes", DASH, "0.125", DASH],
    "lost": ["refused", *[DASH] * 7],
    "none (undefended)": ["unchanged", "none", "none", "none", "no", DASH, "0.125", DASH],
    "scratch": ["replaced", "120", "none", "none", "yes", DASH, "0.125", DASH],
    "filter": ["replaced", "none", "without the poison (of 480)", "none", "yes", DASH, "0.125", DASH],
    "means": ["replaced", "120", "none", "given", "no", DASH, "0.125", "0"],
    "probe": ["replaced", "none", "480 as published", "given", "no", DASH, "0.125", "4"],
}


def kinds(**more: object) -> list[Row]:
    """Controls first, to see them moved to the end."""
    return [
        row("badnets", seed, name, 0.5, **{"control": False, **settings, **more})
        for name, settings in [*list(KINDS.items())[6:], *list(KINDS.items())[:6]] for seed in (0, 1)
    ]  # fmt: skip


def test_given_words_for_every_kind_of_defense(tmp_path):
    written = run(kinds(), tmp_path)
    lines = [cells(line) for line in written["given-model-clean.md"].splitlines() if line.startswith("| ")]
    assert {line[0]: line[2:] for line in lines[2:] if line[1]} == WORDS
    assert [line[0] for line in lines[2:]] == [
        "edits", "bare", "anew", "features", "vouched", "lost", "**Reference and controls**",
        "none (undefended)", "scratch", "means", "probe", "filter",
    ]  # fmt: skip
    assert "Controls training: it trains a network from initial weights itself." in written["given-model-clean.md"]
    records = {line["defense"]: line for line in csv.DictReader(io.StringIO(written["given-model-clean.csv"]))}
    assert (records["filter"]["training_images"], records["filter"]["train_images_max"]) == ("without the poison", "480")
    assert (records["lost"]["missing"], records["lost"]["clean_images_min"]) == ("refused", "")
    assert (records["anew"]["controls_training"], records["probe"]["controls_training"]) == ("yes", "no")
    assert r"smoke; a\_b=1 & 0.125 & -- \\" in written["given-model-clean.tex"]


def test_given_numbers_that_differ_are_a_range_and_words_a_choice(tmp_path):
    rows = [row("badnets", 0, "d", used="model + clean", clean_images=96, preset="cpu"),
            row("wanet", 0, "d", used="model + clean + train", clean_images=400, train_images=7, cost_epochs=0.5)]  # fmt: skip
    text = run(rows, tmp_path)["given-model-clean.md"]
    found = next(cells(line) for line in text.splitlines() if line.startswith("| d |"))
    assert found[2:] == ["edited", f"96{DASH}400", f"0{DASH}7 none or as published", "none", "no", f"cpu or {DASH}", "0.312", DASH]


def test_given_is_there_when_nothing_is_implanted(tmp_path):
    assert "| edits |" in run(kinds(asr_undefended=0.3), tmp_path)["given-model-clean.md"]


# -- samples singled out -------------------------------------------------------------------------------------------------------


def test_no_table_of_detectors_where_nothing_is_isolated(tmp_path):
    assert not any(name.startswith("detectors") for name in run(field(), tmp_path))


def test_detector_lines_by_hand(tmp_path):
    told = {"selection": "default", "used": "train", "train_images": 200, "track": "train"}
    rows = [row("badnets", seed, "abl", isolated=10 + seed, precision=0.5 + 0.2 * seed, recall=0.25, auroc=0.75, **told)
            for seed in (0, 1)]  # fmt: skip
    note = f"training-control attack: {stats.EXPORTED}"
    rows += [row("badnets", 0, "abl", track="train"),
             row("wanet", 0, "abl", isolated=0, recall=0.0, auroc=0.5, asr_undefended=0.3, note=note, **told),
             row("wanet", 1, "abl", isolated=5, precision=1.0, recall=0.5, asr_undefended=0.3, **told),
             row("sig", 0, "abl", **{**told, "status": "failed", "reason": "why"})]  # fmt: skip
    written = run(rows, tmp_path)
    lines = [cells(line)[4:] for line in written["detectors-train.md"].splitlines() if line.startswith("| abl |")]
    assert lines == [
        ["badnets", "yes", "10.5", "5.3", "60.0±14.1", "25.0±0.0", "75.0±0.0", "10.0"],
        [f"wanet<br>{stats.EXPORTED}", "**no**", "2.5", "1.2", "100.0 (1 of 2 seeds)", "25.0±35.4", "50.0 (1 of 2 seeds)", "10.0"],
        ["sig", "yes", "failed", DASH, DASH, DASH, DASH, "10.0"],
    ]
    assert f"Attacks marked *{stats.EXPORTED}*" in written["detectors-train.md"]
    first = next(csv.DictReader(io.StringIO(written["detectors-train.csv"])))
    assert (first["track"], first["precision"], first["isolated_share"], first["base_rate"]) == ("train", "0.6", "0.0525", "0.1")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a_b", r"a\_b"),
        ("50%", r"50\%"),
        ("\\x", r"\textbackslash{}x"),
        ("{}", r"\{\}"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
    ],
)
def test_latex(raw, expected):
    assert texts.latex(raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a_b", "a_b"),
        ("_a_", r"\_a\_"),
        ("a|b", r"a\|b"),
        ("<i>&", "&lt;i&gt;&amp;"),
        ("a\n\n# b", "a # b"),
        ("[x](y)", r"\[x\](y)"),
    ],
)
def test_markdown(raw, expected):
    assert texts.markdown(raw) == expected


@pytest.mark.parametrize("start", list("=+-@"))
def test_csv_starts_no_formula(start):
    text = texts.csv_text(pd.DataFrame({"name": [f"{start}1+1"], "value": [-0.5], "none": [float("nan")]}))
    assert text == f"name,value,none\n'{start}1+1,-0.5,\n"


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, "0"), (0.03125, "0.0312"), (1.5, "1.5"), (12.34, "12.3"), (4800.0, "4800"), (100.0, "100")]
)
def test_number(value, expected):
    assert texts.number_text(value) == expected


def test_slug():
    assert texts.slug("model+clean") == "model-clean"
    assert texts.slug("../..") == "unnamed"


def test_console_fits_a_hundred_columns():
    rows = [
        row(r.attack, r.seed, "a_very_long_defense_name_that_goes_on_and_on[red]" if r.defense == "good" else r.defense, r.ra)
        for r in field()
    ]
    out = io.StringIO()
    console = Console(file=out, width=100)
    for table in boards.console_leaderboard(frame(rows)):
        console.print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "2 of 2 scenarios implanted" in text
    assert "71.0" in text
    assert next(line for line in text.splitlines() if "weak" in line).split("│")[1].strip() == "2"


def test_console_keeps_place_and_scope_at_eighty_columns():
    rows = [row(r.attack, r.seed, f"{r.defense} with a name of many words", r.ra, scope=scope, control=r.control)
            for r in field() if r.selection == "validation" for scope in ("head", "whole")]  # fmt: skip
    out = io.StringIO()
    for table in boards.console_leaderboard(frame(rows)):
        Console(file=out, width=80).print(table)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if line.startswith("│")]
    assert max(map(len, out.getvalue().splitlines())) <= 80
    first = [line for line in lines if line[3]]  # a wrapped name goes on in lines without figures
    assert [(line[0], line[2]) for line in first[:4]] == [("1", "head"), ("1", "whole"), ("3", "head"), ("3", "whole")]
    assert [line[2] for line in first] == ["head", "whole"] * 4


def test_console_says_when_nothing_is_implanted():
    out = io.StringIO()
    for table in boards.console_leaderboard(frame(field(asr_undefended=0.3))):
        Console(file=out, width=100).print(table)
    assert "No attack was implanted" in out.getvalue()
