"""Published figures beside ours: what is compared with what, the bands by plain loops, nothing where there is no counterpart."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pandas as pd
import pytest

import benchmark
from benchmark.analysis import published, stats
from benchmark.report import charts as plots
from benchmark.report import words as sentences
from benchmark.report.tables import write as tables
from benchmark.storage.rows import Curve, Row, Timing, frame

DASH = "\N{EN DASH}"
FOLDER = Path(benchmark.__file__).parent / "analysis" / "published"


def row(defense: str, seed: int = 0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "cifar10", "backbone": "preact-resnet18-w64", "attack": "badnets", "rate": 0.1, "seed": seed,
        "track": "model+clean", "scope": "whole", "defense": defense, "cell": f"{defense}{seed}", "target": 0,
        "label_mode": "all-to-one", "realised_rate": 0.1, "control": defense == "none", "selection": "validation", "status": "ok",
        "acc": 0.9, "asr": 0.2 + 0.1 * seed, "ra": 0.5, "acc_undefended": 0.95, "asr_undefended": 1.0, "ra_undefended": 0.0,
        "acc_benign": 0.96, "implanted": True, "preset": "cpu",
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def every(defense: str, **more: object) -> list[Row]:
    return [row(defense, seed, selection=how, **more) for seed in (0, 1) for how in ("default", "validation", "leaky")]


def test_the_table_holds_figures_once_each_with_their_source_and_none_known_to_be_wrong() -> None:
    with (FOLDER / "defended.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    named = ("dataset", "backbone", "attack", "labels", "rate", "defense", "source")
    keys = [tuple(line[name] for name in named) for line in lines]
    assert len(set(keys)) == len(keys) > 1900
    assert all(line["source"] for line in lines)
    assert all(0 <= float(line[name]) <= 100 for line in lines for name in ("acc", "asr", "ra") if line[name])
    assert all(float(line["asr"]) + float(line["ra"]) <= 100.5 for line in lines if line["ra"])
    assert {line["chosen_on"] for line in lines} == {"", published.TEST_ASR, "test ACC"}
    assert not [line for line in lines if (line["backbone"], line["attack"]) == ("vgg19-bn", "lf")]
    clean_label = [line for line in lines if line["dataset"] == "cifar10" and line["attack"] in ("lc", "sig")]
    assert clean_label
    assert "0.1" not in {line["rate"] for line in clean_label}
    told = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(line["source"].split(",")[0] in told for line in lines), "a source the README does not name"


def test_all_figures_are_read_as_shares_and_the_undefended_ones_once() -> None:
    found = published.printed()
    lines = sum(len((FOLDER / name).read_text(encoding="utf-8").splitlines()) - 1 for name in ("defended.csv", "undefended.csv"))
    assert len(found) == lines
    (board,) = (f for f in found if (f.dataset, f.backbone, f.attack, f.rate, f.defense, f.source, f.labels) ==
                ("cifar10", "preact-resnet18", "badnets", 0.1, "none", published.BOARD, "all-to-one"))  # fmt: skip
    assert (board.acc, board.asr, board.ra) == pytest.approx((0.9132, 0.9503, 0.0467))
    assert all(math.isnan(value) or 0 <= value <= 1 for f in found for value in (f.rate, f.acc, f.asr, f.ra))


@pytest.mark.parametrize(
    ("label", "expected"),
    [("blended 2 %", "blended"), ("blended", "blended"), ("anp, budget 1 %", "anp"), ("anpx", None),
     ("fine-pruning", "fine-pruning"), ("", None),
     ("my anp", None), ("blended-clean", "blended-clean"), ("cifar100", "cifar100"), ("cifar10-q95", "cifar10"),
     ("cifar1000", None)],
)  # fmt: skip
def test_a_label_stands_for_the_published_name_it_begins_with(label: str, expected: str | None) -> None:
    names = {"blended", "blended-clean", "anp", "pruning", "fine-pruning", "cifar10", "cifar100"}
    assert published.counterpart(label, names) == expected


def test_the_same_network_and_rate_where_there_are_and_both_sources_make_the_band() -> None:
    (reference, anp) = published.comparisons(frame([*every("none"), *every("anp"), *every("hid")]), "model+clean")
    assert (reference.role, anp.role) == ("reference", "defense")
    assert [(f.backbone, f.rate) for f in anp.printed] == [("preact-resnet18", 0.1)] * 2
    assert published.band(f.asr for f in anp.printed) == pytest.approx((0.0073, 0.0383))  # the board and FT-SAM, Table 1
    assert published.band(f.ra for f in anp.printed) == pytest.approx((0.8404, 0.8404))  # FT-SAM prints none
    assert [seed["asr"] for seed in anp.measured] == pytest.approx([0.2, 0.3])
    assert len(anp.leaky) == 2  # the board chose on the test ASR
    assert reference.leaky == ()
    assert not anp.same_protocol
    assert all(math.isnan(value) for value in published.band([math.nan]))


def test_other_networks_and_the_rates_around_stand_in_where_nobody_printed_ours() -> None:
    rows = frame(every("clp", backbone="vgg11-bn-w8", attack="blended 2 %", rate=0.02, dataset="cifar10-q95"))
    (found,) = published.comparisons(rows, "model+clean")
    wanted = ("cifar10", "blended", "all-to-one", "clp")
    twin = [f for f in published.printed() if (f.dataset, f.attack, f.labels, f.defense) == wanted and f.rate in (0.01, 0.05)]
    assert set(found.printed) == set(twin)
    assert {f.backbone for f in found.printed} == {"preact-resnet18"}
    above = frame(every("clp", backbone="vgg11-bn-w8", attack="blended", rate=0.5))
    (found,) = published.comparisons(above, "model+clean")
    assert {f.rate for f in found.printed} == {0.1}
    own = frame([r for name in ("fine-tuning", "abl") for r in every(name, backbone="wrn16-1-w16")])
    (nad, abl) = published.comparisons(own, "model+clean")
    assert [math.isnan(f.rate) for f in nad.printed] == [True]  # the rate is not stated, so it is kept and said
    assert published.band(f.acc for f in abl.printed) == pytest.approx((0.8611, 0.9180))


@pytest.mark.parametrize(
    "change",
    [{"dataset": "digits"}, {"attack": "stripe"}, {"scope": "head"}, {"features": "somebody's"}, {"status": "failed"},
     {"label_mode": "all-to-all", "attack": "wanet"}, {"control": True}],
)  # fmt: skip
def test_no_counterpart_no_comparison(change: dict[str, object]) -> None:
    assert published.comparisons(frame(every("anp", **change)), "model+clean") == []


def test_a_victim_of_the_literatures_protocol_says_so() -> None:
    (found,) = published.comparisons(frame(every("anp", literature="FAIL", acc_literature=0.9, asr_literature=0.9)), "model+clean")
    assert found.same_protocol


def written(rows: list[Row], folder: Path) -> dict[str, str]:
    curves, times = (pd.DataFrame(columns=[*kind.__dataclass_fields__]) for kind in (Curve, Timing))
    return {path.name: path.read_text() for path in tables.write_tables(frame(rows), curves, times, folder, "tiny")}


def test_the_page_shows_bands_ours_and_how_the_protocols_differ(tmp_path: Path) -> None:
    (tmp_path / "matrix.toml").write_text('[recipe]\nepochs = 3\nflip = true\n[dataset]\nsource = "cifar10"\ntrain_limit = 99\n')
    files = written([*every("none"), *every("anp"), *every("hid")], tmp_path)
    text = files["published.md"]
    line = next(line for line in text.splitlines() if line.startswith("| anp |"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "anp", "model+clean", "preact-resnet18; 10 %", "2", "test ASR", f"84.2{DASH}91.7", f"0.7{DASH}3.8", "84.0", "90.0±0.0",
        "25.0±7.1", "50.0±0.0", "validation", "cpu",
    ]  # fmt: skip
    assert "**other protocol**" in text
    assert "| hid |" not in text
    assert "| epochs 3, flip true |" in text
    assert "train\\_limit 99" in text or "train_limit 99" in text
    assert f"- {published.BOARD}\n" in text
    lines = list(csv.DictReader(files["published.csv"].splitlines()))
    assert len(lines) == 4  # two sources, two entries
    assert {line["source"] for line in lines} == {published.BOARD, "FT-SAM, arXiv 2304.11823, Table 1"}
    assert "published.md" not in written(every("anp", dataset="digits"), tmp_path / "digits")


def test_settings_are_words_and_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert published.settings_words(tmp_path) == {}
    (tmp_path / "matrix.toml").write_text("not toml")
    assert published.settings_words(tmp_path) == {}
    (tmp_path / "matrix.toml").write_text('recipe = "by name"\n')
    assert published.settings_words(tmp_path) == {}


def test_the_figure_marks_another_protocol_and_is_drawn_for_counterparts_alone() -> None:
    rows = frame([*every("none"), *every("anp")])
    figure = plots._published(rows, "model+clean")
    assert figure is not None
    assert figure.panels[0].subtitle.startswith("OTHER PROTOCOL than the literature's; published at 10 % poison")
    assert figure.panels[0].alarm
    bands = dict(figure.panels[1].series)["published: least to largest"]
    assert [round(100 * (band.high - band.low), 2) for band in bands] == [1.24, 3.1]  # undefended 93.79 to 95.03, ANP 0.73 to 3.83
    same = plots._published(rows.assign(acc_literature=0.9), "model+clean")
    assert same is not None
    assert not any(panel.alarm or "OTHER PROTOCOL" in panel.subtitle for panel in same.panels)
    label = "here: chosen on the test ASR, as there"
    blind = plots._published(rows[rows["selection"] != "leaky"], "model+clean")
    assert blind is not None
    for drawn, shown in ((figure, True), (blind, False)):  # explained only where it is drawn
        assert {label in drawn.marks, *(label in dict(panel.series) for panel in drawn.panels)} == {shown}
    assert plots._published(rows.assign(dataset="digits"), "model+clean") is None
    assert plots._published(frame(every("none")), "control") is None


def ranked(scenarios: int) -> pd.DataFrame:
    return frame([row(name, attack=f"attack {n}", ra=0.2 + 0.2 * place + 0.01 * ((7 * n + 3 * place) % 11), dataset="digits")
                  for n in range(scenarios) for place, name in enumerate(("a", "b", "c"))])  # fmt: skip


def test_average_ranks_are_drawn_from_eleven_scenarios_on_and_refused_in_words_below() -> None:
    figure = plots._ranks(ranked(11), "model+clean")
    assert figure is not None
    (panel,) = figure.panels
    assert panel.names == ("c", "b", "a")
    assert [part.mean for part in dict(panel.series)["rank"]] == [1, 2, 3]
    assert plots._ranks(ranked(10), "model+clean") is None
    words = sentences.rank_words(ranked(10), "model+clean", "validation")
    assert words == (
        "No rank test and no critical-difference diagram: they need at least 11 implanted scenarios (10 here) and three complete, "
        "differing defenses."
    )
    assert "Friedman test on RA over 11 scenarios" in sentences.rank_words(ranked(11), "model+clean", "validation")


def test_paired_tables_say_what_so_few_can_show(tmp_path: Path) -> None:
    rows = [r for name, ra in (("anp", 0.5), ("training-from-scratch", 0.4)) for r in every(name, ra=ra, control=name != "anp")]
    files = written(rows, tmp_path)
    text = files["paired-model-clean.md"]
    line = next(line for line in text.splitlines() if line.startswith("| anp | whole | RA |"))
    assert [cell.strip() for cell in line.split("|")[4:-1]] == ["2 of 2", "+10.0 [+10.0, +10.0]", "0.500", "1.000", "2", "0.500"]
    assert "With 2 pairs the smallest possible p is 0.500, or 1.000 after Holm over 2 comparisons: a difference cannot be" in text
    assert "One comparison needs 6 blocks, 2 need 7." in text
    first = next(csv.DictReader(files["paired-model-clean.csv"].splitlines()))
    assert (first["track"], first["control"], first["metric"]) == ("model+clean", "training-from-scratch", "ra")
    assert first["pairs"] == "2"
    without = written(every("anp"), tmp_path / "without")
    assert f"the control {stats.SCRATCH}" in without["paired-model-clean.md"]
    assert "paired-model-clean.csv" not in without
