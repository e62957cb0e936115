"""The tables of defenses and attacks: complete, read off the classes, and up to date in the README.md files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmark.__main__ as cli
from attacks import ATTACKS
from attacks.badnets import BadNets
from attacks.natural import Natural
from benchmark.rules.tracks import TRACKS, track_named
from benchmark.settings import catalogue
from benchmark.settings.catalogue import BLOCK, COMMAND, Paper, attack_table, defense_table, markdown, paper_of, write_tables
from defenses import DEFENSES
from defenses.clp import CLP
from defenses.fine_tuning import FineTuning
from defenses.neural_cleanse import NeuralCleanse

ROOT = Path(__file__).resolve().parents[3]
EMPTY = f"above\n<!-- {BLOCK}:begin -->\nold\n<!-- {BLOCK}:end -->\nbelow\n"


@pytest.mark.parametrize(("folder", "table"), [("defenses", defense_table()), ("attacks", attack_table())])
def test_the_table_of_a_readme_is_up_to_date(folder, table) -> None:
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {BLOCK}:begin -->\n(.*)<!-- {BLOCK}:end -->", text, re.DOTALL)
    assert found, "no markers"
    assert found[1] == markdown(table), f"run {COMMAND}"


@pytest.mark.parametrize("kind", DEFENSES, ids=lambda kind: kind.name)
def test_a_defense_names_its_family_and_cost_with_its_own_settings(kind) -> None:
    assert kind.family, "family: a word or two"
    assert kind.cost, "cost: the passes of a run, in words"
    settings = {field.name for field in dataclasses.fields(kind)}
    assert set(re.findall(r"\{(\w+)\}", kind.cost)) <= settings
    assert (kind.family == "control") == kind.control


def test_every_method_has_a_row_and_every_ranked_defense_a_paper() -> None:
    heads, rows = defense_table()
    assert heads == ("defense", "family", "track", "needs", "cost", "paper")
    assert [row[0] for row in rows] == [kind.name for kind in DEFENSES]
    for kind, row in zip(DEFENSES, rows, strict=True):
        assert isinstance(row[5], Paper) != kind.control, row
        track = track_named(str(row[2]))
        assert not kind().needs & ~track.grants
        if not kind.control:
            less = [other for other in TRACKS if len(other.grants) < len(track.grants)]
            assert all(kind().needs & ~other.grants for other in less), "the smallest that suffices"
        assert row[3] == kind().needs.words
    assert [row[0] for row in attack_table()[1]] == [kind.name for kind in ATTACKS]


def test_the_figures_of_a_cost_are_the_default_settings() -> None:
    rows = {row[0]: row for row in defense_table((FineTuning, NeuralCleanse, CLP))[1]}
    assert rows["fine-tuning"][4] == f"{FineTuning().epochs} epochs on the clean budget"
    assert f"{NeuralCleanse().search_epochs} passes" in str(rows["neural-cleanse"][4])
    assert rows["clp"][1:4] == ("pruning", "model", "model")


def test_a_paper_is_read_off_the_first_paragraph() -> None:
    clp = paper_of(CLP)
    assert clp == Paper("Data-free Backdoor Removal based on Channel Lipschitzness", "ECCV 2022", "2208.03111")
    assert clp.words == '"Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, arXiv 2208.03111'
    assert clp.link == "[Data-free Backdoor Removal based on Channel Lipschitzness](https://arxiv.org/abs/2208.03111), ECCV 2022"
    whole = "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks"
    assert paper_of(NeuralCleanse) == Paper(whole, "IEEE S&P 2019", "")
    assert paper_of(NeuralCleanse).link == f"{whole}, IEEE S&P 2019"
    assert paper_of(BadNets).arxiv == "1708.06733"
    for kind in (*DEFENSES, *ATTACKS):
        paper = paper_of(kind)
        if paper is not None:
            assert re.search(r"(?:19|20)\d\d", paper.where), (kind.name, paper)
            assert '"' not in paper.where
            assert "arXiv" not in paper.where


def test_what_an_attack_needs_is_read_off_its_class() -> None:
    rows = {row[0]: row for row in attack_table()[1]}
    assert rows["badnets"][1:4] == ("poisoning", "the training images", "none")
    assert rows["lc"][1:3] == ("poisoning, labels kept", "the training images, a cleanly trained network")
    assert rows["input-aware"][1:4] == ("training control", "the training images, the victim's training", "1 per poisoned image")
    assert rows["natural"][1:3] == ("no poison", "the training images, the attacked model")
    assert not Natural.injects
    assert rows["rescaled"][1] == "adaptive, wraps another attack"
    assert rows["rescaled"][4] == "-"


def test_a_cell_cannot_break_the_table() -> None:
    text = markdown((("a", "b"), [("x|y", Paper("T", "", ""))]))
    assert text == "| a | b |\n| --- | --- |\n| x\\|y | T |\n"


def test_the_tables_are_written_between_the_markers_and_only_there(tmp_path: Path) -> None:
    pages = tmp_path / "defended.md", tmp_path / "attacked.md"
    for page in pages:
        page.write_text(EMPTY)
    assert write_tables(*pages) == list(pages)
    for page, table in zip(pages, (defense_table(), attack_table()), strict=True):
        text = page.read_text()
        assert text == EMPTY.replace("old\n", markdown(table))
    assert write_tables(*pages) == []
    pages[1].write_text("no markers")
    assert write_tables(*pages) == []
    assert pages[1].read_text() == "no markers"


@pytest.mark.parametrize("what", ["defenses", "attacks"])
def test_the_command_prints_the_table(what: str) -> None:
    out = CliRunner().invoke(cli.app, ["list", what]).output
    heads, rows = defense_table() if what == "defenses" else attack_table()
    for word in (*heads, *(str(row[0]) for row in rows)):
        assert word in out
    for row in rows:
        if isinstance(row[-1], Paper) and row[-1].arxiv:
            assert row[-1].arxiv in out


def test_the_command_writes_what_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("defenses", "attacks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(EMPTY)
        monkeypatch.setattr(getattr(catalogue, name), "__file__", str(tmp_path / name / "__init__.py"))
    out = CliRunner().invoke(cli.app, ["list", "--write"]).output
    assert out.count("changed: ") == 2
    assert "\nold\n" not in (tmp_path / "defenses" / "README.md").read_text()
    assert CliRunner().invoke(cli.app, ["list", "--write"]).output == "both tables were up to date\n"
