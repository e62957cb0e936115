"""Tables: figures by hand, hostile names, missing data, a second run."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from benchmark import tables
from benchmark.rows import Curve, Row, Timing, frame, read, write

HOSTILE = "=x|y<b>$z_1%&#{}\\ [a](b) `c` *d* \x1b[31m\nnew\u202e"


def row(attack: str, seed: int, defense: str, ra: float = 0.0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "digits", "backbone": "net", "attack": attack, "rate": 0.1, "seed": seed, "track": "model+clean",
        "scope": "whole", "defense": defense, "cell": f"{attack}{seed}{defense}", "target": 0, "label_mode": "all-to-one",
        "realised_rate": 0.1, "control": defense in ("none", "random"), "selection": "validation", "status": "ok", "acc": 0.9,
        "asr": 0.95 - ra, "ra": ra, "der": 0.5, "acc_undefended": 0.95, "asr_undefended": 1.0, "ra_undefended": 0.0,
        "acc_benign": 0.96, "implanted": True, "gate": "implanted", "pruned": 10, "units": 100, "cost_epochs": 0.125,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def field(seeds: int = 2, **more: object) -> list[Row]:
    return [
        row(attack, seed, name, ra + 0.02 * seed, selection=selection, **more)
        for selection in ("default", "validation", "oracle")
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
    assert good[9:] == ["10 / 100", "0.125", "1.00", "4 / 4"]
    assert "n implanted 2 of 2 scenarios (4 of 4 attacked models)" in text
    assert "badnets (10 %)" in text
    assert "none (undefended)" in text
    assert text.index("| weak |") < text.index("Reference and controls, not ranked") < text.index("| random |")


def test_oracle_has_no_places(tmp_path):
    text = run(field(), tmp_path)["leaderboard-model-clean-oracle.md"]
    good = next(cells(line) for line in text.splitlines() if "| good |" in line)
    assert (good[0], good[11]) == ("", "\N{EN DASH}")
    assert "never ranked" in text


def test_second_run_changes_no_byte(tmp_path):
    first = run(field(), tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert run(field(), tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == stamps


def test_tables_of_a_read_file_equal_those_of_the_frame(tmp_path):
    rows = field()
    write(tmp_path / "rows.csv", Row, rows)
    assert tables.leaderboard_markdown(
        tables.stats.leaderboard(read(tmp_path / "rows.csv", Row), "model+clean", "validation"), ""
    ) == (tables.leaderboard_markdown(tables.stats.leaderboard(frame(rows), "model+clean", "validation"), ""))


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
    written = run(field(implanted=False), tmp_path)
    assert tables.NOTHING in written["leaderboard-model-clean-validation.md"]
    assert written["leaderboard-model-clean-validation.tex"] == f"% {tables.NOTHING}\n"
    assert "not implanted (0 of 2 seeds)" in written["attacks-model-clean-validation.md"]
    assert "**no**, 0 of 2 seeds" in written["attack-validity.md"]


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
        for name in tables.stats.SELECTIONS
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
    assert line[3:8] == ["10 %", "9.94 %", "all-to-one, target 0", "0, 1", "90.0, 91.0"]
    assert line[9] == "30.0, 70.0"
    assert line[11:] == ["**no**, 1 of 2 seeds", "seed 0: gate of 0; seed 1: gate of 1"]


def test_selection_gap_table(tmp_path):
    asr = {"oracle": 0.1, "validation": 0.2, "default": 0.4}
    rows = [row("badnets", seed, "good", selection=name, asr=value, dial=1.0) for name, value in asr.items() for seed in (0, 1)]
    rows += [row("badnets", seed, "plain", selection=name) for name in asr for seed in (0, 1)]
    text = run(rows, tmp_path)["selection-gap.md"]
    good = next(cells(line) for line in text.splitlines() if "| good |" in line)
    assert good[-2:] == ["+10.0 [+10.0, +10.0]", "+30.0 [+30.0, +30.0]"]
    assert "no dial, or no finished cell): plain (whole)." in text


def test_hostile_names_break_nothing(tmp_path):
    rows = [
        row(r.attack + HOSTILE, r.seed, HOSTILE if r.defense == "good" else r.defense, r.ra, selection=r.selection, track=HOSTILE)
        for r in field()
    ]
    written = run(rows, tmp_path, title=HOSTILE)
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
    tex = next(text for name, text in written.items() if name.endswith("validation.tex"))
    body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")]
    for line in body.splitlines()[1:]:
        if line != r"\midrule":
            assert len(re.findall(r"(?<!\\)&", line)) == 12
            assert not re.search(r"(?<!\\)[#%_]", line.removesuffix(r" \\"))


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
    assert tables.latex(raw) == expected


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
    assert tables.markdown(raw) == expected


@pytest.mark.parametrize("start", list("=+-@"))
def test_csv_starts_no_formula(start):
    text = tables.csv_text(pd.DataFrame({"name": [f"{start}1+1"], "value": [-0.5], "none": [float("nan")]}))
    assert text == f"name,value,none\n'{start}1+1,-0.5,\n"


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, "0"), (0.03125, "0.0312"), (1.5, "1.5"), (12.34, "12.3"), (4800.0, "4800"), (100.0, "100")]
)
def test_number(value, expected):
    assert tables._number(value) == expected


def test_slug():
    assert tables.slug("model+clean") == "model-clean"
    assert tables.slug("../..") == "unnamed"


def test_console_fits_a_hundred_columns():
    rows = [
        row(r.attack, r.seed, "a_very_long_defense_name_that_goes_on_and_on[red]" if r.defense == "good" else r.defense, r.ra)
        for r in field()
    ]
    out = io.StringIO()
    console = Console(file=out, width=100)
    for table in tables.console_leaderboard(frame(rows)):
        console.print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "n implanted 2 of 2 scenarios" in text
    assert "71.0" in text
    assert next(line for line in text.splitlines() if "weak" in line).split("│")[1].strip() == "2"


def test_console_says_when_nothing_is_implanted():
    out = io.StringIO()
    for table in tables.console_leaderboard(frame(field(implanted=False))):
        Console(file=out, width=100).print(table)
    assert "No attack was implanted" in out.getvalue()
